"""The command `glmpp`, from its first import on: torch alone takes seconds, in which somebody may change their mind."""

from __future__ import annotations

import sys

from glmpp.ending import ended


def run() -> int:
    from glmpp.cli import run

    return run(sys.argv[1:])


def run_and_leave() -> int:
    try:
        return run()
    finally:
        if server := sys.modules.get("glmpp.dryrun.server"):
            server.Server.close_all()


def main() -> None:
    sys.exit(ended(run_and_leave))


if __name__ == "__main__":
    main()
