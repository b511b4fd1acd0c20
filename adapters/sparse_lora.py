"""SparseLoRA: in training with LoRA only the channels that matter for a batch are computed.  Khaki et al. 2025,
arXiv:2506.16500.

    y = down(act(gate x) * (up x))                      f channels between;  each of the three a frozen W and a LoRA
    once      gate ~ G1 G2, up ~ U1 U2                  of rank 8, by an SVD;  frozen
    a pass    score_f = || act(x G1 G2) * (x U1 U2) ||  over the tokens without labels;  none of it has gradients
              S = the (1 - rho) f channels of the highest scores
              those tokens: rows S of gate and up, columns S of down; of their LoRA, rows of B and columns of A
              tokens with labels: all channels
    from ``start_step`` on, the paper's 5 percent of the steps;  in evaluation, and merged, it is LoRA
    attention likewise, by another score: ``sparse_attention``

Departures: channels of q and k are kept in the pairs that are rotated together, and for all heads of a group of grouped
queries, where the authors' take channels across heads and tear pairs. Tokens are told apart one by one, not by the
shortest prompt of a batch.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook
from transformers import TrainerCallback

from ..validation import number, require, whole
from .sparse_attention import PROJECTIONS, SparseAttention
from .sparse_sides import Prediction, Side, check_side, merged

SIDES = ("gate_proj", "up_proj", "down_proj")


class SparseLora:
    """Makes the gated MLPs and the attentions of a model with LoRA compute some of their channels in training.

    Args:
        model: with LoRA of peft, on all of the matrices or on some.
        sparsity: rho, the share of an MLP's channels that is left out; or one for some of the MLPs, by the ends of
            their names, as ``{"layers.3.mlp": 0.9}``, the others being dense.
        attention: likewise of the channels of q, k, v and o, as ``{"layers.3.self_attn": 0.75}``.
        rank: of what predicts which channels matter.
        start_step, end_step: steps of the optimizer from which and to which it does; None for no end.

    Attributes:
        steps: of the optimizer so far.
        kept: channels that were computed in the last pass, by the names of the MLPs and of the attentions' matrices.

    Raises:
        ValueError: for a value out of range, a model without such parts or with other adapters than plain LoRA on them,
            an attention that norms heads or does not rotate all of their channels, or a name that no part has.

    Example:
        >>> from peft import LoraConfig, get_peft_model
        >>> from gracile.adapters import SparseLora
        >>> from gracile.models import build_llama
        >>> model = get_peft_model(build_llama("2m"), LoraConfig(target_modules=["gate_proj", "up_proj", "down_proj"]))
        >>> sparse = SparseLora(model, sparsity=0.5, attention=0.25)
        >>> sparse.remove()  # LoRA again
    """

    def __init__(
        self,
        model: nn.Module,
        sparsity: float | Mapping[str, float],
        *,
        attention: float | Mapping[str, float] = 0.0,
        rank: int = 8,
        start_step: int = 0,
        end_step: int | None = None,
    ) -> None:
        whole(1)("rank", rank)
        whole(0)("start_step", start_step)
        whole(0, optional=True)("end_step", end_step)
        self.start_step, self.end_step, self.steps = start_step, end_step, 0
        self.kept: dict[str, Tensor] = {}
        self._with_labels: Tensor | None = None
        mlps = _shares(model, SIDES, "sparsity", sparsity, "MLPs")
        attentions = _shares(model, PROJECTIONS, "attention", attention, "attentions")
        kinds: list[tuple[Any, dict[str, float]]] = [(_MLP, mlps), (SparseAttention, attentions)]
        self._parts = [
            kind(self, name, model.get_submodule(name), share, rank)
            for kind, shares in kinds
            for name, share in shares.items()
            if share
        ]
        for part in self._parts:
            part.attach()
        self._hook = model.register_forward_pre_hook(self._note_labels, with_kwargs=True)
        self._trained = {id(p) for p in model.parameters() if p.requires_grad}
        _held.add(self)

    @property
    def is_on(self) -> bool:
        return self.start_step <= self.steps and (self.end_step is None or self.steps < self.end_step)

    def remove(self) -> None:
        """LoRA again."""
        self._hook.remove()
        for part in self._parts:
            part.remove()
        self._parts.clear()
        _held.discard(self)

    def without_labels(self, x: Tensor) -> Tensor:
        """Which of the tokens of x (examples x tokens x width) have no label; all, where there are no labels."""
        labels = self._with_labels
        if labels is None or labels.shape != x.shape[:-1]:
            return torch.ones(x.shape[:-1], dtype=torch.bool, device=x.device)
        return ~labels

    def _note_labels(self, model: nn.Module, args: Any, keywords: Mapping[str, Any]) -> None:
        labels = keywords.get("labels")
        self._with_labels = None if labels is None else labels != -100


def _shares(
    model: nn.Module, sides: tuple[str, ...], key: str, given: float | Mapping[str, float], kind: str
) -> dict[str, float]:
    """The share of each module that has all ``sides``, by its name."""
    within = number("in [0, 1)")
    if not isinstance(given, Mapping):
        within(key, given)
        if not given:
            return {}
    held = [name for name, module in model.named_modules() if all(hasattr(module, side) for side in sides)]
    named_sides = f"{', '.join(sides[:-1])} and {sides[-1]}"
    require(bool(held), f"model must have {kind} with {named_sides}", type(model).__name__)
    if not isinstance(given, Mapping):
        return dict.fromkeys(held, given)
    found: dict[str, float] = {}
    for end, share in given.items():
        within(f"{key} of {end}", share)
        named = [name for name in held if name == end or name.endswith(f".{end}")]
        require(bool(named), f"{key} must name {kind} of the model", end)
        found |= dict.fromkeys(named, share)
    return found


class _MLP:
    """A gated MLP whose ``forward`` is this one's."""

    def __init__(self, owner: SparseLora, name: str, module: nn.Module, share: float, rank: int) -> None:
        self.owner, self.name, self.module = owner, name, module
        sides: list[Any] = [getattr(module, side) for side in SIDES]
        for side, held in zip(SIDES, sides, strict=True):
            check_side(held, f"{name}.{side}")
        self.count = max(1, round((1 - share) * int(sides[0].out_features)))
        self.predictions = [Prediction(held, rank) for held in sides[:2]]
        self._dense: Callable[[Tensor], Tensor] = module.forward

    def attach(self) -> None:
        self.module.forward = self.forward

    def remove(self) -> None:
        del self.module.forward

    @property
    def act(self) -> Callable[[Tensor], Tensor]:
        act: Any = getattr(self.module, "act_fn", F.silu)
        return act

    def forward(self, x: Tensor) -> Tensor:
        if not (self.module.training and torch.is_grad_enabled() and self.owner.is_on):
            return self._dense(x)
        sparse = self.owner.without_labels(x)
        tokens = x[sparse]
        if not len(tokens):
            return self._dense(x)
        S = self.owner.kept[self.name] = self.choose(tokens)
        gate, up, down = (Side.of(getattr(self.module, side)) for side in SIDES)
        some = down.columns(self.act(gate.rows(tokens, S)) * up.rows(tokens, S), S)
        return merged(x, sparse, some, self._dense)

    @torch.no_grad()
    def choose(self, tokens: Tensor) -> Tensor:
        """S, ascending."""
        gate, up = (predicted(tokens) for predicted in self.predictions)
        scores = (self.act(gate) * up).norm(dim=0)
        return scores.topk(self.count).indices.sort().values


class SparseLoraCallback(TrainerCallback):
    """Tells a ``SparseLora`` the Trainer's steps, which a run that is resumed does not begin at zero."""

    def __init__(self, sparse: SparseLora) -> None:
        self.sparse = sparse

    def on_step_begin(self, args: Any, state: Any, control: Any, **keywords: Any) -> None:
        self.sparse.steps = state.global_step


_held: weakref.WeakSet[SparseLora] = weakref.WeakSet()


def _after_step(optimizer: Optimizer, args: Any, keywords: Any) -> None:
    if _held:
        _count_step(optimizer)


@torch.compiler.disable  # of a step that is compiled too
def _count_step(optimizer: Optimizer) -> None:
    for sparse in _held:
        if any(id(p) in sparse._trained for group in optimizer.param_groups for p in group["params"]):
            sparse.steps += 1


register_optimizer_step_post_hook(_after_step)
