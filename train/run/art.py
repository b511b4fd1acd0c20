"""ART: when a model has become one that small weights can be taken from.  Glandorf et al. 2023, arXiv:2308.07163.

    every art_every steps, while the penalty grows:
        p    <- the loss of the model without its smallest weights, on fixed blocks       pruned, measured, put back
        d    <- that of the model as it is
    pruned for good, and trained on, when the least mean of three p in a row is no more than that of the last three d,
    or at prune_at

A model that has learned little is as good without most of its weights: ``warmup_steps`` come first. The blocks are the
first of the training data. Departures from the authors' code: losses for accuracies, steps for epochs; d is averaged as
p is, for a language model's loss keeps falling while p is averaged; an end; the weights that are pruned are those of
then, not those of the best three, of which a copy would have to be kept. What was measured is in the run's log, and
read from there: a resumed run decides the same.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from itertools import islice
from statistics import fmean
from typing import Any

import torch
from torch import Tensor
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ...fp64 import fp64_device
from ...optim.distributed import FullShard, Workspace
from ...optim.sparse.hyper_sparse import how_many
from ...optim.sparse.prune_smallest import prune_smallest_
from ..data.blocks import collate

WINDOW = 3  # evaluations that are averaged
BLOCKS = 32
DENSE, PRUNED = "art_dense_loss", "art_pruned_loss"


def is_time(pruned: Sequence[float], dense: Sequence[float]) -> bool:
    """Whether a model is to be pruned after these losses, a pair from each evaluation."""
    if len(pruned) < WINDOW:
        return False
    means = [fmean(pruned[i : i + WINDOW]) for i in range(len(pruned) - WINDOW + 1)]
    return min(means) <= fmean(dense[-WINDOW:])


@contextmanager
def without_smallest(weights: Sequence[Tensor], share: float) -> Iterator[None]:
    """In the block, the smallest share of ``weights``, seen as one vector, is zero. For weights held whole."""
    held = [W.detach().clone() for W in weights]
    shards = [FullShard(W.detach(), i, Workspace()) for i, W in enumerate(weights)]
    prune_smallest_(shards, how_many(shards, share))
    try:
        yield
    finally:
        for W, before in zip(weights, held, strict=True):
            W.detach().copy_(before)


class ART(TrainerCallback):
    """Evaluates the pruned model now and then, and sets the optimizer's ``prune_at`` when it is good enough."""

    def __init__(self, trainer: Trainer, every: int) -> None:
        self.trainer, self.every = trainer, every
        self.optimizer: torch.optim.Optimizer | None = None
        self.matrices: list[tuple[list[Tensor], float]] = []  # of each group, and the share to prune
        self.blocks: list[Any] = []

    def watch(self, optimizer: torch.optim.Optimizer) -> None:
        """Called before an engine puts other tensors in the place of the optimizer's parameters."""
        self.optimizer = optimizer
        self.matrices = [(list(group["params"]), group["sparsity"]) for group in _squeezed(optimizer)]

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        assert self.optimizer is not None
        step, groups = state.global_step, _squeezed(self.optimizer)
        begun = max(group["warmup_steps"] for group in groups)
        over = any(group["prune_at"] is not None and group["prune_at"] <= step for group in groups)
        if step % self.every or step <= begun or over:
            return control
        self.trainer.log(self.look())
        if is_time(_logged(state, PRUNED), _logged(state, DENSE)):
            for group in groups:
                group["prune_at"] = step + 1
        return control

    @torch.no_grad()
    def look(self) -> dict[str, float]:
        """The losses of the model as it is and of the pruned one; the same on all processes."""
        losses = [self._loss()]
        with ExitStack() as pruned_for_now:
            for weights, share in self.matrices:
                pruned_for_now.enter_context(without_smallest(weights, share))
            losses.append(self._loss())
        both = self.trainer.accelerator.gather(torch.stack(losses)[None])
        dense, pruned = both.view(-1, 2).to(fp64_device(both.device)).double().mean(0).tolist()
        return {DENSE: dense, PRUNED: pruned}

    def _loss(self) -> Tensor:
        trainer, size = self.trainer, self.trainer.args.per_device_eval_batch_size
        model: Any = trainer.model
        if not self.blocks:
            assert trainer.train_dataset is not None
            self.blocks = list(islice(iter(trainer.train_dataset), BLOCKS))
        was_training = model.training
        model.eval()
        total = torch.zeros((), device=trainer.args.device)
        for begin in range(0, len(self.blocks), size):
            some = self.blocks[begin : begin + size]
            inputs = trainer._prepare_inputs(collate(some))
            with trainer.compute_loss_context_manager():
                loss: Any = trainer.compute_loss(model, inputs)
                total += loss.float() * len(some)
        model.train(was_training)
        return total / len(self.blocks)


def _squeezed(optimizer: torch.optim.Optimizer) -> list[dict[str, Any]]:
    """The groups to be pruned; not cached, for loading a checkpoint replaces them."""
    return [group for group in optimizer.param_groups if group["sparsity"] is not None]


def _logged(state: TrainerState, key: str) -> list[float]:
    return [entry[key] for entry in state.log_history if key in entry]
