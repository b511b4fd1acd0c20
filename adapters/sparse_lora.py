"""SparseLoRA: in training with LoRA, an MLP computes only the channels that matter for its batch.  Khaki et al. 2025,
arXiv:2506.16500.

    y = down(act(gate x) * (up x))                      f channels between;  each of the three a frozen W and a LoRA
    once      gate ~ G1 G2, up ~ U1 U2                  of rank 8, by an SVD;  frozen
    a pass    score_f = || act(x G1 G2) * (x U1 U2) ||  over the tokens without labels;  none of it has gradients
              S = the (1 - rho) f channels of the highest scores
              those tokens: rows S of gate and up, columns S of down; of their LoRA, rows of B and columns of A
              tokens with labels: all channels
    from ``start_step`` on, the paper's 5 percent of the steps;  in evaluation, and merged, it is LoRA

Departures: attention stays dense, where the authors also skip channels of q, k, v and o; their scores of grouped
queries take channels across heads, and tear rotary pairs. Tokens are told apart one by one, not by a batch's shortest
prompt.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from peft.tuners.lora import Linear as LoraLinear
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook
from transformers import TrainerCallback

from ..validation import number, require, whole
from .factors import svd_factors

SIDES = ("gate_proj", "up_proj", "down_proj")


class SparseLora:
    """Makes the gated MLPs of a model with LoRA compute some of their channels in training.

    Args:
        model: with LoRA of peft, on all three matrices of each MLP or on some.
        sparsity: rho, the share of the channels that is left out; or one for some of the MLPs, by the ends of their
            names, as ``{"layers.3.mlp": 0.9}``, the others being dense.
        rank: of what predicts which channels matter.
        start_step, end_step: steps of the optimizer from which and to which it does; None for no end.

    Attributes:
        steps: of the optimizer so far.
        kept: channels that were computed in the last pass, by the names of the MLPs.

    Raises:
        ValueError: for a value out of range, a model without gated MLPs, one whose MLPs have biases, or a name that no
            MLP has.

    Example:
        >>> from peft import LoraConfig, get_peft_model
        >>> from gracile.adapters import SparseLora
        >>> from gracile.models import build_llama
        >>> model = get_peft_model(build_llama("2m"), LoraConfig(target_modules=["gate_proj", "up_proj", "down_proj"]))
        >>> sparse = SparseLora(model, sparsity=0.5)
        >>> sparse.remove()  # LoRA again
    """

    def __init__(
        self,
        model: nn.Module,
        sparsity: float | Mapping[str, float],
        *,
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
        held = {name: module for name, module in model.named_modules() if all(hasattr(module, side) for side in SIDES)}
        require(bool(held), "model must have MLPs with gate_proj, up_proj and down_proj", type(model).__name__)
        shares = _shares(held, sparsity)
        self._mlps = [_MLP(self, name, held[name], share, rank) for name, share in shares.items() if share]
        self._hook = model.register_forward_pre_hook(self._note_labels, with_kwargs=True)
        self._trained = {id(p) for p in model.parameters() if p.requires_grad}
        _held.add(self)

    @property
    def is_on(self) -> bool:
        return self.start_step <= self.steps and (self.end_step is None or self.steps < self.end_step)

    def remove(self) -> None:
        """LoRA again."""
        self._hook.remove()
        for mlp in self._mlps:
            del mlp.module.forward
        self._mlps.clear()
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


def _shares(held: Mapping[str, nn.Module], sparsity: float | Mapping[str, float]) -> dict[str, float]:
    within = number("in [0, 1)")
    if not isinstance(sparsity, Mapping):
        within("sparsity", sparsity)
        return dict.fromkeys(held, sparsity)
    found: dict[str, float] = {}
    for end, share in sparsity.items():
        within(f"sparsity of {end}", share)
        named = [name for name in held if name == end or name.endswith(f".{end}")]
        require(bool(named), "sparsity must name MLPs of the model", end)
        found |= dict.fromkeys(named, share)
    return found


@dataclass
class _Side:
    """One matrix of an MLP: its weight and the factors of its LoRA, each with its scale."""

    weight: Tensor
    loras: list[tuple[Tensor, Tensor, float, nn.Module]]

    @classmethod
    def of(cls, module: Any) -> _Side:
        base: Any = module.get_base_layer() if isinstance(module, LoraLinear) else module
        active = [] if not isinstance(module, LoraLinear) or module.disable_adapters else module.active_adapters
        loras = [
            (module.lora_A[a].weight, module.lora_B[a].weight, module.scaling[a], module.lora_dropout[a])
            for a in active
            if a in module.lora_A
        ]
        return cls(base.weight, loras)

    def rows(self, x: Tensor, S: Tensor) -> Tensor:
        y = F.linear(x, self.weight[S])
        for A, B, scale, dropout in self.loras:
            y = y + scale * F.linear(F.linear(dropout(x).to(A.dtype), A), B[S]).to(y.dtype)
        return y

    def columns(self, x: Tensor, S: Tensor) -> Tensor:
        y = F.linear(x, self.weight[:, S])
        for A, B, scale, dropout in self.loras:
            y = y + scale * F.linear(F.linear(dropout(x).to(A.dtype), A[:, S]), B).to(y.dtype)
        return y


class _MLP:
    """A gated MLP whose ``forward`` is this one's."""

    def __init__(self, owner: SparseLora, name: str, module: nn.Module, share: float, rank: int) -> None:
        self.owner, self.name, self.module = owner, name, module
        bases: list[Any] = [getattr(getattr(module, side), "base_layer", getattr(module, side)) for side in SIDES]
        if any(getattr(base, "bias", None) is not None for base in bases):
            raise ValueError(f"model must have MLPs without biases, and {name} has some")
        if any(not base.weight.is_floating_point() for base in bases):
            raise ValueError(f"model must not be quantized, for rows of {name} are taken out of its weights")
        self.channels = len(bases[0].weight)
        self.count = max(1, round((1 - share) * self.channels))
        self.predictors = [_predictor(base.weight, min(rank, *base.weight.shape)) for base in bases[:2]]
        self._dense: Callable[[Tensor], Tensor] = module.forward
        module.forward = self.forward

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
        gate, up, down = (_Side.of(getattr(self.module, side)) for side in SIDES)
        some = down.columns(self.act(gate.rows(tokens, S)) * up.rows(tokens, S), S)
        if len(tokens) == sparse.numel():
            return some.view_as(x)
        y = x.new_empty(x.shape).to(some.dtype)
        return y.masked_scatter(~sparse[..., None], self._dense(x[~sparse])).masked_scatter(sparse[..., None], some)

    @torch.no_grad()
    def choose(self, tokens: Tensor) -> Tensor:
        """S, ascending."""
        gate, up = (F.linear(F.linear(tokens.float(), right), left) for left, right in self.predictors)
        scores = (self.act(gate) * up).norm(dim=0)
        return scores.topk(self.count).indices.sort().values


def _predictor(weight: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    U, S, V = svd_factors(weight, rank)
    return U * S.sqrt(), S.sqrt()[:, None] * V


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
