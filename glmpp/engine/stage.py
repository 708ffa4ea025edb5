"""One stage, built and loaded with the installed vLLM's own classes, and the evidence for its verdict."""

from __future__ import annotations

import re
import time
from dataclasses import replace
from pathlib import Path

import torch
from vllm.model_executor.model_loader import get_model_loader

from glmpp.engine.account import Account
from glmpp.engine.build import ModelBuilder
from glmpp.engine.choices import choices
from glmpp.engine.groups import ALONE, Place, pretend
from glmpp.engine.guards import Guard
from glmpp.engine.load_format import StageModelLoader
from glmpp.engine.memory import memory
from glmpp.engine.source import Source, answer_for_headers
from glmpp.engine.stage_load import StageLoad
from glmpp.engine.targets import refuses
from glmpp.engine.traces import describe
from glmpp.gpus import CPU
from glmpp.ledger import digest

# What PyTorch says when code asks a meta tensor for its data. It is no verdict on the checkpoint.
NEEDS_DATA = re.compile(r"copy out of meta tensor|on meta tensors|_local_scalar_dense|data is not allocated yet")
# What a rank alone says that wants to hear from others. That is no verdict either.
NEEDS_OTHERS = re.compile(rf"{ALONE}|Could not run 'vllm::(all_reduce|all_gather|reduce_scatter)'")
SMALL_ENOUGH = 2_000_000_000  # bytes of a checkpoint that is tried again with data, on the CPU


class Stages:
    """Builds and loads the stages that a request asks for."""

    def __init__(self, request: dict):
        self.request = request
        self.source = Source(request["tensors"])
        self.guard = Guard(request["guard"], request["helper"], request["callers"])
        self.builder = ModelBuilder(request)
        self.real = request["weights"] == "real"
        if not any(Path(request["model"]).glob("*.safetensors")):
            answer_for_headers(request["tensors"])

    def loader(self, config, hand_over, device: str):
        """The loader that vLLM chooses, its source replaced by empty tensors unless real bytes are asked for.

        Args:
            hand_over: what the iterator of weights passes through on its way to the model.
            device: of the empty tensors.
        """
        source, real, chosen = self.source, self.real, type(get_model_loader(config.load_config))

        class Loader(chosen):
            def get_all_weights(self, model_config, model):
                return hand_over(super().get_all_weights(model_config, model))

            def _get_weights_iterator(self, files):
                if real:
                    return super()._get_weights_iterator(files)
                weights = source.hand_over(device)
                if not isinstance(self, StageModelLoader):
                    return weights
                return self.selection.counted(pair for pair in weights if self.selection.wants(pair[0]))

            def watch(self, *model):  # without data the account asks what the load format would, and says all of it
                return super().watch(*model) if real else None

        return Loader(config.load_config)

    def run(self, place: Place) -> dict:
        """Build and load a stage; once more with data on the CPU if the model asks for some.

        Nothing carries over from one run to the next: which of them share a process must not show in what is said of them.
        """
        device = "cpu" if self.real else "meta"
        result, needs_data = self.attempt(place, device)
        if needs_data and device == "meta":
            if sum(self.source.nbytes.values()) > SMALL_ENOUGH:
                return {**result, "verdict": "cannot tell"}
            result, _ = self.attempt(place, "cpu")
        return result

    def attempt(self, place: Place, device: str) -> tuple[dict, bool]:
        """A stage's verdict with its evidence, and whether all that it failed for is a tensor without data."""
        result: dict = {"verdict": "cannot be built"}
        needs_data, built, started = False, None, time.perf_counter()
        self.builder.stand_ins.reset()
        try:
            built = self.builder.build(place, device)
            result["build_seconds"] = time.perf_counter() - started
            result["backends"] = choices(built.model)
            result["patched"] = self.guard.install()
            load = StageLoad(built, self.guard, lambda *how: self.loader(*how, device=device), self.source.nbytes, device)
            started = time.perf_counter()
            load.run(self.request["all_deaths"])
            result["load_seconds"] = time.perf_counter() - started
            result["verdict"] = "dies" if load.deaths else "loads"
            if load.deaths and NEEDS_OTHERS.search(load.deaths[0]["message"]):
                result["verdict"] = "cannot tell"
            if load.deaths:
                result.update(load.deaths[0], deaths=[{**death, "traceback": []} for death in load.deaths])
                needs_data = bool(NEEDS_DATA.search(load.deaths[0]["message"]))
            account = Account(load, self.source.shapes, self.drafted() if place.drafter else None)
            result.update(account.message(self.request["model"] if self.real else None))
            needs_data = needs_data or (not load.deaths and bool(result["unplaced"]))
            if self.real:
                # What belongs to a tower that this stage has no use for, vLLM itself leaves without data.
                held = {name: p for name, p in built.model.named_parameters() if not p.is_meta}
                result["digests"] = {name: digest(p) for name, p in held.items()}
                self.keep(place, built.model)
            result["memory"] = memory(self.builder, place, built, device, self.request["context"])
            result["model_class"] = f"{type(built.model).__module__}.{type(built.model).__qualname__}"
        except Exception as error:
            if built is not None:
                raise  # not the model's fault
            result.update(describe(error), build_seconds=time.perf_counter() - started)
            if NEEDS_OTHERS.search(str(error)):
                result["verdict"] = "cannot tell"
            if error.__cause__ is not None:
                left = describe(error.__cause__)
                result["message"] += f" (with stand-ins: {left['exception']}: {left['message'][:300]} in {left['place']})"
            needs_data = bool(NEEDS_DATA.search(str(error)))
            result["refused"] = refuses(error) and (self.request["gpu"] != CPU or self.is_layout_refused(place, device))
        result.update(stand_ins=self.builder.stand_ins.reasons, device=device, num_layers=self.builder.num_layers)
        return result, needs_data

    def keep(self, place: Place, model: torch.nn.Module) -> None:
        """Save a rank's parameters if they are asked for."""
        if folder := self.request.get("keep"):
            name = f"{'drafter-' * place.drafter}{place.rank}-{place.shard}-{place.replica}.pt"
            torch.save({name: parameter.data for name, parameter in model.named_parameters()}, Path(folder, name))

    def is_layout_refused(self, place: Place, device: str) -> bool:
        """Whether it is for its layout that a model is refused on the CPU platform, which itself may be the reason: without
        shards and replicas it can be built."""
        alone = replace(place, shard=0, shards=1, replica=0, replicas=1, ep=False)
        if alone == place:
            return False
        try:
            pretend(alone)
            self.builder.build(alone, device)
        except Exception:
            return False
        finally:
            self.builder.stand_ins.reset()  # they helped another layout
            pretend(place)
        return True

    def drafted(self) -> list[str]:
        """Prefixes of the MTP layers under the checkpoint's names."""
        config = self.request["config"]
        first, count = config.get("num_hidden_layers", 0), config.get("num_nextn_predict_layers") or 0
        return [f"model.layers.{first + index}." for index in range(count)]
