"""The rooms of the package: who may import whom, and what a process that wants little does not get."""

from __future__ import annotations

import ast
import subprocess
import sys
from functools import cache
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import glmpp

PACKAGE = Path(glmpp.__file__).parent
FILES = {
    ".".join(("glmpp", *path.relative_to(PACKAGE).with_suffix("").parts)).removesuffix(".__init__"): path
    for path in PACKAGE.rglob("*.py")
}
# From the ground up; a room imports from those below it, and of those that need vLLM only what needs none before it is used.
ROOMS = ["formats", "core", "serving", "pretend", "child", "cuts", "dryrun", "layouts", "cli", "lab"]
IN_A_PROCESS_WITH_VLLM = {"serving", "pretend", "child"}
FOR_ALL = {
    "glmpp.serving.contract", "glmpp.serving.fixes", "glmpp.dryrun.scratch", "glmpp.dryrun.messages", "glmpp.dryrun.fit",
}  # fmt: skip
# On the ground beside them: imported by every room.
GROUND = {"glmpp.errors", "glmpp.progress", "glmpp.words"}
# What an import inside a function is for: packages that may be missing, or that are slow and rarely needed.
OPTIONAL = {
    "vllm", "torch", "numpy", "transformers", "pandas", "huggingface_hub", "triton", "fastsafetensors", "xgrammar",
    "glmpp_reference", "platform", "importlib",
}  # fmt: skip


@cache
def imports(name: str, inside: bool = False) -> set[str]:
    """Modules that a module of the kit imports at its top, or inside its functions."""
    tree = ast.parse(FILES[name].read_text())
    inner = {id(node) for f in ast.walk(tree) if isinstance(f, ast.FunctionDef) for node in ast.walk(f) if node is not f}
    found = set()
    for node in ast.walk(tree):
        if (id(node) in inner) != inside:
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            parts = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {part for part in parts if part in FILES} or {node.module}
    return found - {"__future__"}


def room(name: str) -> str:
    folder = FILES[name].parent.name
    return folder if folder in ROOMS else "core"


@pytest.mark.parametrize("name", sorted(FILES))
def test_imports_point_one_way(name):
    """`glmpp` and its command stand above all rooms."""
    if name in ("glmpp", "glmpp.__main__"):
        return
    for other in (imports(name) | imports(name, inside=True)) & FILES.keys() - GROUND - FOR_ALL:
        assert ROOMS.index(room(other)) <= ROOMS.index(room(name)), f"{name} imports {other}"
        across = room(other) in IN_A_PROCESS_WITH_VLLM and room(name) not in IN_A_PROCESS_WITH_VLLM
        assert not across, f"{name} imports {other}: between them lies the boundary of a process"


def test_no_room_is_crowded():
    """A newcomer finds a file by its name: a dozen in a room are what one can look over."""
    for folder in {path.parent for path in FILES.values()}:
        assert len({path.name for path in folder.glob("*.py")} - {"__init__.py", "__main__.py"}) <= 12, folder


@pytest.mark.parametrize("name", sorted(FILES))
def test_a_file_is_read_in_one_go_and_a_function_takes_what_one_can_keep_in_mind(name):
    """300 lines, eight parameters; a Triton kernel has no objects."""
    source = FILES[name].read_text()
    assert len(source.splitlines()) <= 300
    for function in ast.walk(ast.parse(source)):
        if isinstance(function, ast.FunctionDef) and name != "glmpp.triton_dequant":
            names = [one.arg for one in (*function.args.posonlyargs, *function.args.args, *function.args.kwonlyargs)]
            assert len([one for one in names if one not in ("self", "cls")]) <= 8, function.name


def test_the_package_imports_nothing_from_tools():
    """They are not installed with it."""
    tools = {path.stem for path in (PACKAGE.parent / "tools").iterdir() if path.suffix == ".py" or path.is_dir()}
    for name in FILES:
        assert tools.isdisjoint(other.partition(".")[0] for other in imports(name) | imports(name, inside=True)), name


def test_there_is_no_circle_of_imports():
    graph = {name: (imports(name) | imports(name, inside=True)) & FILES.keys() for name in FILES}
    TopologicalSorter(graph).prepare()  # raises CycleError, with the circle


@pytest.mark.parametrize("name", sorted(FILES.keys() - {"glmpp.cli"}))  # an end has to be there before the imports
def test_an_import_inside_a_function_is_of_something_that_may_be_missing(name):
    for other in imports(name, inside=True):
        needs_what_may_be_missing = other in FILES and {part.partition(".")[0] for part in imports(other)} & OPTIONAL
        assert needs_what_may_be_missing or other.partition(".")[0] in OPTIONAL, f"{name} imports {other} inside a function"


def test_no_name_is_a_module_and_a_function():
    modules = {name.rpartition(".")[2] for name in FILES if name.count(".") == 1}
    assert modules.isdisjoint(glmpp.__all__)
    assert all(callable(getattr(glmpp, name)) for name in glmpp.__all__)


def run(program: str) -> str:
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_kit_brings_no_tables_and_no_plots_into_a_process_that_does_not_ask():
    heavy = "{'pandas', 'matplotlib', 'huggingface_hub', 'transformers', 'vllm'}"
    modules = "glmpp, glmpp.cli, glmpp.dryrun.dry_run, glmpp.layouts.search"
    assert run(f"import {modules}, sys; print({heavy} & sys.modules.keys())") == "set()\n"


@pytest.mark.vllm
def test_the_load_format_brings_no_tables_and_no_plots_into_a_serving_process():
    pytest.importorskip("vllm")
    program = """
import sys
import vllm.config, vllm.distributed.parallel_state
from vllm.model_executor.model_loader import default_loader, weight_utils
from vllm.model_executor.layers import vocab_parallel_embedding
from vllm.model_executor.layers.quantization import kv_cache
from vllm.model_executor.models import utils
before = set(sys.modules)
import glmpp.serving.load_format
print({"pandas", "matplotlib", "huggingface_hub"} & (sys.modules.keys() - before))
"""
    assert run(program).splitlines()[-1] == "set()"  # after what vLLM logs


def test_the_parts_that_a_serving_process_needs_cost_under_50_ms_of_processor_time_after_torch():
    """The least of three, for the machine may be busy; of vLLM's own imports nothing is counted."""
    program = """
import time, torch, safetensors.torch, tqdm
started = time.process_time()
import glmpp, glmpp.formats.shard, glmpp.formats.index, glmpp.serving.contract, glmpp.serving.write_tracking
print(time.process_time() - started)
"""
    assert min(float(run(program)) for _ in range(3)) < 0.05
