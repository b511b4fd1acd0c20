"""What a run reports when it ends: metrics.json, loss.png and a table."""

from __future__ import annotations

import math
import operator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import TrainerState

from ...int8_weight import memory_of
from ...optim.memory import adamw_state_bytes, state_bytes
from ...optim.released import ReleasedGradients
from ..atomic_write import non_finite, valid_json, write_atomically
from ..engines.layout import Layout
from ..measurement.measure import peak_memory


def elements(model: nn.Module) -> int:
    """The number of a model's parameters, also of those that ZeRO 3 has split."""
    return sum(getattr(p, "ds_numel", p.numel()) for p in model.parameters())


def trainable(model: nn.Module) -> int:
    """How many of a model's parameters are trained."""
    return sum(getattr(p, "ds_numel", p.numel()) for p in model.parameters() if p.requires_grad)


def memory(
    model: nn.Module,
    optimizer: torch.optim.Optimizer | None,
    layout: Layout,
    released: ReleasedGradients | None = None,
) -> dict[str, int]:
    """Bytes of this process. Weights and state are counted from the tensors; gradients, which may be ``released`` in
    the backward pass, and the state of AdamW to compare with, are computed."""
    held = [*model.parameters(), *_saved_buffers(model)]
    trainable = [_split_from(p) for p in model.parameters() if p.requires_grad]
    gradients = sum(p.nbytes for p in trainable) // layout.gradient_parts
    return {
        "weight_bytes": sum(part.nbytes for p in held for part in memory_of(_held(p))),
        "gradient_bytes": gradients if released is None else released.most_bytes,
        "optimizer_state_bytes": 0 if optimizer is None else state_bytes(optimizer),
        "adamw_state_bytes": adamw_state_bytes(trainable) // layout.state_parts,
        "peak_memory_bytes": peak_memory(),
    }


def _saved_buffers(model: nn.Module) -> list[torch.Tensor]:
    """Buffers that are saved with a model's weights, such as the places of sparse values."""
    found = [(module, *pair) for module in model.modules() for pair in module.named_buffers(recurse=False)]
    return [buffer for module, name, buffer in found if name not in module._non_persistent_buffers_set]


def _held(parameter: Any) -> torch.Tensor:
    """This process's shard of a parameter. (Of FSDP2 a parameter has the whole shape, of ZeRO 3 an empty one.)"""
    if hasattr(parameter, "to_local"):
        parameter = parameter.to_local()
    held: torch.Tensor = parameter if parameter.numel() else getattr(parameter, "ds_tensor", parameter)
    return held


def _split_from(parameter: Any) -> torch.Tensor:
    """The tensor, on the meta device, whose gradient and state the engine splits: the parameter, or FSDP2's shard."""
    shape = getattr(parameter, "ds_shape", None)
    return torch.empty(_held(parameter).shape if shape is None else shape, dtype=parameter.dtype, device="meta")


def perplexity(loss: float) -> float:
    return math.exp(loss) if loss < 700 else math.inf


def write_metrics(output_dir: Path, metrics: dict[str, Any]) -> None:
    """metrics.json; a number that is not finite is null there, and is named."""
    write_atomically(output_dir / "metrics.json", valid_json(metrics, indent=2) + "\n")
    missing = list(non_finite(metrics))
    if missing:
        more = "" if len(missing) == 1 else f" and {len(missing) - 1} more"
        print(f"not finite, and null in metrics.json: {missing[0]}{more}")


def plot_losses(output_dir: Path, history: list[dict[str, float]], tokens_per_step: int, title: str) -> None:
    """loss.png: training and validation loss over steps, with tokens along the top."""
    from matplotlib.figure import Figure  # takes half a second, which most of the package need not wait for

    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes = figure.subplots()
    for key, label, style in (("loss", "training", "-"), ("eval_loss", "validation", "o-")):
        points = [(entry["step"], entry[key]) for entry in history if key in entry]
        if points:
            style = "o" if len(points) == 1 else style  # a line of one point cannot be seen
            axes.plot(*zip(*points, strict=True), style, label=label, markersize=4)
    axes.set(xlabel="step", ylabel="loss (nats per token)", title=title)
    axes.grid(alpha=0.3)
    if axes.lines:
        axes.legend()
    millions = tokens_per_step / 1e6
    top = axes.secondary_xaxis("top", functions=(partial(operator.mul, millions), partial(operator.mul, 1 / millions)))
    top.set_xlabel("million tokens")
    figure.savefig(output_dir / "loss.png", dpi=120)


def closing_table(metrics: dict[str, Any]) -> str:
    """What a pretraining ends with."""
    rows = [
        ("parameters", f"{metrics['parameters']:,}"),
        ("tokens", f"{metrics['tokens']:,} in {metrics['steps']:,} steps"),
        ("tokens / s", _speed(metrics["tokens_per_second"])),
        ("validation loss", f"{metrics['validation_loss']:.4f}"),
        ("validation perplexity", f"{metrics['validation_perplexity']:.2f}"),
        *_memory_rows(metrics),
    ]
    return _table(rows)


def tuning_table(metrics: dict[str, Any]) -> str:
    """What a fine-tuning ends with: losses and accuracies before and after, of other data too."""
    trained, whole = metrics["trainable_parameters"], metrics["parameters"]
    rows = [
        ("parameters", f"{whole:,}, of which {trained:,} are trained ({trained / whole:.2%})"),
        ("examples", f"{metrics['examples']:,} in {metrics['steps']:,} steps"),
        ("tokens / s", _speed(metrics["tokens_per_second"])),
        ("validation loss", _change(metrics["validation_loss_before"], metrics["validation_loss"])),
    ]
    if "validation_accuracy" in metrics:
        rows += [("accuracy", _change(metrics["validation_accuracy_before"], metrics["validation_accuracy"]))]
    if "forgetting_loss" in metrics:
        rows += [("loss on other data", _change(metrics["forgetting_loss_before"], metrics["forgetting_loss"]))]
    return _table([*rows, *_memory_rows(metrics)])


def _change(before: float | None, after: float) -> str:
    return f"{after:.4f}" if before is None else f"{before:.4f} before, {after:.4f} after"


def _speed(tokens_per_second: float | None) -> str:
    if tokens_per_second is None:
        return "nothing left to train"
    return f"{tokens_per_second:,.0f} (evaluations and saves included)"


def _memory_rows(metrics: dict[str, Any]) -> list[tuple[str, str]]:
    state, dense = metrics["optimizer_state_bytes"], metrics["adamw_state_bytes"]
    return [
        ("peak memory", size(metrics["peak_memory_bytes"])),
        ("weights", size(metrics["weight_bytes"])),
        ("gradients", size(metrics["gradient_bytes"])),
        ("optimizer state", f"{size(state)} ({metrics['optimizer']}); plain AdamW {size(dense)}"),
    ]


def _table(rows: list[tuple[str, str]]) -> str:
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"  {name:<{width}}  {value}" for name, value in rows)


def size(count: int) -> str:
    amount = float(count)
    for unit in ("B", "KiB", "MiB"):
        if amount < 1024:
            return f"{amount:.1f} {unit}" if unit != "B" else f"{count} B"
        amount /= 1024
    return f"{amount:.2f} GiB"


def history_of(state: TrainerState) -> list[dict[str, float]]:
    """Losses by step, as metrics.json keeps them; of two evaluations at one step, the later."""
    kept = ("step", "loss", "eval_loss", "eval_accuracy", "grad_norm", "learning_rate", "density")
    entries = {
        (entry["step"], "loss" in entry): {key: entry[key] for key in kept if key in entry}
        for entry in state.log_history
        if "loss" in entry or "eval_loss" in entry
    }
    return list(entries.values())
