"""The command `glmpp` as a process: what it started ends with it."""

from __future__ import annotations

import sys

from glmpp.cli import run
from glmpp.cli.ending import ended


def run_and_leave() -> int:
    try:
        return run(sys.argv[1:])
    finally:
        if server := sys.modules.get("glmpp.dryrun.server"):
            server.Server.close_all()


def main() -> None:
    sys.exit(ended(run_and_leave))


if __name__ == "__main__":
    main()
