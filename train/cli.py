"""The ``gracile`` command: one word a job."""

from __future__ import annotations

import sys

from .. import __version__
from ..validation import nearest

COMMANDS = {"pretrain": "train a LLaMA from scratch"}


def main() -> int:
    arguments = sys.argv[1:]
    if not arguments or arguments[0] in ("-h", "--help"):
        print("usage: gracile COMMAND ...\n")
        print("\n".join(f"  {name:<10} {what}" for name, what in COMMANDS.items()))
        print("\n`gracile COMMAND --help` explains one; `gracile --version` tells the version")
        return 0
    if arguments[0] == "--version":
        print(f"gracile {__version__}")
        return 0
    if arguments[0] not in COMMANDS:
        print(f"gracile: unknown command {arguments[0]!r}; {nearest(arguments[0], COMMANDS)}", file=sys.stderr)
        return 2
    from .pretrain import main as pretrain  # here, so that help and typos need not wait for transformers

    return pretrain(arguments[1:])
