"""What `tools/versions.py` runs in the environment of a release.

    python -m sweep cases GPU TARGET [--beside FILE]   # every architecture; beside another target's: what differs
    python -m sweep bytes SWEPT TARGET                 # the load format beside stock on what counts in a sweep
    python -m sweep release SWEPT TARGET               # what counts in a sweep, on this release

All with --only NAME…: these architectures; the rest of TARGET stays as it is (of `release`: there is no rest).
"""

from __future__ import annotations

import argparse
from pathlib import Path

from glmpp.dryrun.releases import Record
from sweep.cases import Sweep
from sweep.releases import cases_of, save, try_release
from sweep.run import sweep
from sweep.same_bytes import Comparison, compare


def cases(options: argparse.Namespace) -> None:
    found = sweep(options.only, gpu=options.gpu)
    if options.beside:
        found = found.beside(Sweep.load(options.beside))
    elif options.only:
        found = Sweep.load(options.target).renewed(found)
    found.save(options.target)


def same_bytes(options: argparse.Namespace) -> None:
    swept, only = Sweep.load(options.swept), options.only
    counted = [(case.architecture, case.variant) for case in swept.counted]
    found = compare([case for case in counted if not only or case[0] in only], swept.gpu)
    if only:
        before = Comparison.load(options.target)
        found.cases, found.of = {**before.cases, **found.cases}, len(counted)
        found.seconds += before.seconds
    found.save(options.target)


def release(options: argparse.Namespace) -> None:
    swept, only = Sweep.load(options.swept), options.only
    found = try_release([case for case in cases_of(swept) if not only or case[0] in only], swept.gpu)
    save(Record({found.versions["vllm"]: found}), options.target)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    for name, command, first in (("cases", cases, "gpu"), ("bytes", same_bytes, "swept"), ("release", release, "swept")):
        one = commands.add_parser(name)
        one.set_defaults(command=command, beside=None)
        one.add_argument(first)
        one.add_argument("target", type=Path)
        one.add_argument("--only", nargs="+")
        if command is cases:
            one.add_argument("--beside")
    options = parser.parse_args()
    options.command(options)


if __name__ == "__main__":
    main()
