"""The helper of the bug inside the real vLLM: as it is, with its skip taken away, or replaced by the kit's."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import sys
from pathlib import Path

import torch

from glmpp.errors import GlmppError
from glmpp.serving.stage_filter import missing_prefixes

HELPER = "_try_load_fp8_indexer_wk"


class HelperPatch:
    """Puts the wanted helper into every vLLM module that calls it, and keeps the buffers that it is given."""

    def __init__(self, mode: str, helper: str, callers: list[str] | None):
        self.mode, self.callers = mode, callers
        self.helper = load_function(helper) if mode == "helper" else None
        self.originals: dict = {}
        self.reset()

    def reset(self) -> None:
        self.buffers: list[dict] = []  # one for each call of load_weights: there is one call per run of names
        self.missing: dict[int, list[str]] = {}

    def install(self, model: torch.nn.Module) -> list[str]:
        """Patch the modules that are loaded by now, for a load of a model; returns their names."""
        patched = []
        if self.mode in ("installed", "loader"):
            return patched
        for name, module in list(sys.modules.items()):
            if not name.startswith("vllm.") or not hasattr(module, HELPER):
                continue
            original = self.originals.setdefault(name, getattr(module, HELPER))
            if self.mode == "helper":
                follows = self.callers is None or name.rsplit(".", 1)[-1] in self.callers
                setattr(module, HELPER, self.adapted(model) if follows else self.helper)
            elif "pp_missing_layer_names" in inspect.signature(original).parameters:
                setattr(module, HELPER, self.blinded(original))
            else:
                continue
            patched.append(name)
        return patched

    def adapted(self, model: torch.nn.Module):
        """The kit's helper behind vLLM's call: whatever the release passes, the sixth argument is computed here."""

        def call(name, tensor, buffer, params, loaded, *_, **__):
            if id(buffer) not in self.missing:  # the buffer is kept, so that no id is a dead one's
                self.buffers.append(buffer)
                self.missing[id(buffer)] = missing_prefixes(module_of(params, model))
            return self.helper(name, tensor, buffer, params, loaded, self.missing[id(buffer)])

        return call

    def blinded(self, original):
        signature = inspect.signature(original)

        def call(*args, **kwargs):
            bound = signature.bind(*args, **kwargs)
            bound.arguments["pp_missing_layer_names"] = []
            return original(*bound.args, **bound.kwargs)

        return call


def load_function(place: str):
    """A function from "module:function", or from "/path/to/file.py:function", whose folder is not searched for more.

    Raises:
        GlmppError: it is not there, or importing it fails.
    """
    module, _, name = place.rpartition(":")
    try:
        if not module.endswith(".py"):
            return getattr(importlib.import_module(module), name)
        spec = importlib.util.spec_from_file_location(Path(module).stem, module)
        loaded = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(loaded)
        return getattr(loaded, name)
    except Exception as error:
        raise GlmppError(f"the helper {place!r} cannot be imported: {type(error).__name__}: {error}") from error


def module_of(params: dict[str, torch.nn.Parameter], model: torch.nn.Module) -> torch.nn.Module:
    """The module of a model whose `named_parameters` these are."""
    name, param = next(iter(params.items()))
    return next(module for module in model.modules() if dict(module.named_parameters()).get(name) is param)
