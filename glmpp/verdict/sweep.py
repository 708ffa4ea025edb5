"""Is the class of bugs still alive? Every architecture of the installed vLLM that declares pipeline support, tried.

A case is an architecture with a tiny checkpoint that transformers saves, under the names of the hub: as it is, with tied
embeddings, and in block FP8. PP=1 must load for a case to count; then every stage of PP=2 and PP=3 is built and loaded by
the installed vLLM, and what fails is tried again with the load format "glmpp".
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import re
import tempfile
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from glmpp.checkpoint import Checkpoint
from glmpp.errors import GlmppError
from glmpp.formats.tensor import TensorSpec
from glmpp.gpus import CPU, target_name
from glmpp.progress import progress_bar
from glmpp.verdict.deployment import Deployment
from glmpp.verdict.dry_run import run_of, stage_request
from glmpp.verdict.forks import run_stages
from glmpp.verdict.installed import ask_vllm
from glmpp.verdict.report import CANNOT_TELL, LOADS, DryRunReport, StageReport, assemble

if TYPE_CHECKING:
    from pandas import DataFrame, Series

SIZES = (1, 2, 3)
VARIANTS = ("plain", "tied", "fp8")
BLOCK = 128
SECONDS_PER_CASE = 120
FOLDER = re.compile(r"/[^\s'\"]*glmpp-\w+(/model)?")
LINEAR = re.compile(r"\.layers\..+(_proj|_proj_with_mqa|\.wq_b|\.wk)\.weight$")


# Kept in BF16 by the hub's block-FP8 checkpoints: the indexer's head weights, small projections of Mamba, other towers;
# and Kimi's delta attention (known by its f_a_proj), whose projections vLLM fuses into one BF16 parameter.
NOT_QUANTISED = re.compile(r"\.(weights_proj|dt_proj|x_proj)\.|visual|vision|audio|mtp")


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
        stand_ins: what stood in for parts that a CPU lacks.
    """

    architecture: str
    variant: str
    model_class: str | None = None
    verdicts: dict[int, str] = field(default_factory=dict)
    why: str = ""
    findings: list[Finding] = field(default_factory=list)
    stand_ins: list[str] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def counts(self) -> bool:
        return not self.why


@dataclass
class Sweep:
    """All cases, with the versions and the machine.

    Attributes:
        gpu: the GPU that was pretended, or "cpu".
        recorded: None for a live run; otherwise when it was recorded.
    """

    cases: list[Case]
    versions: dict[str, str]
    machine: str
    seconds: float
    gpu: str = CPU
    recorded: str | None = None

    @property
    def source(self) -> str:
        """One line for a caption."""
        versions = ", ".join(f"{name} {version}" for name, version in self.versions.items())
        made = f"{versions}; target {self.gpu}; {self.machine}"
        return f"recorded {self.recorded} ({made})" if self.recorded else f"live ({made})"

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

    def uncounted(self) -> Series:
        """Why cases do not count, and how many of each reason."""
        from pandas import Series

        reasons = Counter(case.why.split(":")[0] for case in self.cases if not case.counts)
        return Series(dict(reasons.most_common()), name="cases", dtype=int)

    def save(self, path: str | Path) -> None:
        head = {"recorded": f"on {time.strftime('%Y-%m-%d')}", "versions": self.versions, "machine": self.machine}
        head |= {"gpu": self.gpu, "seconds": round(self.seconds)}
        lines = ",\n".join(json.dumps(asdict(case)) for case in self.cases)
        Path(path).write_text(json.dumps(head)[:-1] + f', "cases": [\n{lines}\n]}}\n')

    @classmethod
    def load(cls, path: str | Path) -> Sweep:
        content = json.loads(Path(path).read_text())
        for case in content["cases"]:
            case["verdicts"] = {int(size): verdict for size, verdict in case["verdicts"].items()}
            case["findings"] = [Finding(**found) for found in case["findings"]]
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
        told = {f"{what}, {sweep.gpu}": how for sweep, of in ((one, case), (other, twin)) for what, how in _told(of).items()}
        rows.append({"architecture": case.architecture, "variant": case.variant, **dict(sorted(told.items()))})
    return DataFrame(rows)


def _told(case: Case) -> dict[str, str]:
    verdicts = ", ".join(f"PP={size} {verdict}" for size, verdict in case.verdicts.items())
    return {"class": (case.model_class or "").removeprefix("vllm."), "verdicts": verdicts or case.why}


def sweep(
    architectures: list[str] | None = None,
    variants: tuple[str, ...] = VARIANTS,
    gpu: str | None = None,
    workers: int | None = None,
    progress: bool | None = None,
) -> Sweep:
    """Try architectures of the installed vLLM at PP=1, 2 and 3.

    Args:
        architectures: names as in config.json; default every one of the installed vLLM.
        variants: of "plain", "tied" (tie_word_embeddings), "fp8" (block FP8 of 128 x 128, quantised by the kit).
        gpu: the GPU that is pretended, as in `Deployment`.
        workers: cases at a time; default the number of cores.

    Raises:
        GlmppError: an architecture that the installed vLLM does not have, or vLLM is not installed.
    """
    started, gpu = time.perf_counter(), target_name(gpu)
    known = ask_vllm({"kind": "architectures", "gpu": gpu})
    if architectures is None:
        architectures = known["names"]
    if unknown := sorted(set(architectures) - set(known["names"])):
        raise GlmppError(f"vLLM {known['versions']['vllm']} has no architecture {unknown[0]!r}")
    cases = [(architecture, variant) for architecture in architectures for variant in variants]
    with ThreadPoolExecutor(workers or os.cpu_count()) as pool:
        done = pool.map(lambda case: try_case(*case, gpu), cases)
        done = list(progress_bar(done, "sweeping", total=len(cases), show=progress))
    machine = f"{platform.machine()}, {os.cpu_count()} cores, CPU only"
    return Sweep(done, known["versions"], machine, time.perf_counter() - started, gpu)


def try_case(architecture: str, variant: str, gpu: str) -> Case:
    """Make a tiny checkpoint, load it at every size, and again with the load format where that fails."""
    case, started = Case(architecture, variant), time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="glmpp-") as folder:
        try:
            checkpoint = tiny_checkpoint(architecture, variant, Path(folder, "model"), gpu)
            judge(case, dry_runs(checkpoint, Deployment(guard="installed", gpu=gpu)))
        except GlmppError as error:
            case.why = str(error).splitlines()[0]
        if case.findings:
            with contextlib.suppress(GlmppError):  # then they stay, with "cannot tell"
                sizes = tuple(found.pp_size for found in case.findings)
                confirm(case, dry_runs(checkpoint, Deployment(guard="loader", gpu=gpu), sizes))
    case.why = FOLDER.sub("…", case.why)
    case.seconds = round(time.perf_counter() - started, 1)
    return case


def tiny_checkpoint(architecture: str, variant: str, directory: Path, gpu: str | None = None) -> Checkpoint:
    """A case's checkpoint. Raises GlmppError, with the reason as its message, when there is none to be had."""
    request = {
        "kind": "tiny_model",
        "architecture": architecture,
        "directory": str(directory),
        "tied": variant == "tied",
        "gpu": gpu,
    }
    made = ask_vllm(request, SECONDS_PER_CASE)
    if "why" in made:
        raise GlmppError(made["why"])
    checkpoint = Checkpoint.from_directory(directory)
    if variant == "tied" and any(name.endswith("lm_head.weight") for name in checkpoint):
        raise GlmppError("cannot be tied")
    return block_fp8(checkpoint) if variant == "fp8" else checkpoint


def block_fp8(checkpoint: Checkpoint) -> Checkpoint:
    """The same checkpoint with the linear weights of its layers in block FP8: names, dtypes and scale grids; no data.

    As in the hub's FP8 checkpoints, embeddings, norms, routers and everything outside the language model's layers stay.

    Raises:
        GlmppError: nothing is left to quantise.
    """
    specs: list[TensorSpec] = []
    kept: dict[str, None] = {}
    delta_attention = tuple(name.partition("f_a_proj.")[0] for name in checkpoint if ".f_a_proj." in name)
    for spec in checkpoint.values():
        module = spec.name.removesuffix(".weight")
        stays = NOT_QUANTISED.search(spec.name) or spec.name.startswith(delta_attention or ("\0",))
        # vLLM's Glm5Next builds latent attention in BF16 and has no place for these two scales.
        stays = stays or (delta_attention and re.search(r"\.(wq_b|kv_b_proj)\.", spec.name))
        if LINEAR.search(spec.name) and not stays and len(spec.shape) == 2:
            specs.append(TensorSpec(spec.name, "F8_E4M3", spec.shape))
            specs.append(TensorSpec(f"{spec.name}_scale_inv", "F32", tuple(-(-size // BLOCK) for size in spec.shape)))
        else:
            specs.append(TensorSpec(spec.name, spec.dtype, spec.shape))
            kept[module] = None
    if not any(spec.is_scale for spec in specs):
        raise GlmppError("nothing to quantise")
    quantization = {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "activation_scheme": "dynamic",
        "weight_block_size": [BLOCK, BLOCK],
        "modules_to_not_convert": list(kept),
    }
    return Checkpoint(specs, {**checkpoint.config, "quantization_config": quantization})


def dry_runs(checkpoint: Checkpoint, deployment: Deployment, sizes: tuple[int, ...] = SIZES) -> list[DryRunReport]:
    """`dry_run` of a deployment at several pipeline sizes in one fork, which imports the model's module once."""
    runs = [run_of(replace(deployment, pp=size), rank) for size in sizes for rank in range(size)]
    request = stage_request(checkpoint, deployment)
    messages = run_stages(checkpoint, request, runs, workers=1, timeout=SECONDS_PER_CASE)
    reports = []
    for size in sizes:
        of_size = [message for message in messages if message.get("size", size) == size]
        evidence = {"real_group": False, "seconds": 0.0, "messages": of_size}
        of_its_size = replace(deployment, pp=size)
        reports.append(assemble(evidence, checkpoint, of_its_size, of_its_size.stages(checkpoint.config)))
    return reports


def judge(case: Case, reports: list[DryRunReport]) -> None:
    """Fill in a case's verdicts and findings."""
    (whole,) = reports[0].stages
    case.model_class, case.stand_ins = whole.model_class, sorted(whole.stand_ins)
    if case.model_class and ".transformers." in case.model_class:
        case.why = "not vLLM's own class: the transformers backend"
    elif whole.verdict != LOADS:
        case.why = f"PP=1 {whole.verdict}: {whole.exception or ''} {(whole.message or ', '.join(whole.unaccounted))[:150]}"
    for report in reports if case.counts else ():
        failing = [stage for stage in report.stages if stage.verdict != LOADS]
        case.verdicts[report.pp_size] = failing[0].verdict if failing else LOADS
        if failing:
            case.findings.append(finding(report.pp_size, failing[0]))


def finding(pp_size: int, stage: StageReport) -> Finding:
    return Finding(
        pp_size=pp_size,
        stage=stage.stage.rank,
        verdict=stage.verdict,
        exception=stage.exception,
        key=stage.key,
        message=(stage.message or "").split("\n")[0][:200],
        place=stage.place,
        tensor=stage.tensor,
        left_at_init=stage.unaccounted,
        with_load_format=CANNOT_TELL,
    )


def confirm(case: Case, reports: list[DryRunReport]) -> None:
    """What the same pipeline sizes do with the load format: every stage has to load for a finding to count as cured."""
    by_size = {report.pp_size: report for report in reports}
    for found in case.findings:
        left = [stage for stage in by_size[found.pp_size].stages if stage.verdict != LOADS]
        found.with_load_format = (
            LOADS if not left else f"{left[0].verdict}: {left[0].place or ', '.join(left[0].unaccounted)}"
        )
