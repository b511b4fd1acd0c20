"""Break the code on purpose, one line at a time, and see the tests go red: ``make mutate``.

    python tests/mutations/run.py [--only TEXT] [--list]

The faults are in the ``.yaml`` files beside this one, a list in each:

    - id: its name
      file: the file, from the repository's root
      line: the line as it is, without its indentation; it must be there exactly once
      becomes: what stands in its place, which may be several lines
      tests: those of ``make test`` that must see it
      why: what would go wrong, in a sentence

Each is put into a copy of the tree, two copies at a time; the tree itself is never touched. Before any of them the
tests must pass without. Exit code 1: a fault survived, its line is no longer there, or its tests could not run.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parents[2]
KEYS = {"id", "file", "line", "becomes", "tests", "why"}
NOT_SOURCE = {"build", "dist", "runs", "shared"}  # of the root's folders
LIMIT = 900  # seconds for the tests of a fault


@dataclass(frozen=True)
class Fault:
    id: str
    file: str
    line: str
    becomes: str
    tests: tuple[str, ...]
    why: str

    def changed(self, source: str) -> str:
        """The file with this fault.

        Raises:
            LookupError: if the line is not there exactly once.
        """
        lines = source.split("\n")
        found = [i for i, line in enumerate(lines) if line.strip() == self.line.strip()]
        if len(found) != 1:
            raise LookupError(f"{self.file} has the line {len(found)} times: {self.line.strip()}")
        (number,) = found
        indent = lines[number][: len(lines[number]) - len(lines[number].lstrip())]
        lines[number : number + 1] = [indent + line if line else line for line in self.becomes.rstrip("\n").split("\n")]
        return "\n".join(lines)


@dataclass(frozen=True)
class Verdict:
    """``red`` is what a fault must be; else it is ``green``, ``moved`` (no such line) or ``error``."""

    fault: Fault
    color: str
    seconds: float
    told: str


def read_faults(folder: Path) -> list[Fault]:
    """All faults of a folder.

    Raises:
        ValueError: for a fault that lacks a key or has another, or an id that comes twice.
    """
    faults = []
    for path in sorted(folder.glob("*.yaml")):
        for entry in yaml.safe_load(path.read_text()) or []:
            if set(entry) != KEYS:
                raise ValueError(f"{path.name}: {entry.get('id')}: keys must be {sorted(KEYS)}, got {sorted(entry)}")
            faults.append(Fault(**{**entry, "tests": tuple(entry["tests"])}))
    ids = [fault.id for fault in faults]
    if twice := {name for name in ids if ids.count(name) > 1}:
        raise ValueError(f"ids come twice: {sorted(twice)}")
    return faults


def copied(folder: Path) -> Path:
    """The tree, importable as ``gracile`` by who has ``folder`` on the path."""

    def left_out(at: str, names: list[str]) -> set[str]:
        made = {name for name in names if name.startswith(".") or name.endswith(("__pycache__", ".egg-info"))}
        return made | (NOT_SOURCE if Path(at) == ROOT else set())

    return Path(shutil.copytree(ROOT, folder / "gracile", ignore=left_out))


def pytest(tree: Path, tests: list[str]) -> tuple[int, str]:
    path = os.pathsep.join(filter(None, [str(tree.parent), os.environ.get("PYTHONPATH")]))
    command = [sys.executable, "-m", "pytest", "-x", "-q", "--no-header", "-p", "no:cacheprovider", *tests]
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    log = tree.parent / "log"
    with log.open("w") as file:
        process = subprocess.Popen(
            command, cwd=tree, env=environment, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            code = process.wait(LIMIT)
        except subprocess.TimeoutExpired:
            code = -signal.SIGKILL
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    return code, log.read_text(errors="replace")


def judged(fault: Fault) -> Verdict:
    begin = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="gracile-mutation-") as folder:
        tree = copied(Path(folder))
        path = tree / fault.file
        try:
            changed = fault.changed(path.read_text(encoding="utf-8"))
        except (LookupError, OSError) as error:
            return Verdict(fault, "moved", 0.0, str(error))
        path.write_text(changed, encoding="utf-8")
        code, log = pytest(tree, list(fault.tests))
    color = {0: "green", 1: "red"}.get(code, "error")
    failed = [line for line in log.splitlines() if line.startswith(("FAILED", "ERROR"))]
    told = failed[0].split(" - ")[0].split("/")[-1] if failed else "" if color == "green" else log.strip()[-400:]
    return Verdict(fault, color, time.monotonic() - begin, told)


def sound(faults: list[Fault]) -> tuple[int, str]:
    """Whether the tests pass without a fault, in a copy, which is also what is imported there."""
    with tempfile.TemporaryDirectory(prefix="gracile-mutation-") as folder:
        tree = copied(Path(folder))
        where = [sys.executable, "-c", "import gracile; print(gracile.__path__[0])"]
        environment = {**os.environ, "PYTHONPATH": folder}
        found = subprocess.run(where, env=environment, capture_output=True, text=True, check=True, cwd=folder).stdout
        if Path(found.strip()).resolve() != tree.resolve():
            return 1, f"the copy is not what is imported: {found}"
        return pytest(tree, sorted({test for fault in faults for test in fault.tests}))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="faults whose id or file contains this text")
    parser.add_argument("--list", action="store_true", help="name the faults and stop")
    chosen = parser.parse_args()
    faults = [f for f in read_faults(Path(__file__).parent) if chosen.only in f.id or chosen.only in f.file]
    if chosen.list or not faults:
        print(*(f"{fault.id:32} {fault.file:40} {fault.why}" for fault in faults), sep="\n")
        return 0 if faults else 1
    code, log = sound(faults)
    if code != 0:
        print(f"{log[-3000:]}\nthe tests do not pass without a fault: nothing can be said of any")
        return 1
    with ThreadPoolExecutor(2) as pool:
        verdicts = []
        for verdict in pool.map(judged, faults):
            verdicts.append(verdict)
            print(f"{verdict.color:6} {verdict.seconds:5.0f} s  {verdict.fault.id:32} {verdict.told}", flush=True)
    bad = [verdict for verdict in verdicts if verdict.color != "red"]
    for verdict in bad:
        print(f"\n{verdict.fault.id} is {verdict.color}: {verdict.fault.why}\n  {verdict.told}")
    print(f"\n{len(verdicts) - len(bad)} of {len(verdicts)} faults are seen")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
