"""What a training script of any kind holds in memory, step by step, as TensorBoard scalars.

A plain loop::

    with MemoryWatch(model, optimizer, log_dir="runs/memory") as memory:
        ...                       # each optimizer.step() is recorded
    print(memory.most)            # bytes by kind

The Hugging Face Trainer::

    Trainer(..., callbacks=[MemoryCallback()])
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..optim.core.optimizer import ShardedOptimizer
from ..validation import is_whole, require
from .measurement import measure
from .measurement.kinds import GRADIENTS

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

PEAK = "peak"


class MemoryWatch:
    """Bytes that this process holds at each step of an optimizer: weights, gradients, and state by what it is for.

    Of gradients that are freed in backward passes (``release_gradients``) it is the most that were there together.
    ``now`` and ``most`` map kinds to bytes: of the newest step, and the largest so far. ``peak`` among them is what
    the process has held at most, allocated on the GPU, or resident in RAM where there is none.

    Args:
        model: whose parameters and gradients count.
        optimizer: any of torch's or gracile's, also as accelerate or ``deepspeed.initialize`` return it.
        log_dir: where TensorBoard scalars ``memory/<kind>`` go, in MiB; None for none.
        every: steps between two records.
        step: how many steps were done before.

    Raises:
        ValueError: for ``every`` below 1.
        RuntimeError: when it is entered again before it was closed.

    Example:
        >>> from torch import nn
        >>> from gracile.optim import GaLoreAdamW, param_groups
        >>> from gracile.train.watch import MemoryWatch
        >>> model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 8))
        >>> optimizer = GaLoreAdamW(param_groups(model, rank=4, target_modules="all-linear"), lr=0.01)
        >>> with MemoryWatch(model, optimizer) as memory:
        ...     model(torch.randn(16, 64)).square().mean().backward()
        ...     optimizer.step()
        >>> {kind: memory.most[kind] for kind in ("weights", "gradients", "moments", "projectors")}
        {'weights': 9376, 'gradients': 9376, 'moments': 3408, 'projectors': 640}
    """

    def __init__(
        self, model: nn.Module, optimizer: Any, log_dir: str | Path | None = None, *, every: int = 1, step: int = 0
    ) -> None:
        _check(every)
        self.model, self.optimizer, self.every, self.step = model, optimizer, every, step
        self.now: dict[str, int] = {}
        self.most: dict[str, int] = {}
        self._log_dir = log_dir
        self._writer: SummaryWriter | None = None
        self._gradients = 0
        self._freed: measure.FreedGradients | None = None
        self._unhook: Callable[[], None] | None = None

    def __enter__(self) -> MemoryWatch:
        if self._unhook is not None:
            raise RuntimeError("this MemoryWatch is at work already; make another")
        if self._log_dir is not None:
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(log_dir=str(self._log_dir))
        given = measure.layers_of(self.optimizer)[-1]
        if isinstance(given, ShardedOptimizer):
            self._freed = measure.FreedGradients(self.model, given)
        self._unhook = measure.around_steps(self.optimizer, self._before_step, self._after_step)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Stop watching, and write what is left."""
        if self._unhook is not None:
            self._unhook()
        if self._freed is not None:
            self._freed.close()
        if self._writer is not None:
            self._writer.close()
        self._unhook = self._freed = self._writer = None

    def _before_step(self) -> None:
        """Count gradients now: they may be freed in the step, or were in backward passes."""
        self.step += 1
        if self.step % self.every == 0:
            self._gradients = measure.held(self.model, self.optimizer)[GRADIENTS]
            if self._freed is not None:
                self._gradients = max(self._gradients, self._freed.bytes)
        if self._freed is not None:
            self._freed.begin_again()

    def _after_step(self) -> None:
        if self.step % self.every:
            return
        held = measure.held(self.model, self.optimizer) | {GRADIENTS: self._gradients}
        self.now = held | {PEAK: measure.peak_memory()}
        self.most = {kind: max(size, self.most.get(kind, 0)) for kind, size in self.now.items()}
        if self._writer is not None:
            for kind, size in self.now.items():
                self._writer.add_scalar(f"memory/{kind.replace(' ', '_')}", size / 2**20, self.step)


def _check(every: int) -> None:
    require(is_whole(every) and every >= 1, "every must be a whole number >= 1", every)


class MemoryCallback(TrainerCallback):
    """``MemoryWatch`` for ``transformers.Trainer``, under DeepSpeed too; the first process writes its scalars.

    Args:
        log_dir: by default ``runs/memory`` in the Trainer's ``output_dir``.
        every: steps between two records.

    ``watch`` is the ``MemoryWatch``, once training has begun.

    Raises:
        ValueError: for ``every`` below 1.

    Example:
        >>> from transformers import Trainer, TrainingArguments
        >>> from gracile.models import build_llama
        >>> from gracile.train.watch import MemoryCallback
        >>> model = build_llama("2m", hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4)
        >>> rows = [{"input_ids": torch.arange(8), "labels": torch.arange(8)}] * 8
        >>> arguments = TrainingArguments("run", max_steps=1, report_to="none", use_cpu=True, disable_tqdm=True)
        >>> memory = MemoryCallback()
        >>> _ = Trainer(model, arguments, train_dataset=rows, callbacks=[memory]).train()
        {'train_runtime': ...}
        >>> round(memory.watch.most["moments"] / memory.watch.most["weights"])  # the Trainer's AdamW has two moments
        2
    """

    def __init__(self, log_dir: str | Path | None = None, *, every: int = 1) -> None:
        _check(every)
        self.log_dir, self.every = log_dir, every
        self.watch: MemoryWatch | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        log_dir = Path(str(args.output_dir)) / "runs" / "memory" if self.log_dir is None else self.log_dir
        chosen = log_dir if state.is_world_process_zero else None
        watch = MemoryWatch(kwargs["model"], kwargs["optimizer"], chosen, every=self.every, step=state.global_step)
        self.watch = watch.__enter__()

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.watch is not None:
            self.watch.close()
