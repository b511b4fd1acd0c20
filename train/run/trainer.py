"""The Hugging Face Trainer with our optimizers, sealed checkpoints and a stop at the first non-finite loss."""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim.lr_scheduler import LRScheduler
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME, TRAINER_STATE_NAME

from ...int8_weight import memory_of
from ...models.convert import merge
from ...models.int8_export import save_dequantized
from ...models.layers import FactoredLinear
from ...optim import keep_out_of_ddp, release_gradients
from ...optim.distributed import UnsupportedLayout, is_dtensor
from ...optim.released import ReleasedGradients
from ..atomic_write import valid_json, write_atomically
from ..build import loading
from ..build.callbacks import ScheduleCallback
from ..build.layers import merges, schedule_of
from ..build.model import untrained
from ..build.optimizer import build_optimizer, jagged_schedule
from ..config.arguments import ALL, COORDINATES, AnySettings, Config, RunArguments
from ..data.stream import BlockStream
from ..engines import layout as layouts
from ..engines.deepspeed import safe_classes
from ..errors import BadInput, CannotLoad, RunStopped
from . import art, changes, checkpoints, distillation, faults

UNLOGGED = "unlogged.json"
LOOKED_AT = 2**24  # weights that are looked at together before they are saved
COUNTERS = ("last_epoch", "_step_count", "_last_lr", "optimizer")  # of a scheduler: what a step changes


class RunTrainer(Trainer):
    """``transformers.Trainer`` for any command that trains; overridden is only what its arguments cannot say."""

    args: RunArguments
    model: PreTrainedModel

    def __init__(self, *, config: AnySettings, layout: layouts.Layout, weights_are_loaded: bool, **kwargs: Any) -> None:
        self.config, self.layout, self.weights_are_loaded = config, layout, weights_are_loaded
        self.given_optimizer: torch.optim.Optimizer | None = None  # before an engine wrapped it
        self.released: ReleasedGradients | None = None
        self._norm: torch.Tensor | None = None  # where two passes clip
        super().__init__(**kwargs)
        self._first_bad_step = torch.full((), -1, dtype=torch.long, device=self.args.device)
        self._resumed_from: Path | None = None
        self.changed_keys: set[str] = set()  # since the run that is resumed began
        self._new_decays: list[float] = []
        self._new_schedule: dict[str, Any] = {}
        self._validation_loader: Any = None
        self._evaluated = (-1, math.nan)  # a step, and the validation loss after it
        self.add_callback(_TakeUpUnlogged(self))

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        if self.optimizer is None:
            trained = self.model if model is None else model
            self.optimizer = self.build_optimizer(trained)
            if self.config.optimizer.keep_gradients != ALL and self._by_ddp:
                keep_out_of_ddp(trained, self.optimizer, self.config.optimizer.keep_gradients)
            self.given_optimizer = self.optimizer
            self._new_decays = [group["weight_decay"] for group in self.optimizer.param_groups]
        return self.optimizer

    def build_optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        return build_optimizer(model, self.config.optimizer, self.args)

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None) -> LRScheduler:
        scheduler = super().create_scheduler(num_training_steps, optimizer)
        self._new_schedule = {key: value for key, value in vars(scheduler).items() if key not in COUNTERS}
        return scheduler

    # ---- passes and non-finite losses ---------------------------------------------------------------------------

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        passes = partial(super().training_step, *args, **kwargs)
        if self.config.optimizer.clip_in_two_passes:
            assert self.released is not None
            loss, self._norm = self.released.clipped_backward(passes, self.args.max_grad_norm)
        else:
            loss = passes()
        # Kept on the device, and read where the Trainer reads the loss anyway: no synchronisation per step.
        bad = ~torch.isfinite(loss) & (self._first_bad_step < 0)
        self._first_bad_step = torch.where(bad, self.state.global_step + 1, self._first_bad_step)
        return loss

    def _clip_grad_norm(self, model: nn.Module) -> Any:
        """The norm before clipping, which two passes have done already."""
        return super()._clip_grad_norm(model) if self._norm is None else self._norm

    def _maybe_log_save_evaluate(self, tr_loss: torch.Tensor, *args: Any, **kwargs: Any) -> None:
        due = self.control.should_log or self.control.should_save or self.control.should_evaluate
        if (due or tr_loss.device.type == "cpu") and (step := int(self._first_bad_step)) >= 0:
            raise RunStopped(f"the loss at step {step} is not finite; {self._what_stays()}")
        super()._maybe_log_save_evaluate(tr_loss, *args, **kwargs)

    def get_eval_dataloader(self, eval_dataset: Any = None) -> Any:
        """The same for all evaluations: accelerate keeps each one that it prepares, to the end of the run."""
        if eval_dataset is not None and eval_dataset is not self.eval_dataset:
            return super().get_eval_dataloader(eval_dataset)
        if self._validation_loader is None:
            self._validation_loader = super().get_eval_dataloader()
        return self._validation_loader

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        found: dict[str, float] = super().evaluate(*args, **kwargs)
        if "eval_loss" in found:  # of the validation data, and no other
            self._evaluated = (self.state.global_step, found["eval_loss"])
        return found

    def validation_loss(self) -> float:
        """Of the weights as they are; after a step that was evaluated it is not measured again."""
        step, loss = self._evaluated
        return loss if step == self.state.global_step else self.evaluate()["eval_loss"]

    def _refuse_broken_weights(self) -> None:
        """Never save non-finite weights: an update can make them after a finite loss."""
        broken = [name for name, p in self.model.named_parameters() if not _is_finite(p)]
        if broken:
            step = self.state.global_step
            raise RunStopped(f"after step {step} {broken[0]} holds non-finite values; {self._what_stays()}")

    def _what_stays(self) -> str:
        kept, _ = checkpoints.newest_whole(self.args.folder, sizes_only=True)
        return f"the last good checkpoint is {kept}" if kept else "no checkpoint had been saved"

    # ---- checkpoints --------------------------------------------------------------------------------------------

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        self._refuse_broken_weights()
        checkpoint = self.args.folder / f"checkpoint-{self.state.global_step}"
        if self.args.should_save:
            checkpoints.unseal(checkpoint)
        limit, self.args.save_total_limit = self.args.save_total_limit, None  # nothing is deleted before the seal
        logged, self.state.log_history = self.state.log_history, []
        try:
            with self._by_own_names():
                super()._save_checkpoint(model, trial)
        finally:
            self.args.save_total_limit, self.state.log_history = limit, logged
        self._save_logged(checkpoint)
        self._save_unlogged(checkpoint)
        assert self.given_optimizer is not None
        layouts.save(checkpoint, self.layout, self.given_optimizer, self.args.should_save)
        self.accelerator.wait_for_everyone()  # every process writes files of its own
        if self.args.should_save:
            if isinstance(self.train_dataset, BlockStream):
                done = self.state.global_step * self.get_total_train_batch_size(self.args)
                self.train_dataset.save(checkpoint, done)
            checkpoints.seal(checkpoint)
            checkpoints.rotate(self.args.folder, limit, best=self.state.best_model_checkpoint)

    @contextmanager
    def _by_own_names(self) -> Iterator[None]:
        """transformers saves some models under the names and in the pieces of another format, a mixture's experts one
        by one, which its Trainer does not put together again when it resumes."""
        model: Any = self.accelerator.unwrap_model(self.model)
        model.save_pretrained = partial(model.save_pretrained, save_original_format=False)
        try:
            yield
        finally:
            del model.save_pretrained

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        """Weights that a checkpoint has not would stay those of the start: the Trainer warns."""
        tied = set(getattr(self.model, "all_tied_weights_keys", None) or ())
        strange = [*load_result.unexpected_keys, *(name for name in load_result.missing_keys if name not in tied)]
        if strange:
            raise BadInput(f"the checkpoint's weights are not those of this model: {strange[0]} is on one side only")

    @contextmanager
    def _loading(self, checkpoint: str | Path | None) -> Iterator[None]:
        """Whatever a file makes fail that loads it is one line; DeepSpeed's own classes are data, and no others."""
        try:
            with torch.serialization.safe_globals(safe_classes() if self.is_deepspeed_enabled else []):
                yield
        except (BadInput, RunStopped, UnsupportedLayout):
            raise
        except Exception as error:
            if checkpoint is None or faults.is_lost(error):
                raise
            reason = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
            raise CannotLoad(
                f"checkpoint {str(checkpoint)!r} cannot be loaded: {reason}; resume from another"
            ) from error

    def _save_logged(self, checkpoint: Path) -> None:
        """What was logged, as JSON that every reader takes, and without the Trainer's copy of it: that of a long run
        takes many times as long."""
        if self.args.should_save:
            file = checkpoint / TRAINER_STATE_NAME
            state = json.loads(file.read_text(encoding="utf-8"))
            write_atomically(file, valid_json({**state, "log_history": self.state.log_history}) + "\n")

    def _save_unlogged(self, checkpoint: Path) -> None:
        """Losses since the last log, where a signal came between two logs: their mean is then that of the whole run."""
        if self._globalstep_last_logged == self.state.global_step:
            return
        losses = self.accelerator.gather(self._tr_loss[None]).tolist()
        if self.args.should_save:
            write_atomically(
                checkpoint / UNLOGGED, json.dumps({"last_logged": self._globalstep_last_logged, "losses": losses})
            )

    def take_up_unlogged(self) -> None:
        file = None if self._resumed_from is None else self._resumed_from / UNLOGGED
        if file is None or not file.is_file():
            return
        with self._loading(self._resumed_from):
            saved = json.loads(file.read_text(encoding="utf-8"))
            losses, here = saved["losses"], self.args.process_index
            same = len(losses) == self.accelerator.num_processes
            self._globalstep_last_logged = saved["last_logged"]
            self._tr_loss += losses[here] if same else sum(losses) / len(losses)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        if self.weights_are_loaded:
            return
        checkpoint = Path(resume_from_checkpoint)
        with self._loading(checkpoint):
            if self._is_split() or not loading.has_weights(checkpoint):
                super()._load_from_checkpoint(resume_from_checkpoint, model)
            else:
                found = loading.load_weights(self.model if model is None else model, checkpoint)
                self._issue_warnings_after_load(found)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        saved = None if checkpoint is None else Path(checkpoint) / OPTIMIZER_NAME
        if self._is_split() or saved is None or not saved.is_file():
            super()._load_optimizer_and_scheduler(checkpoint)
            return
        assert self.given_optimizer is not None
        assert self.lr_scheduler is not None
        loading.load_optimizer(self.given_optimizer, saved)
        self.lr_scheduler.load_state_dict(torch.load(saved.with_name(SCHEDULER_NAME), weights_only=True))

    def _is_split(self) -> bool:
        return self.is_fsdp_enabled or self.is_deepspeed_enabled

    def _load_rng_state(self, checkpoint: str | None) -> None:
        with self._loading(checkpoint):
            super()._load_rng_state(checkpoint)

    def _prepare_for_training(self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: str | None) -> Any:
        with self._loading(resume_from_checkpoint):
            return self._prepared(max_steps, train_dataloader, resume_from_checkpoint)

    def _prepared(self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: str | None) -> Any:
        """An engine cannot load a checkpoint of another layout: its optimizer state is resharded here."""
        self._resumed_from = None if resume_from_checkpoint is None else Path(resume_from_checkpoint)
        if resume_from_checkpoint is None or not self.weights_are_loaded:
            prepared = super()._prepare_for_training(max_steps, train_dataloader, resume_from_checkpoint)
            self._honour_changes()
            self._free_gradients()
            return prepared
        prepared = super()._prepare_for_training(max_steps, train_dataloader, None)
        checkpoint = Path(resume_from_checkpoint)
        assert self.given_optimizer is not None
        assert self.lr_scheduler is not None
        layouts.load_resharded(checkpoint, self.given_optimizer)
        self.lr_scheduler.load_state_dict(torch.load(checkpoint / SCHEDULER_NAME, weights_only=True))
        for group, lr in zip(self.given_optimizer.param_groups, self.lr_scheduler.get_last_lr(), strict=True):
            group["lr"] = lr  # a scheduler sets it at its next step only
        self._honour_changes()
        self._free_gradients()
        return prepared

    @property
    def _by_ddp(self) -> bool:
        """Whether accelerate is to wrap, or has wrapped, the model in DistributedDataParallel."""
        return self.args.world_size > 1 and not (self.is_fsdp_enabled or self.is_deepspeed_enabled)

    def _free_gradients(self) -> None:
        """When the model is wrapped or split: hooks of parameters that an engine replaces would be lost."""
        kept = self.config.optimizer.keep_gradients
        if kept != ALL:
            assert self.given_optimizer is not None
            passes = 1 if self.args.gradient_accumulation_steps == 1 else None
            if kept == COORDINATES and self.is_fsdp_enabled:  # or whole ones would stay until the last pass
                self.accelerator.gradient_state.plugin_kwargs["sync_each_batch"] = True
            self.released = release_gradients(self.model_wrapped, self.given_optimizer, keep=kept, passes=passes)

    def _init_training_state(self, max_steps: int, *args: Any) -> tuple[int, int]:
        """How often is logged, evaluated and saved is the configuration's, and not that of the checkpoint."""
        trained: tuple[int, int] = super()._init_training_state(max_steps, *args)
        self.state.compute_steps(self.args, max_steps)
        return trained

    def _honour_changes(self) -> None:
        """Give the schedule and the optimizer, as a checkpoint holds them, the values that have changed since."""
        if not self.changed_keys & {*changes.SCHEDULE, "weight_decay"}:
            return
        scheduler: Any = self.lr_scheduler
        assert self.given_optimizer is not None
        groups = self.given_optimizer.param_groups
        if self.changed_keys & changes.SCHEDULE:
            vars(scheduler).update(self._new_schedule)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # asked for outside of a step
                rates = scheduler._last_lr = scheduler.get_lr()
            for group, base, rate in zip(groups, scheduler.base_lrs, rates, strict=True):
                group["initial_lr"], group["lr"] = base, rate
        if "weight_decay" in self.changed_keys:
            for group, decay in zip(groups, self._new_decays, strict=True):
                group["weight_decay"] = decay

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the whole model, also where FSDP saves its checkpoints in parts: the Trainer would save none then."""
        if self.is_fsdp_enabled and "SHARDED" in str(self.accelerator.state.fsdp_plugin.state_dict_type):
            self._save(output_dir, state_dict=self.accelerator.get_state_dict(self.model))
        super().save_model(output_dir, _internal_call)

    def export(self, folder: str) -> None:
        """The trained model as one that loads without gracile. Collective."""
        self.save_model(folder)

    def is_finished(self, checkpoint: Path) -> bool:
        """Whether the checkpoint is the end of this run, after which the Trainer's loop would train one step more."""
        with self._loading(checkpoint):
            state = TrainerState.load_from_json(str(checkpoint / TRAINER_STATE_NAME))
        if self.args.max_steps > 0:
            return state.global_step >= self.args.max_steps
        return state.global_step >= state.max_steps and state.num_train_epochs >= self.args.num_train_epochs

    def load_finished(self, checkpoint: Path) -> None:
        """Load weights, optimizer state and history of a finished run; there is nothing left to train."""
        with self._loading(checkpoint):
            self._load_finished(checkpoint)

    def _load_finished(self, checkpoint: Path) -> None:
        self.state = TrainerState.load_from_json(str(checkpoint / TRAINER_STATE_NAME))
        if self._is_split():  # loads into a model that is split already
            self._prepare_for_training(self.state.max_steps, None, str(checkpoint))
            return
        self._load_from_checkpoint(str(checkpoint))
        optimizer = self.create_optimizer()
        saved = checkpoint / OPTIMIZER_NAME
        if saved.is_file():
            loading.load_optimizer(optimizer, saved)


def _is_finite(weights: torch.Tensor) -> bool:
    """Of all elements; some at a time where all are here, for what is compared is copied."""
    for held in memory_of(weights.detach()):
        here = not is_dtensor(held) and held.is_contiguous()
        parts = held.view(-1).split(LOOKED_AT) if here else [held]
        if not all(bool(torch.isfinite(part).all()) for part in parts):
            return False
    return True


class _TakeUpUnlogged(TrainerCallback):
    def __init__(self, trainer: RunTrainer) -> None:
        self.trainer = trainer

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.trainer.take_up_unlogged()


class PretrainTrainer(RunTrainer):
    """With what a pretraining has beside its data's loss: layers that change, a teacher, ART, a jagged schedule."""

    config: Config

    def __init__(self, *, config: Config, **kwargs: Any) -> None:
        if config.model.layer is not None and config.run.ddp_broadcast_buffers is None:
            config.run.ddp_broadcast_buffers = False  # the buffers of layers, places of weights, never change
        super().__init__(config=config, **kwargs)
        self.schedule = schedule_of(self.model, config)
        if self.schedule is not None:
            self.add_callback(ScheduleCallback(self.schedule))
        self.teacher = distillation.teacher(config, self.args.device)
        self.art = None if config.optimizer.art_every is None else art.ART(self, config.optimizer.art_every)
        if self.art is not None:
            self.add_callback(self.art)

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        new = self.optimizer is None
        optimizer = super().create_optimizer(model)
        if new and self.art is not None:
            self.art.watch(optimizer)
        return optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None) -> LRScheduler:
        stepped: Any = optimizer or self.optimizer
        if self.lr_scheduler is None and self.config.optimizer.lr_restart_every is not None:
            jagged: Any = jagged_schedule(self.config, num_training_steps, stepped)
            self.lr_scheduler = jagged
        return super().create_scheduler(num_training_steps, optimizer)

    def compute_loss(
        self, model: nn.Module, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        if (self.schedule is None and self.teacher is None) or not model.training:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        # whether the loss is already divided by the passes of a step; as the Trainer decides it for its own
        divided = self.model_accepts_loss_kwargs and num_items_in_batch is not None
        if self.teacher is not None:
            tokens = num_items_in_batch / self._loss_factor() if divided else None
            loss = self.teacher.blended(loss, outputs.logits, inputs, tokens)
        penalty = None if self.schedule is None else self.schedule.loss()
        if penalty is not None:
            loss = loss + penalty / (self.current_gradient_accumulation_steps if divided else 1)
        return (loss, outputs) if return_outputs else loss

    def _loss_factor(self) -> int:
        """The Trainer's factor on a loss divided by the tokens of all processes, over which gradients are averaged."""
        if not self.args.average_tokens_across_devices:
            return 1
        return self.accelerator.num_processes if self.args.n_gpu <= 1 else self.args.n_gpu

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if self.schedule is not None and "loss" in logs:
            logs = {**logs, **self.schedule.metrics()}
        super().log(logs, *args, **kwargs)

    def export(self, folder: str) -> None:
        """The trained model as one that loads without gracile: layers merged into plain ones, weights in 8 bits
        opened. Collective.

        Layers that are not linear have no plain form: their model.safetensors would load as a LLaMA of random weights.
        Such a model is in the last checkpoint only.
        """
        chosen = self.config.model
        if chosen.layer is None and chosen.weight_bits is None:
            self.save_model(folder)
            return
        if chosen.weight_bits is not None:
            self._export_opened(folder)
            return
        if not merges(self.accelerator.unwrap_model(self.model)):
            self._export_tokenizer(folder)
            return
        state = self.accelerator.get_state_dict(self.model_wrapped)
        if not self.args.should_save:
            return
        architecture: Any = self.model.config
        plain = untrained(self.config, architecture, next(iter(state.values())).dtype)
        plain.load_state_dict(state, assign=True)
        for module in plain.modules():
            if isinstance(module, FactoredLinear):
                module.finish()
        merge(plain)
        plain.generation_config = self.model.generation_config
        plain.save_pretrained(folder)
        self._export_tokenizer(folder)

    def _export_opened(self, folder: str) -> None:
        if self.args.should_save:
            Path(folder).mkdir(parents=True, exist_ok=True)
            save_dequantized(self.accelerator.unwrap_model(self.model), Path(folder))
            self._export_tokenizer(folder)

    def _export_tokenizer(self, folder: str) -> None:
        if self.args.should_save and self.processing_class is not None:
            self.processing_class.save_pretrained(folder)
