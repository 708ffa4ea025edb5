"""The child process of `glmpp.dry_run`: the installed vLLM's own classes, one pipeline stage after another.

Real: EngineArgs and every config check, the model class and its `__init__`, `make_layers`, the placeholders, the default
loader, `load_weights`, every parameter's `weight_loader`. Stand-ins, and why each is needed, are in `_stand_ins.py`.
Nothing here is imported by the parent. vLLM is imported once; each request is answered in a fork, so that patches and
process groups stay in it.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import hashlib
import importlib
import importlib.util
import inspect
import json
import math
import os
import re
import resource
import selectors
import signal
import socket
import struct
import sys
import time
import traceback
import weakref
from collections import deque
from collections.abc import Iterator
from pathlib import Path

# Before torch and vLLM are imported. The GPU, if there is one, stays unseen: verdicts must not depend on the machine.
os.environ.update(
    CUDA_VISIBLE_DEVICES="",
    VLLM_CONFIGURE_LOGGING="0",
    VLLM_NO_USAGE_STATS="1",
    DO_NOT_TRACK="1",
    HF_HUB_OFFLINE="1",
    HUMMING_DISABLE_PARALLEL_BUILD="1",  # vLLM >= 0.32 starts background compiles from an import
    TQDM_DISABLE="1",
    VLLM_ALLOW_LONG_MAX_MODEL_LEN="1",  # the length asked for is nominal: nothing is generated
)
# jsonschema imports it where it is installed (JupyterLab brings it) and builds a grammar for 3.6 s; vLLM never uses it.
sys.modules["rfc3987_syntax"] = None  # type: ignore[assignment]

import torch
from torch.utils._device import _device_constructors

from glmpp import _contract
from glmpp._stand_ins import Builder, inspect_in_process, install_platform
from glmpp.loader import WriteRecorder, digest
from glmpp.partition import PARTITION_VARIABLE, Prefixes

HELPER = "_try_load_fp8_indexer_wk"
# What PyTorch says when code asks a meta tensor for its data. It is no verdict on the checkpoint.
NEEDS_DATA = re.compile(r"copy out of meta tensor|on meta tensors|_local_scalar_dense|data is not allocated yet")
HELD_FOR = 50  # tensors: halves of a pair come closer together
LINGERING = 4  # tensors that live on in the variables of a loop are not held
SMALL_ENOUGH = 2_000_000_000  # bytes of a checkpoint that is tried again with data, on the CPU


# --- process groups -----------------------------------------------------------------------------------------------


def init_groups(rank: int, size: int, init_file: str) -> None:
    """vLLM's process groups over gloo: the real thing when `size` processes call this, or a group of one."""
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.distributed import parallel_state

    with set_current_vllm_config(VllmConfig()):
        parallel_state.init_distributed_environment(size, rank, f"file://{init_file}", rank, backend="gloo")
        parallel_state.initialize_model_parallel(1, size)


def pretend_rank(rank: int, size: int) -> None:
    from vllm.distributed.parallel_state import get_pp_group

    group = get_pp_group()
    group.ranks, group.rank, group.rank_in_group, group.world_size = list(range(size)), rank, rank, size


def set_layer_counts(layer_counts: str | None) -> None:
    """What vLLM will find in VLLM_PP_LAYER_PARTITION. The server's own environment is that of whoever started it."""
    os.environ.pop(PARTITION_VARIABLE, None)
    if layer_counts is not None:
        os.environ[PARTITION_VARIABLE] = layer_counts


# --- guards -------------------------------------------------------------------------------------------------------


class Guard:
    """Puts the wanted helper into every vLLM module that calls it, and keeps the buffers that it is given."""

    def __init__(self, mode: str, helper: str, callers: list[str] | None):
        self.mode, self.callers = mode, callers
        self.helper = load_function(helper) if mode == "helper" else None
        self.originals: dict = {}
        self.reset()

    def reset(self) -> None:
        self.buffers: list[dict] = []  # one for each call of load_weights: there is one call per run of names
        self.missing: dict[int, list[str]] = {}

    def install(self) -> list[str]:
        """Patch the modules that are loaded by now; returns their names."""
        patched = []
        for name, module in list(sys.modules.items()):
            if not name.startswith("vllm.") or not hasattr(module, HELPER) or self.mode in ("installed", "loader"):
                continue
            original = self.originals.setdefault(name, getattr(module, HELPER))
            if self.mode == "helper":
                follows = self.callers is None or name.rsplit(".", 1)[-1] in self.callers
                setattr(module, HELPER, self.adapted() if follows else self.helper)
            elif "pp_missing_layer_names" in inspect.signature(original).parameters:
                setattr(module, HELPER, self.blinded(original))
            else:
                continue
            patched.append(name)
        return patched

    def adapted(self):
        """The kit's helper behind vLLM's call: whatever the release passes, the sixth argument is computed here."""

        from glmpp.vllm_plugin import missing_prefixes

        def call(name, tensor, buffer, params, loaded, *_, **__):
            if id(buffer) not in self.missing:  # the buffer is kept, so that no id is a dead one's
                self.buffers.append(buffer)
                self.missing[id(buffer)] = missing_prefixes(calling_module(sys._getframe(1)))
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
    """A function from "module:function", or from "/path/to/file.py:function", whose folder is not searched for more."""
    module, _, name = place.rpartition(":")
    if not module.endswith(".py"):
        return getattr(importlib.import_module(module), name)
    spec = importlib.util.spec_from_file_location(Path(module).stem, module)
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return getattr(loaded, name)


def calling_module(frame) -> torch.nn.Module:
    """The model whose `load_weights` is calling."""
    while True:
        variables = frame.f_locals
        found = variables.get("self")
        if type(variables) is dict and variables is not frame.f_globals:
            variables.clear()  # a copy that would keep tensors alive (Python < 3.13)
        if isinstance(found, torch.nn.Module):
            return found
        frame = frame.f_back


# --- one stage ----------------------------------------------------------------------------------------------------


class Stages:
    """Builds and loads the stages that the request asks for."""

    def __init__(self, request: dict):
        from glmpp.checkpoint import TensorSpec

        self.request = request
        self.specs = [(name, *TensorSpec(name, dtype, tuple(shape)).in_torch) for name, dtype, shape in request["tensors"]]
        self.guard = Guard(request["guard"], request["helper"], request["callers"])
        self.builder = Builder(request["strict"])
        self.real = request["weights"] == "real"
        self.device = "cpu" if self.real else "meta"
        self.num_layers: int | None = None

    def vllm_config(self, rank: int, size: int, drafter: bool):
        from vllm.engine.arg_utils import EngineArgs

        set_layer_counts(self.request["layer_counts"] if size > 1 else None)
        config = EngineArgs(
            model=self.request["model"],
            skip_tokenizer_init=True,
            load_format="glmpp" if self.request["guard"] == "loader" else "safetensors",
            enforce_eager=True,
            enable_prefix_caching=False,  # the CPU platform turns it off halfway, and then other checks fail
            max_model_len=512,  # nominal: nothing is generated
            pipeline_parallel_size=size,
            distributed_executor_backend="mp",
            speculative_config={"method": "mtp", "num_speculative_tokens": 1} if drafter else None,
        ).create_engine_config()
        config.parallel_config.rank = rank
        self.num_layers = config.model_config.get_total_num_hidden_layers()
        return config

    def build(self, rank: int, size: int, drafter: bool = False):
        """A stage's model with its vLLM config and model config."""
        from vllm.config import set_current_vllm_config
        from vllm.model_executor.model_loader.utils import initialize_model
        from vllm.model_executor.models import utils
        from vllm.utils.torch_utils import set_default_torch_dtype

        utils._model_to_pp_missing_layer_names.clear()  # keyed by id(model), and ids are reused: see missing_prefixes
        config = self.vllm_config(rank, size, drafter)  # what fails here no stand-in is for

        def construct():
            nonlocal config
            config = config or self.vllm_config(rank, size, drafter)
            mine, config = config, None  # layers register in it: another attempt needs another
            model_config = mine.speculative_config.draft_model_config if drafter else mine.model_config
            with set_current_vllm_config(mine), set_default_torch_dtype(model_config.dtype), torch.device(self.device):
                return initialize_model(vllm_config=mine, model_config=model_config), mine, model_config

        return self.builder.build(construct)

    def loader(self, config, hand_over):
        """The loader that vLLM chooses, its source replaced by empty tensors unless real bytes are asked for.

        Args:
            hand_over: what the iterator of weights passes through on its way to the model.
        """
        from vllm.model_executor.model_loader import get_model_loader

        from glmpp.vllm_plugin import StageModelLoader

        stages, chosen = self, type(get_model_loader(config.load_config))

        class Loader(chosen):
            def get_all_weights(loader, model_config, model):
                return hand_over(super().get_all_weights(model_config, model))

            def _get_weights_iterator(loader, source):
                if stages.real:
                    return super()._get_weights_iterator(source)
                if not isinstance(loader, StageModelLoader):
                    return stages.empty_tensors()
                return loader.selection.counted(pair for pair in stages.empty_tensors() if loader.selection.wants(pair[0]))

            def check(loader, left, model, model_config):
                if stages.real:  # meta tensors have no addresses to watch: `account` goes by the operators instead
                    super().check(left, model, model_config)

        return Loader(config.load_config)

    def empty_tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """All tensors of the checkpoint without their data, or with ones for data on the CPU.

        They are made by the thousand, past the recorder and the device context, which each would cost ten times as much.
        """
        for start in range(0, len(self.specs), 1000):
            with torch._C.DisableTorchFunction(), torch._C._DisableTorchDispatch():
                some = self.specs[start : start + 1000]
                made = deque((name, self.empty_tensor(dtype, shape)) for name, dtype, shape in some)
            while made:
                yield made.popleft()

    def empty_tensor(self, dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
        if self.device == "meta":
            return torch.empty(shape, dtype=dtype, device="meta")
        ones = torch.ones((), dtype=torch.float32, device="cpu")
        packed = dtype is getattr(torch, "float4_e2m1fn_x2", None)  # torch has no conversion to it
        return (ones.to(torch.uint8).view(dtype) if packed else ones.to(dtype)).expand(shape)

    def run(self, rank: int, size: int, drafter: bool = False) -> dict:
        """Build and load a stage; once more with data on the CPU if the model asks for some.

        Nothing carries over from one run to the next: which of them share a process must not show in what is said of them.
        """
        self.device = "cpu" if self.real else "meta"
        result, needs_data = self.attempt(rank, size, drafter)
        if needs_data and self.device == "meta":
            if sum(torch.Size(shape).numel() * dtype.itemsize for _, dtype, shape in self.specs) > SMALL_ENOUGH:
                return {**result, "verdict": "cannot tell"}
            self.device = "cpu"
            result, _ = self.attempt(rank, size, drafter)
        return result

    def attempt(self, rank: int, size: int, drafter: bool) -> tuple[dict, bool]:
        """A stage's verdict with its evidence, and whether all that it failed for is a tensor without data."""
        result: dict = {"verdict": "cannot be built"}
        needs_data, model, started = False, None, time.perf_counter()
        self.builder.reset()
        try:
            model, config, model_config = self.build(rank, size, drafter)
            result["build_seconds"] = time.perf_counter() - started
            result["patched"] = self.guard.install()
            load = StageLoad(self, model, config, model_config)
            started = time.perf_counter()
            load.run(self.request["all_deaths"])
            result["load_seconds"] = time.perf_counter() - started
            result["verdict"] = "dies" if load.deaths else "loads"
            if load.deaths:
                result.update(load.deaths[0], deaths=[{**death, "traceback": []} for death in load.deaths])
                needs_data = bool(NEEDS_DATA.search(load.deaths[0]["message"]))
            result.update(self.account(load, drafter))
            result["model_class"] = f"{type(model).__module__}.{type(model).__qualname__}"
        except Exception as error:
            if model is not None:
                raise  # not the model's fault
            result.update(describe(error), build_seconds=time.perf_counter() - started)
            if error.__cause__ is not None:
                left = describe(error.__cause__)
                result["message"] += f" (with stand-ins: {left['exception']}: {left['message'][:300]} in {left['place']})"
            needs_data = bool(NEEDS_DATA.search(str(error)))
        result.update(stand_ins=self.builder.stand_ins, device=self.device, num_layers=self.num_layers)
        return result, needs_data

    def account(self, load: StageLoad, drafter: bool) -> dict:
        """What became of every tensor and parameter, from the writes that were seen."""
        from glmpp.padding import padding
        from glmpp.vllm_plugin import accounted, mapped, missing_prefixes, speculative_prefixes

        model, recorder = load.model, load.recorder
        missing, rename = missing_prefixes(model), mapped(model) or (lambda name: name)
        elsewhere = Prefixes(missing)
        speculative = Prefixes(speculative_prefixes(model, load.model_config.hf_text_config))
        own = Prefixes(self.speculative_names()) if drafter else None
        # A buffered pair is stored when its second half arrives: the write credits both.
        stems = {re.sub(r"_scale(_inv)?$", "", name) for name in recorder.stored if re.search(r"\.weight(_scale)?", name)}
        reached = set(recorder.order)
        selection = getattr(load.loader, "selection", None)
        dropped = set() if selection is None else {name for name, *_ in self.specs if not selection.wants(name)}

        def column(name: str) -> str:
            if name not in reached and name not in dropped:
                return "not reached"
            if name in recorder.stored or re.sub(r"_scale(_inv)?$", "", name) in stems:
                return "loaded"
            if own is not None:
                return "unexpected" if own.cover(name) else "another stage's"
            place = rename(name)
            if place is None:
                return "ignored by the model"
            if speculative.cover(place):
                return "speculative layer"
            return "another stage's" if elsewhere.cover(place) else "unexpected"

        runs: list[list] = []
        for name, *_ in self.specs:
            found = column(name)
            if runs and runs[-1][0] == found:
                runs[-1][1] += 1
            else:
                runs.append([found, 1])
        sizes, added = {name: p.numel() for name, p in model.named_parameters()}, padding(model)
        account = {
            "handed_over": len(recorder.order),
            "order": hashlib.sha256("\n".join(recorder.order).encode()).hexdigest(),
            "columns": runs,
            "parameters": {name: [recorder.written.get(name, size), size] for name, size in sizes.items()},
            "missing_prefixes": missing,
            "padding": added,
            "accounted": accounted(recorder.left_at_init(added), model, load.model_config),
            "held": {name: size for name, size in load.held.items() if column(name) == "another stage's"},
        }
        if self.real:
            account["digests"] = {name: digest(p) for name, p in model.named_parameters()}
        return account

    def speculative_names(self) -> list[str]:
        """Prefixes of the MTP layers under the checkpoint's names."""
        config = self.request["config"]
        first, count = config.get("num_hidden_layers", 0), config.get("num_nextn_predict_layers") or 0
        return [f"model.layers.{first + index}." for index in range(count)]


class StageLoad:
    """One stage's load, and the deaths on the way.

    Attributes:
        deaths: one dict each: the tensor that was handed over last (None: after all of them), exception, key, place.
        recorder, loader: of the last pass over the checkpoint.
        held: tensor -> bytes, of those that the model still held when the last one, or HELD_FOR others, had been handed
            over; {} for a model that makes a list of all of them first.
    """

    def __init__(self, stages: Stages, model: torch.nn.Module, config, model_config):
        self.stages, self.model, self.config, self.model_config = stages, model, config, model_config
        self.deaths: list[dict] = []
        self.dead: set[str] = set()

    def run(self, all_deaths: bool) -> None:
        """Load until the end or the first death.

        Args:
            all_deaths: drop the tensor that died and go on with the rest. Then load once more from the start without
                those that died, so that the ledger says what they leave undone.
        """
        if self.survives(self.load_all) or not all_deaths:
            return
        for step in (self.load_rest, self.load_all):
            while not self.survives(step) and self.deaths[-1]["tensor"]:
                pass

    def survives(self, step) -> bool:
        """Take a step; a death on the way is noted."""
        try:
            step()
            return True
        except Exception as error:
            tensor = self.recorder.order[-1] if self.recorder.order and not self.exhausted else None
            self.deaths.append({"tensor": tensor, **describe(error)})
            self.dead.add(tensor)
            return False

    def load_all(self) -> None:
        """What vLLM does."""
        self.stages.guard.reset()
        self.recorder, self.exhausted, self.held = WriteRecorder(self.model), False, {}
        self.loader = self.stages.loader(self.config, self.hand_over)
        with self.surroundings():
            self.loader.load_weights(self.model, self.model_config)

    def load_rest(self) -> None:
        """What comes after the tensor that died."""
        with self.surroundings():
            self.model.load_weights(self.rest)

    @contextlib.contextmanager
    def surroundings(self) -> Iterator[None]:
        from vllm.config import set_current_vllm_config
        from vllm.utils.torch_utils import set_default_torch_dtype

        dtype, device = self.model_config.dtype, constructors_on(self.stages.device)
        with set_current_vllm_config(self.config), set_default_torch_dtype(dtype), device, self.recorder:
            yield

    def hand_over(self, weights):
        self.rest = self.until_exhausted(self.recorder.hand_over(pair for pair in weights if pair[0] not in self.dead))
        return self.rest

    def until_exhausted(self, weights):
        """Hand over the weights, and watch how long the model holds on to each."""
        given: list[_Watched] = []
        died: dict[int, int] = {}

        def note(watched: _Watched) -> None:
            died[watched.at] = len(given)

        for name, tensor in weights:
            watched = _Watched(tensor, note)
            watched.at = len(given)
            given.append(watched)
            yield name, tensor
            del tensor
        self.exhausted = True
        names = self.recorder.order[-len(given) :]
        long = [at for at in range(len(given) - 1) if died.get(at, math.inf) - at > HELD_FOR]
        nbytes = {name: dtype.itemsize * math.prod(shape) for name, dtype, shape in self.stages.specs if long}
        held = {names[at]: nbytes[names[at]] for at in long}
        stored = self.recorder.stored
        lists_all = stored and len(stored & held.keys()) > len(stored) / 2
        self.held = {} if lists_all or len(held) <= LINGERING else held


@contextlib.contextmanager
def constructors_on(device: str) -> Iterator[None]:
    """`torch.empty`, `torch.zeros` and their kin make tensors on a device unless told otherwise.

    So does `with torch.device(…)`, but by a look at every call of any operator: a third of a load's time at PP=1.
    """

    def wrapped(construct):
        def call(*args, **kwargs):
            if kwargs.get("device") is None:
                kwargs["device"] = device
            return construct(*args, **kwargs)

        return call

    originals = {f.__name__: f for f in _device_constructors() if getattr(torch, f.__name__, None) is f}
    for name, construct in originals.items():
        setattr(torch, name, wrapped(construct))
    try:
        yield
    finally:
        for name, construct in originals.items():
            setattr(torch, name, construct)


class _Watched(weakref.ref):
    """A reference that knows the place of its tensor in the order."""

    __slots__ = ("at",)


def trim(path: str) -> str:
    """A source path without the machine: from the package on."""
    match = re.search(r"(?:.*/(?:site|dist)-packages/|.*/lib/python[\d.]+/|.*/(?=glmpp/))(.+)", path)
    return match[1] if match else os.path.basename(path)


def is_shown(path: str) -> bool:
    """Whether a source line is worth showing: vLLM's, a model's, the kit's helpers', not what they call."""
    inner = re.search(r"/lib/python[\d.]+/(?!site-packages/|dist-packages/)", path) is not None
    return not inner and not re.match(r"torch/|transformers/|pydantic|glmpp/(?!loader\.py|vllm_plugin\.py)|<", trim(path))


def describe(error: BaseException) -> dict:
    """Exception type, message, key, where in vLLM (or in the kit's helper) it rose, and the trimmed traceback."""
    frames = traceback.extract_tb(error.__traceback__)
    lines = [(trim(f.filename), f.lineno, f.name, f.line) for f in frames if is_shown(f.filename)]
    file, line, function, _ = lines[-1] if lines else (trim(frames[-1].filename), frames[-1].lineno, frames[-1].name, "")
    message = re.sub(r"(?<![\w.])/[\w./-]+/(?=(?:vllm|torch|glmpp|transformers)/)", "", str(error))
    return {
        "exception": type(error).__name__,
        "message": message[:2000],
        "key": str(error.args[0]) if isinstance(error, KeyError) and error.args else None,
        "place": f"{file}:{line}",
        "function": function,
        "traceback": [f"{file}:{line} in {function}\n    {source}" for file, line, function, source in lines],
    }


def versions() -> dict:
    import platform
    from importlib.metadata import version

    return {
        "python": platform.python_version(),
        "vllm": _contract.vllm_version(),
        **{name: version(name) for name in ("torch", "transformers")},
    }


def preload() -> None:
    """Everything slow and common to all requests: half a minute of imports the first time, a second once forked."""
    install_platform()
    _contract.require(_contract.DRY_RUN)
    import vllm.engine.arg_utils
    import vllm.model_executor.model_loader.default_loader
    import vllm.model_executor.models.registry  # noqa: F401

    inspect_in_process()
    from vllm.model_executor.layers.quantization import get_quantization_config

    get_quantization_config("fp8")
    for module in ("deepseek_v2", "deepseek_mtp"):
        with contextlib.suppress(ImportError):
            importlib.import_module(f"vllm.model_executor.models.{module}")


def serve(request: dict, world: dict, turns: int, send) -> None:
    """Answer one request: those of its runs that are this fork's turn, one message each."""
    if request["kind"] == "tiny_model":
        from glmpp._tiny_models import make

        return send({"kind": "tiny_model", **make(request["architecture"], Path(request["directory"]), request["tied"])})
    if request["kind"] == "architectures":
        from vllm.model_executor.models.registry import ModelRegistry

        return send({"kind": "architectures", "names": sorted(ModelRegistry.get_supported_archs()), "versions": versions()})
    if request["kind"] == "pp_indices":
        from vllm.distributed.utils import get_pp_indices

        set_layer_counts(request["layer_counts"])
        indices = [[get_pp_indices(layers, rank, size) for rank in range(size)] for layers, size in request["cases"]]
        return send({"kind": "pp_indices", "indices": indices})
    init_groups(world["rank"], world["size"], world["group"])
    send({"kind": "ready", "versions": versions()})
    if request["kind"] == "load_time":
        from glmpp._load_time_child import measure

        return measure(request, send)
    stages = Stages(request)
    while number := os.read(turns, 2):
        at = int.from_bytes(number, sys.byteorder)
        run = request["runs"][at]
        if world["size"] == 1:
            pretend_rank(run["rank"], run["size"])
        send({"kind": "stage", "run": at, **run, **stages.run(run["rank"], run["size"], run["drafter"])})


def peak_rss_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def resident_bytes() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize()


def end_with_parent() -> None:
    """Let the kernel of the system end this process with the server, which ends with the kernel of the notebook."""
    with contextlib.suppress(AttributeError):  # Linux has it
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def answer(names: dict, pipe: int, turns: int) -> None:
    """In a fork of its own: read the request, write messages into the pipe and everything else into the log.

    Args:
        names: request, log, group: files in a folder of the request's own; rank and size in the process group.
        turns: where the numbers of the runs come from, two bytes each.
    """
    end_with_parent()
    log = os.open(names["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 1)
    os.dup2(log, 2)
    shared = resident_bytes()
    with os.fdopen(pipe, "w") as channel:

        def send(message: dict) -> None:
            channel.write(json.dumps(message) + "\n")
            channel.flush()

        send({"kind": "pid", "pid": os.getpid()})
        try:
            with open(names["request"]) as file:
                request = json.load(file)
            os.chdir(os.path.dirname(names["request"]))
            serve(request, names, turns, send)
            send({"kind": "end", "peak_rss_bytes": peak_rss_bytes(), "shared_bytes": shared})
        except BaseException:
            traceback.print_exc()  # before the pipe closes: the parent reads the log then
            sys.stderr.flush()
            raise


def main(descriptor: int) -> None:
    """Import vLLM once, then fork for every message on a connection, so that no request sees another's patches.

    A message is a JSON object, see `answer`, and with it come the pipe to answer into and the one that gives out turns.
    The process ends when the last connection is closed: those who asked have gone.

    Args:
        descriptor: of a listening socket, which somebody has connected to.
    """
    preload()
    gc.freeze()  # what the forks inherit is not theirs to look through, and stays shared
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # finished forks are reaped by the kernel
    listening, sockets = socket.socket(fileno=descriptor), selectors.DefaultSelector()
    sockets.register(listening, selectors.EVENT_READ)
    while True:
        for key, _ in sockets.select():
            if key.fileobj is listening:
                client, _ = listening.accept()
                if is_same_user(client):
                    sockets.register(client, selectors.EVENT_READ)
                continue
            names, pipes, *_ = socket.recv_fds(key.fileobj, 4096, 2)
            if not names:
                sockets.unregister(key.fileobj)
                key.fileobj.close()
                if len(sockets.get_map()) == 1:
                    return
                continue
            if os.fork() == 0:
                try:
                    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                    for other in list(sockets.get_map().values()):
                        other.fileobj.close()
                    answer(json.loads(names), *pipes)
                finally:
                    os._exit(0)  # no exit handlers: they are the server's
            for pipe in pipes:
                os.close(pipe)


def is_same_user(client: socket.socket) -> bool:
    """Whether a connection is this user's. The socket has no file whose permissions would see to it."""
    _pid, uid, _gid = struct.unpack("3i", client.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i")))
    return uid == os.getuid()
