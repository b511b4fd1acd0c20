"""A run that imitates a frozen teacher beside learning from the data: CAST's loss, arXiv:2509.25996.

    L  =  eta * KL(P_teacher || P_student) + (1 - eta) * CE

over the tokens that CE counts, at temperature 1, in fp32. For self-distillation the teacher is the model that the run
begins with, as it was. Evaluation uses no teacher. Each process holds the whole teacher, however the student is split.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...validation import is_real
from .. import sources
from ..config.arguments import DTYPES, Config
from ..engines.deepspeed import unpartitioned
from ..errors import BadInput


def divergence(student: Tensor, teacher: Tensor, labels: Tensor, tokens: Tensor | float | None = None) -> Tensor:
    """KL(P_teacher || P_student), summed over the predicted tokens that count and divided by how many.

    Args:
        student, teacher: logits (batch x length x vocabulary).
        labels: of the same tokens (batch x length); the first is not predicted, and those of -100 do not count.
        tokens: what to divide by instead, where a step has several passes or processes.
    """
    counted = labels[:, 1:] != -100
    wanted = F.log_softmax(teacher[:, :-1].float(), dim=-1)
    found = F.log_softmax(student[:, :-1].float(), dim=-1)
    each = F.kl_div(found, wanted, reduction="none", log_target=True).sum(-1)
    return (each * counted).sum() / (counted.sum() if tokens is None else tokens)


class Teacher:
    """A frozen model, and the share of the loss that imitates it."""

    def __init__(self, model: nn.Module, share: float) -> None:
        self.model, self.share = model.eval().requires_grad_(False), share

    def blended(self, loss: Tensor, logits: Tensor, inputs: dict[str, Any], tokens: Tensor | float | None) -> Tensor:
        """The data's ``loss`` and the divergence from this teacher, weighted by their shares."""
        with torch.no_grad():
            seen = {key: value for key, value in inputs.items() if key not in ("labels", "num_items_in_batch")}
            wanted = self.model(**seen).logits
        apart = divergence(logits, wanted, inputs["labels"], tokens)
        return self.share * apart + (1 - self.share) * loss


def check(config: Config, vocabulary: int) -> None:
    """Refuse a teacher that cannot be used, before anything is built.

    Raises:
        BadInput: for a teacher that cannot be loaded or has another vocabulary, or a share outside of [0, 1].
    """
    name, share = config.optimizer.teacher, config.optimizer.distill
    if not (is_real(share) and 0 <= share <= 1):
        raise BadInput(f"distill must be a number in [0, 1], got {share}")
    if name is None:
        return
    other = sources.config_of("teacher", name, config.model.trust_remote_code)
    if other.vocab_size != vocabulary:
        raise BadInput(f"teacher {name!r} has a vocabulary of {other.vocab_size} tokens, the model one of {vocabulary}")


def teacher(config: Config, device: torch.device) -> Teacher | None:
    """The teacher of a run, if it has one."""
    name, trusted = config.optimizer.teacher, config.model.trust_remote_code
    if name is None:
        return None
    with unpartitioned(config.run):
        dtype = DTYPES[config.model.dtype]
        model = sources.model_of("teacher", name, trusted, dtype=dtype)
    model.config.use_cache = False
    return Teacher(model.to(device), config.optimizer.distill)
