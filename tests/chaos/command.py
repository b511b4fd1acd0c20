"""The ``gracile`` command, which says that it has begun: from there on a signal is its own business."""

print("begun", flush=True)

from gracile.train.cli import command

command()
