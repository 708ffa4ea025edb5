"""What each command of `glmpp` does with its options."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence

from glmpp.cli.advice_text import other_lines, pasted, split_lines, what_to_do
from glmpp.cli.model import open_checkpoint
from glmpp.cli.parser import make_parser
from glmpp.cli.report_json import as_json
from glmpp.cli.report_text import as_text
from glmpp.dryrun.advice import PLUGINS_VARIABLE, try_fixes, try_layouts, try_load_format, with_cure
from glmpp.dryrun.deployment import Deployment
from glmpp.dryrun.dry_run import dry_run
from glmpp.dryrun.fit import NO_FIT
from glmpp.dryrun.stage_report import CANNOT_TELL, CROSSES, DIES, INCOMPLETE, LOADS
from glmpp.errors import GlmppError
from glmpp.formats.glm5 import ALL_NAMES, reduced_config
from glmpp.gpus import CPU
from glmpp.layouts import plan as plans
from glmpp.layouts.room import would_fit
from glmpp.layouts.search import layouts
from glmpp.layouts.text import layouts_json, layouts_text
from glmpp.layouts.uncut import try_uncut
from glmpp.partition import PARTITION_VARIABLE, parse_counts
from glmpp.words import joined, printable

# What else ends with 2 or more, `glmpp.cli.ending` says.
EXIT_CODES = {LOADS: 0, DIES: 1, INCOMPLETE: 1, CANNOT_TELL: 2, NO_FIT: 1, CROSSES: 1}


def run(arguments: Sequence[str] | None = None) -> int:
    options = make_parser().parse_args(arguments)
    return COMMANDS[options.command](options)


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
    report = dry_run(checkpoint, deployment, ranks=options.ranks, all_failures=options.all, **how)
    again, fixed = try_load_format(checkpoint, report, **how), try_fixes(checkpoint, report, **how)
    loading = next((with_cure(report, one) for one in (again, fixed) if one and all(stage.loads for stage in one.all)), None)
    others = None if loading else try_layouts(checkpoint, report, share, **how)
    other_split = try_uncut(checkpoint, loading or report, **how)
    room = would_fit(checkpoint, loading or report, share, **how)
    if options.json:
        print(json.dumps(as_json(checkpoint, report, again, share, fixed, room, others, other_split), indent=1))
    else:
        print(as_text(checkpoint, report, options.each, share))
        lines = [*what_to_do(options, checkpoint, report, again, fixed), *split_lines(options, other_split)]
        if lines := [*lines, *([""] if room or others else []), *room, *other_lines(options, others)]:
            print(joined(lines))
    return EXIT_CODES[report.overall(share)]


def _layouts(options: argparse.Namespace) -> int:
    if PARTITION_VARIABLE in os.environ:
        print(f"glmpp: {PARTITION_VARIABLE} is ignored, sizes vary here; unset it where vLLM is to run", file=sys.stderr)
    checkpoint = open_checkpoint(options.model, options.revision, options.timeout)
    how = {"utilization": options.gpu_memory_utilization, "timeout": options.timeout}
    found = layouts(checkpoint, options.gpus, options.gpu, options.context, **how)
    told = pasted(options.model), checkpoint, found, os.environ.get(PLUGINS_VARIABLE)
    print(json.dumps(layouts_json(*told), indent=1) if options.json else layouts_text(*told))
    return EXIT_CODES[found.verdict]


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


COMMANDS = {"check": _check, "layouts": _layouts, "plan": _plan, "make-checkpoint": _make}
