"""What a fork answers to each kind of request."""

from __future__ import annotations

import importlib
import os
import platform
import sys
from collections.abc import Callable
from importlib.metadata import version

from vllm.distributed.utils import get_pp_indices

from glmpp.dryrun.child import load_time
from glmpp.dryrun.child.run_stage import Stages
from glmpp.dryrun.pretend.ranks import Place, init_groups, pretend, set_layer_counts
from glmpp.serving import contract


def serve(request: dict, world: dict, turns: int, send: Callable[[dict], None]) -> None:
    """Answer one request: those of its runs that are this fork's turn, one message each.

    Args:
        request: its `kind` and what that needs.
        world: rank, size and the file of the process group that this fork is in, and how many of it share a stage.
        turns: where the numbers of the runs come from, two bytes each.
    """
    kind = request["kind"]
    send({"kind": "begins", "what": f"the answer about {kind.replace('_', ' ')}"})
    if kind == "function_call":
        return send({"kind": kind, "returned": call(request["folder"], request["function"], request["arguments"])})
    if kind == "pp_indices":
        set_layer_counts(request["layer_counts"])
        indices = [[get_pp_indices(layers, rank, size) for rank in range(size)] for layers, size in request["cases"]]
        return send({"kind": kind, "indices": indices})
    init_groups(world["rank"], world["size"], world["tp"], world["group"])
    send({"kind": "ready", "versions": versions()})
    if kind == "load_time":
        return load_time.measure(request, send)
    stages = Stages(request)
    while number := os.read(turns, 2):
        at = int.from_bytes(number, sys.byteorder)
        run = request["runs"][at]
        place = Place.of(run)
        send({"kind": "begins", "what": "the PP=1 control" if run["control"] else str(place)})
        if world["size"] == 1:
            pretend(place)
        send({"kind": "stage", "run": at, **run, **stages.run(place)})


def call(folder: str, function: str, arguments: dict) -> object:
    """What a function of the asker's own returns, here where vLLM is imported.

    Args:
        folder: where its module is looked for first.
        function: "module:function".
    """
    sys.path.insert(0, folder)
    module, _, name = function.partition(":")
    return getattr(importlib.import_module(module), name)(**arguments)


def versions() -> dict[str, str | None]:
    return {
        "python": platform.python_version(),
        "vllm": contract.vllm_version(),
        **{name: version(name) for name in ("torch", "transformers")},
    }
