"""The process that has imported vLLM: it forks for every request, so that patches and process groups stay in the fork.

Real: EngineArgs and every config check, the model class and its `__init__`, `make_layers`, the placeholders, the default
loader, `load_weights`, every parameter's `weight_loader`. Stand-ins, and why each is needed, are in `stand_ins`. Nothing
here is imported by the parent.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import importlib.util
import os
import resource
import select
import signal
import socket
import sys
import tempfile
import threading
import traceback
from collections.abc import Callable, Iterator
from importlib.metadata import entry_points
from pathlib import Path

import msgspec

from glmpp.dryrun.messages import AnyRequest, End, Message, Refused, World
from glmpp.dryrun.pretend.failures import frames, is_kits, what_to_install, without_paths
from glmpp.dryrun.scratch import remove_scratch
from glmpp.errors import GlmppError, KitError
from glmpp.gpus import CPU
from glmpp.serving import contract

# Before torch and vLLM are imported. The GPU, if there is one, stays unseen: verdicts must not depend on the machine.
os.environ.update(
    CUDA_VISIBLE_DEVICES="",
    VLLM_CONFIGURE_LOGGING="0",
    VLLM_NO_USAGE_STATS="1",
    DO_NOT_TRACK="1",
    HF_HUB_OFFLINE="1",
    HUMMING_DISABLE_PARALLEL_BUILD="1",  # vLLM >= 0.32 starts background compiles from an import
    CUDA_TILE_TEMP_DIR=tempfile.gettempdir(),  # else each import makes another
    TQDM_DISABLE="1",
    VLLM_ALLOW_LONG_MAX_MODEL_LEN="1",  # the length asked for is nominal: nothing is generated
    # What is chosen for a GPU must not depend on this machine: without it vLLM looks for nvcc, and asks NVIDIA's server.
    VLLM_HAS_FLASHINFER_CUBIN="1",
)


# jsonschema imports it where it is installed (JupyterLab brings it) and builds a grammar for 3.6 s; vLLM never uses it.
sys.modules["rfc3987_syntax"] = None  # type: ignore[assignment]

# What vLLM imports only once a model is built, which would be half of the time of a small model's verdict in every fork. A
# release that has no such module does without.
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
    "vllm.v1.attention.backends.flash_attn",
    "vllm.v1.attention.backends.flashinfer",
    "vllm.v1.attention.backends.triton_attn",
    "vllm.v1.attention.backends.flex_attention",
    "vllm.v1.attention.backends.turboquant_attn",
    "vllm.v1.attention.backends.mla.flashattn_mla",
    "vllm.v1.attention.backends.mla.flashmla",
    "vllm.v1.attention.backends.mla.flashmla_sparse",
    "vllm.v1.attention.backends.mla.triton_mla",
]


def preload(target: str) -> None:
    """Everything slow and common to all requests: half a minute of imports the first time, a second once forked."""
    from glmpp.dryrun.pretend.cpu_stand_ins import expert_map_on_cpu, inspect_in_process, install_platform

    install_platform(target)
    contract.require(contract.DRY_RUN)
    import glmpp.dryrun.child.handlers  # noqa: F401  imports vLLM, which has to find the platform

    inspect_in_process()
    expert_map_on_cpu()
    from vllm.model_executor.layers.quantization import get_quantization_config

    get_quantization_config("fp8")
    contract.missing(contract.KV_CACHE)  # looks, and so imports
    load_plugins()
    for module in LATE + (LATE_ON_GPU if target != CPU else []):
        with contextlib.suppress(ImportError):
            importlib.import_module(module)


def load_plugins() -> None:
    """vLLM's general plugins, those of VLLM_PLUGINS if it is set, once and for all requests. What one raises is its own.

    Raises:
        GlmppError: one of them fails. In `vllm serve` it has all variables of the environment, and may not.
    """
    from vllm import plugins

    group = plugins.DEFAULT_PLUGINS_GROUP
    for name, run in plugins.load_plugins_by_group(group).items():
        try:
            run()
        except (Exception, SystemExit) as error:
            points = (point for point in entry_points(group=group) if point.name == name and point.dist)
            whose = ", ".join(f"{point.dist.name} {point.dist.version}" for point in points) or "unknown"
            line, where = line_and_traceback(error)
            raise GlmppError(
                f"the vLLM plugin {name!r} (package {whose}) fails, with the few variables that it has here: {line}. "
                "Uninstall it, or name the plugins that are wanted in VLLM_PLUGINS",
                where,
            ) from None
    plugins.plugins_loaded = True


def peak_rss_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def resident_bytes() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize()


def answer(world: World, pipe: int, turns: int) -> None:
    """In a fork of its own: read the request, write messages into the pipe and everything else into the log.

    Args:
        turns: where the numbers of the runs come from, two bytes each.
    """
    log = os.open(world.log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 1)
    os.dup2(log, 2)
    shared = resident_bytes()
    with os.fdopen(pipe, "wb") as channel:

        def send(message: Message) -> None:
            channel.write(msgspec.json.encode(message) + b"\n")
            channel.flush()

        try:
            request = msgspec.json.decode(Path(world.request).read_bytes(), type=AnyRequest)
            os.chdir(os.path.dirname(world.request))
            from glmpp.dryrun.child.handlers import serve

            serve(request, world, turns, send)
            send(End(peak_rss_bytes(), shared))
        except BaseException as error:
            traceback.print_exc()  # before the pipe closes: the parent reads the log then
            sys.stderr.flush()
            if isinstance(error, GlmppError) or is_kits(error):
                send(message_of(error))
            raise


def line_and_traceback(error: BaseException) -> tuple[str, list[str]]:
    where = [line for frame in frames(error) for line in str(frame).splitlines()]
    return f"{type(error).__name__}: {without_paths(str(error))}", where


def message_of(error: BaseException) -> Refused:
    """What is sent of an error that ends all: what the kit says, a fault of its own, or of what keeps vLLM from starting."""
    if not isinstance(error, GlmppError):
        line, where = line_and_traceback(error)
        if is_kits(error):
            error = KitError(line, where)
        else:
            advice = f"; {what_to_install(error)}" if isinstance(error, ImportError) and error.name else ""
            error = GlmppError(f"vLLM {contract.vllm_version()} cannot be imported here{advice}: {line}", where)
    return Refused(error.args[0], error.details, fault=isinstance(error, KitError))


@contextlib.contextmanager
def watched(connection: socket.socket, gone: Callable[[], None]) -> Iterator[None]:
    """Call a function when the other end is closed within the block. No thread is left after it."""
    read, write = os.pipe()

    def watch() -> None:
        poll = select.poll()
        poll.register(connection, 0)  # a hang-up is always told
        poll.register(read, 0)
        if connection.fileno() in dict(poll.poll()):
            gone()

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        os.close(write)
        thread.join()
        os.close(read)


def fork_for_each(connection: socket.socket, work: Callable[[bytes, int, int], None]) -> None:
    """Work on each request in a fork of its own, until the other end of the connection is closed.

    With a request come three pipes: the one to answer into, the one that gives out turns, and one that nothing is written
    into. When that is closed, whoever asked has what it wants, has waited long enough or is gone, and the fork is ended.
    """
    server, forks = os.getpid(), {}  # the last of a request's pipes -> process id
    poll = select.poll()
    poll.register(connection, select.POLLIN)
    while True:
        for descriptor, _ in poll.poll():
            if descriptor in forks:
                poll.unregister(descriptor)
                os.close(descriptor)
                end(forks.pop(descriptor))
                continue
            message, pipes, *_ = socket.recv_fds(connection, 65536, 3)
            if not message:
                for pid in forks.values():
                    end(pid)
                return
            pid = os.fork()
            if pid == 0:
                try:
                    end_with_parent(server)
                    connection.close()
                    work(message, *pipes[:2])
                finally:
                    os._exit(0)  # no exit handlers: they are the server's
            forks[pipes[2]] = pid
            poll.register(pipes[2], 0)
            for pipe in pipes[:2]:
                os.close(pipe)


def end(pid: int) -> None:
    """End a fork, be it at work or not. Nobody has waited for it yet: the number is its own."""
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)


def end_with_parent(parent: int) -> None:
    """Let the system end this process with the server, which was `parent` before the fork and may have gone since."""
    with contextlib.suppress(AttributeError):  # Linux has it
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    if os.getppid() != parent:
        os._exit(1)


def main(descriptor: int, target: str, folder: str) -> None:
    """Import vLLM once, then fork for every request, so that none sees another's patches.

    What is sent is a `World`, see `answer`. The process ends when the other end of the connection is closed: the kernel
    has gone.

    Args:
        descriptor: of the connection to the kernel.
        target: the GPU that is pretended, or "cpu".
        folder: of `glmpp.dryrun.scratch`, this process's own; it goes with it.
    """
    connection, failure = socket.socket(fileno=descriptor), None

    def leave() -> None:
        remove_scratch(Path(folder))
        os._exit(0)  # no exit handlers, which may wait

    def work(world: bytes, pipe: int, turns: int) -> None:
        if failure:
            os.write(pipe, msgspec.json.encode(failure) + b"\n")
        else:
            answer(msgspec.json.decode(world, type=World), pipe, turns)

    with watched(connection, leave):
        gc.disable()  # what is imported stays: looking through it again and again would be a fifth of the time
        try:
            preload(target)
        except (Exception, SystemExit) as error:
            traceback.print_exc()
            failure = message_of(error)
    gc.freeze()  # what the forks inherit is not theirs to look through, and stays shared
    gc.set_threshold(50_000)  # a load makes many objects, and little garbage
    gc.enable()
    fork_for_each(connection, work)
    leave()
