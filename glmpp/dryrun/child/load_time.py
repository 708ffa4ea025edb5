"""In the child process: load pipeline stages for real, with a clock in each part. Answers `glmpp.lab.load_time`."""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from vllm.config import set_current_vllm_config
from vllm.model_executor.model_loader import get_model_loader
from vllm.utils.torch_utils import set_default_torch_dtype

from glmpp.dryrun.child.helper_patch import HELPER
from glmpp.dryrun.child.run_stage import Stages
from glmpp.dryrun.messages import Load, LoadTimeRequest, Run
from glmpp.dryrun.pretend.ranks import pretend
from glmpp.serving.load_format import StageModelLoader


class Clock:
    """Seconds by part: inside the iterator of weights (choosing, reading) and inside the indexer's helper."""

    def __init__(self) -> None:
        self.choosing = self.iterator = self.dequantising = 0.0
        self.handed = self.nbytes = 0

    def iterate(self, weights) -> Iterator[tuple[str, torch.Tensor]]:
        """Pass weights on; the time until each arrives is the iterator's, what follows is the model's."""
        weights = iter(weights)
        while True:
            started = time.perf_counter()
            pair = next(weights, None)
            self.iterator += time.perf_counter() - started
            if pair is None:
                return
            self.handed += 1
            self.nbytes += pair[1].nbytes
            yield pair

    @contextlib.contextmanager
    def around_helpers(self) -> Iterator[None]:
        """The clock around the helper in every vLLM module that calls it."""
        with contextlib.ExitStack() as stack:
            for name, module in list(sys.modules.items()):
                if name.startswith("vllm.") and (helper := getattr(module, HELPER, None)):
                    stack.enter_context(mock.patch.object(module, HELPER, self.timed(helper)))
            yield

    def timed(self, helper):
        def call(name, *arguments, **keywords):
            started = time.perf_counter()
            handled = helper(name, *arguments, **keywords)
            if ".indexer.wk." in name:
                self.dequantising += time.perf_counter() - started
            return handled

        return call


def read_through(path: Path) -> None:
    """Bring a file into the page cache."""
    with path.open("rb", buffering=0) as file, open(os.devnull, "wb") as nowhere:
        shutil.copyfileobj(file, nowhere, 1 << 24)


def resident_bytes(path: Path) -> int:
    """Bytes of a file that are in the page cache, mincore(2)."""
    if path.stat().st_size == 0:
        return 0
    mapped = np.memmap(path, np.uint8, "r")
    pages = np.zeros(-(-mapped.size // mmap.PAGESIZE), np.uint8)
    mincore = ctypes.CDLL(None, use_errno=True).mincore
    if mincore(ctypes.c_void_p(mapped.ctypes.data), ctypes.c_size_t(mapped.size), ctypes.c_void_p(pages.ctypes.data)):
        raise OSError(ctypes.get_errno(), "mincore")
    return int((pages & 1).sum()) * mmap.PAGESIZE


def drop_from_cache(paths: list[Path]) -> int:
    """Ask the kernel to drop files from the page cache, posix_fadvise(2); returns the bytes that stayed."""
    for path in paths:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)  # dirty pages are not dropped
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)
    return sum(map(resident_bytes, paths))


def clocked(loader: type, clock: Clock) -> type:
    """A loader class whose weights pass the clock."""

    class Clocked(loader):
        def get_all_weights(self, model_config, model):
            return clock.iterate(super().get_all_weights(model_config, model))

        def choose(self, source):
            started = time.perf_counter()
            chosen = super().choose(source)
            clock.choosing += time.perf_counter() - started
            return chosen

    return Clocked


class Bench:
    """A request's model, one rank at a time, and its loads."""

    def __init__(self, request: LoadTimeRequest):
        self.request, self.stages = request, Stages(request.stages)
        self.shards = [Path(request.stages.model, file) for file in request.stages.files]

    def build(self, run: Run) -> None:
        self.model = None  # the stage before it goes first
        pretend(run)
        built = self.stages.builder.build(run, "cpu")
        self.model, self.config = built.model, built.config
        self.config.load_config.use_tqdm_on_load = False
        self.config.parallel_config.enable_ep_weight_filter = self.request.filtered
        if self.request.reader:
            self.config.load_config.model_loader_extra_config = {"reader": self.request.reader}
        for parameter in self.model.parameters():
            parameter.data.view(torch.uint8).fill_(0)  # so that no load pays for the first touch of its pages
        self.stages.guard.install(self.model)

    def load(self, weights: list | None = None) -> dict:
        """One load; from a list in memory if one is given, otherwise by the loader that vLLM chooses."""
        self.stages.guard.reset()
        clock = Clock()
        loader = clocked(type(get_model_loader(self.config.load_config)), clock)(self.config.load_config)
        stayed = drop_from_cache(self.shards) if self.request.cold else None
        dtype = self.config.model_config.dtype
        with set_current_vllm_config(self.config), set_default_torch_dtype(dtype), clock.around_helpers():
            started = time.perf_counter()
            if weights is None:
                loader.load_weights(self.model, self.config.model_config)
            else:
                self.model.load_weights(clock.iterate(weights))
            total = time.perf_counter() - started
        selection = getattr(loader, "selection", None)
        opened = len(self.shards) if selection is None else selection.files
        return {
            "total": total,
            "choosing": clock.choosing,
            "reading": clock.iterator - clock.choosing,
            "dequantising": clock.dequantising,
            "vllm": total - clock.iterator - clock.dequantising,
            "tensors": clock.handed,
            "bytes_handed": clock.nbytes,
            "files_opened": opened if weights is None else 0,
            "bytes_in_cache_before": stayed,
            "bytes_read": sum(map(resident_bytes, self.shards)) if self.request.cold else None,
        }

    def in_memory(self) -> list[tuple[str, torch.Tensor]]:
        """What the load format hands this stage, copied into memory: the floor that no reading can go under."""
        loader = StageModelLoader(self.config.load_config)
        return [(n, tensor.clone()) for n, tensor in loader.get_all_weights(self.config.model_config, self.model)]


def measure(request: LoadTimeRequest, send: Callable[[Load], None]) -> None:
    """Load every run, `repeats` times, and send a message for each. Warm: all shards have been read before."""
    bench = Bench(request)
    if not request.cold:
        for shard in bench.shards:
            read_through(shard)
    for run in request.stages.runs:
        bench.build(run)
        weights = bench.in_memory() if request.in_memory else None
        for _ in range(request.repeats):
            send(Load({"rank": run.stage, **bench.load(weights)}))
