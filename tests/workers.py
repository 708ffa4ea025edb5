"""With pytest-xdist: which tests are begun first, and which stay on one worker. Hooks of conftest.py."""

from __future__ import annotations

import pytest

# Begun in this order: first what needs no vLLM and ends soon; then what takes longest, so that in the end no worker waits
# long for another.
ORDER = [
    "test_hub",
    "test_house",
    "test_loader",
    "test_dequant",
    "test_forward",
    "test_checkpoint",
    "test_vllm_plugin",
    "test_vllm_quantised",
    "test_vllm_layouts",
    "test_vllm_targets",
    "test_faults",
    "test_vllm_check",
    "test_vllm_losses",
    "test_vllm_memory",
    "test_vllm_dry_run",
    "test_vllm_child",
    "test_vllm_sweep",
    "notebook",
    "mutants with vLLM",
    "mutants",
]
SPREAD = ("test_notebooks.py", "test_mutations.py")


def pytest_collection_modifyitems(config, items):
    if not hasattr(config, "workerinput"):
        return

    def kind(item) -> str:
        marks = {mark.name for mark in item.iter_markers()}
        if "mutation" in marks:
            return "mutants with vLLM" if "vllm" in marks else "mutants"
        if "notebooks" in marks:
            return "notebook"
        return item.path.stem

    items.sort(key=lambda item: ORDER.index(kind(item)) if kind(item) in ORDER else len(ORDER))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """A file's tests stay on one worker, with their fixtures and servers; notebooks and mutants go where there is room.

    Not by the mark `xdist_group`: pytest-xdist 3.8 appends it to a name that pytest 9.2 no longer asks for.
    """
    from xdist.scheduler import LoadScopeScheduling

    class ByFile(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = nodeid.partition("::")[0]
            return nodeid if file.endswith(SPREAD) else file

    return ByFile(config, log)
