"""Every name of vLLM that the kit touches, on each release of the matrix."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import glmpp
from glmpp.errors import GlmppError
from glmpp.serving import contract

pytest.importorskip("vllm")
pytestmark = pytest.mark.vllm


# The others need a driver, or what stands in for it: a process that pretends a GPU asks for them itself.
@pytest.mark.parametrize("name", [name for name, part in contract.NAMES.items() if part != contract.PRETENDED])
def test_the_installed_vllm_has(name):
    assert contract._failure(name) is None


def imported() -> set[str]:
    """What the kit's source imports from vLLM."""
    found = set()
    for path in Path(glmpp.__file__).parent.rglob("*.py"):
        if path.parent.name == "fixes":  # each is for releases that it names, and `make test-upstream` applies it there
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.level == 0 and node.module.split(".")[0] == "vllm":
                found |= {f"{node.module}:{alias.name}" for alias in node.names}
    return found


def test_the_list_holds_everything_that_the_source_imports_by_name():
    listed = {name.partition(":")[0] + ":" + name.partition(":")[2].split(".")[0] for name in contract.NAMES}
    modules = {name.partition(":")[0] for name in contract.NAMES}
    absent = {name for name in imported() - listed if name.replace(":", ".") not in modules}
    assert absent == set()


def test_a_name_that_has_moved_is_named_with_the_release_it_was_last_seen_in_and_what_still_works(monkeypatch):
    monkeypatch.setitem(contract.NAMES, "vllm.config:NoLongerThere.at_all", contract.LOAD_FORMAT)
    with pytest.raises(GlmppError) as error:
        contract.require(contract.LOAD_FORMAT)
    for part in ("has no vllm.config:NoLongerThere.at_all", "the load format", "0.33.0", "What still works: vLLM's own"):
        assert part in str(error.value)
    contract.require(contract.DRY_RUN)  # the other part does not rely on it


def test_a_name_that_was_elsewhere_before_is_found_there(monkeypatch):
    monkeypatch.setitem(contract.NAMES, "vllm.config:Moved", contract.LOAD_FORMAT)
    monkeypatch.setitem(contract.BEFORE, "vllm.config:Moved", "vllm.config:ModelConfig")
    assert contract.missing(contract.LOAD_FORMAT) == []
    monkeypatch.setitem(contract.BEFORE, "vllm.config:Moved", "vllm.config:NotThereEither")
    assert contract.missing(contract.LOAD_FORMAT) == ["vllm.config:Moved"]
    assert contract.BEFORE.keys() <= contract.NAMES.keys()


def test_the_load_format_and_the_dry_run_ask_before_they_use_anything():
    program = (
        "from glmpp.serving import contract; contract.NAMES = {'vllm.version:Gone': contract.LOAD_FORMAT}\n"
        "import glmpp.serving.load_format"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode != 0 and "has no vllm.version:Gone" in done.stderr
    program = (
        "import sys; sys.argv = ['child', '0']\n"
        "from glmpp.serving import contract; contract.NAMES = {'vllm.version:Gone': contract.DRY_RUN}\n"
        "from glmpp.dryrun.child.main import preload; preload('cpu')"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode != 0 and "has no vllm.version:Gone" in done.stderr


def test_missing_layer_names_have_the_form_that_the_fix_leans_on():
    """Module paths with a dot at the end: what `name.startswith` needs, so that layer 1 is not taken for layer 11."""
    from vllm.model_executor.models.utils import PPMissingLayer, get_pp_missing_layer_names

    from glmpp.serving.stage_filter import missing_prefixes

    model = torch.nn.Module()
    model.layers = torch.nn.ModuleList(
        [PPMissingLayer() if index in (1, 3) else torch.nn.Linear(1, 1) for index in range(12)]
    )
    model.norm = PPMissingLayer()
    assert get_pp_missing_layer_names(model) == missing_prefixes(model) == ["layers.1.", "layers.3.", "norm."]
