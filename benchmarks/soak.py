"""A long run at a tiny size: resident memory, open files, threads and the folder's size, every 500 steps.

    python benchmarks/soak.py                                      10,000 steps, into benchmarks/results/soak.md
    python benchmarks/soak.py --steps 2000 --table soak.md

The run is a child process with the quickstart's recipe, its checkpoints, evaluations and TensorBoard logs. From step
1,000 on it is flat where memory does not grow by 0.3 percent, where files, threads and the sizes of checkpoints
stay, and where what does grow is the record of its losses alone.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from statistics import median

RESULTS = Path(__file__).parent / "results"
SETTLED = 1000  # steps after which nothing may grow
EVERY = 500
MEMORY = 0.003  # a loader that was kept after each evaluation came to 0.004, all logged losses to 0.001
TINY = {
    "hidden_size": 64,
    "intermediate_size": 176,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "vocab_size": 400,
}
RECORD = 64 * 1024  # bytes that a thousand steps may add: ten logs of each hundred, in text, and events


@dataclass(frozen=True)
class Sample:
    """What a process held some steps after it had logged, evaluated and saved; sizes in bytes."""

    step: int
    memory: int
    files_open: int
    threads: int
    files: int
    weights: int  # of all checkpoints, but for the record
    record: int  # of what was logged: in the newest checkpoint
    events: int


def command(folder: Path, steps: int) -> list[str]:
    """Some steps more, so that there is a log after the last sample is due."""
    run = [sys.executable, "-m", "gracile.train.pretrain", "quickstart", "--model_overrides", json.dumps(TINY)]
    run += ["--block_size", "32", "--rank", "8", "--per_device_train_batch_size", "4", "--validation_blocks", "32"]
    return [*run, "--max_steps", str(steps + 20), "--disable_tqdm", "true", "--output_dir", str(folder)]


def samples(folder: Path, steps: int) -> Iterator[Sample]:
    """Taken at the first log after each 500 steps: what these steps bring is done then."""
    process = subprocess.Popen(command(folder, steps), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert process.stdout is not None
    said: list[str] = []
    wanted = EVERY
    try:
        for line in process.stdout:
            said = [*said[-20:], line]
            found = re.match(r"step (\d+)/\d+  loss", line)
            if found and int(found[1]) > wanted:
                yield sample(process.pid, folder, int(found[1]))
                wanted += EVERY
    finally:
        process.kill() if sys.exc_info()[0] else process.wait()
    if process.wait():
        sys.exit(f"the run ended with exit code {process.returncode}\n{''.join(said)}")


def sample(pid: int, folder: Path, step: int) -> Sample:
    status = Path(f"/proc/{pid}/status").read_text()
    files = [path for path in folder.rglob("*") if path.is_file()]
    kept = [path for path in files if path.parts[-2].startswith("checkpoint-")]
    record = max((path for path in kept if path.name == "trainer_state.json"), key=lambda path: path.stat().st_mtime)
    return Sample(
        step,
        memory=1024 * int(re.search(r"VmRSS:\s+(\d+) kB", status)[1]),  # type: ignore[index]
        files_open=len(list(Path(f"/proc/{pid}/fd").iterdir())),
        threads=int(re.search(r"Threads:\s+(\d+)", status)[1]),  # type: ignore[index]
        files=len(files),
        weights=sum(path.stat().st_size for path in kept if path.name not in (record.name, "complete.json")),
        record=record.stat().st_size,
        events=sum(path.stat().st_size for path in files if ".tfevents." in path.name),
    )


def growth(values: list[int]) -> float:
    """Of the median of the last third over that of the first."""
    third = max(len(values) // 3, 1)
    return median(values[-third:]) / median(values[:third]) - 1


def verdict(found: list[Sample]) -> list[str]:
    """What was seen, a line each; those that begin with NOT say what is not flat."""
    settled = [sample for sample in found if sample.step >= SETTLED]
    more = growth([sample.memory for sample in settled])
    lines = [f"{'' if more < MEMORY else 'NOT '}flat: resident memory, {more:+.2%} from the first third to the last"]
    for name, words in (("files_open", "open files"), ("threads", "threads"), ("files", "files in the folder")):
        values = {getattr(sample, name) for sample in settled}
        lines.append(f"{'' if len(values) == 1 else 'NOT '}flat: {words}, {' or '.join(map(str, sorted(values)))}")
    sizes = [sample.weights for sample in settled]
    same = max(sizes) - min(sizes) < 1024  # numbers in their text have more or fewer digits
    lines.append(
        f"{'' if same else 'NOT '}flat: checkpoints without the record, {min(sizes):,} to {max(sizes):,} bytes"
    )
    for name, words in (("record", "the record of losses in a checkpoint"), ("events", "TensorBoard's events")):
        first, last = (getattr(sample, name) for sample in (settled[0], settled[-1]))
        rate = 1000 * (last - first) / (settled[-1].step - settled[0].step)
        lines.append(f"{'' if rate < RECORD else 'NOT '}bounded: {words} grows by {rate:,.0f} bytes in 1,000 steps")
    return lines


def table(found: list[Sample]) -> str:
    names = [field.name for field in fields(Sample)]
    heads = [name.replace("_", " ") for name in names]
    rows = ["| " + " | ".join(heads) + " |", "|" + "---:|" * len(heads)]
    rows += ["| " + " | ".join(f"{asdict(sample)[name]:,}" for name in names) + " |" for sample in found]
    return "\n".join(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=10_000)
    parser.add_argument("--table", type=Path, default=RESULTS / "soak.md")
    options = parser.parse_args()
    if options.steps < SETTLED + 3 * EVERY:
        sys.exit(f"--steps must be at least {SETTLED + 3 * EVERY}, got {options.steps}")
    found: list[Sample] = []
    with tempfile.TemporaryDirectory() as name:
        for taken in samples(Path(name) / "run", options.steps):
            found.append(taken)
            print(taken, flush=True)
    lines = verdict(found)
    options.table.write_text(table(found) + "\n\n" + "\n".join(f"* {line}" for line in lines) + "\n")
    print(table(found), *lines, sep="\n")
    sys.exit(any(line.startswith("NOT") for line in lines))


if __name__ == "__main__":
    main()
