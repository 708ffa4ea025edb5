"""Compare the load format "glmpp" with vLLM's own on the sweep's tiny checkpoints: the same bytes, and no false alarm.

Each is loaded with its real bytes at PP=1 and PP=2 by both. What stock loads completely must have the same SHA-256 in every
parameter. What the load format refuses must be incomplete in stock's load, too.
"""

from __future__ import annotations

import re
import tempfile
import time
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path

from glmpp import records
from glmpp.dryrun.deployment import Deployment
from glmpp.dryrun.stage_report import INCOMPLETE, LOADS, StageReport
from glmpp.errors import GlmppError
from glmpp.gpus import target_name
from glmpp.ledger import CUT
from sweep.run import FOLDER, call_in_vllm, dry_runs, tiny_checkpoint, try_all

SIZES = (1, 2)
EQUAL, REFUSED, NOT_COMPARABLE = "equal", "refused", "not comparable"
FALSE_ALARM, UNEQUAL, MISSED = "false alarm", "unequal", "missed"
WRONG = (FALSE_ALARM, UNEQUAL, MISSED)
WORST_FIRST = (*WRONG, CUT, REFUSED, NOT_COMPARABLE, EQUAL)
REFUSAL = re.compile(r"(\d+) parameters were left at init")


@dataclass(frozen=True)
class Compared:
    """What came of a case.

    Attributes:
        outcome: EQUAL; REFUSED: by the load format, and the bytes confirm every parameter that it names; NOT_COMPARABLE:
            neither loads; FALSE_ALARM: it refuses what stock loads completely, or names a parameter that the bytes do
            not confirm; UNEQUAL: a parameter has other bytes; MISSED: it comes up although a parameter was left at init;
            CUT: it comes up, as stock does, and of a tensor not everything is read.
        why: kinds of what was refused, or the first difference.
        parameters: how many had the same SHA-256, over all stages and sizes.
    """

    outcome: str
    why: str = ""
    parameters: int = 0


@dataclass
class Comparison:
    """All cases by "architecture, variant". `of` is how many there were to compare."""

    cases: dict[str, Compared]
    of: int
    versions: dict[str, str]
    machine: str
    gpu: str
    seconds: float
    recorded: str

    @property
    def outcomes(self) -> Counter[str]:
        return Counter(case.outcome for case in self.cases.values())

    @property
    def source(self) -> str:
        """One line for a caption."""
        made = records.caption(self.recorded, self.versions, f"target {self.gpu}", self.machine)
        return f"{made}: {len(self.cases)} of {self.of} cases"

    def save(self, path: str | Path) -> None:
        head = {**asdict(self), "seconds": round(self.seconds)}
        records.write(path, head, "cases", head.pop("cases"))

    @classmethod
    def load(cls, path: str | Path) -> Comparison:
        content = records.read(path)
        return cls(**{**content, "cases": {name: Compared(**case) for name, case in content["cases"].items()}})


def compare(
    cases: list[tuple[str, str]],
    gpu: str | None = None,
    workers: int | None = None,
    progress: bool | None = None,
) -> Comparison:
    """Compare the load formats on cases, (architecture, variant) each.

    Args:
        gpu: the GPU that is pretended, as in `Deployment`.
        workers: cases at a time; default the number of cores.
    """
    started, gpu = time.perf_counter(), target_name(gpu)
    _, versions = call_in_vllm("known_architectures", gpu)
    compared = try_all(lambda case: compare_case(*case, gpu), cases, "comparing bytes", workers, progress)
    done = {", ".join(case): one for case, one in zip(cases, compared)}
    return Comparison(done, len(cases), versions, records.MACHINE, gpu, time.perf_counter() - started, records.today())


def compare_case(architecture: str, variant: str, gpu: str) -> Compared:
    """Load a tiny checkpoint by stock and by the load format at every size."""
    with tempfile.TemporaryDirectory(prefix="glmpp-") as folder:
        try:
            checkpoint = tiny_checkpoint(architecture, variant, Path(folder, "model"), gpu)
            stock, ours = (
                dry_runs(checkpoint, Deployment(guard=guard, gpu=gpu), SIZES, "real") for guard in ("installed", "loader")
            )
        except GlmppError as error:
            return Compared(NOT_COMPARABLE, FOLDER.sub("…", str(error).splitlines()[0]))
    whole = stock[0].stages[0]
    stages = [
        compare_stage(one, other, whole, f"PP={report.pp_size} stage {one.stage.rank}")
        for report, of_ours in zip(stock, ours)
        for one, other in zip(report.stages, of_ours.stages)
    ]
    worst = min(stages, key=lambda one: WORST_FIRST.index(one.outcome))
    return Compared(worst.outcome, FOLDER.sub("…", worst.why), sum(one.parameters for one in stages))


def compare_stage(stock: StageReport, ours: StageReport, whole: StageReport, where: str) -> Compared:
    """A stage loaded by both. Where stock dies, PP=1 (`whole`) says what its parameters should hold."""
    if ours.cuts and not ours.unaccounted:
        return Compared(CUT, f"{where}: {ours.cuts[0].tensor}: {ours.cuts[0]}")
    if ours.verdict == INCOMPLETE:
        return Compared(MISSED, f"{where}: {ours.unaccounted[0]}")
    if ours.verdict == LOADS:
        should = next((one for one in (stock, whole) if one.verdict == LOADS), None)
        if should is None:
            return Compared(MISSED, f"{where}: {', '.join(stock.unaccounted[:1]) or stock.verdict}")
        return compare_digests(should, ours, where)
    refusal = REFUSAL.search(ours.message or "") if ours.exception == GlmppError.__name__ else None
    if stock.verdict == LOADS:
        return Compared(FALSE_ALARM, f"{where}: {(ours.message or '')[:200]}")
    if refusal is None:
        return Compared(NOT_COMPARABLE, f"{where}: {ours.verdict}: {ours.exception} {(ours.message or '')[:120]}")
    if int(refusal[1]) != len(ours.unaccounted):
        return Compared(FALSE_ALARM, f"{where}: names {refusal[1]}, the bytes confirm {len(ours.unaccounted)}")
    kinds = Counter(ours.left[name].kind for name in ours.unaccounted)
    return Compared(REFUSED, ", ".join(f"{count} {kind}" for kind, count in kinds.items()))


def compare_digests(should: StageReport, ours: StageReport, where: str) -> Compared:
    """Of all parameters but those that both leave at init as expected, or that are padded: these hold what memory held."""
    padded = ours.ledger.padding
    names = [name for name in ours.digests if name not in padded and (name not in ours.left or name not in should.left)]
    differ = [name for name in names if ours.digests[name] != should.digests.get(name)]
    return Compared(UNEQUAL, f"{where}: {differ[0]}") if differ else Compared(EQUAL, "", len(names))
