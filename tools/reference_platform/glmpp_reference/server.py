"""`vllm serve` on the reference platform: started, asked over HTTP, stopped, and what its processes said.

Everything is read from outside, as an operator sees it: exit code, log, the OpenAI interface.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

from glmpp.errors import GlmppError
from glmpp.partition import PARTITION_VARIABLE
from glmpp_reference.oracle import Answer
from glmpp_reference.served import LONGEST, TOKENS

LINE = re.compile(r"^(?:\((?P<who>[^)]*?) pid=\d+\) )?(?:[A-Z]+ [\d-]+ [\d:]+ (?:\[[^\]]*\] ?)?)?(?P<text>.*)$")
ERROR = re.compile(r"^(?P<kind>[\w.]*(?:Error|Exception)): (?P<message>.*)$")


class Server:
    """`vllm serve` with its worker processes, and its log.

    Args:
        directory: the checkpoint's.
        pp_size: pipeline stages, each a process of its own; they share the cores that there are.
        load_format: "auto" for vLLM's own, or "glmpp".
        skip: a wrong fix to run with, a name in `wrong_fixes.WRONG`.
    """

    def __init__(self, directory: str | Path, pp_size: int, load_format: str = "auto", skip: str = ""):
        self.directory = Path(directory)
        self.port = free_port()
        self.arguments = [
            *("--pipeline-parallel-size", str(pp_size)),
            *("--load-format", load_format),
            *("--dtype", "float32"),  # in which tokens can be compared
        ]
        self.environment = {
            **{name: value for name, value in os.environ.items() if name != PARTITION_VARIABLE},
            "GLMPP_REFERENCE": "1",
            "GLMPP_REFERENCE_SKIP": skip,
            "VLLM_CPU_OMP_THREADS_BIND": "|".join(str(core) for core in cores(pp_size)),
            "VLLM_CPU_KVCACHE_SPACE": "1",
            "VLLM_NO_USAGE_STATS": "1",
            "DO_NOT_TRACK": "1",
            "HF_HUB_OFFLINE": "1",
        }
        self.seconds = 0.0  # until it was up, or dead

    @property
    def command(self) -> str:
        """What a user would type."""
        return " ".join(["vllm serve", self.directory.name, *self.arguments])

    def start(self, timeout: float = 600) -> bool:
        """Start it and wait until it is up (True) or has ended (False).

        Raises:
            GlmppError: neither within `timeout` seconds.
        """
        options = ["--host", "127.0.0.1", "--port", str(self.port), "--served-model-name", "model"]
        limits = ["--max-model-len", str(LONGEST), "--max-num-seqs", "4"]
        # What `vllm serve` runs. The command itself ends at once in vllm-cpu: it asks for the version of a package "vllm".
        program = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(self.directory)]
        self._log = tempfile.TemporaryFile()  # noqa: SIM115  not a pipe, which a worker could hold open
        started = time.perf_counter()
        self.process = subprocess.Popen(
            [*program, *self.arguments, *options, *limits],
            env=self.environment,
            stdout=self._log,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )
        while time.perf_counter() - started < timeout:
            up = self._answers()
            if up or self.process.poll() is not None:
                self.seconds = time.perf_counter() - started
                return up
            time.sleep(0.5)
        raise self._broken(f"neither up nor ended after {timeout:.0f} s")

    def __enter__(self) -> Server:
        self.up = self.start()
        return self

    def __exit__(self, *_) -> None:
        self.code = self.stop()

    def _broken(self, why: object) -> GlmppError:
        return GlmppError(f"{self.command}: {why}; it said last:", self.log[-2000:].splitlines())

    def _answers(self) -> bool:
        with contextlib.suppress(OSError):
            return self._open("/health").status == 200
        return False

    def _open(self, path: str, body: dict | None = None):
        request = urllib.request.Request(f"http://127.0.0.1:{self.port}{path}", headers={"Content-Type": "application/json"})
        if body is not None:
            request.data = json.dumps(body).encode()
        return urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=300)

    def complete(self, asked: list[list[int]]) -> list[Answer]:
        """Greedy completions of all prompts in one request, that is, in one batch."""
        body = {
            "model": "model",
            "prompt": asked,
            "max_tokens": TOKENS,
            "temperature": 0,
            "logprobs": 5,
            "ignore_eos": True,
        }
        try:
            choices = json.load(self._open("/v1/completions", body))["choices"]
        except OSError as error:
            raise self._broken(error) from error
        return [as_answer(choice["logprobs"]) for choice in sorted(choices, key=lambda choice: choice["index"])]

    def stop(self) -> int:
        """End the server and all its workers; its exit code, or that with which it had ended by itself."""
        code = self.process.poll()
        if code is None:
            self.process.terminate()  # the server alone: it ends its engine, the engine its workers
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(30)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)  # whoever is left
        self.process.wait()
        self.text = self.log
        self._log.close()
        return self.process.wait() if code is None else code

    @property
    def log(self) -> str:
        """What its processes have said so far."""
        if self._log.closed:
            return self.text
        return os.pread(self._log.fileno(), os.fstat(self._log.fileno()).st_size, 0).decode(errors="replace")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def cores(workers: int) -> Iterator[int]:
    """A core for each worker, over and over where there are fewer."""
    mine = sorted(os.sched_getaffinity(0))
    return (mine[worker % len(mine)] for worker in range(workers))


def as_answer(logprobs: dict) -> Answer:
    """From what the OpenAI interface says of one completion, in words of the small tokenizer."""
    return Answer(
        [int(word[1:]) for word in logprobs["tokens"]],
        [{int(word[1:]): value for word, value in step.items()} for step in logprobs["top_logprobs"]],
    )


# --- what its processes said --------------------------------------------------------------------------------------


def lines(log: str) -> Iterator[tuple[str, str]]:
    """(process, text) for each line, without times and process numbers; "" for a line that names no process."""
    for line in log.splitlines():
        match = LINE.match(line)
        yield match["who"] or "", match["text"]


def deaths(log: str) -> dict[str, str]:
    """Worker -> the first error that it ended in, e.g. `Worker_PP1` -> `KeyError: 'layers.0…'`."""
    found: dict[str, str] = {}
    for who, text in lines(log):
        if who.startswith("Worker") and (match := ERROR.match(text.strip())):
            found.setdefault(who, f"{match['kind']}: {match['message']}")
    return found


def excerpt(log: str, *patterns: str) -> str:
    """The lines that match one of the patterns, as a reader needs them: no times, numbers or folders, none twice."""
    kept: dict[str, None] = {}
    for who, text in lines(log):
        if any(re.search(pattern, text) for pattern in patterns):
            short = re.sub(r"(/[^\s'\",:]+)+/", "…/", text.strip())
            kept[f"({who}) {short}" if who else short] = None
    return "\n".join(kept)


def last_lines(log: str, count: int = 3) -> str:
    """The last lines of the server itself, which is what a terminal shows when the prompt is back."""
    own = [text for who, text in lines(log) if who == "APIServer" and text.strip()]
    return "\n".join(re.sub(r"(/[^\s'\",:]+)+/", "…/", text) for text in own[-count:])
