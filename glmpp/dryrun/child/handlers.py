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
from glmpp.dryrun.messages import Answer, AnyRequest, Begins, FunctionCall, LoadTimeRequest, Message, PPIndices, Ready, World
from glmpp.dryrun.pretend.ranks import init_groups, pretend, set_layer_counts
from glmpp.serving import contract


def serve(request: AnyRequest, world: World, turns: int, send: Callable[[Message], None]) -> None:
    """Answer one request: those of its runs that are this fork's turn, one message each.

    Args:
        turns: where the numbers of the runs come from, two bytes each.
    """
    send(Begins(f"the answer about {type(request).__struct_config__.tag.replace('_', ' ')}"))
    if isinstance(request, FunctionCall):
        return send(Answer(call(request.folder, request.function, request.arguments)))
    if isinstance(request, PPIndices):
        set_layer_counts(request.layer_counts)
        return send(Answer([[get_pp_indices(layers, at, size) for at in range(size)] for layers, size in request.cases]))
    init_groups(world.rank, world.size, world.tp_size, world.group)
    send(Ready(versions()))
    if isinstance(request, LoadTimeRequest):
        return load_time.measure(request, send)
    stages = Stages(request)
    while number := os.read(turns, 2):
        at = int.from_bytes(number, sys.byteorder)
        run = request.runs[at]
        send(Begins(str(run)))
        if world.size == 1:
            pretend(run)
        result = stages.run(run)
        result.at = at
        send(result)


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
