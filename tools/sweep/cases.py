"""What a sweep found: its cases and findings, as tables and as a file."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from glmpp import records
from glmpp.dryrun.stage_report import LOADS
from glmpp.gpus import CPU
from glmpp.ledger import UnloadedParam

if TYPE_CHECKING:
    from pandas import DataFrame, Series

NUMBER = re.compile(r"\.\d+\.")


@dataclass
class Finding:
    """A stage that fails although PP=1 loads: the first one of a case and a pipeline size.

    Attributes:
        verdict, exception, key, place, tensor, stage, left_at_init: as in `StageReport`.
        with_load_format: the verdict of the same stage with `--load-format glmpp`, and where it fails then.
    """

    pp_size: int
    stage: int
    verdict: str
    exception: str | None
    key: str | None
    message: str
    place: str | None
    tensor: str | None
    left_at_init: list[str]
    with_load_format: str

    @property
    def cured(self) -> bool:
        return self.with_load_format == LOADS


@dataclass
class Case:
    """One architecture in one variant, and what came of it.

    Attributes:
        model_class: vLLM's class, None if it was not built.
        verdicts: pipeline size -> LOADS, or the verdict of the first stage that does not; {} when the case does not count.
        why: why it does not count; "" when it does.
        left: what PP=1 leaves at init although somebody should have written it, after a load of real bytes.
        stand_ins: what stood in for parts that a CPU lacks.
    """

    architecture: str
    variant: str
    model_class: str | None = None
    verdicts: dict[int, str] = field(default_factory=dict)
    why: str = ""
    left: dict[str, UnloadedParam] = field(default_factory=dict)
    findings: list[Finding] = field(default_factory=list)
    stand_ins: list[str] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def counts(self) -> bool:
        return not self.why


# What begins the reasons of cases that might have had a verdict. The others say that there is nothing to judge.
NOT_TOLD = ("PP=1 ", "no tiny config")


@dataclass
class Sweep:
    """All cases, with the versions and the machine.

    Attributes:
        gpu: the GPU that was pretended, or "cpu".
        recorded: None for a live run; otherwise when it was recorded.
        tried: how many cases there were; more than `cases` where only those are kept that differ from another target's.
    """

    cases: list[Case]
    versions: dict[str, str]
    machine: str
    seconds: float
    gpu: str = CPU
    recorded: str | None = None
    tried: int = 0

    def __post_init__(self):
        self.tried = self.tried or len(self.cases)

    @property
    def source(self) -> str:
        """One line for a caption."""
        return records.caption(self.recorded, self.versions, f"target {self.gpu}", self.machine)

    @property
    def counted(self) -> list[Case]:
        return [case for case in self.cases if case.counts]

    @property
    def classes(self) -> set[str]:
        """vLLM's own classes that have a verdict."""
        return {case.model_class for case in self.counted if case.model_class}

    def findings(self) -> DataFrame:
        """One row per case and pipeline size that fails although PP=1 loads."""
        from pandas import DataFrame

        rows = [
            {
                "architecture": case.architecture,
                "variant": case.variant,
                "PP": found.pp_size,
                "stage": found.stage,
                "verdict": found.verdict,
                "exception": found.exception or "",
                "key or message": found.key or found.message or ", ".join(found.left_at_init[:2]),
                "in": found.place or "",
                "with --load-format glmpp": found.with_load_format,
            }
            for case in self.counted
            for found in case.findings
        ]
        return DataFrame(rows)

    def incomplete(self) -> DataFrame:
        """What loads, and is not complete: one row per case and kind, for parameters that differ in the layer only."""
        from pandas import DataFrame

        rows: dict[tuple, dict] = {}
        for case in self.counted:
            for name, one in case.left.items():
                parameter, tensor = (NUMBER.sub(".*.", each) if each else "" for each in (name, one.tensor))
                row = {"architecture": case.architecture, "variant": case.variant, "parameter": parameter, "kind": one.kind}
                row = rows.setdefault((case.architecture, case.variant, parameter), {**row, "tensor": tensor, "how many": 0})
                row["how many"] += 1
                row |= {"in the file": one.in_file or "", "in the model": one.in_model or ""}
        return DataFrame(rows.values())

    def uncounted(self) -> Series:
        """Why cases do not count, and how many of each reason."""
        from pandas import Series

        reasons = Counter(case.why.split(":")[0] for case in self.cases if not case.counts)
        return Series(dict(reasons.most_common()), name="cases", dtype=int)

    def not_told(self) -> DataFrame:
        """Cases of an architecture that has a tiny checkpoint, or lacks only its sizes, and that PP=1 does not load."""
        from pandas import DataFrame

        rows: dict[tuple[str, str], list[str]] = {}
        for case in self.cases:
            if case.why.startswith(NOT_TOLD):
                rows.setdefault((case.architecture, " ".join(case.why.split())), []).append(case.variant)
        listed = [(architecture, ", ".join(variants), why) for (architecture, why), variants in rows.items()]
        return DataFrame(listed, columns=["architecture", "variants", "why"])

    def renewed(self, later: Sweep) -> Sweep:
        """This sweep with a later one's cases in place of its own; the seconds stay those of the whole."""
        cases = {(case.architecture, case.variant): case for case in (*self.cases, *later.cases)}
        return replace(self, cases=list(cases.values()), tried=len(cases))

    def beside(self, other: Sweep) -> Sweep:
        """This sweep without the cases of which another target's says the same: class, verdicts, faults and reasons."""
        same = {(case.architecture, case.variant): _summary(case) for case in other.cases}
        kept = [case for case in self.cases if same.get((case.architecture, case.variant)) != _summary(case)]
        return replace(self, cases=kept)

    def save(self, path: str | Path) -> None:
        head = {"recorded": records.today(), "versions": self.versions, "machine": self.machine}
        head |= {"gpu": self.gpu, "seconds": round(self.seconds), "tried": self.tried}
        records.write(path, head, "cases", map(asdict, self.cases))

    @classmethod
    def load(cls, path: str | Path) -> Sweep:
        content = records.read(path)
        for case in content["cases"]:
            case["verdicts"] = {int(size): verdict for size, verdict in case["verdicts"].items()}
            case["findings"] = [Finding(**found) for found in case["findings"]]
            case["left"] = {name: UnloadedParam(**one) for name, one in case.get("left", {}).items()}
        return cls(**{**content, "cases": [Case(**case) for case in content["cases"]]})


def differences(one: Sweep, other: Sweep) -> DataFrame:
    """Architectures that two targets of a release judge by different classes, or differently; one row for each variant."""
    from pandas import DataFrame

    others = {(case.architecture, case.variant): case for case in other.cases}
    rows = []
    for case in one.cases:
        twin = others.get((case.architecture, case.variant))
        if twin is None or (case.model_class, case.verdicts) == (twin.model_class, twin.verdicts):
            continue
        columns = {**_columns(case, one.gpu), **_columns(twin, other.gpu)}
        rows.append({"architecture": case.architecture, "variant": case.variant, **dict(sorted(columns.items()))})
    return DataFrame(rows)


def _summary(case: Case) -> tuple:
    faults = [(found.pp_size, found.stage, found.key, found.with_load_format) for found in case.findings]
    return case.model_class, case.verdicts, case.why, sorted(case.left), faults


def _columns(case: Case, gpu: str) -> dict[str, str]:
    verdicts = ", ".join(f"PP={size} {verdict}" for size, verdict in case.verdicts.items())
    return {f"class, {gpu}": (case.model_class or "").removeprefix("vllm."), f"verdicts, {gpu}": verdicts or case.why}
