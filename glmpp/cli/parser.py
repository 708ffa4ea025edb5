"""What the command takes."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import NoReturn

from glmpp.cli.ending import versions
from glmpp.dryrun.deployment import GUARDS
from glmpp.dryrun.dry_run import MAX_CONTEXT
from glmpp.dryrun.workers import TIMEOUT
from glmpp.errors import GlmppError, positive, whole
from glmpp.formats.shard import MAX_SHARD_BYTES
from glmpp.gpus import GPUS, REPORTED
from glmpp.layouts.search import CONTEXT
from glmpp.partition import MAX_GPUS, PARTITION_VARIABLE
from glmpp.serving import fixes
from glmpp.words import printable


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        super().error(printable(message))


def make_parser() -> argparse.ArgumentParser:
    parser = Parser(prog="glmpp", description="Loading FP8 checkpoints under pipeline parallelism in vLLM.")
    parser.add_argument("--version", action="version", version=versions())
    count, tokens = _number(int, whole, 1, MAX_GPUS), _number(int, whole, 1, MAX_CONTEXT)
    share, gigabytes = _number(float, positive, 1), _number(float, positive, 1_000_000)
    seconds = _number(float, positive, 1_000_000)
    megabytes, any_number = _number(float, positive, MAX_SHARD_BYTES // 10**6), _number(int, whole, -(2**63), 2**63 - 1)
    commands = parser.add_subparsers(required=True, metavar="command")

    def command(name: str, what: str) -> argparse.ArgumentParser:
        added = commands.add_parser(name, help=what, description=what)
        added.set_defaults(command=name)
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
    check = command("check", "Build and load the ranks of a layout with the installed vLLM's own classes, without a GPU.")
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

    choose = command("layouts", "Every TP x PP (x EP) that takes all GPUs: does it load, and what fits beside it?")
    source(choose)
    choose.add_argument("--gpus", type=count, required=True, metavar="N", help="in all")
    choose.add_argument("--gpu", metavar="NAME", help=f"{gpus}; {default_gpu}")
    memory(choose)
    choose.set_defaults(context=CONTEXT)
    choose.add_argument("--json", action="store_true", help="the layouts as JSON")

    plan = command("plan", "Layers, tensors and bytes of every stage, and the split with the smallest largest stage.")
    model(plan)
    plan.add_argument(
        "--gpu-gb",
        type=gigabytes,
        metavar="GB",
        help="memory of a GPU (GB = 1e9 bytes): what a stage leaves free",
    )
    plan.add_argument("--drafter", action="store_true", help="count the MTP layer on the last stage")

    make = command("make-checkpoint", "Write a synthetic checkpoint of the GLM-5 family with small dimensions.")
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
