"""The ``gracile`` command: one word a job."""

from __future__ import annotations

import sys
from importlib import import_module
from typing import NoReturn

from .. import __version__
from ..validation import nearest
from .engines.process_exit import leave

COMMANDS = {
    "pretrain": "train a LLaMA from scratch",
    "finetune": "train a saved model on instructions, texts or classes: an adapter or all of it",
    "memory": "plan the memory of a run, before anything is allocated",
    "profile": "measure the memory and the time of a run's first steps",
    "export": "write a sparse model without its zeros, for inference",
    "spectra": "show what a fine-tuning did to the spectra of a model's matrices",
    "list": "list every optimizer, layer and embedded configuration",
    "completion": "print a script by which a shell completes commands and keys",
}
MODULES = {"list": "listing"}  # where a module is not called as its command


def main() -> int:
    arguments = sys.argv[1:]
    if not arguments or arguments[0] in ("-h", "--help"):
        print("usage: gracile COMMAND ...\n")
        print("\n".join(f"  {name:<11} {what}" for name, what in COMMANDS.items()))
        print("\n`gracile COMMAND --help` explains one; `gracile --version` prints the version")
        return 0
    if arguments[0] == "--version":
        print(f"gracile {__version__}")
        return 0
    if arguments[0] not in COMMANDS:
        print(f"gracile: unknown command {arguments[0]!r}; {nearest(arguments[0], COMMANDS)}", file=sys.stderr)
        return 2
    name = MODULES.get(arguments[0], arguments[0])
    chosen = import_module(f".{name}", __package__)  # here: help and typos need not wait for transformers
    code: int = chosen.main(arguments[1:])
    return code


def command() -> NoReturn:
    try:
        leave(main())
    except KeyboardInterrupt:  # while modules are imported, or in a command that has nothing to save
        print("gracile: stopped by SIGINT", file=sys.stderr)
        leave(130)
