"""The command `glmpp`.

glmpp check MODEL --pp 8      does it load on the installed vLLM, and if not, where does it die?
glmpp plan MODEL --pp 8       what does each stage hold, and which split is balanced?
glmpp make-checkpoint …       write a synthetic checkpoint
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from itertools import groupby
from pathlib import Path

from glmpp.advice import fixed_in, serve_line, try_load_format
from glmpp.checkpoint import ALL_NAMES, INDEX_FILE, Checkpoint, printable, reduced_config, write_checkpoint
from glmpp.dry_run import (
    CANNOT_BUILD,
    CANNOT_TELL,
    DIES,
    GUARDS,
    LEAVES_AT_INIT,
    LOADS,
    Death,
    DryRunReport,
    StageReport,
    dry_run,
    vllm_version,
)
from glmpp.errors import GlmppError
from glmpp.partition import PARTITION_VARIABLE, balance, layer_list, make_stages, owned, parse_counts, stage_bytes

NO_RELEASE = "no release of vLLM is known here to load it"
EXIT_CODES = {LOADS: 0, DIES: 1, CANNOT_TELL: 2}
SCHEMA_VERSION = 2


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command. Returns 0: loads, 1: does not, 2: cannot tell, or the arguments or the checkpoint are bad."""
    options = _parser().parse_args(arguments)
    try:
        return options.run(options)
    except GlmppError as error:
        print(f"glmpp: {printable(str(error))}", file=sys.stderr)
        return EXIT_CODES[CANNOT_TELL]
    except KeyboardInterrupt:
        print("glmpp: interrupted", file=sys.stderr)
        return 130


def versions() -> str:
    """Of the kit, and of the vLLM whose classes it runs."""
    try:
        own = version("glmpp")
    except PackageNotFoundError:
        own = "(a checkout that is not installed)"
    return f"glmpp {own}, vLLM {vllm_version() or 'not installed'}"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="glmpp", description="Loading FP8 checkpoints under pipeline parallelism in vLLM.")
    parser.add_argument("--version", action="version", version=versions())
    commands = parser.add_subparsers(required=True, metavar="command")

    def command(name: str, run, what: str) -> argparse.ArgumentParser:
        added = commands.add_parser(name, help=what, description=what)
        added.set_defaults(run=run)
        return added

    def model(added: argparse.ArgumentParser) -> None:
        added.add_argument("model", metavar="MODEL", help="folder, Hub repository (org/name), or a GLM-5 config.json")
        added.add_argument("--revision", help="branch, tag or commit of a Hub repository")
        added.add_argument("--pp", type=int, required=True, metavar="N", help="pipeline stages")
        added.add_argument(
            "--layer-partition",
            metavar="10,10,…",
            help=f"layers per stage, as in {PARTITION_VARIABLE}; default: vLLM's split",
        )

    check = command("check", _check, "Build and load every stage with the installed vLLM's own classes, without a GPU.")
    model(check)
    check.add_argument("--guard", choices=GUARDS, default="installed", help="default: vLLM as it is installed")
    check.add_argument("--all", action="store_true", help="every death of a stage, not only the first")
    check.add_argument("--each", action="store_true", help="a line for each stage, also where they end alike")
    check.add_argument("--strict", action="store_true", help="no stand-ins for parts that a CPU lacks")
    check.add_argument("--json", action="store_true", help="the report as JSON")

    plan = command("plan", _plan, "Layers, tensors and bytes of every stage, and the split with the smallest largest stage.")
    model(plan)
    plan.add_argument(
        "--gpu-gb", type=float, metavar="GB", help="memory of a GPU (GB = 1e9 bytes): what a stage leaves free"
    )
    plan.add_argument("--tp", type=int, default=1, metavar="N", help="GPUs that share a stage (default 1)")
    plan.add_argument("--drafter", action="store_true", help="count the MTP layer on the last stage")

    make = command("make-checkpoint", _make, "Write a synthetic checkpoint of the GLM-5 family with small dimensions.")
    make.add_argument("config", help="a GLM-5 config.json, e.g. data/glm-5.1-fp8/config.json")
    make.add_argument("directory", help="created; must not exist")
    make.add_argument(
        "--all-names", action="store_true", help="all layers and experts, 119,000 names, 1 GB; default: 12 layers"
    )
    make.add_argument("--seed", type=int, default=0)
    make.add_argument("--shard-mb", type=float, default=5, metavar="MB", help="a new shard begins after so much (default 5)")
    return parser


def open_checkpoint(model: str, revision: str | None = None) -> Checkpoint:
    """A checkpoint from what a user calls a model: a folder, a config.json, or a Hub repository.

    Raises:
        GlmppError: none of these, or it cannot be read.
    """
    path = Path(model)
    if path.is_dir() and ((path / INDEX_FILE).exists() or any(path.glob("*.safetensors"))):
        return Checkpoint.from_directory(path)
    if path.exists():
        checkpoint = Checkpoint.from_config(path)
        checkpoint.source = f"{path} (names and shapes from the config alone)"
        return checkpoint
    if model.count("/") == 1 and not model.startswith((".", "/", "~")):
        return Checkpoint.from_hub(model, revision)
    raise GlmppError(f"{model}: no such folder or file, and not the name of a Hub repository (org/name)")


# --- check --------------------------------------------------------------------------------------------------------


def _check(options: argparse.Namespace) -> int:
    checkpoint = open_checkpoint(options.model, options.revision)
    how = {"layer_counts": _counts(options), "strict": options.strict}
    report = dry_run(checkpoint, options.pp, guard=options.guard, all_deaths=options.all, **how)
    again = try_load_format(checkpoint, report, **how)
    if options.json:
        print(json.dumps(as_json(checkpoint, report, again), indent=1))
    else:
        lines = [as_text(checkpoint, report, options.each), *what_to_do(options, report, again)]
        print("\n".join(printable(line) for line in lines))
    return EXIT_CODES[overall(report)]


def _counts(options: argparse.Namespace) -> list[int] | None:
    """Layers per stage, if the user gave them."""
    return None if options.layer_partition is None else parse_counts(options.layer_partition, options.pp)


def overall(report: DryRunReport) -> str:
    """LOADS if every stage and the control do, DIES if one fails for sure, otherwise CANNOT_TELL."""
    verdicts = {stage.verdict for stage in report.all}
    if verdicts & {DIES, CANNOT_BUILD, LEAVES_AT_INIT}:
        return DIES
    return CANNOT_TELL if CANNOT_TELL in verdicts else LOADS


def as_json(checkpoint: Checkpoint, report: DryRunReport, again: DryRunReport | None = None) -> dict:
    """The report as plain values; `tests/check.schema.json` is its schema.

    Args:
        again: the failing stages with the load format, see `glmpp.advice`.
    """
    known = fixed_in(report)
    return {
        "schema": SCHEMA_VERSION,
        "checkpoint": {"source": checkpoint.source, "tensors": len(checkpoint), "bytes": checkpoint.nbytes},
        "versions": report.versions,
        "guard": report.guard,
        "pp_size": report.pp_size,
        "verdict": overall(report),
        "stages": [_stage_json(stage) for stage in report.stages],
        "control": None if report.control is None else _stage_json(report.control),
        "stand_ins": report.stand_ins,
        "with_load_format": again and {"verdict": overall(again), "stages": [_stage_json(stage) for stage in again.stages]},
        "known_to_load_from": known and {"vllm": known.fixed_in, "source": known.source},
    }


def _stage_json(stage: StageReport) -> dict:
    found = stage.deaths or ([_failed_build(stage)] if stage.exception else [])
    return {
        "rank": stage.stage.rank,
        "layers": [stage.stage.layers[0], stage.stage.layers[-1]],
        "verdict": stage.verdict,
        "model_class": stage.model_class,
        "device": stage.device,
        "tensors_handed_over": stage.handed_over,
        "deaths": [
            {key: getattr(death, key) for key in ("exception", "message", "key", "place", "function", "tensor")}
            for death in found
        ],
        "left_at_init": stage.unaccounted,
        "held": stage.held,
        "accounted_for": stage.accounted,
    }


def _failed_build(stage: StageReport) -> Death:
    return Death(None, stage.exception, stage.message, stage.key, stage.place, stage.function)


def as_text(checkpoint: Checkpoint, report: DryRunReport, each: bool = False) -> str:
    """The report for a terminal: nothing in it changes from run to run unless a verdict does.

    Args:
        each: a paragraph for each stage; otherwise those that end alike share one.
    """
    versions = ", ".join(f"{name} {version}" for name, version in report.versions.items())
    lines = [
        f"{checkpoint.source}: {len(checkpoint):,} tensors, {checkpoint.nbytes / 1e9:,.3f} GB",
        f"{versions}; guard: {report.guard}",
        "",
    ]
    ends: dict[object, list[StageReport]] = {}
    for stage in report.all:
        alone = each or stage.control or stage.drafter
        ends.setdefault(id(stage) if alone else "\n".join([stage.verdict, *_evidence(stage)]), []).append(stage)
    for alike in ends.values():
        lines += [f"{_label(alike):<13} layers {_layers(alike):<8} {alike[0].verdict}", *_evidence(alike[0])]
    lines += ["", "stand-ins: " + ", ".join(report.stand_ins)]
    if any(stage.device == "cpu" for stage in report.all):
        lines.append("made-up values on the CPU: the model asks for data while it is built or loaded")
    return "\n".join([*lines, "", f"PP={report.pp_size}: {conclusion(report)}"])


def _evidence(stage: StageReport) -> list[str]:
    """What a stage's verdict rests on, indented; [] for one that loads and leaves nothing to say."""
    lines = []
    for death in stage.deaths or ([_failed_build(stage)] if stage.exception else []):
        said = " ".join(death.message.split())
        lines.append(f"    KeyError: {death.key!r}" if death.key else f"    {death.exception}: {said[:300]}")
        lines.append(f"        in {death.place} {death.function}" + (f", handed {death.tensor}" if death.tensor else ""))
    if stage.verdict == LEAVES_AT_INIT:
        lines += [f"    left at init: {name}" for name in stage.unaccounted]
    return lines + [f"    held to the end, though another stage's: {name}" for name in stage.held]


def _label(stages: list[StageReport]) -> str:
    """ "stage 3", "stages 0, 2-7", or what else was run."""
    if len(stages) == 1:
        return stages[0].label
    return f"stages {_spans([stage.stage.rank for stage in stages])}"


def _layers(stages: list[StageReport]) -> str:
    return _spans([layer for stage in stages for layer in stage.stage.layers])


def _spans(numbers: list[int]) -> str:
    """ "0, 2-7" for ascending numbers."""
    runs = (list(run) for _, run in groupby(enumerate(numbers), key=lambda pair: pair[1] - pair[0]))
    return ", ".join(f"{run[0][1]}-{run[-1][1]}" if len(run) > 1 else str(run[0][1]) for run in runs)


def what_to_do(options: argparse.Namespace, report: DryRunReport, again: DryRunReport | None) -> list[str]:
    """Lines that end the answer when the checkpoint does not load; [] when there is nothing that would help."""
    if again is None:
        return []
    left = [stage for stage in again.stages if not stage.loads]
    if left:
        lines = [f"--load-format glmpp does not cure it: {_label(left[:1])} {left[0].verdict}", *_evidence(left[0])]
    else:
        loads = f"{_label(again.stages)} load{'s' * (len(again.stages) == 1)}"
        model = "MODEL" if Path(options.model).is_file() else options.model
        lines = [f"with --load-format glmpp {loads} (glmpp has to be installed where vLLM runs):"]
        lines.append(f"    {serve_line(model, report.pp_size, options.layer_partition)}")
    known = fixed_in(report)
    return ["", *lines, f"known to load from vLLM {known.fixed_in} on ({known.source})" if known else NO_RELEASE]


def conclusion(report: DryRunReport) -> str:
    """The answer in one line."""
    failing = [stage for stage in report.stages if not stage.loads]
    found = overall(report)
    if found == LOADS:
        return "loads"
    if found == CANNOT_TELL:
        return "cannot tell: " + ("PP=1 cannot be built here either" if report.control else "see above")
    if report.control is not None and not report.control.loads:
        return f"does not load, nor does PP=1: {len(failing)} of {report.pp_size} stages fail"
    although = " although PP=1 loads" if report.control else ""
    return f"does not load: {len(failing)} of {report.pp_size} stages fail{although}"


# --- plan and make-checkpoint -------------------------------------------------------------------------------------


def _plan(options: argparse.Namespace) -> int:
    checkpoint = open_checkpoint(options.model, options.revision)
    print(printable(plan_text(checkpoint, options.pp, options.layer_partition, options.gpu_gb, options.tp, options.drafter)))
    return 0


def plan_text(
    checkpoint: Checkpoint,
    pp_size: int,
    layer_counts: str | None = None,
    gpu_gb: float | None = None,
    tp_size: int = 1,
    drafter: bool = False,
) -> str:
    """What each stage holds, by the names and sizes in the checkpoint, and the balanced split.

    Args:
        gpu_gb: memory of one GPU, GB = 1e9 bytes. What is left is for activations, the KV cache and CUDA itself.
        tp_size: GPUs that share a stage evenly.
    """
    layers = layer_list(checkpoint)
    stages = make_stages(checkpoint.config, pp_size, layer_counts, drafter, layers)
    held = [owned(checkpoint, stage) for stage in stages]
    sizes = [sum(spec.nbytes for spec in specs) for specs in held]
    lines = [
        f"{checkpoint.source}: {len(checkpoint):,} tensors, {checkpoint.nbytes / 1e9:,.3f} GB",
        "",
        f"{'stage':<6} {'layers':<9} {'tensors':>9} {'GB':>9}" + (f"{'left of a GPU':>16}" if gpu_gb else ""),
    ]
    for stage, specs, size in zip(stages, held, sizes):
        where = f"{stage.layers[0]}-{stage.layers[-1]}"
        left = f"{gpu_gb - size / tp_size / 1e9:>13.1f} GB" if gpu_gb else ""
        lines.append(f"{stage.rank:<6} {where:<9} {len(specs):>9,} {size / 1e9:>9.3f}{left}")
    placed = {spec.name for specs in held for spec in specs}
    if rest := [spec for spec in checkpoint.values() if spec.name not in placed]:
        size = sum(spec.nbytes for spec in rest)
        lines.append(f"{'no stage':<16} {len(rest):>9,} {size / 1e9:>9.3f}  MTP layers, and parts beside {layers}")
    counts = balance(checkpoint, pp_size, drafter)
    smallest = max(stage_bytes(checkpoint, make_stages(checkpoint.config, pp_size, counts, drafter, layers)))
    lines += ["", f"balanced: {PARTITION_VARIABLE}={','.join(map(str, counts))}"]
    saved = f"{100 * (1 - smallest / max(sizes)):.1f} % less" if smallest < max(sizes) else "no less"
    lines.append(f"its largest stage has {smallest / 1e9:.3f} GB, {saved} than {max(sizes) / 1e9:.3f} GB")
    return "\n".join(lines)


def _make(options: argparse.Namespace) -> int:
    config = reduced_config(options.config, **(ALL_NAMES if options.all_names else {}))
    checkpoint = write_checkpoint(config, options.directory, options.seed, int(options.shard_mb * 1e6))
    print(f"{options.directory}: {checkpoint}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
