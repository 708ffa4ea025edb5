"""Every name of vLLM that the kit touches, on each release of the matrix."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import pytest
import torch
from touched import Touched

import glmpp
from glmpp.errors import GlmppError
from glmpp.serving import contract

pytest.importorskip("vllm")
pytestmark = pytest.mark.vllm
KIT = Path(glmpp.__file__).parent
VLLM = contract.vllm_version()
NAMES = {place: contract.names(owners) for place, owners in contract.NAMES.items()}
EVERY = set().union(*NAMES.values())
OPTIONAL = {name: releases for releases, owners in contract.OPTIONAL.items() for name in contract.names(owners)}
ATTRIBUTES = {word: releases for releases, words in contract.ATTRIBUTES.items() for word in words.split()}
# Attributes that the kit asks for by a string and that are not vLLM's: torch's, transformers', the kit's own.
OTHERS = {
    *("_cuda_getArchFlags", "_to_copy", "clone", "float4_e2m1fn_x2", "load_weights", "obj", "weight", "name"),
    *("config", "intermediate_size", "model_type", "num_hidden_layers", "num_nextn_predict_layers", "tie_word_embeddings"),
    *("names_sparse_mla", "selection"),
}


# The pretended GPU's need a driver, or what stands in for it.
WITHOUT_DRIVER = NAMES.keys() - {*contract.PARTS[contract.PRETENDED]}


@pytest.mark.parametrize("name", sorted({name for place in WITHOUT_DRIVER for name in NAMES[place]}))
def test_the_installed_vllm_has(name):
    assert contract._failure(name) is None


def test_the_installed_vllm_has_what_a_pretended_gpu_needs():
    program = (
        "from glmpp.dryrun.pretend import targets; from glmpp.gpus import gpu_of; targets.install(gpu_of('h100'))\n"
        "from glmpp.serving import contract; print(contract.missing(contract.PRETENDED))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout.splitlines()[-1:] == ["[]"], done.stderr


def has(name: str) -> bool:
    """Whether the installed vLLM has an optional name; a module is not imported, for some want a GPU."""
    module, _, path = name.partition(":")
    try:
        found = importlib.util.find_spec(module)
    except ModuleNotFoundError:
        return False
    if found is None or not path:
        return found is not None
    try:
        return contract._failure(name) is None
    except RuntimeError:  # AMD's platform looks for a GPU
        return re.search(rf"^(class|def) {path}\b", Path(found.origin).read_text(), re.M) is not None


@pytest.mark.skipif(VLLM not in contract.SEEN, reason="the lists are about other releases")
class TestOptional:
    @pytest.mark.parametrize("name", sorted(OPTIONAL))
    def test_the_releases_have_it_that_are_said_to(self, name):
        assert has(name) == (VLLM in OPTIONAL[name])

    def test_vllms_source_has_the_attributes_that_objects_are_asked_for(self):
        folder = Path(importlib.util.find_spec("vllm").origin).parent
        code = "\n".join(
            path.read_text() for part in ("model_executor", "models", "v1") for path in (folder / part).rglob("*.py")
        )
        words = set(re.findall(r"\w+", code))
        assert {word for word, releases in ATTRIBUTES.items() if VLLM in releases} == words & ATTRIBUTES.keys()


def place_of(path: Path) -> str | None:
    """The entry of NAMES for a file of the kit, "" for a file outside the rooms."""
    file = path.relative_to(KIT).as_posix()
    # A fix is for releases that it names, and `make test-upstream` applies it there.
    if file == "serving/contract.py" or path.parent.name == "fixes":
        return None
    return max((place for place in NAMES if f"{file}/".startswith(f"{place}/")), key=len, default="")


@pytest.fixture(scope="module")
def read() -> dict[str, list[Touched]]:
    found = {place: [] for place in (*NAMES, "")}
    for path in sorted(KIT.rglob("*.py")):
        if (place := place_of(path)) is not None:
            found[place].append(Touched(path.read_text()))
    return found


def all_of(kind: str, files: Iterable[Touched]) -> set[str]:
    return set().union(*(getattr(one, kind) for one in files))


def in_the_rooms(read: dict[str, list[Touched]]) -> list[Touched]:
    return [one for place in NAMES for one in read[place]]


def dotted(*names: str) -> set[str]:
    return {name.replace(":", ".") for name in names}


def is_the_kits(method: str) -> bool:
    """Whether a method of a class that extends one of vLLM's is nothing of vLLM's."""
    return isinstance(contract._failure(re.sub(r"\.(?=[A-Z])", ":", method, count=1)), AttributeError)


@pytest.mark.parametrize("place", NAMES)
def test_what_the_source_touches_is_listed(place, read):
    listed = dotted(*NAMES[place], *OPTIONAL, *contract.BEFORE.values())
    every = {*listed, *(".".join(name.split(".")[:count]) for name in listed for count in range(name.count(".") + 1))}
    absent = (all_of("names", read[place]) | all_of("methods", read[place])) - every
    own = {name for name in absent & all_of("methods", in_the_rooms(read)) if is_the_kits(name)}
    assert absent - own == set()


def test_outside_the_rooms_nothing_is_touched(read):
    assert all_of("names", read[""]) == set()


def test_what_objects_are_asked_for_by_a_string_is_listed(read):
    listed = {name.rpartition(".")[2] for name in dotted(*OPTIONAL, *EVERY)}
    asked = {name for name in all_of("asked", in_the_rooms(read)) if not name.startswith("__")}
    assert asked - listed - ATTRIBUTES.keys() - OTHERS == set()
    assert (ATTRIBUTES.keys() | OTHERS) - asked == set()


def unused(names: list[str], files: list[Touched]) -> list[str]:
    """Names that no file touches. Of objects whose class the source does not say, the word has to be there."""
    touched, asked, words = (all_of(kind, files) for kind in ("names", "asked", "words"))
    touched |= all_of("methods", files)

    def is_used(name: str) -> bool:
        last = re.split("[.:]", name)[-1]
        is_member = "." in name.partition(":")[2]
        where = dotted(name, contract.BEFORE.get(name, name))
        return bool(where & touched) or last in asked or (is_member and last in words)

    return [name for name in names if not is_used(name)]


@pytest.mark.parametrize("place", NAMES)
def test_what_is_listed_the_source_touches(place, read):
    assert unused(NAMES[place], read[place]) == []


def test_what_is_listed_as_optional_the_source_touches(read):
    assert unused([*OPTIONAL], in_the_rooms(read)) == []


def test_the_lists_are_sorted_and_say_nothing_twice():
    attributes = [{"": words} for words in contract.ATTRIBUTES.values()]
    for owners in (*contract.NAMES.values(), *contract.OPTIONAL.values(), *attributes):
        assert list(owners) == sorted(owners)
        assert all(listed.split() == sorted(set(listed.split())) for listed in owners.values())
    assert len(OPTIONAL) == sum(len(contract.names(owners)) for owners in contract.OPTIONAL.values())
    assert EVERY.isdisjoint(OPTIONAL)
    assert contract.BEFORE.keys() <= EVERY
    assert sorted(sum(contract.PARTS.values(), ())) == sorted(NAMES)


@pytest.mark.parametrize(
    ("source", "touched"),
    [
        ("from vllm.x import y", "vllm.x.y"),
        ("def f():\n    from vllm.x import y", "vllm.x.y"),
        ("import vllm.x as m\nm.attr", "vllm.x.attr"),
        ("import vllm.x as m\nm.attr = 1", "vllm.x.attr"),
        ("from vllm import x\nx.attr.more()", "vllm.x.attr.more"),
        ("import vllm.x\nvllm.x.attr()", "vllm.x.attr"),
        ("import vllm.x as m\n_replace(m, 'attr', 1)", "vllm.x.attr"),
        ("import vllm.x as m\nfor a in ('p', 'q'):\n    getattr(m, a)", "vllm.x.q"),
        ("import importlib\nN = 'vllm.x'\nimportlib.import_module(N).attr", "vllm.x.attr"),
        ("LATE = ['vllm.x.z']", "vllm.x.z"),
        ("from vllm.x import C\nC(field=1).method", "vllm.x.C.field"),
        ("from vllm.x import C\nC(field=1).method", "vllm.x.C.method"),
        ("from vllm.x import C\ndef f(one: C | None):\n    one.field", "vllm.x.C.field"),
        ("from vllm.x import C\nclass D(C):\n    def f(self):\n        super().g(self.h)", "vllm.x.C.g"),
        ("from vllm.x import C\nclass D(C):\n    def f(self):\n        super().g(self.h)", "vllm.x.C.h"),
        ("place.model_config.max_model_len", "vllm.config.ModelConfig.max_model_len"),
    ],
)
def test_a_touch_is_seen(source, touched):
    assert touched in Touched(source).names


def test_a_name_that_has_moved_is_named_with_the_release_it_was_last_seen_in_and_what_still_works(monkeypatch):
    monkeypatch.setitem(contract.NAMES, "serving", {"vllm.config:NoLongerThere": "at_all"})
    with pytest.raises(GlmppError) as error:
        contract.require(contract.LOAD_FORMAT)
    for part in ("has no vllm.config:NoLongerThere.at_all", "the load format", "0.33.0", "What still works: vLLM's own"):
        assert part in str(error.value)
    contract.require(contract.DRY_RUN)  # the other part does not rely on it


def test_a_name_that_was_elsewhere_before_is_found_there(monkeypatch):
    monkeypatch.setitem(contract.NAMES, "serving", {"vllm.config": "Moved"})
    monkeypatch.setitem(contract.BEFORE, "vllm.config:Moved", "vllm.config:ModelConfig")
    assert contract.missing(contract.LOAD_FORMAT) == []
    monkeypatch.setitem(contract.BEFORE, "vllm.config:Moved", "vllm.config:NotThereEither")
    assert contract.missing(contract.LOAD_FORMAT) == ["vllm.config:Moved"]


def test_what_only_objects_have_is_found_where_it_is_annotated_or_set_by_the_constructor(monkeypatch):
    class Parent:
        annotated: int

        def __init__(self):
            self.is_set = self.called()

    module = type(sys)("vllm_here")
    module.Child = type("Child", (Parent,), {"__post_init__": lambda self: setattr(self, "by_word", 1)})
    monkeypatch.setitem(sys.modules, "vllm_here", module)
    names = {"annotated": True, "is_set": True, "called": False, "by_word": False}
    assert {name: contract._failure(f"vllm_here:Child.{name}") is None for name in names} == names


@pytest.mark.parametrize(
    ("place", "use"),
    [
        ("serving", "import glmpp.serving.load_format"),
        ("dryrun/child", "from glmpp.dryrun.child.main import preload; preload('cpu')"),
        ("dryrun/pretend", "from glmpp.dryrun.child.main import preload; preload('cpu')"),
    ],
)
def test_the_load_format_and_the_dry_run_ask_before_they_use_anything(place, use):
    program = (
        "import sys; sys.argv = ['child', '0']\n"
        f"from glmpp.serving import contract; contract.NAMES[{place!r}] = {{'vllm.version': 'Gone'}}\n{use}"
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
