"""One stage, built and loaded with the installed vLLM's own classes, and the evidence for its verdict."""

from __future__ import annotations

import contextlib
import os
import resource
import time
from pathlib import Path

import msgspec
import torch
from safetensors import safe_open
from torch.nn.parameter import is_lazy
from vllm.model_executor.model_loader import get_model_loader
from vllm.model_executor.model_loader.default_loader import DefaultModelLoader

from glmpp.dryrun.child.build import Built, ModelBuilder
from glmpp.dryrun.child.built_model import carried, selected_kernels
from glmpp.dryrun.child.dummy_weights import DummyWeights, answer_for_headers
from glmpp.dryrun.child.helper_patch import HelperPatch
from glmpp.dryrun.child.load import StageLoad
from glmpp.dryrun.child.memory import memory
from glmpp.dryrun.child.tensor_outcomes import TensorOutcomes
from glmpp.dryrun.messages import MADE_UP, NO_DATA, REAL, Run, StageRequest, StageResult
from glmpp.dryrun.pretend.failures import (
    FAULT,
    NO_ANSWER,
    NO_VERDICT,
    PACKAGE,
    REFUSAL,
    describe,
    is_kits,
    kind_of,
    what_to_install,
)
from glmpp.dryrun.pretend.ranks import pretend
from glmpp.dryrun.pretend.targets import tensors_on
from glmpp.dryrun.pretend.unanswered import UnansweredOnMeta
from glmpp.errors import chain, on_behalf
from glmpp.formats.index import natural_key
from glmpp.gpus import CPU
from glmpp.ledger import EXPECTED, digest
from glmpp.serving.load_format import StageModelLoader, register
from glmpp.serving.read_tracking import Reads
from glmpp.serving.write_tracking import parameters
from glmpp.words import some

SMALL_ENOUGH = 2_000_000_000  # bytes of a checkpoint and of a model that are tried again with data, on the CPU
ROOM = 3_000_000_000  # bytes that a stage may take, and five times those that are tried; of GLM-5.1's on meta one has 1 GB


def limit_memory(nbytes: int) -> None:
    """Let this process have so many bytes more than it has: a config may ask for any number of them, on the CPU too."""
    (said,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmData:"))
    most = int(said.split()[1]) * 1024 + nbytes
    hard = resource.getrlimit(resource.RLIMIT_DATA)[1]
    resource.setrlimit(resource.RLIMIT_DATA, (most if hard == resource.RLIM_INFINITY else min(most, hard), hard))


def is_complete(result: StageResult) -> bool:
    """Whether a stage loads and leaves nothing at init that a checkpoint has to hold."""
    return result.verdict == "loads" and all(left.kind == EXPECTED for left in result.left.values())


def cannot_tell(result: StageResult, why: str) -> None:
    """Take a verdict back. Why it cannot be told is said with the failure, too, if there is one."""
    result.verdict, result.why = "cannot tell", why
    for failure in result.failures[:1]:
        failure.message += f" ({why})"


def opened_by(loader: DefaultModelLoader, source: DefaultModelLoader.Source) -> list[str]:
    """Paths of the files that a loader opens of a source. Raises what vLLM says where it finds none."""
    if isinstance(loader, StageModelLoader):
        return loader.locate(source)[0]
    how = source.subfolder, source.revision, source.fall_back_to_pt, source.allow_patterns_overrides
    return loader._prepare_weights(source.model_or_path, *how)[1]


def described(shards: list) -> list[tuple[str, str, list[int]]]:
    """Name, safetensors dtype and shape of the tensors of shards that the library has opened."""
    found = ((name, shard.get_slice(name)) for shard in shards for name in shard.keys())  # noqa: SIM118  not a dict
    return [(name, one.get_dtype(), one.get_shape()) for name, one in found]


class Stages:
    """Builds and loads the stages that a request asks for."""

    def __init__(self, request: StageRequest):
        self.request = request
        self.source = DummyWeights(request.tensors)
        self.guard = HelperPatch(request.guard, request.helper, request.callers)
        self.builder = ModelBuilder(request)
        register()  # VLLM_PLUGINS may leave the kit's plugin out, and decides nothing here
        self.nbytes = sum(self.source.nbytes.values())
        if request.weights != "real":
            limit_memory(ROOM + 5 * min(self.nbytes, SMALL_ENOUGH))
        self.has_files = request.files is not None
        if not self.has_files:
            answer_for_headers(request.tensors)

    def loader(self, config, hand_over, data: str):
        """The loader that vLLM chooses, its source replaced by tensors that are made here unless real bytes are asked for.

        Args:
            hand_over: what the iterator of weights passes through on its way to the model.
            data: NO_DATA, MADE_UP or REAL.
        """
        source, chosen, real = self.source, type(get_model_loader(config.load_config)), self.request.weights == "real"
        folder, read, stand_ins = self.request.model, self.request.files, self.builder.stand_ins

        class Loader(chosen):
            def get_all_weights(self, model_config, model):
                return hand_over(super().get_all_weights(model_config, model))

            def _get_weights_iterator(self, files):
                if data == REAL:
                    return super()._get_weights_iterator(files)
                if read is not None and files.model_or_path == folder:
                    listed = {os.path.relpath(file, folder): file for file in opened_by(self, files)}
                    if listed.keys() != set(read):
                        stand_ins.reasons["file list"] = f"vLLM opens {some([*listed])}; glmpp had read {some(read)}"
                        shards = []
                        for file in sorted(listed.values(), key=natural_key):
                            shards.append(on_behalf(safe_open, file, "pt"))
                        source.become(DummyWeights(described(shards)))
                weights = source.hand_over("meta" if data == NO_DATA else "cpu")
                if not isinstance(self, StageModelLoader):
                    return weights
                return self.selection.counted(pair for pair in weights if self.selection.wants(pair[0]))

            def watch(self, *model):  # otherwise the account asks what the load format would, and says all of it
                return super().watch(*model) if real else None

        return Loader(config.load_config)

    def run(self, run: Run) -> StageResult:
        """Build and load a stage. What fails without data, or stays incomplete, is tried again.

        The checkpoint's own bytes decide, if it has files and they are not too large. Values that are made up can show that
        a stage loads, and not that it fails: where torch was asked for what only data would tell, nothing can be told then.

        Nothing carries over from one run to the next: which of them share a process must not show in what is said of them.
        """
        if self.request.weights == "real":
            return self.attempt(run, REAL)
        result = self.attempt(run, NO_DATA)
        if is_complete(result):
            return result
        if max(self.nbytes, result.memory.parameters if result.memory else 0) <= SMALL_ENOUGH:
            again = self.attempt(run, REAL if self.has_files else MADE_UP, moves=True)
            if self.has_files or is_complete(again):
                again.reads = again.reads or result.reads  # of values made up nothing is seen
                return again
        with UnansweredOnMeta() as asked:
            result = self.attempt(run, NO_DATA, moves=True)
        if asked.found and not is_complete(result):
            cannot_tell(result, f"{NO_VERDICT[NO_ANSWER]}: {asked.found[0]}")
        return result

    def attempt(self, run: Run, data: str, moves: bool = False) -> StageResult:
        """A stage's verdict with its evidence.

        Args:
            moves: tensors that the model puts on the GPU while it loads are put where they can be. It costs a third.
        """
        device = "meta" if data == NO_DATA else "cpu"
        result = StageResult(run=run, device=device, data=data)
        built, failed, started = None, None, time.perf_counter()
        self.builder.stand_ins.reset()
        try:
            built = self.builder.build(run, device)
        except Exception as error:
            if is_kits(error):
                raise
            failed = error
            result.build_seconds = time.perf_counter() - started
            failure = describe(error)
            if error.__cause__ is not None and kind_of(error) != PACKAGE:
                cause = describe(error.__cause__)
                failure.message += f" (from {cause.exception}: {cause.message[:300]} in {cause.place})"
            result.failures = [failure]
            refused = kind_of(error) == REFUSAL and self.request.gpu != CPU
            result.refused = refused or (kind_of(error) in (REFUSAL, FAULT) and self.is_layout_refused(run, device))
        else:
            result.build_seconds = time.perf_counter() - started
            failed = self.load(built, result, moves)
        if failed is not None and (why := NO_VERDICT.get(kind_of(failed))):
            if kind_of(failed) == PACKAGE:
                missing = [cause for cause in chain(failed) if isinstance(cause, ImportError)]
                result.failures[:1] = [describe(missing[0])]
                why = ": ".join([why, *(what_to_install(cause) for cause in missing if cause.name)][:2])
            result.verdict = "cannot tell"
            result.failures[0].message += f" ({why})"
        result.stand_ins, result.num_layers = self.builder.stand_ins.reasons, self.builder.num_layers
        return result

    def load(self, built: Built, result: StageResult, moves: bool) -> Exception | None:
        """Load a stage that has been built, and put down what is seen; returns the first exception on the way."""
        run, device, data = result.run, result.device, result.data
        lazy = [name for name, parameter in built.model.named_parameters() if is_lazy(parameter)]
        result.backends = selected_kernels(built.model)
        result.carried = {} if run.drafter else carried(built.model, self.builder.num_layers)
        result.patched = self.guard.install(built.model)
        places = tensors_on(device) if moves else contextlib.nullcontext()
        load = StageLoad(built, self.guard, lambda *how: self.loader(*how, data=data), self.source.nbytes, device)
        started = time.perf_counter()
        with places:
            load.run(self.request.all_failures)
        result.load_seconds = time.perf_counter() - started
        result.verdict, result.failures = "dies" if load.failures else "loads", load.failures
        outcomes = TensorOutcomes(load, self.source.shapes, self.drafted() if run.drafter else None)
        outcomes.tell(result, self.request.model if self.has_files else None)
        load.recorder.reads = Reads()  # 40 MB for each stage of GLM-5.1; a load lies in a circle of references, and stays
        if not load.failures and result.unplaced:
            result.verdict = "cannot tell"
        if not load.failures and (unseen := outcomes.unseen):
            what = "dropped, as the model has no parameter for it; its values would tell whether it is needed"
            cannot_tell(result, f"{some(unseen)}: {what}")
        if not load.failures and lazy:
            what = "parameters take their shape from what is loaded, and are not looked at"
            cannot_tell(result, f"{len(lazy)} {what}, e.g. {lazy[0]}")
        if self.request.weights == "real":
            # What belongs to a tower that this stage has no use for, vLLM itself leaves without data.
            held = {name: p for name, p in parameters(built.model).items() if not p.is_meta}
            result.digests = {name: digest(p) for name, p in held.items()}
            self.keep(run, built.model)
        result.memory = memory(self.builder, run, built, device, self.request.context)
        result.model_class = f"{type(built.model).__module__}.{type(built.model).__qualname__}"
        return load.error

    def keep(self, run: Run, model: torch.nn.Module) -> None:
        """Save a rank's parameters if they are asked for."""
        if folder := self.request.keep:
            name = f"{'drafter-' * run.drafter}{run.stage}-{run.tp_rank}-{run.dp_rank}.pt"
            torch.save({name: parameter.data for name, parameter in model.named_parameters()}, Path(folder, name))

    def is_layout_refused(self, run: Run, device: str) -> bool:
        """Whether it is for its layout that a model cannot be built, and not for what is pretended: at TP=1 and DP=1 it can
        be."""
        alone = msgspec.structs.replace(run, tp_rank=0, tp_size=1, dp_rank=0, dp_size=1, ep=False)
        if alone == run:
            return False
        try:
            pretend(alone)
            self.builder.build(alone, device)
        except Exception as error:
            if is_kits(error):
                raise
            return False
        finally:
            self.builder.stand_ins.reset()  # they helped another layout
            pretend(run)
        return True

    def drafted(self) -> list[str]:
        """PrefixSet of the MTP layers under the checkpoint's names."""
        config = self.request.config
        first, count = config.get("num_hidden_layers", 0), config.get("num_nextn_predict_layers") or 0
        return [f"model.layers.{first + index}." for index in range(count)]
