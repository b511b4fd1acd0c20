"""Let runs suffer at random moments, and see that they go on to the losses and weights of an undisturbed run.

    PYTHONPATH=tests python -m chaos.run --faults 64 --seed 0

SIGKILL, SIGTERM, SIGINT, a full disk, truncated, flipped and poisoned files, a second process in the folder and one
killed rank, on one process, DistributedDataParallel, ZeRO 2 and ZeRO 3. A line for each fault, a table of them all, and
exit code 1 with what went wrong.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"}  # before any import

from chaos.disk import Disk
from chaos.disturbed import Disturbed
from chaos.kinds import FULL, KINDS
from chaos.layouts import LAYOUTS, write_config
from chaos.starts import PATIENCE
from launched import can_mount
from pool import Pool


def parsed(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--faults", type=int, default=72, help="of all layouts together; default 72")
    parser.add_argument("--steps", type=int, default=120, help="of each run; default 120")
    parser.add_argument("--seed", type=int, default=None, help="of the moments; by default another each time")
    names = [layout.name for layout in LAYOUTS]
    parser.add_argument("--layouts", nargs="+", choices=names, default=names)
    parser.add_argument("--inside", type=Path, help=argparse.SUPPRESS)  # a folder to mount, in a namespace of its own
    return parser.parse_args(argv)


def in_a_namespace(folder: Path, options: argparse.Namespace) -> int:
    """This script once more, where it can mount a file system of its own; else without full disks."""
    seed = random.randrange(10**6) if options.seed is None else options.seed
    command = [sys.executable, "-m", "chaos.run", *sys.argv[1:], "--seed", str(seed)]
    if can_mount(folder):
        return subprocess.run(["unshare", "-rm", *command, "--inside", str(folder)]).returncode
    print("no disk will be full: file systems cannot be mounted here (unshare -rm mount)")
    return suffer(folder, None, options, seed)


def suffer(folder: Path, disk: Disk | None, options: argparse.Namespace, seed: int) -> int:
    begin = time.monotonic()
    print(f"seed {seed}", flush=True)
    moments = random.Random(seed)
    with tempfile.TemporaryDirectory() as outside:
        os.environ["HF_HOME"] = outside  # must not be on the disk that fills up
        config = write_config(Path(outside), options.steps)
        pool = Pool(patience=PATIENCE)
        chosen = [layout for layout in LAYOUTS if layout.name in options.layouts]
        runs = [Disturbed(layout, pool, config, folder / layout.name, moments, disk) for layout in chosen]
        try:
            for run in runs:
                run.folder.mkdir()
                run.log = Path(outside) / "log.txt"
                run.suffer(-(-options.faults // len(chosen)))
        finally:
            pool.close()
    print(f"\n{table(runs)}\n\n{time.monotonic() - begin:.0f} s")
    failures = [failure for run in runs for failure in run.failures]
    print(*[f"FAILED: {failure}" for failure in failures], sep="\n")
    return 1 if failures else 0


def table(runs: list[Disturbed]) -> str:
    kinds = [kind for kind in KINDS if kind != FULL or runs[0].disk is not None]
    heads = [f"{'':16}", *(f"{run.layout.name:>6}" for run in runs), "   all"]
    rows = ["".join(heads)]
    for kind in kinds:
        counts = [run.counts[kind] for run in runs]
        rows.append(f"{kind:16}" + "".join(f"{count:6}" for count in [*counts, sum(counts)]))
    totals = [run.counts.total() for run in runs]
    return "\n".join([*rows, f"{'all':16}" + "".join(f"{count:6}" for count in [*totals, sum(totals)])])


def main() -> int:
    options = parsed(None)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # started in the background it is ignored, by runs too
    if options.inside is not None:
        moments = random.Random(options.seed)
        return suffer(options.inside, Disk.mounted(options.inside, moments), options, options.seed)
    folder = Path(tempfile.mkdtemp(prefix="gracile-chaos-"))
    try:
        return in_a_namespace(folder, options)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    sys.exit(main())
