"""The process that has imported vLLM: it forks for every request, so that patches and process groups stay in the fork.

Real: EngineArgs and every config check, the model class and its `__init__`, `make_layers`, the placeholders, the default
loader, `load_weights`, every parameter's `weight_loader`. Stand-ins, and why each is needed, are in `stand_ins`. Nothing
here is imported by the parent.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import gc
import importlib.util
import json
import os
import resource
import selectors
import signal
import socket
import struct
import sys
import tempfile
import traceback

from glmpp.engine import contract
from glmpp.engine.failures import frames, is_kits, without_paths
from glmpp.engine.stand_ins import expert_map_on_cpu, inspect_in_process, install_platform
from glmpp.errors import GlmppError
from glmpp.gpus import CPU

# Before torch and vLLM are imported. The GPU, if there is one, stays unseen: verdicts must not depend on the machine. Nor on
# what a launcher has set for processes of its own: vLLM would wait for the other ranks.
for name in [name for name in os.environ if name.startswith("VLLM_DP_")]:
    del os.environ[name]
for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
    os.environ.pop(name, None)
os.environ.update(
    CUDA_VISIBLE_DEVICES="",
    VLLM_CONFIGURE_LOGGING="0",
    VLLM_NO_USAGE_STATS="1",
    DO_NOT_TRACK="1",
    HF_HUB_OFFLINE="1",
    HUMMING_DISABLE_PARALLEL_BUILD="1",  # vLLM >= 0.32 starts background compiles from an import
    CUDA_TILE_TEMP_DIR=tempfile.gettempdir(),  # else an import makes one, which nobody uses or removes
    TQDM_DISABLE="1",
    VLLM_ALLOW_LONG_MAX_MODEL_LEN="1",  # the length asked for is nominal: nothing is generated
    # What is chosen for a GPU must not depend on this machine: without it vLLM looks for nvcc, and asks NVIDIA's server.
    VLLM_HAS_FLASHINFER_CUBIN="1",
)


# jsonschema imports it where it is installed (JupyterLab brings it) and builds a grammar for 3.6 s; vLLM never uses it.
sys.modules["rfc3987_syntax"] = None  # type: ignore[assignment]

# What vLLM imports only once a model is built, which would be half of the time of a small model's verdict in every fork. A
# release that has no such module does without.
BACKENDS = "vllm.v1.attention.backends"
LATE = [
    "vllm.model_executor.models.adapters",
    "vllm.model_executor.models.deepseek_mtp",
    "vllm.model_executor.models.deepseek_v2",
    "vllm.model_executor.models.llama",
    "vllm.v1.executor.multiproc_executor",
]
LATE_ON_GPU = [
    "flashinfer",
    "vllm.compilation.passes.fusion.allreduce_rms_fusion",
    "vllm.models.deepseek_v32",
    "vllm.third_party.deep_gemm",
    *(f"{BACKENDS}.{name}" for name in ("flash_attn", "flashinfer", "triton_attn", "flex_attention", "turboquant_attn")),
    *(f"{BACKENDS}.mla.{name}" for name in ("flashattn_mla", "flashmla", "flashmla_sparse", "triton_mla")),
]


FAULT = 70  # the exit code after a fault of the kit: EX_SOFTWARE of sysexits.h


def preload(target: str) -> None:
    """Everything slow and common to all requests: half a minute of imports the first time, a second once forked."""
    install_platform(target)
    contract.require(contract.DRY_RUN)
    import glmpp.engine.answers  # noqa: F401  imports vLLM, which has to find the platform

    inspect_in_process()
    expert_map_on_cpu()
    from vllm.model_executor.layers.quantization import get_quantization_config

    get_quantization_config("fp8")
    contract.missing(contract.KV_CACHE)  # looks, and so imports
    for module in LATE + (LATE_ON_GPU if target != CPU else []):
        with contextlib.suppress(ImportError):
            importlib.import_module(module)


def peak_rss_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def resident_bytes() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize()


def end_with_parent(parent: int) -> None:
    """Let the kernel of the system end this process with the server, which ends with the kernel of the notebook.

    Args:
        parent: the server's process id, as it was before the fork: what had gone until now is told to nobody.
    """
    with contextlib.suppress(AttributeError):  # Linux has it
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    if os.getppid() != parent:
        os._exit(1)


def answer(names: dict, pipe: int, turns: int) -> None:
    """In a fork of its own: read the request, write messages into the pipe and everything else into the log.

    Args:
        names: request, log, group: files in a folder of the request's own; rank and size in the process group, and tp:
            how many of it share a stage.
        turns: where the numbers of the runs come from, two bytes each.
    """
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
            from glmpp.engine.answers import serve

            serve(request, names, turns, send)
            send({"kind": "end", "peak_rss_bytes": peak_rss_bytes(), "shared_bytes": shared})
        except BaseException as error:
            traceback.print_exc()  # before the pipe closes: the parent reads the log then
            sys.stderr.flush()
            if isinstance(error, GlmppError):
                send({"kind": "refused", "message": str(error)})
            elif is_kits(error):
                send({"kind": "fault", "message": told(error)})
            raise


def told(error: BaseException) -> str:
    """A fault of the kit in a line, its traceback behind it."""
    where = frames(error)
    return "\n".join([f"{type(error).__name__}: {without_paths(str(error))}", *map(str, where)])


def main(descriptor: int, target: str, turn: int | None = None) -> None:
    """Import vLLM once, then fork for every message on a connection, so that no request sees another's patches.

    A message is a JSON object, see `answer`, and with it come the pipe to answer into and the one that gives out turns.
    The process ends when the last connection is closed: those who asked have gone.

    Args:
        descriptor: of a listening socket, which somebody has connected to.
        target: the GPU that is pretended, or "cpu".
        turn: of a file that is locked while vLLM is imported.
    """
    if turn is not None:
        fcntl.lockf(turn, fcntl.LOCK_EX)
    gc.disable()  # what is imported stays: looking through it again and again would be a fifth of the time
    try:
        preload(target)
    except Exception as error:
        if is_kits(error):
            print(told(error), file=sys.stderr)
            sys.exit(FAULT)
        raise
    if turn is not None:
        os.close(turn)  # and unlocks it, as the end of the process would
    gc.freeze()  # what the forks inherit is not theirs to look through, and stays shared
    gc.set_threshold(50_000)  # a load makes many objects, and little garbage
    gc.enable()
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # finished forks are reaped by the kernel
    server, listening, sockets = os.getpid(), socket.socket(fileno=descriptor), selectors.DefaultSelector()
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
                    end_with_parent(server)
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
