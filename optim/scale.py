"""SCALE: normalised columns, and a momentum in the last layer only.  Glentis et al. 2025, arXiv:2506.16659.

For a matrix W with gradient G, by the role that it has; M from zero, without bias correction, for f cancels it:

    linear      (outputs x inputs)     X = G                           f = rms of each row      (outputs)
    transposed  (inputs x outputs)     X = G                           f = rms of each column   (outputs)
    embedding   (tokens x features)    X = G                           f = rms of each column   (features)
    head        (tokens x features)    M <- b M + (1 - b) G,  X = M    f = rms of each row      (tokens)
    all         W  <-  W - lr * decay * W - lr * X / max(f, 1e-8)      zeros stay zeros

What has no role, such as norms and biases: AdamW, as torch has it, at lr * adam_scale. The paper writes weights as
inputs x outputs: its column is a row of torch's Linear. It divides by norms, its code by root mean squares, to which
the published learning rates belong: the code is followed, and ``norm="l2"`` is the paper.

Departures from the code: a role is a key of a group and comes from the module, not from its name; squares, means and M
are fp32 at least; ``adam_scale`` is no ratio to the largest lr seen, and leaves the decay alone; no convolutions. An
embedding that is the output layer, too, is a head: no published run has one.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch.optim.optimizer import ParamsT

from ..validation import Check, number, one_of
from .core.batches import Direction
from .core.optimizer import ShardedOptimizer
from .core.rules import TORCH_ADAM
from .core.types import Group, State
from .distributed import Block, BlockedUpdate, FullShard
from .state.spec import Coordinates, StateSpec, moment_dtype, wide_dtype

NORMALIZED_OVER = {"linear": -1, "transposed": -2, "embedding": -2, "head": -1}  # by role, the dimension of a mean


class SCALE(ShardedOptimizer):
    """SGD whose gradients are divided by their size at each output of a layer; only the head has a moment.

    Args:
        params: parameters, named ones or groups; ``gracile.optim.param_groups(model, role="auto")`` makes them.
        lr: about what each weight of a matrix moves in a step. Few rows of an embedding move further: give it less.
        betas, eps: of the AdamW of groups without a role.
        weight_decay: decoupled, applied before the step.
        role: of a group's matrices: ``linear``, ``transposed``, ``embedding``, ``head``; None for AdamW.
        momentum: of a head (b).
        norm: ``rms``, or ``l2`` as in the paper.
        norm_eps: the least that is divided by.
        adam_scale: factor on lr in groups without a role; the authors' scripts have 20, and 5 for 1B.
        state_dtype, torch_keywords: as for ``GaLoreAdamW``.

    State: a counter for each parameter; one number for each weight of a head, two where there is no role.

    Raises:
        ValueError: at construction, for an unknown key, a value out of range, or a role without a matrix.

    >>> W = torch.nn.Parameter(torch.zeros(2, 2))
    >>> W.grad = torch.tensor([[3.0, -3.0], [1e-3, 1e-3]])
    >>> SCALE([W], lr=0.5, role="linear").step()
    >>> W.tolist()
    [[-0.5, 0.5], [-0.5, -0.5]]
    """

    rule, matrix_key, captures = TORCH_ADAM, "role", True
    moves_int8_weights: ClassVar[bool] = True
    checks: ClassVar[Mapping[str, Check]] = {
        "role": one_of(*NORMALIZED_OVER, optional=True),
        "momentum": number("in [0, 1)"),
        "norm": one_of("rms", "l2"),
        "norm_eps": number("> 0"),
        "adam_scale": number(">= 0"),
    }

    def __init__(
        self, params: ParamsT, lr: float = 1e-4, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8,
        weight_decay: float = 0.0, *, role: str | None = None, momentum: float = 0.9, norm: str = "rms", norm_eps:
        float = 1e-8, adam_scale: float = 1.0, state_dtype: torch.dtype | None = None, **torch_keywords: object
    ) -> None:  # fmt: skip
        super().__init__(params, locals())

    def check_shape(self, shape: tuple[int, ...], group: Group) -> None:
        if len(shape) != 2:
            raise ValueError(f"role={group['role']!r} needs matrices, got shape {shape}; put it into another group")

    def needs_rows(self, group: Group) -> bool:
        return group["role"] is not None

    def state_specs(self, shard: FullShard, group: Group) -> list[StateSpec]:
        moment = Coordinates.of(shard, in_rows=True).spec("exp_avg", moment_dtype(shard, group))
        return {None: super().state_specs(shard, group), "head": [moment]}.get(group["role"], [])

    def moves_by_rule(self, shard: FullShard, group: Group) -> bool:
        return False  # ``adam_scale``

    def direction(self, G: torch.Tensor, shard: FullShard, group: Group, state: State) -> Direction:
        if group["role"] is None:
            N, correction = yield G, state
            return N, correction * group["adam_scale"]
        beta, dim = group["momentum"], NORMALIZED_OVER[group["role"]]
        X = G if group["role"] != "head" else state["exp_avg"].mul_(beta).add_(G, alpha=1 - beta)
        if shard.in_blocks():
            return self._in_blocks(X, shard, group, dim), 1.0
        squares = X.to(wide_dtype(shard), copy=True).square_()
        f = shard.mean(squares, dim).mul_(shard.shape[dim] if group["norm"] == "l2" else 1).sqrt_().unsqueeze(dim)
        return torch.mul(X, f.clamp_(min=group["norm_eps"]).reciprocal_(), out=squares), 1.0

    def _in_blocks(self, X: torch.Tensor, shard: FullShard, group: Group, dim: int) -> BlockedUpdate:
        """Of a large matrix, X / max(f, norm_eps): of rows where f is of rows, of columns where it is of columns."""

        def normalized(block: Block) -> torch.Tensor:
            own = block.of(X)
            squares = own.to(wide_dtype(shard), copy=True).square_()
            f = squares.mean(dim).mul_(shard.shape[dim] if group["norm"] == "l2" else 1).sqrt_().unsqueeze(dim)
            return torch.mul(own, f.clamp_(min=group["norm_eps"]).reciprocal_(), out=squares)

        return BlockedUpdate(shard.shape, normalized, axis=dim % 2 ^ 1)
