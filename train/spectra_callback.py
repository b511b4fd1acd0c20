"""The spectra of a model while it is fine-tuned, as TensorBoard scalars::

Trainer(..., callbacks=[SpectraCallback(every=100)])
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..spectra import LowRankUpdate, compare
from ..target_modules import DEFAULT_TARGETS, targets
from ..validation import is_whole, require
from .spectra_rows import Found, layer_names, row_of, rows_of, seed_of
from .weight_pairs import INPUTS_FIRST, Pair, Place, place_of

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

SCALARS = (
    "intruders", "control", "intruder_energy", "drift", "left_angle_mean", "left_angle_max", "right_angle_mean",
    "right_angle_max", "effective_rank", "stable_rank", "relative_norm", "left_inside", "right_inside", "unchanged",
    "principal_enrichment", "low_enrichment",
)  # fmt: skip
BY_LAYER = ("intruders", "control", "drift", "left_angle_mean", "effective_rank")
LORA_WAY = "compare saved folders with `gracile spectra` instead"


class SpectraCallback(TrainerCallback):
    """Spectral measures for ``transformers.Trainer``, as scalars ``spectra/<measure>``; some by layer too.

    A model is compared with its weights as training begins, of which a copy is kept on the CPU; a model with LoRA
    adapters of peft with its base, of which none is needed. The first process computes, and the others wait for it: a
    record costs what ``gracile spectra`` costs for the same matrices.

    Args:
        every: steps between two records.
        target_modules: layers to look at, as for ``param_groups``; with LoRA, of those that have adapters.
        log_dir: by default ``runs/spectra`` in the Trainer's ``output_dir``.
        k: as for ``gracile.spectra.compare``.
        epsilon: as for ``gracile.spectra.compare``.
        subspace: as for ``gracile.spectra.compare``.

    ``found`` has the measures of the newest record, by matrix.

    Raises:
        ValueError: for an argument out of range, a pattern that matches nothing, weights that are split (ZeRO 3, FSDP)
            or quantized, an adapter that is no plain LoRA, or a run that is resumed, whose first weights are gone.

    Example:
        >>> from transformers import Trainer, TrainingArguments
        >>> from gracile.models import build_llama
        >>> from gracile.train.spectra_callback import SpectraCallback
        >>> model = build_llama("2m", hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4)
        >>> rows = [{"input_ids": torch.arange(8), "labels": torch.arange(8)}] * 8
        >>> arguments = TrainingArguments("run", max_steps=2, report_to="none", use_cpu=True, disable_tqdm=True)
        >>> spectra = SpectraCallback(every=2, target_modules=["q_proj"])
        >>> _ = Trainer(model, arguments, train_dataset=rows, callbacks=[spectra]).train()
        {'train_runtime': ...}
        >>> [one.place.name for one in spectra.found]
        ['model.layers.0.self_attn.q_proj.weight']
    """

    def __init__(
        self,
        every: int = 100,
        target_modules: str | Sequence[str] = DEFAULT_TARGETS,
        log_dir: str | Path | None = None,
        *,
        k: int = 10,
        epsilon: float = 0.5,
        subspace: int = 64,
    ) -> None:
        require(is_whole(every) and every >= 1, "every must be a whole number >= 1", every)
        self.keys: dict[str, Any] = {"k": k, "epsilon": epsilon, "subspace": subspace}
        compare(torch.eye(2), torch.eye(2), **self.keys)  # which refuses them
        self.every, self.target_modules, self.log_dir = every, target_modules, log_dir
        self.found: list[Found] = []
        self._watched: list[_Watched] = []
        self._writer: SummaryWriter | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._watched = _watched(kwargs["model"], self.target_modules)
        if state.global_step and not all(isinstance(one, _Lora) for one in self._watched):
            raise ValueError(
                f"SpectraCallback: training goes on at step {state.global_step}, and the weights that it began with "
                f"are not here; leave the callback out, and {LORA_WAY}"
            )
        if not state.is_world_process_zero:
            self._watched = []
            return
        for one in self._watched:
            one.remember()
        from torch.utils.tensorboard import SummaryWriter

        log_dir = Path(str(args.output_dir)) / "runs" / "spectra" if self.log_dir is None else self.log_dir
        self._writer = SummaryWriter(log_dir=str(log_dir))

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self._writer is None or state.global_step % self.every:
            return
        self.found = [self._measured(one.pair()) for one in self._watched]
        total = row_of("all", [one.measures for one in self.found])
        for measure in SCALARS:
            self._writer.add_scalar(f"spectra/{measure}", total.means[measure], state.global_step)
        if len(layer_names(self.found)) > 1:
            for row in rows_of(self.found, "layer"):
                for measure in BY_LAYER:
                    tag = f"spectra_{measure}/layer_{row.name.replace(' ', '_')}"
                    self._writer.add_scalar(tag, row.means[measure], state.global_step)
        self._writer.flush()

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self._writer is not None:
            self._writer.close()
        self._writer = None
        self._watched = []  # with the copies

    def _measured(self, pair: Pair) -> Found:
        measures = compare(pair.before, pair.after, seed=seed_of(pair.place.name), **self.keys)
        return Found(pair.place, tuple(pair.before.shape), measures)


class _Watched:
    """A matrix of a model, which is held inputs x outputs where ``turned``."""

    def __init__(self, place: Place, weight: Tensor, turned: bool) -> None:
        self.place, self.weight, self.turned = place, weight, turned
        self.before: Tensor | None = None

    def remember(self) -> None:
        self.before = self.weight.detach().to("cpu", copy=True)

    def pair(self) -> Pair:
        assert self.before is not None
        before, after = self.before.to(self.weight.device), self.weight.detach()
        return Pair(self.place, before.mT, after.mT) if self.turned else Pair(self.place, before, after)


class _Lora(_Watched):
    """A matrix that stays, beside factors of it that are trained."""

    def __init__(self, place: Place, layer: Any, adapter: str, turned: bool) -> None:
        super().__init__(place, layer.get_base_layer().weight, turned)
        self.layer, self.adapter = layer, adapter

    def remember(self) -> None:
        """Nothing: the base does not change."""

    def pair(self) -> Pair:
        A, B = (part[self.adapter].weight.detach().float() for part in (self.layer.lora_A, self.layer.lora_B))
        before = self.weight.detach()
        return Pair(
            self.place, before.mT if self.turned else before, LowRankUpdate(self.layer.scaling[self.adapter] * B, A)
        )


def _watched(model: nn.Module, target_modules: str | Sequence[str]) -> list[_Watched]:
    """The matrices to look at, in the model's order."""
    model = getattr(model, "module", model) if not hasattr(model, "config") else model
    adapted = {name: module for name, module in model.named_modules() if hasattr(module, "lora_A")}
    others = [name for name, module in model.named_modules() if hasattr(module, "base_layer") and name not in adapted]
    if others:
        raise ValueError(f"SpectraCallback: {others[0]} is an adapter of peft, and no LoRA; {LORA_WAY}, merged")
    linear = adapted or {
        name: module
        for name, module in model.named_modules()
        if isinstance(getattr(module, "weight", None), Tensor) and module.weight.ndim == 2
        and not isinstance(module, nn.Embedding)
    }  # fmt: skip
    names = targets(model, target_modules, list(linear), {})
    kinds = INPUTS_FIRST.get(str(getattr(getattr(model, "config", None), "model_type", "")), ())
    return [one for name in names for one in _of_module(name, linear[name], name.rpartition(".")[2] in kinds)]


def _of_module(name: str, module: Any, turned: bool) -> Iterator[_Watched]:
    place = place_of(re.sub(r"^base_model\.model\.", "", name) + ".weight")
    if not hasattr(module, "lora_A"):
        _check_weight(name, module.weight)
        yield _Watched(place, module.weight, turned)
        return
    _check_weight(name, module.get_base_layer().weight)
    adapters = [adapter for adapter in module.active_adapters if adapter in module.lora_A]
    if len(adapters) != 1 or getattr(module, "lora_variant", {}) or module.merged:
        what = f"has {len(adapters)} active adapters" if len(adapters) != 1 else "is no plain LoRA that is not merged"
        raise ValueError(f"SpectraCallback: {name} {what}; {LORA_WAY}")
    yield _Lora(place, module, adapters[0], turned)


def _check_weight(name: str, weight: Tensor) -> None:
    if hasattr(weight, "ds_id"):
        raise ValueError(f"SpectraCallback: the weights are split under DeepSpeed ZeRO 3 ({name}); {LORA_WAY}")
    if type(weight).__name__ in ("DTensor", "FlatParameter") or weight.ndim != 2:
        raise ValueError(f"SpectraCallback: the weights are split under FSDP ({name}); {LORA_WAY}")
    if not weight.is_floating_point():
        raise ValueError(f"SpectraCallback: {name} is quantized ({weight.dtype}); {LORA_WAY}")
