"""The command `glmpp`.

glmpp check MODEL --pp 8      (--tp 8 --pp 2 --ep …) does it load on the installed vLLM, and if not, where does it die?
glmpp layouts MODEL --gpus 16  which TP x PP x EP loads, what fits beside it, and the line to paste
glmpp plan MODEL --pp 8       what does each stage hold, and which split is balanced?
glmpp make-checkpoint …       write a synthetic checkpoint
"""

from __future__ import annotations

from collections.abc import Sequence

from glmpp.cli.ending import ended


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command. Returns an exit code, see `glmpp.cli.ending`."""
    return ended(lambda: run(arguments))


def run(arguments: Sequence[str] | None = None) -> int:
    """The same, and what it raises comes out."""
    from glmpp.cli import commands  # torch alone takes seconds, in which somebody may change their mind

    return commands.run(arguments)
