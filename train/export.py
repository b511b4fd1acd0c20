"""``gracile export``: a run's sparse model with its zeros left out, and a report of what that changes."""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import platform
import statistics
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
import yaml
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from ..models import sparse_export
from ..models.sparse_export import AUTO, CHOICES, DENSE, FORMS, Exported
from .atomic_write import write_atomically
from .config.arguments import DataArguments
from .config.parser import OneLineParser
from .data.blocks import Blocks, collate, make_blocks
from .data.corpus import open_corpus
from .data_only import data_only
from .engines.process_exit import leave
from .errors import BadInput
from .run.report import perplexity, size
from .run.resume import RUN_FILE
from .sources import model_of, tokenizer_of

REPORT = "report.json"
BATCH = 8  # validation blocks a pass
TURNS = 11  # of whole models
HEAD = """\
Write the sparse model of a run without its zeros, each layer in the form that is fastest on this machine, and compare
it with the dense one: speed, file size and perplexity on the validation blocks of the run's data.

  gracile export runs/sparse
  gracile export runs/sparse --sparse csr --tokens 32 --output_dir runs/small

CHECKPOINT is a folder that gracile pretrain saved. gracile.models.sparse_export.load(DIR) reads what is written.
"""


def _flags() -> OneLineParser:
    parser = OneLineParser(
        prog="gracile export",
        description=HEAD,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        usage="gracile export CHECKPOINT [options]",
    )
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="folder of a saved model")
    parser.add_argument("--sparse", default=AUTO, metavar="FORM", help=f"{', '.join(CHOICES)} [{AUTO}]")
    parser.add_argument("--tokens", type=int, default=1, metavar="N", help="tokens of a pass, to be fast at [1]")
    parser.add_argument("--output_dir", "--output-dir", metavar="DIR", help="where to write [CHECKPOINT-sparse]")
    parser.add_argument("--dataset", metavar="NAME", help="data for the perplexity [the run's]")
    parser.add_argument("--validation_blocks", "--validation-blocks", type=int, metavar="N", help="[the run's]")
    parser.add_argument("--device", metavar="NAME", help="where to be fast: cpu or cuda [a GPU where there is one]")
    parser.add_argument("--json", action="store_true", help="print JSON")
    return parser


def export(options: argparse.Namespace) -> dict[str, Any]:
    """Write the model; returns what report.json holds.

    Raises:
        BadInput: for input that cannot be used, before anything is written.
    """
    checkpoint, output_dir = Path(options.checkpoint), folder_of(options)
    _check(options, checkpoint, output_dir)
    data, device = _data(checkpoint, options), _device(options.device)
    model, tokenizer = _loaded(checkpoint, device)
    _check_positions(model, options.tokens)
    blocks = make_blocks(open_corpus(data), tokenizer, data)
    dense, dense_bytes = sparse_export.sparse_linears(model), _bytes(model)
    before = loss(model, blocks)
    numbers = list(dict.fromkeys((options.tokens, 1)))
    try:
        layers = sparse_export.sparsify(model, options.sparse, numbers)
    except ValueError as error:
        raise BadInput(f"checkpoint {str(checkpoint)!r} cannot be exported: {error}") from None
    sparse_bytes = sparse_export.save(model, output_dir)
    tokenizer.save_pretrained(output_dir)
    after = loss(sparse_export.load(output_dir, device), blocks)
    report = {
        "checkpoint": str(checkpoint),
        "output_dir": str(output_dir),
        "sparse": options.sparse,
        "tokens": options.tokens,
        "dtype": str(model.dtype).removeprefix("torch."),
        "zeros": _zeros(layers),
        "bytes": {"dense": dense_bytes, "sparse": sparse_bytes},
        "data": {
            "dataset": ", ".join(data.dataset),
            "validation_blocks": len(blocks.validation),
            "block_size": data.block_size,
        },
        "loss": {"dense": before, "sparse": after},
        "perplexity": {"dense": perplexity(before), "sparse": perplexity(after)},
        "model_ms": {str(number): passes(model, dense, number) for number in sorted(numbers)},
        "forms": {str(number): by_form(layers, number) for number in sorted(numbers)},
        "layers": {name: _as_json(layer) for name, layer in layers.items()},
        "machine": f"{platform.machine()}, {device.type}, {torch.get_num_threads()} threads",
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
    }
    write_atomically(output_dir / REPORT, json.dumps(report, indent=2) + "\n")
    return report


def folder_of(options: argparse.Namespace) -> Path:
    """Where to write."""
    if options.output_dir is not None:
        return Path(options.output_dir)
    checkpoint = Path(options.checkpoint)
    named = checkpoint if checkpoint.name not in ("", "..") else checkpoint.resolve()
    return named.with_name(f"{named.name}-sparse")


def _as_json(layer: Exported) -> dict[str, Any]:
    return {
        "form": layer.form,
        "shape": list(layer.shape),
        "zeros": layer.zeros,
        "ms": {str(number): times for number, times in layer.ms.items()},
    }


def _zeros(layers: dict[str, Exported]) -> float:
    """Of all weights of these layers."""
    elements = {name: math.prod(layer.shape) for name, layer in layers.items()}
    return sum(elements[name] * layer.zeros for name, layer in layers.items()) / sum(elements.values())


def _bytes(model: PreTrainedModel) -> int:
    """Of the model's weights, tied ones once."""
    return sum({p.data_ptr(): p.nbytes for p in model.state_dict().values()}.values())


@torch.inference_mode()
def loss(model: PreTrainedModel, blocks: Blocks) -> float:
    """Nats per token, over all validation blocks."""
    count, total, tokens = len(blocks.validation), 0.0, 0
    for start in range(0, count, BATCH):
        examples = [blocks.validation[i] for i in range(start, min(start + BATCH, count))]
        batch = {key: value.to(model.device) for key, value in collate(examples).items()}
        counted = int((batch["labels"][:, 1:] != -100).sum())
        total, tokens = total + counted * float(model(**batch).loss), tokens + counted
    return total / tokens


@torch.inference_mode()
def passes(model: PreTrainedModel, dense: Mapping[str, nn.Module], tokens: int) -> dict[str, float]:
    """Milliseconds of the whole model on ``tokens`` tokens as it is and with ``dense`` layers, in turns; medians."""
    ids = torch.zeros(1, tokens, dtype=torch.long, device=model.device)
    sparse = {name: model.get_submodule(name) for name in dense}
    times: dict[str, list[float]] = {"dense": [], "sparse": []}
    for turn in range(TURNS + 1):
        for name, layers in (("dense", dense), ("sparse", sparse)):
            sparse_export.put(model, layers)
            sparse_export.wait_for(model.device)
            start = time.perf_counter()
            model(ids, use_cache=False)
            sparse_export.wait_for(model.device)
            if turn:  # the first turn warms up
                times[name].append(1e3 * (time.perf_counter() - start))
    return {name: statistics.median(of) for name, of in times.items()}


def by_form(layers: dict[str, Exported], tokens: int) -> dict[str, dict[str, Any]]:
    """Milliseconds of all sparse layers in one form, beside the same layers dense, and how many can take it."""
    report = {}
    for form in (DENSE, *FORMS):
        able = [layer.ms[tokens] for layer in layers.values() if form in layer.ms[tokens]]
        if able:
            ms, floor = sum(times[form] for times in able), sum(times[DENSE] for times in able)
            report[form] = {"layers": len(able), "ms": ms, "dense_ms": floor}
    chosen = sum(layer.ms[tokens][layer.form] for layer in layers.values())
    report["as written"] = {"layers": len(layers), "ms": chosen, "dense_ms": report[DENSE]["ms"]}
    return report


def table(report: dict[str, Any]) -> str:
    """The report as text."""
    one, other = report["bytes"]["dense"], report["bytes"]["sparse"]
    losses, forms = report["perplexity"], [layer["form"] for layer in report["layers"].values()]
    count = ", ".join(f"{forms.count(form)} {form}" for form in dict.fromkeys(forms))
    lines = [
        f"{report['checkpoint']}: {len(forms)} sparse linear layers, {report['zeros']:.1%} zeros; written as {count}",
        "",
        f"  {'':<22}{'dense':>14}{'sparse':>14}",
        f"  {'weights':<22}{size(one):>14}{size(other):>14}  {one / other:.2f} x smaller",
        f"  {'perplexity':<22}{losses['dense']:>14.4f}{losses['sparse']:>14.4f}",
    ]
    for number, ms in report["model_ms"].items():
        row = f"model, {number} token{'s' if number != '1' else ''}"
        faster = f"{ms['dense'] / ms['sparse']:.2f} x as fast"
        lines.append(f"  {row:<22}{ms['dense']:>11.2f} ms{ms['sparse']:>11.2f} ms  {faster}")
    for number, by in report["forms"].items():
        lines += ["", f"  the sparse layers alone, {number} token{'s' if number != '1' else ''}"]
        for form, found in by.items():
            faster = f"{found['dense_ms'] / found['ms']:.2f} x as fast as dense"
            of = f"{found['layers']} layers"
            lines.append(f"    {form:<12}{of:>12}{found['ms']:>14.3f} ms  {faster}")
    lines += ["", f"  {report['output_dir']}/ holds the model, its tokenizer and {REPORT}"]
    return "\n".join(lines)


# ---- what is given --------------------------------------------------------------------------------------------------


def _check(options: argparse.Namespace, checkpoint: Path, output_dir: Path) -> None:
    if options.sparse not in CHOICES:
        raise BadInput(f"sparse must be one of {', '.join(CHOICES)}, got {options.sparse!r}")
    for key in ("tokens", "validation_blocks"):
        value = getattr(options, key)
        if value is not None and value < 1:
            raise BadInput(f"{key} must be at least 1, got {value}")
    if not (checkpoint / "config.json").is_file():
        raise BadInput(f"checkpoint {str(checkpoint)!r} holds no config.json: give the folder of a saved model")
    if output_dir.is_file() or (output_dir.is_dir() and any(output_dir.iterdir())):
        raise BadInput(f"output_dir {str(output_dir)!r} holds something already; choose another with --output_dir")
    if not output_dir.is_dir():
        try:
            output_dir.mkdir(parents=True)
            output_dir.rmdir()  # only whether it can be made: the work comes first
        except OSError as error:
            reason = error.strerror
            raise BadInput(f"output_dir {str(output_dir)!r} cannot be made: {reason}; choose another") from None


def _check_positions(model: PreTrainedModel, tokens: int) -> None:
    most = getattr(model.config, "max_position_embeddings", None)
    if most is not None and tokens > most:
        raise BadInput(f"tokens must be at most {most}, the positions that the model knows, got {tokens}")


def _device(name: str | None) -> torch.device:
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.empty(0, device=device)
    except (AssertionError, RuntimeError) as error:
        raise BadInput(f"device {name!r} cannot be used: {' '.join(str(error).split())}") from None
    return device


def _data(checkpoint: Path, options: argparse.Namespace) -> DataArguments:
    """The data of the run, or what was given in its place."""
    names = [field.name for field in dataclasses.fields(DataArguments)]
    settings: dict[str, Any] = {}
    run = next((folder / RUN_FILE for folder in (checkpoint, checkpoint.parent) if (folder / RUN_FILE).is_file()), None)
    if run is not None:
        try:
            saved = yaml.safe_load(run.read_text(encoding="utf-8"))["config"]
            settings = {name: saved[name] for name in names if name in saved}
        except (OSError, ValueError, yaml.YAMLError, KeyError, TypeError) as error:
            raise BadInput(f"{run} is not what gracile pretrain writes: {' '.join(str(error).split())}") from None
    elif options.dataset is None:
        raise BadInput(f"{str(checkpoint)!r} holds no {RUN_FILE}: say what to measure the perplexity on with --dataset")
    if options.dataset is not None:
        for key in ("validation_dataset", "dataset_weights"):
            settings.pop(key, None)
    for key in ("dataset", "validation_blocks"):
        if getattr(options, key) is not None:
            settings[key] = getattr(options, key)
    return DataArguments(**settings)


def _loaded(checkpoint: Path, device: torch.device) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    with _quietly():
        tokenizer = tokenizer_of("checkpoint", str(checkpoint), None)
        loaded = model_of("checkpoint", str(checkpoint), None, dtype="auto", output_loading_info=True)
    model, found = loaded
    if found["unexpected_keys"] or found["missing_keys"]:
        strange = sorted([*found["unexpected_keys"], *found["missing_keys"]])[0]
        raise BadInput(
            f"checkpoint {str(checkpoint)!r} does not hold a model of plain layers ({strange}); "
            "export the folder that the run ended with"
        )
    return model.eval().to(device), tokenizer


@contextmanager
def _quietly() -> Iterator[None]:
    """No bars and no tables from transformers: what is wrong with a file is said in one line."""
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code 0; 2 for bad input, with one line that says why."""
    arguments = sys.argv[1:] if argv is None else list(argv)
    try:
        options = _flags().parse_args(arguments)
        with data_only():
            report = export(options)
    except BadInput as error:
        print(f"gracile export: {error}", file=sys.stderr)
        return 2
    print(json.dumps(report, indent=2) if options.json else table(report))
    return 0


if __name__ == "__main__":
    leave(main())
