"""The child process of `glmpp.dry_run`: the installed vLLM's own classes, one pipeline stage after another.

Real: EngineArgs and every config check, the model class and its `__init__`, `make_layers`, the placeholders, the default
loader, `load_weights`, every parameter's `weight_loader`. Stand-ins, and why each is needed, are in `STAND_INS`.
Nothing here is imported by the parent. vLLM is imported once; each request is answered in a fork, so that patches and
process groups stay in it.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import inspect
import json
import os
import re
import resource
import signal
import socket
import sys
import time
import traceback
from types import SimpleNamespace

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

from glmpp.loader import WriteRecorder

HELPER = "_try_load_fp8_indexer_wk"
STAND_INS = {
    "platform": "vLLM's CpuPlatform, answering FLASHMLA_SPARSE when asked for a sparse-MLA attention backend: "
    "the CPU platform refuses to name one",
    "MLAAttention": "an empty module: its kernels exist for GPUs only; it holds no checkpoint tensor of GLM-5",
    "FP8 linear kernel": "an empty object: the chooser refuses CPUs without AMX; parameters are created as always",
    "class inspection": "in this process instead of a subprocess: the subprocess would miss the platform",
}
RANK_STAND_IN = "a real gloo group of size 1 whose rank and size fields are rewritten for each stage"


# --- stand-ins ----------------------------------------------------------------------------------------------------


def install_platform() -> None:
    """Must run before any other vLLM module is imported: many ask for the platform at import time."""
    import vllm.platforms
    from vllm.platforms.cpu import CpuPlatform

    class DryRunPlatform(CpuPlatform):
        @classmethod
        def import_kernels(cls) -> None:
            pass

        @classmethod
        def get_attn_backend_cls(cls, selected_backend, attn_selector_config, *args, **kwargs) -> str:
            if attn_selector_config.use_mla or getattr(attn_selector_config, "use_sparse", False):
                from vllm.v1.attention.backends.registry import AttentionBackendEnum

                return AttentionBackendEnum.FLASHMLA_SPARSE.get_path()
            return super().get_attn_backend_cls(selected_backend, attn_selector_config, *args, **kwargs)

    vllm.platforms.current_platform = vllm.platforms._current_platform = DryRunPlatform()


def install_stand_ins() -> None:
    import vllm.model_executor.layers.mla as mla
    import vllm.model_executor.layers.quantization.fp8 as fp8
    import vllm.model_executor.models.registry as registry

    class NoAttention(torch.nn.Module):
        def __init__(self, *args, **kwargs):
            super().__init__()

    mla.MLAAttention = NoAttention
    if hasattr(fp8, "init_fp8_linear_kernel"):
        fp8.init_fp8_linear_kernel = lambda *args, **kwargs: SimpleNamespace()
    registry._run_in_subprocess = lambda function: function()


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


# --- guards -------------------------------------------------------------------------------------------------------


class Guard:
    """Puts the wanted helper into every vLLM module that calls it, and remembers the buffers it was given."""

    def __init__(self, mode: str, helper: str, callers: list[str] | None):
        self.mode, self.callers = mode, callers
        module, _, name = helper.partition(":")
        self.helper = getattr(importlib.import_module(module), name) if mode == "helper" else None
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

        def call(name, tensor, buffer, params, loaded, *_, **__):
            if not any(buffer is known for known in self.buffers):
                self.buffers.append(buffer)
            frame = sys._getframe(1)
            while not isinstance(frame.f_locals.get("self"), torch.nn.Module):
                frame = frame.f_back
            model = frame.f_locals["self"]  # the model whose load_weights is calling
            if id(model) not in self.missing:  # reset() before every load, so that no id is a dead model's
                from glmpp.vllm_plugin import missing_prefixes

                self.missing[id(model)] = missing_prefixes(model)
            return self.helper(name, tensor, buffer, params, loaded, self.missing[id(model)])

        return call

    def blinded(self, original):
        signature = inspect.signature(original)

        def call(*args, **kwargs):
            bound = signature.bind(*args, **kwargs)
            bound.arguments["pp_missing_layer_names"] = []
            return original(*bound.args, **bound.kwargs)

        return call


# --- one stage ----------------------------------------------------------------------------------------------------


class Stages:
    """Builds and loads the stages that the request asks for."""

    def __init__(self, request: dict):
        from glmpp.checkpoint import TORCH_DTYPES

        self.request = request
        self.specs = [(name, TORCH_DTYPES[dtype], shape) for name, dtype, shape in request["tensors"]]
        self.guard = Guard(request["guard"], request["helper"], request["callers"])

    def vllm_config(self, rank: int, size: int, drafter: bool):
        from vllm.engine.arg_utils import EngineArgs

        os.environ.pop("VLLM_PP_LAYER_PARTITION", None)
        if self.request["layer_counts"] and size > 1:
            os.environ["VLLM_PP_LAYER_PARTITION"] = self.request["layer_counts"]
        config = EngineArgs(
            model=self.request["model"],
            skip_tokenizer_init=True,
            load_format="glmpp" if self.request["guard"] == "loader" else "safetensors",
            enforce_eager=True,
            max_model_len=2048,
            pipeline_parallel_size=size,
            distributed_executor_backend="mp",
            speculative_config={"method": "mtp", "num_speculative_tokens": 1} if drafter else None,
        ).create_engine_config()
        config.parallel_config.rank = rank
        return config

    def loader(self, config, recorder: WriteRecorder):
        """The loader that vLLM chooses, its source replaced by meta tensors unless real bytes are asked for."""
        from vllm.model_executor.model_loader import get_model_loader

        from glmpp.vllm_plugin import StageModelLoader

        meta, chosen = self.request["weights"] == "meta", type(get_model_loader(config.load_config))

        class Loader(chosen):
            def get_all_weights(loader, model_config, model):
                return recorder.hand_over(super().get_all_weights(model_config, model))

            def _get_weights_iterator(loader, source):
                if not meta:
                    return super()._get_weights_iterator(source)
                if not isinstance(loader, StageModelLoader):
                    return self.meta_tensors()
                return loader.selection.counted(pair for pair in self.meta_tensors() if loader.selection.wants(pair[0]))

            def check(loader, left, model, model_config):
                if not meta:  # meta tensors have no addresses to watch: `account` goes by the operators instead
                    super().check(left, model, model_config)

        return Loader(config.load_config)

    def meta_tensors(self):
        for name, dtype, shape in self.specs:
            yield name, torch.empty(shape, dtype=dtype, device="meta")

    def run(self, rank: int, size: int, drafter: bool = False) -> dict:
        from vllm.config import set_current_vllm_config
        from vllm.model_executor.model_loader.utils import initialize_model
        from vllm.model_executor.models import utils
        from vllm.utils.torch_utils import set_default_torch_dtype

        utils._model_to_pp_missing_layer_names.clear()  # keyed by id(model): see missing_prefixes
        result = {"verdict": "cannot be built"}
        started = time.perf_counter()
        model = recorder = loader = None
        try:
            config = self.vllm_config(rank, size, drafter)
            model_config = config.speculative_config.draft_model_config if drafter else config.model_config
            device = "meta" if self.request["weights"] == "meta" else "cpu"
            with set_current_vllm_config(config), set_default_torch_dtype(model_config.dtype), torch.device(device):
                model = initialize_model(vllm_config=config, model_config=model_config)
                result["build_seconds"] = time.perf_counter() - started
                result["patched"] = self.guard.install()
                self.guard.reset()
                recorder = WriteRecorder(model)
                result["verdict"] = "dies"
                started = time.perf_counter()
                loader = self.loader(config, recorder)
                with recorder:
                    loader.load_weights(model, model_config)
            result["verdict"] = "loads"
        except Exception as error:
            result.update(describe(error), tensor=recorder.order[-1] if recorder and recorder.order else None)
        result["load_seconds" if model is not None else "build_seconds"] = time.perf_counter() - started
        if model is not None:
            selection = getattr(loader, "selection", None)
            result.update(self.account(model, recorder, selection, drafter, model_config))
            result["model_class"] = f"{type(model).__module__}.{type(model).__qualname__}"
        return result

    def account(self, model: torch.nn.Module, recorder: WriteRecorder, selection, drafter: bool, model_config) -> dict:
        """What became of every tensor and parameter, from the writes that were seen."""
        from glmpp.vllm_plugin import accounted, missing_prefixes

        missing = tuple(missing_prefixes(model))
        config = self.request["config"]
        first, count = config.get("num_hidden_layers", 0), config.get("num_nextn_predict_layers") or 0
        speculative = tuple(f"model.layers.{first + i}." for i in range(count)) or ("\0",)
        # A buffered pair is stored when its second half arrives: the write credits both.
        stems = {re.sub(r"_scale(_inv)?$", "", name) for name in recorder.stored if re.search(r"\.weight(_scale)?", name)}
        reached = set(recorder.order)
        dropped = set() if selection is None else {name for name, *_ in self.specs if not selection.wants(name)}

        def column(name: str) -> str:
            if name not in reached and name not in dropped:
                return "not reached"
            if name in recorder.stored or re.sub(r"_scale(_inv)?$", "", name) in stems:
                return "loaded"
            if drafter:
                return "another stage's" if not name.startswith(speculative) else "unexpected"
            if name.startswith(speculative):
                return "speculative layer"
            return "another stage's" if name.startswith(missing) else "unexpected"

        runs: list[list] = []
        for name, *_ in self.specs:
            found = column(name)
            if runs and runs[-1][0] == found:
                runs[-1][1] += 1
            else:
                runs.append([found, 1])
        sizes = {name: p.numel() for name, p in model.named_parameters()}
        account = {
            "handed_over": len(recorder.order),
            "order": hashlib.sha256("\n".join(recorder.order).encode()).hexdigest(),
            "columns": runs,
            "parameters": {name: [recorder.written[name], size] for name, size in sizes.items()},
            "missing_prefixes": list(missing),
            "accounted": accounted(recorder.left_at_init(), model, model_config),
            "pending": {  # what the helper still holds back
                layer: sum(t.nbytes for t in parts.values())
                for buffer in self.guard.buffers
                for layer, parts in buffer.items()
                if parts
            },
        }
        if self.request["weights"] == "real":
            account["digests"] = {name: digest(p) for name, p in model.named_parameters()}
        return account


def digest(tensor: torch.Tensor) -> str:
    """SHA-256 of dtype, shape and bytes."""
    head = f"{tensor.dtype} {list(tensor.shape)} ".encode()
    return hashlib.sha256(head + tensor.detach().contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()


def trim(path: str) -> str:
    """A source path without the machine: from the package on."""
    match = re.search(r"(?:.*/(?:site|dist)-packages/|.*/lib/python[\d.]+/|.*/(?=glmpp/))(.+)", path)
    return match[1] if match else os.path.basename(path)


def describe(error: BaseException) -> dict:
    """Exception type, message, key, where in vLLM (or in the kit's helper) it rose, and the trimmed traceback."""
    frames = [(trim(f.filename), f.lineno, f.name, f.line) for f in traceback.extract_tb(error.__traceback__)]
    shown = [f for f in frames if f[0].startswith("vllm/") or f[0] in ("glmpp/loader.py", "glmpp/vllm_plugin.py")]
    file, line, function, _ = shown[-1] if shown else frames[-1]
    message = re.sub(r"(?<![\w.])/[\w./-]+/(?=(?:vllm|torch|glmpp|transformers)/)", "", str(error))
    return {
        "exception": type(error).__name__,
        "message": message[:2000],
        "key": error.args[0] if isinstance(error, KeyError) and error.args else None,
        "place": f"{file}:{line}",
        "function": function,
        "traceback": [f"{file}:{line} in {function}\n    {source}" for file, line, function, source in shown],
    }


def versions() -> dict:
    import platform
    from importlib.metadata import version

    return {"python": platform.python_version(), **{name: version(name) for name in ("vllm", "torch", "transformers")}}


def preload() -> None:
    """Everything slow and common to all requests: half a minute of imports the first time, a second once forked."""
    install_platform()
    import vllm.engine.arg_utils
    import vllm.model_executor.model_loader.default_loader
    import vllm.model_executor.models.registry  # noqa: F401

    install_stand_ins()
    from vllm.model_executor.layers.quantization import get_quantization_config

    get_quantization_config("fp8")
    for module in ("deepseek_v2", "deepseek_mtp"):
        with contextlib.suppress(ImportError):
            importlib.import_module(f"vllm.model_executor.models.{module}")


def serve(request: dict, send) -> None:
    """Answer one request: every run of it, one message each."""
    world = request["world"]
    init_groups(world["rank"], world["size"], world["init_file"])
    stand_ins = {**STAND_INS, "pipeline group": RANK_STAND_IN} if world["size"] == 1 else STAND_INS
    send({"kind": "ready", "versions": versions(), "stand_ins": stand_ins})
    if request["kind"] == "load_time":
        from glmpp._load_time_child import measure

        measure(request, send)
    stages = Stages(request)
    for run in request["runs"]:
        if world["size"] == 1:
            pretend_rank(run["rank"], run["size"])
        send({"kind": "stage", **run, **stages.run(run["rank"], run["size"], run["drafter"])})
    send({"kind": "end", "peak_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024})


def answer(path: str, pipe: int) -> None:
    """In a fork of its own: read the request, write messages into the pipe and everything else into the log."""
    with open(path) as file:
        request = json.load(file)
    log = os.open(request["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.chdir(request["cwd"])
    sys.path.insert(0, request["cwd"])  # where the reader's own helper may lie
    with os.fdopen(pipe, "w") as channel:

        def send(message: dict) -> None:
            channel.write(json.dumps(message) + "\n")
            channel.flush()

        send({"kind": "pid", "pid": os.getpid()})
        try:
            serve(request, send)
        except BaseException:
            traceback.print_exc()  # before the pipe closes: the parent reads the log then
            sys.stderr.flush()
            raise


def main() -> None:
    """Import vLLM once, then fork for every request, so that no request sees another's patches.

    A request is a message on the socket: the path of a JSON file, and with it the pipe to answer into.
    """
    preload()
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # finished forks are reaped by the kernel
    server = socket.socket(fileno=int(sys.argv[1]))
    while True:
        path, pipes, *_ = socket.recv_fds(server, 4096, 1)
        if not path:
            return  # the kernel that started this process has gone
        if os.fork() == 0:
            try:
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                server.close()
                answer(path.decode(), pipes[0])
            finally:
                os._exit(0)  # no exit handlers: they are the server's
        os.close(pipes[0])


if __name__ == "__main__":
    main()
