"""The command `glmpp`.

glmpp check MODEL --pp 8      (--tp 8 --pp 2 --ep …) does it load on the installed vLLM, and if not, where does it die?
glmpp layouts MODEL --gpus 16  which TP x PP x EP loads, what fits beside it, and the line to paste
glmpp plan MODEL --pp 8       what does each stage hold, and which split is balanced?
glmpp make-checkpoint …       write a synthetic checkpoint
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

from glmpp.checkpoint import Checkpoint
from glmpp.ending import ended, versions
from glmpp.engine import fixes
from glmpp.errors import GlmppError, positive, whole
from glmpp.formats.config import load_config
from glmpp.formats.files import exists, list_folder
from glmpp.formats.glm5 import ALL_NAMES, reduced_config
from glmpp.formats.shard import MAX_SHARD_BYTES
from glmpp.formats.weights import ADAPTER, MISTRALS, adapter_line, check_serves_alone, weight_files
from glmpp.gpus import CPU, GPUS, REPORTED
from glmpp.partition import MAX_GPUS, PARTITION_VARIABLE, parse_counts
from glmpp.verdict import plan as plans
from glmpp.verdict.advice import (
    PLUGINS_VARIABLE,
    KnownFault,
    Tried,
    command,
    fixed_in,
    is_in_record,
    layout_words,
    nearest_in_record,
    nearest_line,
    serve_line,
    try_fixes,
    try_layouts,
    try_load_format,
)
from glmpp.verdict.deployment import GUARDS, Deployment
from glmpp.verdict.dry_run import MAX_CONTEXT, dry_run
from glmpp.verdict.fit import NO_FIT
from glmpp.verdict.forks import TIMEOUT
from glmpp.verdict.layouts import CONTEXT, layouts
from glmpp.verdict.layouts_text import layouts_json, layouts_text
from glmpp.verdict.report import DryRunReport
from glmpp.verdict.room import would_fit
from glmpp.verdict.stage_report import CANNOT_TELL, DIES, INCOMPLETE, LOADS
from glmpp.verdict.text import as_json, as_text, evidence_lines, label, overall
from glmpp.words import MESSAGE, joined, printable, shown

NO_RELEASE = "no release of vLLM is known here to load it"
# What else ends with 2 or more, `glmpp.ending` says.
EXIT_CODES = {LOADS: 0, DIES: 1, INCOMPLETE: 1, CANNOT_TELL: 2, NO_FIT: 1}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command. Returns an exit code, see `glmpp.ending`."""
    return ended(lambda: run(arguments))


def run(arguments: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    return options.run(options)


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        super().error(printable(message))


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog="glmpp", description="Loading FP8 checkpoints under pipeline parallelism in vLLM.")
    parser.add_argument("--version", action="version", version=versions())
    count, tokens = _number(int, whole, 1, MAX_GPUS), _number(int, whole, 1, MAX_CONTEXT)
    share, gigabytes = _number(float, positive, 1), _number(float, positive, 1_000_000)
    seconds = _number(float, positive, 1_000_000)
    megabytes, any_number = _number(float, positive, MAX_SHARD_BYTES // 10**6), _number(int, whole, -(2**63), 2**63 - 1)
    commands = parser.add_subparsers(required=True, metavar="command")

    def command(name: str, run, what: str) -> argparse.ArgumentParser:
        added = commands.add_parser(name, help=what, description=what)
        added.set_defaults(run=run)
        return added

    def source(added: argparse.ArgumentParser) -> None:
        added.add_argument("model", metavar="MODEL", help="folder, Hub repository (org/name), or a GLM-5 config.json")
        added.add_argument("--revision", help="branch, tag or commit of a Hub repository")
        what = f"for each rank, for the import of vLLM before the first, and for the Hub (default {TIMEOUT:.0f})"
        added.add_argument("--timeout", type=seconds, default=TIMEOUT, metavar="SECONDS", help=what)

    def model(added: argparse.ArgumentParser) -> None:
        source(added)
        added.add_argument("--pp", type=count, default=1, metavar="N", help="pipeline stages (default 1)")
        added.add_argument("--tp", type=count, default=1, metavar="N", help="GPUs that share a stage (default 1)")
        added.add_argument(
            "--layer-partition",
            metavar="10,10,…",
            help=f"layers per stage; default: what {PARTITION_VARIABLE} says, as for vLLM, or else vLLM's split",
        )

    def memory(added: argparse.ArgumentParser) -> None:
        added.add_argument(
            "--gpu-memory-utilization",
            type=share,
            metavar="0.9",
            help="share that vLLM may take; default: vLLM's own",
        )
        added.add_argument("--context", type=tokens, metavar="TOKENS", help="of the longest request")

    gpus, default_gpu = f"{', '.join(GPUS)}, sm90 …, with memory l4:12 (GB)", f"default: the one here, or {REPORTED}"
    check = command(
        "check", _check, "Build and load the ranks of a layout with the installed vLLM's own classes, without a GPU."
    )
    model(check)
    check.add_argument("--ep", action="store_true", help="experts are spread over the GPUs of a stage, not sliced")
    check.add_argument("--dp", type=count, default=1, metavar="N", help="replicas that share the experts (default 1)")
    check.add_argument(
        "--ranks", choices=["all"], help="every rank; default: of each stage the first and the last shard (and replica)"
    )
    check.add_argument("--guard", choices=GUARDS, default="installed", help="default: vLLM as it is installed")
    which = f"{', '.join(fixes.NAMES)}, or {fixes.KNOWN}: all that fit the release and the model"
    check.add_argument("--fixes", type=_names, default=(), metavar="NAME,…", help=which)
    check.add_argument("--gpu", metavar="NAME", help=f"{gpus}, or cpu; {default_gpu}")
    memory(check)
    check.add_argument("--all", action="store_true", help="every death of a rank, not only the first")
    check.add_argument("--each", action="store_true", help="a line for each rank, also where they end alike")
    check.add_argument("--strict", action="store_true", help="no stand-ins for parts that a CPU lacks")
    check.add_argument("--json", action="store_true", help="the report as JSON")

    choose = command("layouts", _layouts, "Every TP x PP (x EP) that takes all GPUs: does it load, and what fits beside it?")
    source(choose)
    choose.add_argument("--gpus", type=count, required=True, metavar="N", help="in all")
    choose.add_argument("--gpu", metavar="NAME", help=f"{gpus}; {default_gpu}")
    memory(choose)
    choose.set_defaults(context=CONTEXT)
    choose.add_argument("--json", action="store_true", help="the layouts as JSON")

    plan = command("plan", _plan, "Layers, tensors and bytes of every stage, and the split with the smallest largest stage.")
    model(plan)
    plan.add_argument(
        "--gpu-gb",
        type=gigabytes,
        metavar="GB",
        help="memory of a GPU (GB = 1e9 bytes): what a stage leaves free",
    )
    plan.add_argument("--drafter", action="store_true", help="count the MTP layer on the last stage")

    make = command("make-checkpoint", _make, "Write a synthetic checkpoint of the GLM-5 family with small dimensions.")
    make.add_argument("config", help="a GLM-5 config.json, e.g. data/glm-5.1-fp8/config.json")
    make.add_argument("directory", help="created; must not exist, or --overwrite")
    make.add_argument("--overwrite", action="store_true", help="replace a folder that holds a checkpoint and nothing else")
    make.add_argument(
        "--all-names", action="store_true", help="all layers and experts, 119,000 names, 1 GB; default: 12 layers"
    )
    make.add_argument("--seed", type=any_number, default=0)
    make.add_argument(
        "--shard-mb",
        type=megabytes,
        default=5,
        metavar="MB",
        help="a new shard begins after so much (default 5)",
    )
    return parser


def _number(kind: type, check: Callable, *limits: float) -> Callable[[str], float]:
    """A type for argparse: a number that `whole` or `positive` takes."""

    def parse(text: str) -> float:
        try:
            number = kind(text)
        except ValueError:
            number = text
        try:
            return check("", number, *limits)
        except GlmppError as error:
            raise argparse.ArgumentTypeError(str(error).removeprefix("=")) from None

    return parse


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",")]


def open_checkpoint(model: str, revision: str | None = None, seconds: float = TIMEOUT, judged: bool = False) -> Checkpoint:
    """A checkpoint from what a user calls a model: a folder, a config.json, or a Hub repository.

    Args:
        seconds: that the Hub may take.
        judged: as of `Checkpoint.from_directory`.

    Raises:
        GlmppError: none of these, no model of its own (an adapter, a drafter), or it cannot be read.
    """
    if not model:
        raise GlmppError("the name of the model is empty")
    path = Path(model)
    if exists(path):
        checkpoint = _open_folder(path, judged) if path.is_dir() else _from_config(path)
    elif model.count("/") == 1 and not model.startswith((".", "/", "~")):
        checkpoint = Checkpoint.from_hub(model, revision, seconds=seconds)
    else:
        raise GlmppError(f"{model}: no such folder or file, and not the name of a Hub repository (org/name)")
    check_serves_alone(checkpoint.config, model)
    return checkpoint


def _open_folder(path: Path, judged: bool) -> Checkpoint:
    names = list_folder(path)
    if "config.json" not in names:
        if ADAPTER in names:
            raise GlmppError(adapter_line(str(path), load_config(path / ADAPTER)))
        if "params.json" in names:
            raise GlmppError(
                f"{path}: holds params.json and no config.json, Mistral's own format, in which vLLM opens {MISTRALS}; "
                "glmpp reads models with a config.json"
            )
    found = weight_files(names)
    if found.files or found.index or any(name.endswith(".gguf") for name in names):
        return Checkpoint.from_directory(path, judged)
    try:
        return _from_config(path)
    except GlmppError as error:
        raise GlmppError(f"{error} ({path} holds no weights that vLLM opens, and so its config alone is read)") from None


def _from_config(path: Path) -> Checkpoint:
    checkpoint = Checkpoint.from_config(path)
    checkpoint.source = f"{path} (names and shapes from the config alone)"
    return checkpoint


def _partition(options: argparse.Namespace) -> str | None:
    """Layers per stage as asked, or as vLLM would find them in its variable. The kit reads it here and nowhere else.

    Raises:
        GlmppError: the variable does not name as many stages as are asked for.
    """
    found = os.environ.get(PARTITION_VARIABLE)
    if options.layer_partition is not None or found is None:
        return options.layer_partition
    try:
        parse_counts(found, options.pp)
    except GlmppError as error:
        raise GlmppError(f"{error}. It is set in this environment, where vLLM refuses it, too: unset or mend it") from None
    return found


def _check(options: argparse.Namespace) -> int:
    checkpoint = open_checkpoint(options.model, options.revision, options.timeout, judged=True)
    deployment = Deployment(
        options.pp,
        options.tp,
        options.dp,
        options.ep,
        layer_counts=_partition(options),
        guard=options.guard,
        gpu=options.gpu,
        fixes=options.fixes,
    )
    share, how = options.gpu_memory_utilization, {"strict": options.strict, "timeout": options.timeout}
    how["context"] = options.context
    report = dry_run(checkpoint, deployment, ranks=options.ranks, all_deaths=options.all, **how)
    again, fixed = try_load_format(checkpoint, report, **how), try_fixes(checkpoint, report, **how)
    loading = next((one for one in (again, fixed) if one and one.loads), None)
    others = None if loading else try_layouts(checkpoint, report, share, **how)
    room = would_fit(checkpoint, loading or report, share, **how)
    if options.json:
        print(json.dumps(as_json(checkpoint, report, again, share, fixed, room, others), indent=1))
    else:
        print(as_text(checkpoint, report, options.each, share))
        lines = what_to_do(options, checkpoint, report, again, fixed)
        if lines := [*lines, *([""] if room or others else []), *room, *other_lines(options, others)]:
            print(joined(lines))
    return EXIT_CODES[overall(report, share)]


def other_lines(options: argparse.Namespace, others: Tried | None) -> list[str]:
    """What was tried in place of the layout that was asked for, and the line to paste for the one that loads."""
    if others is None or not others.tried:
        return []
    if others.loads is None:
        return [f"no other layout of these GPUs that was tried loads: {', '.join(others.names)}"]
    line = command(pasted(options.model), others.loads, layout_words(others.loads), os.environ.get(PLUGINS_VARIABLE))
    return [f"on as many GPUs {others.loads.layout} loads (tried: {', '.join(others.names)}):", f"    {line}"]


def what_to_do(
    options: argparse.Namespace,
    checkpoint: Checkpoint,
    report: DryRunReport,
    again: DryRunReport | None,
    fixed: DryRunReport | None,
) -> list[str]:
    """Lines that end the answer when the checkpoint does not load; [] when there is nothing that would help.

    Args:
        again: the failing stages with the load format; None where that could change nothing.
        fixed: the same with the fixes that are known; None where there are none.
    """
    lines, known, nearest = [], fixed_in(report), nearest_in_record(checkpoint, report)
    if again is not None:
        lines += cure_lines(options, again, "--load-format glmpp")
    if fixed is not None:
        names = ", ".join(fixed.deployment.fixes)
        lines += cure_lines(options, fixed, f"the fix{'es' * (len(fixed.deployment.fixes) > 1)} {names}")
        lines += [f"    {name}: {fixes.about(name)}" for name in fixed.deployment.fixes]
    lines += [known_line(known, report)] if known else []
    lines += [nearest_line(nearest)] if nearest else []
    lines += [NO_RELEASE] if lines and not known and not nearest and is_in_record(checkpoint, report) else []
    return ["", *lines] if lines else []


def known_line(known: KnownFault, report: DryRunReport) -> str:
    """What is known of the fault that the stages die of. Where PP=1 fails for another reason, it is not all that fails."""
    if report.control is None or report.control.loads:
        return f"known to load from vLLM {known.fixed_in} on ({known.source})"
    return f"this {known.exception} is mended from vLLM {known.fixed_in} on ({known.source}); what PP=1 ends with is another"


def cure_lines(options: argparse.Namespace, again: DryRunReport, what: str) -> list[str]:
    """Whether the ranks that failed load with something, and the line to paste if they also fit."""
    if left := [stage for stage in again.all if not stage.loads]:
        return [f"{what} does not cure it: {label(left[:1])} {left[0].verdict}", *evidence_lines(left[0])]
    loads = f"{label(again.stages)} load{'s' * (len(again.stages) == 1)}"
    if (found := again.fit(options.gpu_memory_utilization)) and found.fits is False:
        return [f"with {what} {loads}, but it {NO_FIT}: {shown(found.lack, MESSAGE)}"]
    line = serve_line(pasted(options.model), again.deployment, os.environ.get(PLUGINS_VARIABLE))
    return [f"with {what} {loads} (glmpp has to be installed where vLLM runs):", f"    {line}"]


def _layouts(options: argparse.Namespace) -> int:
    if PARTITION_VARIABLE in os.environ:
        print(f"glmpp: {PARTITION_VARIABLE} is ignored, sizes vary here; unset it where vLLM is to run", file=sys.stderr)
    checkpoint = open_checkpoint(options.model, options.revision, options.timeout)
    how = {"utilization": options.gpu_memory_utilization, "timeout": options.timeout}
    found = layouts(checkpoint, options.gpus, options.gpu, options.context, **how)
    told = pasted(options.model), checkpoint, found, os.environ.get(PLUGINS_VARIABLE)
    print(json.dumps(layouts_json(*told), indent=1) if options.json else layouts_text(*told))
    return EXIT_CODES[found.verdict]


def pasted(model: str) -> str:
    """What a command for a server says in the place of the model."""
    path = Path(model)
    no_shards = path.is_file() or (path.is_dir() and not any(path.glob("*.safetensors")))
    return "MODEL" if no_shards or model.startswith("-") or printable(model) != model else model


def _plan(options: argparse.Namespace) -> int:
    checkpoint = open_checkpoint(options.model, options.revision, options.timeout)
    # No GPU has a part in it, and so none is looked for.
    deployment = Deployment(options.pp, layer_counts=_partition(options), drafter=options.drafter, gpu=CPU)
    text, fits = plans.plan(checkpoint, deployment, options.gpu_gb, options.tp)
    print(text)
    return EXIT_CODES[LOADS if fits else NO_FIT]


def _make(options: argparse.Namespace) -> int:
    from glmpp.synthetic import write_checkpoint  # and torch, which takes seconds

    config = reduced_config(options.config, **(ALL_NAMES if options.all_names else {}))
    shard_bytes = int(options.shard_mb * 1e6)
    checkpoint = write_checkpoint(config, options.directory, options.seed, shard_bytes, options.overwrite)
    print(printable(f"{options.directory}: {checkpoint}"))
    return 0
