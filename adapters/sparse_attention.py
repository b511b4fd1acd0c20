"""SparseLoRA's part for attention: q, k, v and o compute only the channels that matter for their batch.

    y = o(softmax(q k^T / sqrt(d)) v)            heads of d channels;  a head of k and v serves a group of heads of q
    a pass    score_i = || q~_i || || k~_i ||     of a pair i of channels of a head of k that are rotated together; q~_i
                                                 those of all heads of its group
              score_c = || v~_c ||               of a channel c of a head of v
              the (1 - rho) of the highest scores are kept, each in all heads of q of its group
              tokens without labels: those rows of q, k and v, the other outputs being 0, and those columns of o
              tokens with labels: all

What lies between is the model's own, and takes as long as ever.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .sparse_sides import Owner, Prediction, Side, check_side, merged

ROWS, COLUMNS = ("q_proj", "k_proj", "v_proj"), "o_proj"
PROJECTIONS = (*ROWS, COLUMNS)


@dataclass
class Plan:
    """Of a pass: which tokens are sparse (of the shape of a batch), and the channels of each matrix that they have."""

    sparse: Tensor
    kept: dict[str, Tensor]


class SparseAttention:
    """An attention whose ``forward``, and that of its matrices, is this one's."""

    def __init__(self, owner: Owner, name: str, module: Any, share: float, rank: int) -> None:
        self.owner, self.name, self.module = owner, name, module
        sides = {side: getattr(module, side) for side in PROJECTIONS}
        for side, held in sides.items():
            check_side(held, f"{name}.{side}")
        self.predictions = {side: Prediction(sides[side], rank) for side in ROWS}
        self.d, self.groups = self._heads(sides)
        self.partner = _partners(module, name, self.d)
        channels = int(sides["k_proj"].out_features)
        self.pairs = max(1, round((1 - share) * channels / 2))
        self.values = max(1, round((1 - share) * channels))
        self._plan: Plan | None = None
        self._dense: dict[nn.Module, Callable[..., Any]] = {held: held.forward for held in (module, *sides.values())}

    def attach(self) -> None:
        self.module.forward = self.forward
        for side in PROJECTIONS:
            getattr(self.module, side).forward = self._rows_of(side) if side in ROWS else self._columns

    def _heads(self, sides: dict[str, Any]) -> tuple[int, int]:
        """d, and how many heads of q a head of k serves."""
        d, groups = getattr(self.module, "head_dim", None), getattr(self.module, "num_key_value_groups", None)
        q, k, v, o = (sides[side] for side in PROJECTIONS)
        usual = d is not None and groups is not None and k.out_features % d == 0
        if not usual or (q.out_features, v.out_features, o.in_features) != (
            k.out_features * groups, k.out_features, k.out_features * groups,
        ):  # fmt: skip
            raise ValueError(f"attention must have heads of q, k, v and o alike, and {self.name} has others")
        if hasattr(self.module, "q_norm"):
            raise ValueError(f"attention must not norm its heads, whose channels are left out, and {self.name} does")
        assert d is not None
        assert groups is not None
        return d, groups

    def remove(self) -> None:
        for module in self._dense:
            del module.forward

    def forward(self, *args: Any, **keywords: Any) -> Any:
        x = args[0] if args else keywords["hidden_states"]
        if self.module.training and torch.is_grad_enabled() and self.owner.is_on:
            sparse = self.owner.without_labels(x)
            tokens = x[sparse]
            if len(tokens):
                self._plan = Plan(sparse, self.choose(tokens))
                self.owner.kept |= {f"{self.name}.{side}": kept for side, kept in self._plan.kept.items()}
        try:
            return self._dense[self.module](*args, **keywords)
        finally:
            self._plan = None

    def _rows_of(self, side: str) -> Callable[[Tensor], Tensor]:
        module = getattr(self.module, side)

        def forward(x: Tensor) -> Tensor:
            dense, plan = self._dense[module], self._plan
            if plan is None:
                found: Tensor = dense(x)
                return found
            S = plan.kept[side]
            some = Side.of(module).rows(x[plan.sparse], S)
            wide = some.new_zeros(len(some), module.out_features).index_copy(1, S, some)
            return merged(x, plan.sparse, wide, dense)

        return forward

    def _columns(self, x: Tensor) -> Tensor:
        module = getattr(self.module, COLUMNS)
        dense, plan = self._dense[module], self._plan
        if plan is None:
            found: Tensor = dense(x)
            return found
        S = plan.kept[COLUMNS]
        return merged(x, plan.sparse, Side.of(module).columns(x[plan.sparse][:, S], S), dense)

    @torch.no_grad()
    def choose(self, tokens: Tensor) -> dict[str, Tensor]:
        """The channels of each matrix, ascending; tokens N x n."""
        q, k, v = (self.predictions[side](tokens).square().sum(0) for side in ROWS)
        q, k = q.view(-1, self.groups, self.d).sum(1), k.view(-1, self.d)
        scores = ((q + q[:, self.partner]) * (k + k[:, self.partner])).sqrt()  # of a pair twice
        first = torch.arange(self.d, device=tokens.device) < self.partner
        found = scores[:, first].flatten().topk(self.pairs).indices
        heads, low = found // (self.d // 2), first.nonzero().flatten()[found % (self.d // 2)]
        of_k = (torch.cat([heads, heads]) * self.d + torch.cat([low, self.partner[low]])).sort().values
        of_v = v.topk(self.values).indices.sort().values
        return {"q_proj": self._in_group(of_k), "k_proj": of_k, "v_proj": of_v, "o_proj": self._in_group(of_v)}

    def _in_group(self, channels: Tensor) -> Tensor:
        """Channels of k or v in all heads of q, ascending."""
        head, place = channels // self.d, channels % self.d
        served = head[:, None] * self.groups + torch.arange(self.groups, device=channels.device)
        return (served * self.d + place[:, None]).flatten().sort().values


def _partners(module: Any, name: str, d: int) -> Tensor:
    """Of each channel of a head the one that it is rotated with, as the model's own ``rotate_half`` has it."""
    rotate = getattr(sys.modules[type(module).__module__], "rotate_half", None)
    rotary = getattr(getattr(module, "config", None), "rope_parameters", None) or {}
    if rotate is None or rotary.get("partial_rotary_factor", 1.0) != 1.0:
        raise ValueError(f"attention must rotate all channels of its heads in pairs, and {name} does not")
    device = module.k_proj.weight.device
    partner: Tensor = rotate(torch.arange(1.0, d + 1, device=device)).abs().long() - 1
    return partner
