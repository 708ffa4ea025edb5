"""The real engine: `vllm serve` on the reference platform, what its processes said, and what it answered over HTTP.

Everything is read from outside, as an operator sees it: exit code, log, the OpenAI interface. The oracle is transformers'
`generate` on the same checkpoint, dequantised.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from glmpp.checkpoint import Checkpoint
from glmpp.errors import GlmppError
from glmpp.formats.glm5 import reduced_config
from glmpp.formats.index import INDEX_FILE
from glmpp.formats.shard import read_shard
from glmpp.lab.forward import unsplit_model
from glmpp.synthetic import write_checkpoint

# Of the small checkpoint. `index_topk` is small enough that a prompt can be longer; 32 index heads as in GLM-5.1, since
# with four a sixteenth of all scores is exactly zero, and ties have no right answer; eps is 1e-6 because transformers
# uses that for the two norms inside attention whatever the config says, and vLLM does what it says. No kernel here minds
# the size of a latent vector.
SIZES = {"index_topk": 16, "index_n_heads": 32, "rms_norm_eps": 1e-6, "kv_lora_rank": 128}
LONGEST = 256  # tokens of prompt and answer
TOKENS = 24  # of an answer
LENGTHS = (5, 40, 12, 25)  # of the prompts: two are shorter and two longer than `index_topk`
SHORT, LONG = (0, 2), (1, 3)
# Both sides compute in float32 and sum in different orders; 12 layers leave 1.5e-6 of a log-probability of about -5.
TOLERANCE = 2e-5


@dataclass
class Answer:
    """To one prompt: token ids, and for each the log-probabilities of the likeliest tokens."""

    tokens: list[int]
    logprobs: list[dict[int, float]] = field(repr=False)

    def differences(self, other: Answer) -> list[float]:
        """For each token, up to the first that is another: the largest difference of a log-probability that both name."""
        found = []
        for mine, theirs, a, b in zip(self.tokens, other.tokens, self.logprobs, other.logprobs):
            found.append(max(abs(a[token] - b[token]) for token in a.keys() & b.keys()))
            if mine != theirs:
                break
        return found

    def gap(self) -> float:
        """The smallest distance of a chosen token's log-probability from the runner-up's."""
        ranked = (sorted(step.values())[::-1] for step in self.logprobs)
        return min(best - second for best, second, *_ in ranked)


def write_served_checkpoint(config: dict | str | Path, directory: str | Path, **sizes) -> Checkpoint:
    """A small checkpoint with real bytes, and a tokenizer for it in which token 7 is the word `t7`."""
    checkpoint = write_checkpoint(reduced_config(config, **SIZES | sizes), directory)
    words = {f"t{token}": token for token in range(checkpoint.config["vocab_size"])}
    tokenizer = {
        "version": "1.0",
        "added_tokens": [],
        "pre_tokenizer": {"type": "WhitespaceSplit"},
        "model": {"type": "WordLevel", "vocab": words, "unk_token": "t0"},
    }
    Path(directory, "tokenizer.json").write_text(json.dumps(tokenizer))
    Path(directory, "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))
    return checkpoint


def prompts(vocabulary: int = 512) -> list[list[int]]:
    """Random token ids, the same every time."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(2, vocabulary, (length,), generator=generator).tolist() for length in LENGTHS]


def right_steps(prompt: int) -> int:
    """How many tokens of the answer to a short prompt do not depend on the indexer: up to index_topk all are attended to."""
    return max(0, SIZES["index_topk"] - LENGTHS[prompt] + 1)


# --- mutations of a checkpoint --------------------------------------------------------------------------------------


def swapped(name: str) -> str:
    """wk of layer 4 for that of layer 8."""
    if ".indexer.wk." not in name:
        return name
    return name.replace(".4.", ".x.").replace(".8.", ".4.").replace(".x.", ".8.")


def shifted(name: str) -> str:
    """The layers of stage 1 of 2, each one further on."""
    parts = name.split(".")
    if parts[1] == "layers" and 6 <= int(parts[2]) < 12:
        parts[2] = str(6 + (int(parts[2]) - 5) % 6)
    return ".".join(parts)


LOST = "model.layers.8.mlp.experts.2.up_proj.weight_scale_inv"


def without_a_scale(name: str) -> str | None:
    return None if name == LOST else name


def mutated(checkpoint: Checkpoint, folder: Path, rename: Callable[[str], str | None]) -> Path:
    """A copy of the checkpoint whose tensors have the names that `rename` makes of theirs; None loses a tensor."""
    shutil.copytree(checkpoint.directory, folder)
    weight_map = {}
    for file in sorted({spec.file for spec in checkpoint.values()}):
        held = {new: tensor for name, tensor in read_shard(checkpoint.directory / file) if (new := rename(name))}
        save_file(held, folder / file, {"format": "pt"})
        weight_map.update(dict.fromkeys(held, file))
    (folder / INDEX_FILE).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


# --- the oracle ---------------------------------------------------------------------------------------------------


@torch.no_grad()
def oracle(checkpoint: Checkpoint, asked: list[list[int]], tokens: int = TOKENS) -> list[Answer]:
    """transformers' greedy `generate` on the dequantised checkpoint, in float32, one prompt at a time."""
    model, answers = unsplit_model(checkpoint), []
    for prompt in asked:
        made = model.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            max_new_tokens=tokens,
            do_sample=False,
            eos_token_id=None,
            output_logits=True,
            return_dict_in_generate=True,
        )
        logprobs = [dict(enumerate(logits[0].log_softmax(-1).tolist())) for logits in made.logits]
        answers.append(Answer(made.sequences[0, len(prompt) :].tolist(), logprobs))
    return answers


# --- the engine ---------------------------------------------------------------------------------------------------


class Server:
    """`vllm serve` with its worker processes, and its log.

    Args:
        directory: the checkpoint's.
        pp_size: pipeline stages, each a process of its own; they share the cores that there are.
        load_format: "auto" for vLLM's own, or "glmpp".
        skip: a wrong fix to run with, a name in `glmpp.engine.reference.wrong_fixes`.
        dtype: "float32", in which tokens can be compared, or "bfloat16".
    """

    def __init__(
        self, directory: str | Path, pp_size: int, load_format: str = "auto", skip: str = "", dtype: str = "float32"
    ):
        self.directory, self.pp_size = Path(directory), pp_size
        self.port = free_port()
        self.arguments = [
            *("--pipeline-parallel-size", str(pp_size)),
            *("--load-format", load_format),
            *("--dtype", dtype),
        ]
        self.environment = {
            **os.environ,
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
        raise GlmppError(f"{self.command}: neither up nor ended after {timeout:.0f} s; it said last:\n{self.log[-2000:]}")

    def __enter__(self) -> Server:
        self.up = self.start()
        return self

    def __exit__(self, *_) -> None:
        self.code = self.stop()

    def _answers(self) -> bool:
        with contextlib.suppress(OSError):
            return self._open("/health").status == 200
        return False

    def _open(self, path: str, body: dict | None = None):
        request = urllib.request.Request(f"http://127.0.0.1:{self.port}{path}", headers={"Content-Type": "application/json"})
        if body is not None:
            request.data = json.dumps(body).encode()
        return urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=300)

    def complete(self, asked: list[list[int]], tokens: int = TOKENS, logprobs: int = 5) -> list[Answer]:
        """Greedy completions of all prompts in one request, that is, in one batch."""
        body = {
            "model": "model",
            "prompt": asked,
            "max_tokens": tokens,
            "temperature": 0,
            "logprobs": logprobs,
            "ignore_eos": True,
        }
        try:
            choices = json.load(self._open("/v1/completions", body))["choices"]
        except OSError as error:
            raise GlmppError(f"{self.command}: {error}; it said last:\n{self.log[-2000:]}") from error
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

LINE = re.compile(r"^(?:\((?P<who>[^)]*?) pid=\d+\) )?(?:[A-Z]+ [\d-]+ [\d:]+ (?:\[[^\]]*\] ?)?)?(?P<text>.*)$")
ERROR = re.compile(r"^(?P<kind>[\w.]*(?:Error|Exception)): (?P<message>.*)$")


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


# --- the cases ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """One server: of which checkpoint, on how many stages, loaded how."""

    pp_size: int
    load_format: str = "auto"
    skip: str = ""
    mutation: Callable[[str], str | None] | None = None


STOCK = Case(2)
SERVED = {pp_size: Case(pp_size, "glmpp") for pp_size in (1, 2, 3)}
AFFECTED, FIRST_FIXED, LATER = "0.22.1", "0.23.0", "0.32.0"
CASES = {
    AFFECTED: {
        "stock, PP=2": STOCK,
        **{f"glmpp, PP={pp_size}": case for pp_size, case in SERVED.items()},
        "wk of layers 4 and 8 swapped": Case(1, "glmpp", mutation=swapped),
        "layers of stage 1 off by one": Case(2, "glmpp", mutation=shifted),
        "a scale lost": Case(2, "glmpp", mutation=without_a_scale),
    },
    FIRST_FIXED: {
        "skip taken out": Case(2, skip="off"),
        "asked too late": Case(2, skip="late"),
        "prefixes without their dot": Case(2, skip="dotless"),
    },
    LATER: {"stock, PP=2": STOCK, "skip taken out": Case(2, skip="off")},
}
EVIDENCE = (r"glmpp: stage", r"^[\w.]*(Error|Exception): ", r"this stage held", r"on purpose")


@dataclass
class Run:
    """What was seen of one server.

    Attributes:
        up: whether it came up; else it ended by itself.
        code: exit code.
        seconds: until it was up or had ended.
        deaths: worker -> the error it ended in.
        said: the lines of its log that matter, trimmed.
        last: its last lines.
        tokens: of the answers, one list for each prompt.
        differences: for each prompt and token the largest difference of a log-probability from the oracle's.
        rate: tokens per second, all prompts in one batch.
    """

    command: str
    up: bool
    code: int
    seconds: float
    deaths: dict[str, str]
    said: str
    last: str
    tokens: list[list[int]] = field(default_factory=list)
    differences: list[list[float]] = field(default_factory=list)
    rate: float = 0.0


@dataclass
class Evidence:
    """All runs of one release, and the oracle's tokens.

    Attributes:
        tokens, gaps: what transformers answers, and how far its choices are from the runners-up.
        runs: by the names in `CASES`.
        machine: versions and hardware.
        recorded: None for a live run; otherwise the day on which it was recorded.
    """

    release: str
    tokens: list[list[int]]
    gaps: list[float]
    machine: dict[str, str]
    runs: dict[str, Run] = field(default_factory=dict)
    recorded: str | None = None

    @property
    def source(self) -> str:
        made = ", ".join(f"{name} {value}" for name, value in self.machine.items())
        return f"recorded on {self.recorded} ({made})" if self.recorded else f"live ({made})"

    def save(self, path: str | Path) -> None:
        content = asdict(self) | {"recorded": time.strftime("%Y-%m-%d")}
        for run in content["runs"].values():
            run["differences"] = [[float(f"{value:.2g}") for value in one] for one in run["differences"]]
        Path(path).write_text(json.dumps(content, indent=1) + "\n")

    @classmethod
    def load(cls, path: str | Path) -> Evidence:
        content = json.loads(Path(path).read_text())
        return cls(**content | {"runs": {name: Run(**run) for name, run in content["runs"].items()}})


class Bench:
    """Runs the cases of the installed vllm-cpu, on a small checkpoint in a folder of its own."""

    def __init__(self, config: dict | str | Path, folder: Path):
        self.folder = folder
        self.checkpoint = write_served_checkpoint(config, folder / "glm")
        self.expected = oracle(self.checkpoint, prompts())
        release = installed_release() or "none"
        gaps = [answer.gap() for answer in self.expected]
        self.evidence = Evidence(release, [answer.tokens for answer in self.expected], gaps, machine())

    def run(self, name: str, while_up: Callable[[Server], Any] | None = None) -> Run:
        """Start, ask and stop the server of one case; `while_up` may ask it for more."""
        case = CASES[self.evidence.release][name]
        directory = self.checkpoint.directory
        if case.mutation:
            directory = mutated(self.checkpoint, self.folder / case.mutation.__name__, case.mutation)
        answers, rate, log = [], 0.0, ""
        with Server(directory, case.pp_size, case.load_format, case.skip) as server:
            if server.up:
                started = time.perf_counter()
                answers = server.complete(prompts())
                rate = sum(len(answer.tokens) for answer in answers) / (time.perf_counter() - started)
                if while_up:
                    while_up(server)
                log = server.log  # without what is said while it is being ended
        log = log or server.log
        self.evidence.runs[name] = run = Run(
            server.command,
            server.up,
            server.code,
            round(server.seconds, 1),
            deaths(log),
            excerpt(log, *EVIDENCE),
            last_lines(log),
            [answer.tokens for answer in answers],
            [ours.differences(theirs) for ours, theirs in zip(answers, self.expected)],
            round(rate, 1),
        )
        return run


def evidence(release: str, recorded: str | Path, config: dict | str | Path | None = None) -> Evidence:
    """Every case of a release: live where that vllm-cpu is installed and a config is given, else as it was recorded."""
    if config is None or installed_release() != release:
        return Evidence.load(recorded)
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(config, Path(folder))
        for name in CASES[release]:
            bench.run(name)
    return bench.evidence


def installed_release() -> str | None:
    """Of vllm-cpu, the distribution that has vLLM's operators for a CPU; None where it is not installed."""
    with contextlib.suppress(PackageNotFoundError):
        return version("vllm-cpu").partition("+")[0]
    return None


def machine() -> dict[str, str]:
    packages = {name: version(name) for name in ("torch", "transformers")}
    system = f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores, CPU only"
    return {"python": platform.python_version(), "vllm-cpu": installed_release() or "none", **packages, "system": system}
