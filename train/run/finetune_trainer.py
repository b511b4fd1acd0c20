"""The trainer of a fine-tuning: losses by token, what was before, and a merged model at the end."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import EvalPrediction, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import EvalLoopOutput

from ..build.adapter import has_adapter, has_own_adapter, merges
from ..build.calibration import make_loadable
from ..build.packing_check import check_packing
from ..build.selected import build_selected
from ..build.tuned_model import load_base, prepare_tokens
from ..config.finetune_arguments import FinetuneConfig
from ..data.chat import NO_LOSS
from ..data.tuning import TuningData
from ..engines.deepspeed import unpartitioned
from .trainer import RunTrainer

ADAPTER = "adapter"  # folder of the adapter, beside the merged model
FORGETTING = "forgetting"
_BY_TOKEN = "by_token"


class FinetuneTrainer(RunTrainer):
    """Evaluates before the first step too, and on data whose loss says what is forgotten.

    Args:
        data: what is read.
        end_tokens: by which the model ends what it says.
    """

    config: FinetuneConfig

    def __init__(self, *, config: FinetuneConfig, data: TuningData, end_tokens: list[int], **kwargs: Any) -> None:
        self.data, self.end_tokens = data, end_tokens
        self.unmerged: str | None = None  # why an adapter is saved alone
        measured = (_classified, _accuracy) if config.classifies else (_sums, _mean_by_token)
        super().__init__(
            config=config, preprocess_logits_for_metrics=measured[0], compute_metrics=measured[1], **kwargs
        )
        if self.label_smoother is not None and has_own_adapter(self.model):
            self.compute_loss_func = self._penalized(self.label_smoother)
        self.add_callback(_BeforeTraining(self))

    def _penalized(self, smoother: Any) -> Callable[..., Tensor]:
        """The smoothed loss, which the Trainer computes itself, with the terms that an adapter adds to a model's."""
        from ...adapters import penalized_loss

        def smoothed(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
            of_tokens = not self.config.classifies
            loss: Tensor = smoother(outputs, labels, shift_labels=of_tokens, num_items_in_batch=num_items_in_batch)
            return loss

        return penalized_loss(self.model, smoothed)

    def build_optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        return build_selected(model, self.config)

    # ---- evaluation ---------------------------------------------------------------------------------------------

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> EvalLoopOutput:
        """The loss is a mean over tokens: the Trainer's is one over batches, whatever each has to say."""
        found = super().evaluation_loop(*args, **kwargs)
        metrics: Any = found.metrics
        for key in [key for key in metrics if key.endswith(f"_{_BY_TOKEN}")]:
            metrics[key.removesuffix(f"_{_BY_TOKEN}") + "_loss"] = metrics.pop(key)
        return found

    def evaluate_before(self) -> None:
        """Measure what there is before the first step, without a trace in the states that chance is drawn from."""
        if any(entry.get("step") == 0 and "eval_loss" in entry for entry in self.state.log_history):
            return
        devices = [self.args.device] if self.args.device.type == "cuda" else []
        with torch.random.fork_rng(devices):
            self.evaluate()
            self._evaluate_forgetting()

    def _evaluate_forgetting(self) -> None:
        if self.data.forgetting is not None:
            self.evaluate(self.data.forgetting, metric_key_prefix=FORGETTING)

    def results(self) -> dict[str, float | None]:
        """Losses and accuracies before the first step (None where a checkpoint does not say) and now. Collective."""
        step = self.state.global_step
        self.validation_loss()
        if self._logged(step, f"{FORGETTING}_loss") is None:
            self._evaluate_forgetting()
        told: dict[str, float | None] = {}
        for key, name in ((f"{FORGETTING}_loss", f"{FORGETTING}_loss"), ("eval_accuracy", "validation_accuracy")):
            if (now := self._logged(step, key)) is not None:
                told |= {name: now, f"{name}_before": self._logged(0, key)}
        return {"validation_loss_before": self._logged(0, "eval_loss"), **told}

    def _logged(self, step: int, key: str) -> float | None:
        found = [entry[key] for entry in self.state.log_history if entry.get("step") == step and key in entry]
        return found[-1] if found else None

    # ---- checkpoints and the model that is saved ----------------------------------------------------------------

    @contextmanager
    def _by_own_names(self) -> Iterator[None]:
        """An adapter has no other names than its own."""
        with nullcontext() if has_adapter(self._unwrapped()) else super()._by_own_names():
            yield

    def _unwrapped(self) -> Any:
        return self.accelerator.unwrap_model(self.model)

    @property
    def splits_base(self) -> bool:
        """Whether ZeRO 3 has split the model when it was loaded."""
        return self.layout.stage == 3 and not has_adapter(self._unwrapped())

    def export(self, folder: str) -> None:
        """The trained model as transformers loads it; of an adapter, itself beside the model that it is merged into.
        Collective."""
        tuned = self._unwrapped()
        if not has_adapter(tuned):
            self._tell_ends(tuned)
            self.save_model(folder)
            return
        self.save_model(str(Path(folder) / ADAPTER))
        if not self.args.should_save:
            return
        make_loadable(tuned, Path(folder) / ADAPTER)
        assert self.processing_class is not None
        self.processing_class.save_pretrained(folder)
        if not merges(tuned):
            self.unmerged = "it merges into no weights"
            return
        try:
            merged = self._merged(Path(folder) / ADAPTER)
        except (ValueError, TypeError, KeyError, RuntimeError, NotImplementedError) as error:
            self.unmerged = f"it was not merged: {' '.join(str(error).split())}"  # it is saved, and training was long
            return
        self._tell_ends(merged)
        merged.save_pretrained(folder)

    def _merged(self, adapter: Path) -> Any:
        """The saved adapter merged into the saved model, as it was in training: from 4 bits, but not in them."""
        import peft

        with unpartitioned(self.args):
            base: Any = load_base(self.config, self.data.classes)
            if self.config.model.quantize is not None:
                base = base.dequantize()
            merged: Any = peft.PeftModel.from_pretrained(base, str(adapter)).merge_and_unload()
        return merged

    def _tell_ends(self, model: Any) -> None:
        tokenizer: Any = self.processing_class
        prepare_tokens(model, tokenizer)
        settings = getattr(model, "generation_config", None)
        if settings is not None and self.end_tokens:
            known = settings.eos_token_id
            known = [known] if isinstance(known, int) else list(known or [])
            ends = list(dict.fromkeys([*known, *self.end_tokens]))
            settings.eos_token_id = ends[0] if len(ends) == 1 else ends


class _BeforeTraining(TrainerCallback):
    def __init__(self, trainer: FinetuneTrainer) -> None:
        self.trainer = trainer

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        trainer = self.trainer
        if trainer.data.train.packed and trainer.splits_base:  # its weights are there from now on
            vocabulary = trainer.model.config.get_text_config().vocab_size
            check_packing(trainer.model, vocabulary, args.device)
        trainer.evaluate_before()


# ---- what is kept of a batch's logits -------------------------------------------------------------------------------


def _sums(logits: Any, labels: Tensor) -> Tensor:
    """(B, 2): of each row the summed loss of its tokens in nats, and how many carry loss."""
    logits = logits[0] if isinstance(logits, tuple) else logits
    logits, said = logits[:, -labels.shape[1] : -1], labels[:, 1:]  # an adapter may put tokens of its own before
    losses = functional.cross_entropy(logits.float().transpose(1, 2), said, ignore_index=NO_LOSS, reduction="none")
    return torch.stack([losses.sum(1), (said != NO_LOSS).sum(1).to(losses.dtype)], dim=1)


def _mean_by_token(found: EvalPrediction) -> dict[str, float]:
    total, count = found.predictions.astype("float64").sum(0)  # type: ignore[union-attr]
    return {_BY_TOKEN: float(total / count)}


def _classified(logits: Any, labels: Tensor) -> Tensor:
    """(B,): the class of the largest output."""
    chosen: Tensor = (logits[0] if isinstance(logits, tuple) else logits).argmax(-1)
    return chosen


def _accuracy(found: EvalPrediction) -> dict[str, float]:
    return {"accuracy": float((found.predictions == found.label_ids).mean())}  # type: ignore[union-attr]
