"""Load format "glmpp" for vLLM: a rank's `load_weights` is handed only what the rank can hold.

    vllm serve zai-org/GLM-5.1-FP8 --pipeline-parallel-size 8 --load-format glmpp

Installing the package is enough: vLLM finds `register` under the entry point group `vllm.general_plugins`. No tensor of a
layer that lives on another stage reaches the model, so no code of the model can trip over one, and its bytes are not
read. Under expert parallelism neither are the weights of experts that live on another rank, whether or not vLLM's own
filter of them is on. Everything that the filter is not sure about passes through: a filter that is too wide loses weights
silently, which is worse than a crash. After loading, a parameter that was not written and that nobody accounts for is an
error.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from fnmatch import fnmatch
from functools import partial
from itertools import chain
from pathlib import Path

import torch
from tqdm import tqdm

from glmpp.serving import contract, fixes

contract.require(contract.LOAD_FORMAT)  # before the imports, which would not say what has moved

from vllm.config import ModelConfig, VllmConfig
from vllm.config.load import LoadConfig
from vllm.distributed.parallel_state import get_pp_group, get_tp_group
from vllm.logger import init_logger
from vllm.model_executor.model_loader import get_model_loader, register_model_loader
from vllm.model_executor.model_loader.default_loader import DefaultModelLoader
from vllm.model_executor.model_loader.weight_utils import enable_tqdm, runai_safetensors_weights_iterator

from glmpp.errors import GlmppError, short, whole
from glmpp.formats.index import INDEX_FILE, load_index, natural_key, shard_path
from glmpp.formats.shard import READERS, read_shard
from glmpp.ledger import DROPPED, EXPECTED, UnloadedParam
from glmpp.serving.dropped import dropped
from glmpp.serving.left_at_init import quantises_online
from glmpp.serving.stage_filter import Selection, is_drafter
from glmpp.serving.unloaded import left
from glmpp.serving.write_tracking import WriteRecorder
from glmpp.words import shown

LOAD_FORMAT = "glmpp"
INCOMPLETE = ("refuse", "warn")

logger = init_logger(f"vllm.{__name__}")


def register() -> None:
    """Make `--load-format glmpp` known to this process. vLLM calls it in every process, and may call it again."""
    with contextlib.suppress(ValueError):
        if isinstance(get_model_loader(LoadConfig(load_format=LOAD_FORMAT)), StageModelLoader):
            return
    register_model_loader(LOAD_FORMAT)(StageModelLoader)


class StageModelLoader(DefaultModelLoader):
    """vLLM's default loader behind the filter of `Selection`. Without pipeline and expert parallelism it does the same.

    `--model-loader-extra-config` takes, besides the default loader's keys:
        reader: "safetensors" (default: of a shard only the wanted tensors are read), or "runai_streamer" or
            "fastsafetensors" (these read whole shards; only shards that hold something for the stage are given to them).
        may_stay_at_init: patterns (`*.bias`) of parameters that the checkpoint need not hold.
        incomplete: "refuse" (default), or "warn": come up although parameters were left at init.
        fixes: names of `glmpp.serving.fixes` to apply to vLLM's classes before the model is built, or "known" for all that
            fit this release and model. Default none.

    Raises:
        GlmppError: a shard cannot be read (named, with the tensor), a parameter is left at init unaccounted for, or a fix
            that was named does not fit.
    """

    def __init__(self, load_config: LoadConfig):
        extra = load_config.model_loader_extra_config
        if not isinstance(extra, dict | None):
            raise GlmppError(f"--model-loader-extra-config is {short(extra)}, expected a JSON object")
        extra = dict(extra or {})
        self.reader = extra.pop("reader", READERS[0])
        self.may_stay_at_init = patterns = extra.pop("may_stay_at_init", [])
        if not isinstance(patterns, list | tuple) or not all(isinstance(one, str) and one for one in patterns):
            raise GlmppError(f"may_stay_at_init is {short(patterns)}, expected a list of patterns, e.g. ['*.bias']")
        self.incomplete = extra.pop("incomplete", INCOMPLETE[0])
        self.fixes = fixes.named(extra.pop("fixes", []))
        if self.reader not in READERS:
            raise GlmppError(f"reader {self.reader!r} is unknown; choose one of {', '.join(READERS)}")
        if self.incomplete not in INCOMPLETE:
            raise GlmppError(f"incomplete: {self.incomplete!r} is unknown; choose one of {', '.join(INCOMPLETE)}")
        for name in ("enable_multithread_load", "enable_weights_track"):  # vLLM's own; before 0.33 "false" is true to it
            if not isinstance(extra.get(name, False), bool):
                raise GlmppError(f"{name} is {short(extra[name])}, expected true or false")
        if "num_threads" in extra:
            whole("num_threads", extra["num_threads"], 1, 1024)
        super().__init__(replace(load_config, load_format="auto", model_loader_extra_config=extra))
        self.selection: Selection | None = None
        self.written: WriteRecorder | None = None
        self._files: list[str] | None = None

    def load_model(self, vllm_config: VllmConfig, model_config: ModelConfig, prefix: str = "") -> torch.nn.Module:
        """What vLLM does, after the fixes that were asked for: they have to be there before the model is built."""
        self.fix(model_config)
        return super().load_model(vllm_config=vllm_config, model_config=model_config, prefix=prefix)

    def fix(self, model_config: ModelConfig) -> None:
        """Apply the fixes that were asked for; to a drafter, a model of another kind, those of them that are for its own."""
        release, architectures, wanted = contract.vllm_version(), list(model_config.architectures), self.fixes
        if is_drafter(model_config) and fixes.KNOWN not in wanted:
            wanted = [name for name in fixes.known(release, architectures) if name in wanted]
        active = fixes.apply(wanted, release, architectures)
        for name in active:
            logger.info("%s: fix %s: %s", stage_name(model_config), name, fixes.about(name))
        if wanted and not active:
            of = ", ".join(map(shown, architectures))
            logger.info("%s: no fix is known for %s in vLLM %s", stage_name(model_config), of, release)

    def load_weights(self, model: torch.nn.Module, model_config: ModelConfig) -> None:
        """Load this stage and check that every parameter was written."""
        started = time.perf_counter()
        self.written = self.watch(model, model_config)
        with self.written or contextlib.nullcontext():
            super().load_weights(model, model_config)
        logger.info("%s: %s, %.2f s", stage_name(model_config), self.selection, time.perf_counter() - started)
        if self.written is not None:
            gone = dropped(self.written, model)
            self.check(left(self.written, model, model_config, gone), model_config)
            self.written = None  # what was read of GLM-5.1 takes 40 MB

    def watch(self, model: torch.nn.Module, model_config: ModelConfig) -> WriteRecorder | None:
        """What notes which parameters a load writes; None for a model of which that does not say what was loaded."""
        if quantises_online(model):
            logger.warning("%s: quantised while loading, so it is not checked what is loaded", stage_name(model_config))
            return None
        return WriteRecorder(model)

    def check(self, left: dict[str, UnloadedParam], model_config: ModelConfig) -> None:
        """Account for the parameters that were not written.

        Raises:
            GlmppError: for those that neither vLLM nor `may_stay_at_init` account for; all of them are named in the log.
        """
        known = {name: one.why for name, one in left.items() if one.kind == EXPECTED}
        known |= {name: "may_stay_at_init" for name in left if any(fnmatch(name, p) for p in self.may_stay_at_init)}
        if known:
            logger.info("%s: left at init, as expected: %s", stage_name(model_config), known)
        unknown: dict[str, list[str]] = {}
        for name in left.keys() - known.keys():
            unknown.setdefault(str(left[name]), []).append(name)
        if not unknown:
            return
        count = sum(map(len, unknown.values()))
        names = "; ".join(
            f"{', '.join(map(shown, sorted(names, key=natural_key)))} ({why})" for why, names in sorted(unknown.items())
        )
        halves = "".join(f" {pair}." for pair in self.selection.unpaired()) if self.selection else ""
        or_dropped = ", or a tensor was dropped" * any(one.kind == DROPPED for one in left.values())
        what = f"{stage_name(model_config)}: {count} parameters were left at init, or partly{or_dropped}: {names}.{halves}"
        logger.warning("%s", what)  # all of them: an error has room for some
        if self.incomplete == "warn":
            return
        raise GlmppError(
            f"{what} If that is as it should be, pass "
            '--model-loader-extra-config \'{"may_stay_at_init": ["a pattern for them"]}\', or {"incomplete": "warn"}'
        )

    def get_all_weights(self, model_config: ModelConfig, model: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
        self.selection = Selection(model, model_config)
        weights = super().get_all_weights(model_config, model)
        yield from weights if self.written is None else self.written.hand_over(weights)

    def _get_weights_iterator(self, source: DefaultModelLoader.Source) -> Iterator[tuple[str, torch.Tensor]]:
        if self.selection.is_whole and self.reader == READERS[0]:
            return self.selection.counted(super()._get_weights_iterator(source))
        return self.wanted(source)

    def wanted(self, source: DefaultModelLoader.Source) -> Iterator[tuple[str, torch.Tensor]]:
        """The tensors of a source that the stage is handed, under their names with the source's prefix, and counted."""
        if self.counter_before_loading_weights == 0.0:
            self.counter_before_loading_weights = time.perf_counter()
        files, is_safetensors, wants, skip_readahead = self.choose(source)
        if self.reader == "runai_streamer" and is_safetensors:
            weights = runai_safetensors_weights_iterator(files, self.load_config.use_tqdm_on_load)
        elif self.reader == "fastsafetensors" and is_safetensors:
            weights = read_fast(files)
        elif is_safetensors and self._reads_plainly():
            shown = enable_tqdm(self.load_config.use_tqdm_on_load)
            shards = tqdm(sorted(files, key=natural_key), "Loading safetensors checkpoint shards", disable=not shown)
            count = partial(self.selection.count, prefix=source.prefix)
            weights = chain.from_iterable(read_shard(file, wants, skip_readahead, count) for file in shards)
            return weights if not source.prefix else ((source.prefix + name, tensor) for name, tensor in weights)
        else:
            weights = self._read_by_vllm(source, files)
        return self.selection.counted((source.prefix + name, tensor) for name, tensor in weights if wants(name))

    def choose(self, source: DefaultModelLoader.Source) -> tuple[list[str], bool, Callable[[str], bool], set[str]]:
        """Files of a source that hold something for the stage, whether they are safetensors, which names to take, and
        which of them not to read ahead.

        A file that no index mentions is opened, and a name that no index lists is asked about: nothing is dropped for
        being unknown.
        """
        prefix, selection = source.prefix, self.selection
        files, is_safetensors, weight_map = self.locate(source)
        wanted = (
            selection.filter_names(prefix + name for name in weight_map) if prefix else selection.filter_names(weight_map)
        )
        skip_readahead = {name.removeprefix(prefix) for name in selection.skip_readahead(wanted)}
        known = {name.removeprefix(prefix) for name in wanted} if prefix else set(wanted)
        needed = {weight_map[name] for name in known}
        unneeded = set(weight_map.values()) - needed
        chosen = [file for file in files if os.path.basename(file) not in unneeded]
        selection.saw(weight_map, files, chosen)

        def wants(name: str) -> bool:
            return name in known or (name not in weight_map and selection.wants(prefix + name))

        return chosen, is_safetensors, wants, skip_readahead

    def locate(self, source: DefaultModelLoader.Source) -> tuple[list[str], bool, dict[str, str]]:
        """Paths of a source's files, whether they are safetensors, and its index: tensor -> file name, {} without one.

        The default loader answers, unless the source is a plain local folder with an index: it would parse the index
        too, and use nothing of it but the file names.

        Raises:
            GlmppError: the index cannot be read, or names a file outside the folder.
        """
        path = source.model_or_path
        index = Path(path, INDEX_FILE)
        plain = source.subfolder is None and source.allow_patterns_overrides is None and os.path.isdir(path)
        consolidated = plain and any(Path(path).glob("consolidated*.safetensors"))
        if plain and index.exists() and not consolidated:
            weight_map = load_index(index)
            return [str(shard_path(path, file)) for file in dict.fromkeys(weight_map.values())], True, weight_map
        folder, files, is_safetensors, *_ = self._prepare_weights(
            path, source.subfolder, source.revision, source.fall_back_to_pt, source.allow_patterns_overrides
        )
        held = {os.path.basename(file) for file in files}
        for index in sorted(Path(folder).glob("*.safetensors.index.json")) if is_safetensors else ():
            weight_map = load_index(index)
            if held <= set(weight_map.values()):
                return files, True, weight_map
        return files, is_safetensors, {}

    def _reads_plainly(self) -> bool:
        """Whether none of the default loader's ways of reading was asked for: those are left to it."""
        config = self.load_config
        return (
            config.safetensors_load_strategy in (None, "lazy")
            and not config.model_loader_extra_config.get("enable_multithread_load")
            and (self.local_expert_ids is None or bool(self.selection.experts))  # what that filter drops is dropped here
        )

    def _read_by_vllm(self, source: DefaultModelLoader.Source, files: list[str]) -> Iterator[tuple[str, torch.Tensor]]:
        """The default loader's own iterator, over the given files only, without the source's prefix."""
        self._files = files
        try:
            return super()._get_weights_iterator(replace(source, prefix=""))
        finally:
            self._files = None

    def _prepare_weights(self, *args, **kwargs):
        folder, files, *rest = super()._prepare_weights(*args, **kwargs)
        return (folder, files if self._files is None else self._files, *rest)


def read_fast(files: list[str]) -> Iterator[tuple[str, torch.Tensor]]:
    """fastsafetensors in this process alone.

    vLLM's own iterator spreads the files over all ranks, so all ranks must ask for the same files. The stages do not.
    """
    from fastsafetensors import fastsafe_open
    from vllm.platforms import current_platform

    device = f"cuda:{torch.cuda.current_device()}" if current_platform.is_cuda_alike() else "cpu"
    for file in sorted(files, key=natural_key):
        with fastsafe_open(filenames=[file], nogds=device == "cpu", device=device) as shard:
            for name in shard.keys():  # noqa: SIM118  not a dict
                yield name, shard.get_tensor(name).clone()


def stage_name(model_config: ModelConfig) -> str:
    """ "glmpp: stage 1 of 2", or "glmpp: drafter on stage 1 of 2, shard 0 of 4"."""
    stage, shard = get_pp_group(), get_tp_group()
    name = f"glmpp: {'drafter on ' if is_drafter(model_config) else ''}stage {stage.rank_in_group} of {stage.world_size}"
    return name + (f", shard {shard.rank_in_group} of {shard.world_size}" if shard.world_size > 1 else "")
