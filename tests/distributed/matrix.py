"""The whole distributed matrix, every pair of values in some cell, against one process; printed as a table.

    python tests/distributed/matrix.py [--only TEXT] [--out TABLE.md] [--list]

``make test-distributed`` runs it. cells.py says what a cell may differ by. In bf16, where gradients differ by more than
that, one rank in the same setting is compared over all parameters, and what torch's AdamW differs by there stands
beside it.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import random
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
from catalogue import OVER_PROCESSES, VARIANTS
from pool import Pool

Cell = dict[str, Any]

BATCH_OF_CELLS = 30  # cells of one job, after which a dot is printed

LAYERED = tuple(name for name in OVER_PROCESSES if VARIANTS[name].layer)
WITHOUT_SIDES = tuple(
    name for name in OVER_PROCESSES if VARIANTS[name].state.startswith("masks") or name.startswith("SCALE")
)
LARGE = {"sizes": [96, 401, 113], "rank": 12}  # moments of at least 4096 numbers, so that they are held in 8 bits
ZERO = ("zero1", "zero2", "zero3")
OPTIONS: dict[str, tuple[Cell, tuple[str, ...]]] = {
    "": ({}, ("ddp", "fsdp2", "zero0", *ZERO)),
    "round robin": ({"round_robin_gradients": True}, ("zero1", "zero2")),
    "no reduce-scatter": ({"reduce_scatter": False}, ("zero1", "zero2")),
    "overlap": ({"overlap_comm": True}, ZERO),
    "offload": ({"offload_optimizer": {"device": "cpu"}}, ZERO),
    "sub-groups": ({"sub_group_size": 200}, ("zero3",)),
}
FACTORS: dict[str, list[Any]] = {
    "optimizer": OVER_PROCESSES,
    "layout": ["zero0", "zero1", "zero2", "zero3", "ddp", "fsdp2"],
    "option": list(OPTIONS),
    "precision": ["fp32", "bf16", "bf16, fp32 gradients"],
    "ranks": [2, 4],
    "side": ["std", "left", "reverse_std"],
    "accumulation": [1, 4],
    "clip": [0.0, 0.05],
    "zero_init": [False, True],
    "shard_basis": [None, True],
}


def possible(cell: Cell) -> bool:
    """Whether such a cell exists; keys that are not chosen yet may still become anything."""
    layout, option = cell.get("layout"), cell.get("option")
    if layout and option and layout not in OPTIONS[option][1]:
        return False
    if cell.get("zero_init") and layout not in (None, "zero3"):
        return False
    if cell.get("zero_init") and option and "zero3" not in OPTIONS[option][1]:
        return False
    precision = cell.get("precision")
    layered = cell.get("optimizer") in LAYERED
    if layered and (cell.get("zero_init") or option == "sub-groups" or cell.get("side", "std") != "std"):
        return False  # weights must be whole to be converted, and layers stepped whole; there is no side
    if layered and cell.get("shard_basis"):
        return False
    if cell.get("optimizer") == "HyperSparseAdamW" and option == "sub-groups":
        return False  # the matrices of a group are ranked together, and so stepped together
    if cell.get("optimizer") in WITHOUT_SIDES and (cell.get("side", "std") != "std" or cell.get("shard_basis")):
        return False  # no side is projected, and there is no basis
    if cell.get("optimizer") == "SSTAdamW" and (precision or "fp32") != "fp32":
        return False  # what is frozen is rounded there, and its decompositions cannot be replayed in fp32
    if precision == "bf16, fp32 gradients" and layout and layout not in ZERO:
        return False
    return not (precision == "bf16" and layout == "zero0")  # no fp32 master weights there


def pairs_of(cell: Cell) -> set[frozenset[tuple[str, Any]]]:
    return {frozenset(pair) for pair in itertools.combinations(cell.items(), 2)}


def pairwise(seed: int = 0) -> list[Cell]:
    """Cells that hold every possible pair of values, greedily few."""
    chance = random.Random(seed)
    every = (dict(pair) for a, b in itertools.combinations(FACTORS, 2) for pair in _products(a, b))
    missing = {frozenset(pair.items()) for pair in every if possible(pair)}
    cells = []
    while missing:
        in_order = sorted((sorted(pair, key=repr) for pair in missing), key=repr)  # the same each time: sets have none
        best: Cell = {}
        covered: set[frozenset[tuple[str, Any]]] = set()
        for _ in range(40):
            cell = _completed(dict(chance.choice(in_order)), chance)
            new = pairs_of(cell) & missing if cell else set()
            if len(new) > len(covered):
                best, covered = cell, new
        missing -= covered
        cells.append(best)
    return cells


def _products(a: str, b: str) -> Iterator[Iterator[tuple[str, Any]]]:
    for x, y in itertools.product(FACTORS[a], FACTORS[b]):
        yield iter(((a, x), (b, y)))


def _completed(cell: Cell, chance: random.Random) -> Cell:
    for name in chance.sample(list(FACTORS), len(FACTORS)):
        if name not in cell:
            fitting = [value for value in FACTORS[name] if possible({**cell, name: value})]
            if not fitting:
                return {}
            cell[name] = chance.choice(fitting)
    return {name: cell[name] for name in FACTORS}


def task(cell: Cell, optimizer: str | None = None) -> Cell:
    """A cell as cells.py takes it."""
    return {
        "optimizer": optimizer or cell["optimizer"],
        "layout": cell["layout"],
        "precision": cell["precision"],
        "proj_type": cell["side"],
        "accumulation": cell["accumulation"],
        "clip": cell["clip"],
        "zero_init": cell["zero_init"],
        "traffic": True,
        "zero": OPTIONS[cell["option"]][0],
        "keys": {"shard_basis": True} if cell["shard_basis"] and _keeps_a_basis(cell["optimizer"]) else {},
        **(LARGE if VARIANTS[cell["optimizer"]].state in ("moments in 8 bits", "basis in 4 bits") else {}),
    }


def _keeps_a_basis(optimizer: str) -> bool:
    return not optimizer.startswith(("Lion", "DCT"))


def launch(pool: Pool, ranks: int, tasks: list[Cell]) -> list[Cell]:
    """What cells.py says of ``tasks`` on ``ranks`` processes."""
    return pool.call(ranks, "cells:measure", tasks, timeout=60 + 30 * len(tasks))


def measure(cells: list[Cell], pool: Pool, folder: Path) -> list[tuple[Cell, Cell, Cell | None]]:
    """For each cell what it measured, and AdamW's measure in the same setting where it is bf16."""
    settings: dict[str, str] = {}  # of a bf16 task -> the file of its run on one rank
    tasks = []
    for cell in cells:
        for own in [task(cell)] + ([task(cell, "AdamW")] if cell["precision"] != "fp32" else []):
            if cell["precision"] != "fp32":
                own["alone"] = settings.setdefault(json.dumps(own), str(folder / f"{len(settings)}.pt"))
            tasks.append((cell["ranks"], own))
    alone = [{**json.loads(text), "alone": path} for text, path in settings.items()]
    for some in _batches(alone):
        launch(pool, 1, some)
        print(".", end="", file=sys.stderr, flush=True)
    told: dict[str, Cell] = {}
    for ranks in FACTORS["ranks"]:
        own = list({json.dumps(t): t for r, t in tasks if r == ranks}.values())
        for some in _batches(own):
            for asked, result in zip(some, launch(pool, ranks, some), strict=True):
                told[json.dumps((ranks, asked))] = result
            print(".", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    results = []
    for cell in cells:
        own = [told[json.dumps((r, t))] for r, t in tasks if r == cell["ranks"] and _is_of(t, cell)]
        beside = next((t for t in own if t["optimizer"] == "AdamW"), None)
        results.append((cell, next(t for t in own if t["optimizer"] == cell["optimizer"]), beside))
    return results


def _is_of(asked: Cell, cell: Cell) -> bool:
    plain = {key: value for key, value in asked.items() if key != "alone"}
    return plain == task(cell) or (cell["precision"] != "fp32" and plain == task(cell, "AdamW"))


def _batches(tasks: list[Cell]) -> Iterator[list[Cell]]:
    for begin in range(0, len(tasks), BATCH_OF_CELLS):
        yield tasks[begin : begin + BATCH_OF_CELLS]


def table(results: list[tuple[Cell, Cell, Cell | None]]) -> str:
    """One line a cell, in Markdown."""
    heads = ["optimizer", "layout", "ranks", "precision", "side", "options", "same gradients", "own gradients",
             "AdamW's", "state", "sent", "at refresh", "holds"]  # fmt: skip
    lines = [heads, ["---"] * len(heads)]
    for cell, told, beside in sorted(results, key=lambda r: (OVER_PROCESSES.index(r[0]["optimizer"]), r[0]["layout"])):
        options = [cell["option"]] if cell["option"] else []
        options += ["accumulation 4"] if cell["accumulation"] > 1 else []
        options += ["clipped"] if cell["clip"] else []
        options += ["zero.Init"] if cell["zero_init"] else []
        options += ["shard_basis"] if task(cell)["keys"] else []
        measured = [f"{told['replayed']:.0e} {told['replayed_of_movement']:.0e}"]
        if beside is None:
            measured += [f"{told['difference']:.0e} {told['of_movement']:.0e}", ""]
        else:
            measured += [f"{told['overall']:.1e}", f"{beside['overall']:.1e}"]
        setting = [str(cell[name]) for name in ("optimizer", "layout", "ranks", "precision", "side")]
        bytes_ = [f"{told['state_bytes'] / told['state_bytes_alone']:.2f}", told["sent"], told["sent_at_refresh"]]
        holds = "yes" if told["holds"] else "NO"
        lines.append([*setting, ", ".join(options), *measured, *map(str, bytes_), holds])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="cells whose values contain this text")
    parser.add_argument("--out", type=Path, help="write the table there too")
    parser.add_argument("--list", action="store_true", help="name the cells and stop")
    chosen = parser.parse_args()
    cells = [cell for cell in pairwise() if chosen.only in str(list(cell.values()))]
    print(f"{len(cells)} cells", file=sys.stderr)
    if chosen.list:
        print(*cells, sep="\n")
        return 0
    with tempfile.TemporaryDirectory() as folder, contextlib.closing(Pool()) as pool:
        results = measure(cells, pool, Path(folder))
    text = table(results)
    print(text)
    failed = sum(not told["holds"] for _, told, _ in results)
    summary = f"{len(results) - failed} of {len(results)} cells hold"
    print(f"\n{summary}")
    if chosen.out:
        chosen.out.write_text(f"{text}\n\n{summary}\n")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
