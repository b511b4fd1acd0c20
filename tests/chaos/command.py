"""The ``gracile`` command, which says that it has begun: from there on a signal is its own business."""

print("begun", flush=True)

from gracile.train.cli import command  # noqa: E402 - the line comes before what takes long

command()
