"""``gracile spectra``: what a fine-tuning did to the spectra of a model's matrices."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from ..spectra import compare
from .atomic_write import valid_json, write_atomically
from .config.output_files import check_output
from .config.parser import OneLineParser
from .engines.process_exit import leave
from .errors import BadInput
from .spectra_rows import Found, Row, layer_names, row_of, rows_of, seed_of
from .weight_pairs import read_pairs

HEAD = """\
What a fine-tuning did to the matrices of a model: intruder dimensions beside a random control, drift of singular
values, principal angles, the rank of the update and where it lies. By layer and by kind of matrix.

  gracile spectra base runs/tuned
  gracile spectra base runs/lora --modules q_proj,v_proj --json spectra.json --plot spectra.png

BASE is the folder of a saved model, TUNED one of the same model after fine-tuning, or a LoRA adapter that peft saved.
Safetensors are read a matrix at a time; no model is built, and no code is run.
"""
# Of the columns: head, measure, format.
COLUMNS = (
    ("intruders", "intruders", ".2f"),
    ("control", "control", ".2f"),
    ("energy", "intruder_energy", ".3f"),
    ("drift", "drift", ".1e"),
    ("angle L", "left_angle_mean", ".2f"),
    ("max", "left_angle_max", ".1f"),
    ("angle R", "right_angle_mean", ".2f"),
    ("max", "right_angle_max", ".1f"),
    ("rank", "effective_rank", ".1f"),
    ("stable", "stable_rank", ".1f"),
    ("|D|/|W|", "relative_norm", ".1e"),
    ("in L", "left_inside", ".3f"),
    ("in R", "right_inside", ".3f"),
    ("same", "unchanged", ".3f"),
    ("princ.", "principal_enrichment", ".2f"),
    ("low", "low_enrichment", ".2f"),
)


def _flags() -> OneLineParser:
    parser = OneLineParser(
        prog="gracile spectra",
        description=HEAD,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        usage="gracile spectra BASE TUNED [options]",
    )
    parser.add_argument("base", metavar="BASE", help="folder of the model before")
    parser.add_argument("tuned", metavar="TUNED", help="folder of the model after, or of a LoRA adapter")
    parser.add_argument("--k", type=int, default=10, metavar="N", help="leading vectors that may be intruders [10]")
    parser.add_argument(
        "--epsilon", type=float, default=0.5, metavar="X", help="an intruder's |cosine| is below it [0.5]"
    )
    parser.add_argument("--subspace", type=int, default=64, metavar="N", help="dimension of leading subspaces [64]")
    parser.add_argument("--modules", metavar="NAME,...", help="parts of names, or expressions [matrices of all layers]")
    parser.add_argument("--embeddings", action="store_true", help="embeddings and the output layer too")
    parser.add_argument("--device", default="cpu", metavar="NAME", help="where to compute: cpu or cuda [cpu]")
    parser.add_argument("--json", metavar="FILE.json", help="write every matrix's measures")
    parser.add_argument("--plot", metavar="FILE.png", help="draw intruders, similarities, ranks and angles by layer")
    return parser


def find(options: argparse.Namespace) -> Iterator[Found]:
    """The measures of each pair, as it is read."""
    device = _device(options.device)
    modules = [] if options.modules is None else [part.strip() for part in options.modules.split(",") if part.strip()]
    keys = {key: getattr(options, key) for key in ("k", "epsilon", "subspace")}
    names, pairs = read_pairs(Path(options.base), Path(options.tuned), modules, options.embeddings)
    for number, pair in enumerate(pairs):
        if sys.stderr.isatty():
            print(f"\r\033[K{number + 1} of {len(names)}  {pair.place.name}", end="", file=sys.stderr, flush=True)
        before, after = pair.before.to(device), pair.after
        after = type(after)(*(part.to(device) for part in after)) if isinstance(after, tuple) else after.to(device)
        try:
            measures = compare(before, after, seed=seed_of(pair.place.name), **keys)
        except ValueError as error:
            raise BadInput(f"{pair.place.name}: {error}") from None
        yield Found(pair.place, tuple(before.shape), measures)
    if sys.stderr.isatty():
        print("\r\033[K", end="", file=sys.stderr, flush=True)


def table(found: Sequence[Found], options: argparse.Namespace) -> str:
    """By layer, by kind, and in all."""
    total = row_of("all", [one.measures for one in found])
    intruders, control = (sum(getattr(one.measures, key) for one in found) for key in ("intruders", "control"))
    looked = sum(len(one.measures.similarity) for one in found)
    title = f"{options.tuned} against {options.base}: {len(found)} matrices; of {looked} leading left singular vectors "
    title += f"{intruders} are intruders, and {control} with the same update in random directions"
    blocks = [_lines("layer", rows_of(found, "layer")), _lines("kind", rows_of(found, "kind")), _lines("", [total])]
    width = max(len(cells[0]) for block in blocks for cells in block)
    columns = [max(len(cells[i]) for block in blocks for cells in block) for i in range(1, len(COLUMNS) + 2)]
    lines = [title]
    for block in blocks:
        lines.append("")
        for name, *cells in block if block[0][0] else block[1:]:
            shown = "  ".join(f"{cell:>{size}}" for cell, size in zip(cells, columns, strict=True))
            lines.append(f"  {name:<{width}}  {shown}")
    return "\n".join([*lines, "", _foot(found, options)])


def _lines(name: str, rows: Sequence[Row]) -> list[list[str]]:
    lines = [[name, "n", *(head for head, _, _ in COLUMNS)]]
    for row in rows:
        cells = [f"{row.means[key]:{form}}" for _, key, form in COLUMNS]
        lines.append([row.name or "(none)", str(row.matrices), *cells])
    return lines


def _foot(found: Sequence[Found], options: argparse.Namespace) -> str:
    sizes = sorted({one.measures.subspace for one in found})
    subspace = f"{sizes[0]}" if len(sizes) == 1 else f"{sizes[0]} to {sizes[-1]}"
    return f"""\
Means over n matrices; max is the largest. intruders: of the {options.k} leading left vectors, those with a |cosine|
below {options.epsilon:g} to each of the base's; control: with the same update in random directions; energy: the
intruders' share of the squared singular values. drift: of the singular values. angle L, R: between leading subspaces of
dimension {subspace}, in degrees. rank, stable: effective and stable rank of the update D. in L, R: share of D within
those of the base. same: weights unchanged in bf16. princ., low: how often the others are among the largest of the
base's leading part, and the smallest of the base, over what chance gives."""


def as_json(found: Sequence[Found], options: argparse.Namespace) -> dict[str, Any]:
    """Everything, by matrix, by layer, by kind and in all."""

    def rows(of: str) -> dict[str, Any]:
        return {row.name: {"matrices": row.matrices, **row.means} for row in rows_of(found, of)}

    return {
        "base": str(options.base),
        "tuned": str(options.tuned),
        "settings": {key: getattr(options, key) for key in ("k", "epsilon", "subspace")},
        "all": row_of("all", [one.measures for one in found]).means,
        "by_layer": rows("layer"),
        "by_kind": rows("kind"),
        "matrices": [{**one.place._asdict(), "shape": list(one.shape), **one.measures._asdict()} for one in found],
    }


def _device(name: str) -> torch.device:
    try:
        device = torch.device(name)
        torch.empty(0, device=device, dtype=torch.float64)
    except (AssertionError, RuntimeError, TypeError) as error:
        raise BadInput(f"device {name!r} cannot be used: {' '.join(str(error).split())}") from None
    return device


def _check(options: argparse.Namespace) -> None:
    for key in ("k", "subspace"):
        if getattr(options, key) < 1:
            raise BadInput(f"{key} must be at least 1, got {getattr(options, key)}")
    if not 0 < options.epsilon <= 1:
        raise BadInput(f"epsilon must be above 0 and at most 1, got {options.epsilon}")
    if options.modules is not None and not options.modules.strip(", "):
        raise BadInput("modules is empty; name some, or leave it out for the matrices of all layers")
    if options.json is not None:
        check_output("json", options.json, (".json",))
    if options.plot is not None:
        check_output("plot", options.plot, (".png", ".svg", ".pdf"))


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code 0; 2 for bad input, with one line that says why."""
    arguments = sys.argv[1:] if argv is None else list(argv)
    try:
        options = _flags().parse_args(arguments)
        _check(options)
        found = list(find(options))
    except BadInput as error:
        print(f"gracile spectra: {error}", file=sys.stderr)
        return 2
    print(table(found, options))
    if options.json is not None:
        write_atomically(Path(options.json), valid_json(as_json(found, options), indent=1) + "\n")
    if options.plot is not None:
        from .spectra_figure import draw  # matplotlib takes half a second

        draw(Path(options.plot), found, layer_names(found), options.epsilon)
    return 0


if __name__ == "__main__":
    leave(main())
