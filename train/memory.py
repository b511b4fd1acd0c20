"""``gracile memory``: the memory of each process of a run, planned before anything is allocated."""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

from .atomic_write import valid_json
from .build.model import checkpoints_activations
from .config.arguments import ALL, AnySettings, RunArguments
from .config.checks import optimizer_entry
from .config.output_files import check_output
from .config.parser import OneLineParser
from .config.which import load_either
from .engines.division import Division
from .engines.process_exit import leave
from .errors import BadInput
from .measurement.kinds import ACTIVATIONS, FROZEN, KINDS, MOMENTS, STEP, TEMPORARY, WEIGHTS, short_name
from .measurement.planner import ADAMW, WIDE_ADAMW, Plan, Planner
from .run.report import size

GIB = 2**30


class Card(NamedTuple):
    """A size of GPU: the GiB that a program can use, as drivers report it, and cards of that size."""

    gib: float
    names: tuple[str, ...]


CARDS = {
    "24GB": Card(24.0, ("RTX3090", "RTX4090")),
    "40GB": Card(40.0, ("A100-40GB",)),
    "48GB": Card(45.0, ("L40S", "A6000")),
    "80GB": Card(79.6, ("A100-80GB", "H100")),
    "141GB": Card(140.4, ("H200",)),
}
UNITS = {"MB": 10**6, "GB": 10**9, "MIB": 2**20, "GIB": 2**30}
HEAD = """\
Bytes that each process of a run needs, by kind, without allocating any. CONFIG is as for gracile pretrain or gracile
finetune, and so are all further --key value pairs: a key that only one of the two has says which it is.

  gracile memory llama_7b_galore --compare adamw,galore_adamw,galore_adamw_8bit --micro_batch 1 --budget 24GiB
  gracile memory my.yaml --zero 3 --world_size 8 --plot memory.png
  gracile memory finetune_quickstart --adapter lora --optimizer adamw
"""


def _flags() -> OneLineParser:
    parser = OneLineParser.of("memory", HEAD)
    parser.add_argument("--command", metavar="WORD", help="pretrain or finetune, where no key of CONFIG says it")
    parser.add_argument("--zero", type=int, metavar="STAGE", help="DeepSpeed ZeRO 0, 1, 2 or 3 [the configuration's]")
    parser.add_argument("--world_size", "--world-size", type=int, metavar="N", help="processes [those launched]")
    parser.add_argument("--offload", choices=("none", "optimizer"), help="whether optimizer state lies on the CPU")
    parser.add_argument("--micro_batch", "--micro-batch", type=int, metavar="N", help="per_device_train_batch_size")
    parser.add_argument("--seq_len", "--seq-len", type=int, metavar="N", help="block_size")
    parser.add_argument("--compare", metavar="A,B,...", help="optimizers side by side [the configuration's]")
    parser.add_argument("--budget", metavar="24GiB", help="find the largest micro batch within it")
    parser.add_argument("--gpu", metavar="NAME,...", help="cards to try, by size or name: 24GB, H100 [all]")
    parser.add_argument("--plot", metavar="FILE.png", help="draw what there is at the peak")
    parser.add_argument("--json", action="store_true", help="print JSON")
    return parser


def bytes_of(text: str) -> int:
    """``24GiB``, ``80GB`` or ``512MiB`` as bytes.

    Raises:
        BadInput: for anything else.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([GM]i?B)", text, re.IGNORECASE)
    amount = 0.0 if found is None else float(found[1]) * UNITS[found[2].upper()]
    if not 1 <= amount < 2**62:
        raise BadInput(f"budget must be an amount such as 24GiB, 80GB or 512MiB, got {text!r}")
    return int(amount)


def division_of(
    run: RunArguments, hidden_size: int, *, zero: int | None, world_size: int | None, offload: str | None
) -> Division:
    """How the run will be split, as its configuration and the flags say."""
    configured = Division.of(run, hidden_size)
    return replace(
        configured,
        stage=configured.stage if zero is None else zero,
        processes=configured.processes if world_size is None else world_size,
        offload=configured.offload if offload is None else offload == "optimizer",
    )


class Table:
    """The plans of one or several optimizers with and without checkpointed activations."""

    def __init__(self, config: AnySettings, options: argparse.Namespace) -> None:
        self.config = config
        given = {key: getattr(options, key) for key in ("zero", "world_size", "offload")}
        self.names = _optimizers(options.compare, config)
        self.cards = _cards(options.gpu)
        self.budget = None if options.budget is None else bytes_of(options.budget)
        self.planner = Planner(config, partial(division_of, **given))
        self.micro_batch = config.run.per_device_train_batch_size
        self.plans = {name: self._both(name) for name in self.names}
        self._compare_like_with_like()
        self._check_budget()

    def _both(self, name: str) -> tuple[Plan, Plan]:
        plan = partial(self.planner.plan, name, self.micro_batch)
        return plan(checkpointing=False), plan(checkpointing=True)

    def _compare_like_with_like(self) -> None:
        """Put an AdamW with fp32 moments beside torch's, where the others' moments are fp32 and torch's narrower."""
        moments = {name: plain.moments for name, (plain, _) in self.plans.items()}
        narrow = moments.get(ADAMW) in (torch.bfloat16, torch.float16)
        if narrow and torch.float32 in moments.values():
            self.names.insert(self.names.index(ADAMW) + 1, WIDE_ADAMW)
            self.plans[WIDE_ADAMW] = self._both(WIDE_ADAMW)

    def _check_budget(self) -> None:
        weights = min(plain.weights for plain, _ in self.plans.values())
        if self.budget is not None and self.budget < weights:
            raise BadInput(
                f"budget is {size(self.budget)}, less than the {size(weights)} of weights of each process; give more, "
                "or split them with --zero 3 and a larger --world_size"
            )

    def largest(self, name: str) -> tuple[int, int]:
        """The largest micro batches within the budget, plain and checkpointed."""
        assert self.budget is not None
        one, other = (self.planner.largest_micro_batch(name, ckpt, self.budget) for ckpt in (False, True))
        return one, other

    def fits(self, name: str, card: str) -> str:
        plain, checkpointed = self.plans[name]
        room = CARDS[card].gib * GIB
        return "yes" if plain.peak <= room else "checkpointed" if checkpointed.peak <= room else "no"

    # ---- shown ------------------------------------------------------------------------------------------------------

    @property
    def title(self) -> str:
        planner = self.planner
        dtype = str(planner.dtype).removeprefix("torch.") + (", mixed precision" if planner.autocast else "")
        tokens = f"{self.micro_batch} x {self.config.data.block_size} tokens a pass"
        part = "" if planner.trainee.part is None else f"; {planner.trainee.part}, {planner.trained:,} trained"
        model = f"{self.config.model.model}, {planner.parameters:,} parameters in {dtype}{part}"
        kept = self.config.optimizer.keep_gradients
        freed = "" if kept == ALL else f", keep_gradients {kept}"
        return f"{model}; {tokens}; {planner.division}{freed}"

    def rows(self) -> list[tuple[str, list[str]]]:
        """Names and cells, a cell for each optimizer."""

        def each(row: str, cell: Any) -> tuple[str, list[str]]:
            return row, [cell(*self.plans[name]) for name in self.names]

        rows = []
        for kind in KINDS:
            if kind not in (ACTIVATIONS, TEMPORARY):
                if any(plain.held[kind] for plain, _ in self.plans.values()):
                    name = "trained weights" if kind == WEIGHTS and self._has_frozen else kind
                    rows.append(each(name, lambda plain, _, kind=kind: size(plain.held[kind])))
                if kind == MOMENTS:
                    rows.append(each("dtype of moments", lambda plain, _: short_name(plain.moments)))
                continue
            rows.append(each(kind, lambda plain, _, kind=kind: size(plain.held[kind])))
            rows.append(each(f"{kind}, checkpointed", lambda _, less, kind=kind: size(less.held[kind])))
        own = checkpoints_activations(self.config.run)
        rows.append(each("peak" if own else "peak, as this run is", lambda plain, _: size(plain.peak)))
        name = "peak, checkpointed" + (", as this run is" if own else "")
        rows.append(each(name, lambda _, less: size(less.peak)))
        rows.append(each("weights + state", lambda plain, _: size(plain.weights_and_state)))
        if any(plain.offloaded_bytes for plain, _ in self.plans.values()):
            rows.append(each("in the CPU's memory", lambda plain, _: size(plain.offloaded_bytes)))
        if self.budget is not None:
            found = [self.largest(name) for name in self.names]
            rows.append((f"micro batch in {size(self.budget)}", [str(plain) for plain, _ in found]))
            rows.append(("micro batch, checkpointed", [str(less) for _, less in found]))
        for card in self.cards:
            rows.append(
                (f"fits {card} ({', '.join(CARDS[card].names)})", [self.fits(name, card) for name in self.names])
            )
        return rows

    def __str__(self) -> str:
        rows = [("each process, at most", self.names), *self.rows()]
        width = max(len(name) for name, _ in rows)
        columns = [max(len(cells[i]) for _, cells in rows) for i in range(len(self.names))]
        lines = [
            "  ".join([f"  {name:<{width}}", *(f"{cell:>{w}}" for cell, w in zip(cells, columns, strict=True))])
            for name, cells in rows
        ]
        foot = "Not all at the same time: the peak is the most together, in a pass or in the optimizer's step. Not in\n"
        foot += (
            "it are the driver's own share of a GPU (about 0.5 GiB), what library calls need inside, and changes of\n"
        )
        foot += "masks."
        if WIDE_ADAMW in self.names:
            foot += f"\ntorch's AdamW keeps moments in the dtype of the weights: compare fp32 ones with {WIDE_ADAMW}."
        return "\n".join([self.title, "", *lines, "", foot])

    @property
    def _has_frozen(self) -> bool:
        return any(plain.held[FROZEN] for plain, _ in self.plans.values())

    def as_json(self) -> dict[str, Any]:
        def numbers(plan: Plan) -> dict[str, Any]:
            return {"held": plan.held, "at_peak": plan.at_peak, "peak": plan.peak, "offloaded": plan.offloaded}

        optimizers = {}
        for name, (plain, checkpointed) in self.plans.items():
            optimizers[name] = numbers(plain) | {
                "checkpointed": numbers(checkpointed),
                "dtype_of_moments": short_name(plain.moments),
                "weights_and_state": plain.weights_and_state,
                "fits": {card: self.fits(name, card) for card in self.cards},
            }
            if self.budget is not None:
                keys = ("plain", "checkpointed")
                optimizers[name]["largest_micro_batch"] = dict(zip(keys, self.largest(name), strict=True))
        return {
            "model": self.config.model.model,
            "parameters": self.planner.parameters,
            "trained": self.planner.trained,
            "micro_batch": self.micro_batch,
            "seq_len": self.config.data.block_size,
            "zero": self.planner.division.stage,
            "world_size": self.planner.division.processes,
            "budget": self.budget,
            "checkpointed": checkpoints_activations(self.config.run),
            "optimizers": optimizers,
        }

    def plot(self, path: Path) -> None:
        """Stacked bars of what there is at the peak, checkpointed where the configuration says so."""
        checkpointed = checkpoints_activations(self.config.run)
        names = {name: name for name in self.names}
        if WIDE_ADAMW in names:
            names[ADAMW] += f", {short_name(self.plans[ADAMW][checkpointed].moments)} moments"
        bars = {shown: self.plans[name][checkpointed].at_peak for name, shown in names.items()}
        draw(path, bars, self._limits(), self._plot_title(checkpointed))

    def _limits(self) -> dict[str, float]:
        if self.budget is not None:
            return {f"budget {size(self.budget)}": self.budget / GIB}
        return {card: CARDS[card].gib for card in self.cards}

    def _plot_title(self, checkpointed: bool) -> str:
        more = ", activations checkpointed" if checkpointed else ""
        return self.title.replace("; ", "\n", 1) + more


def draw(path: Path, bars: Mapping[str, Mapping[str, int]], limits: Mapping[str, float], title: str) -> None:
    """One bar a name, stacked by kind; lines at ``limits``, in GiB."""
    from matplotlib.figure import Figure  # takes half a second, which a plan without a picture need not wait for

    figure = Figure(figsize=(9, 1.6 + 0.55 * len(bars)), layout="constrained")
    axes = figure.subplots()
    colours = {kind: f"C{i}" for i, kind in enumerate(kind for kind in KINDS if kind != FROZEN)}
    colours |= {FROZEN: "0.75", STEP: "0.35"}
    names = list(bars)
    left = [0.0] * len(names)
    for kind in KINDS:
        widths = [bars[name][kind] / GIB for name in names]
        if any(width > 0.002 * max(sum(held.values()) / GIB for held in bars.values()) for width in widths):
            axes.barh(names, widths, left=left, label=kind, color=colours[kind], height=0.65)
        left = [x + width for x, width in zip(left, widths, strict=True)]
    for name, total in zip(names, left, strict=True):
        above_lines = {"facecolor": "white", "edgecolor": "none", "pad": 0}
        axes.annotate(f" {total:.3g}", (total, name), va="center", bbox=above_lines)
    shown = {name: limit for name, limit in limits.items() if limit <= 1.3 * max(left) or len(limits) == 1}
    for name, limit in shown.items():
        axes.axvline(limit, color="black", linestyle="--", linewidth=1)
        axes.annotate(name, (limit, 1), xycoords=("data", "axes fraction"), va="bottom", ha="center", size=8)
    axes.set_title(title, pad=18)
    axes.set(xlabel="GiB at the peak, each process", xlim=(0, 1.12 * max([*left, *shown.values()])))
    axes.invert_yaxis()
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
    figure.savefig(path, dpi=120)


def _optimizers(compare: str | None, config: AnySettings) -> list[str]:
    names = [config.optimizer.optimizer] if compare is None else [name.strip() for name in compare.split(",")]
    for name in names:
        optimizer_entry(name)
    return list(dict.fromkeys(names))


def _cards(chosen: str | None) -> list[str]:
    if chosen is None:
        return list(CARDS)
    known = {name.lower(): size for size, card in CARDS.items() for name in (size, size[:-2], *card.names)}
    found = []
    for name in chosen.split(","):
        plain = name.strip().lower().replace(" ", "")
        if plain not in known:
            readable = [f"{size} ({', '.join(card.names)})" for size, card in CARDS.items()]
            raise BadInput(
                f"unknown gpu {name.strip()!r}; give its memory as --budget, or one of {', '.join(readable)}"
            )
        found.append(known[plain])
    return list(dict.fromkeys(found))


def _table(arguments: Sequence[str]) -> tuple[Table, argparse.Namespace]:
    options, rest = _flags().parse_known_args(arguments)
    for flag, key, least in (("micro_batch", "per_device_train_batch_size", 1), ("seq_len", "block_size", 2)):
        value = getattr(options, flag)
        if value is not None and not least <= value < 2**62:
            raise BadInput(f"{flag} must be at least {least}, and a size that a computer can count, got {value}")
        rest += [] if value is None else [f"--{key}", str(value)]
    if options.plot is not None:
        check_output("plot", options.plot, (".png", ".svg", ".pdf"))
    return Table(load_either(rest, options.command, needs_output_dir=False), options), options


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code 0; 2 for bad input, with one line that says why."""
    arguments = sys.argv[1:] if argv is None else list(argv)
    try:
        table, options = _table(arguments)
    except BadInput as error:
        if os.environ.get("RANK", "0") == "0":
            print(f"gracile memory: {error}", file=sys.stderr)
        return 2
    print(valid_json(table.as_json(), indent=2) if options.json else table)
    if options.plot is not None:
        table.plot(Path(options.plot))
    return 0


if __name__ == "__main__":
    leave(main())
