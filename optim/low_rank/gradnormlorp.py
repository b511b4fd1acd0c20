"""GradNormLoRP: GaLore on the direction of each row, Adam on its length.  Huang et al. 2024, arXiv:2412.19616.

For a matrix W (m x n, one row an output) with gradient G, each row written as a length g times a direction c:

                     g   ,  c  =  W / g                                       m x 1, m x n, |c_i| = 1
                     dg  =  rowsum(G * c)                                     m x 1    the exact gradient of g
                     D   =  g * (G - dg c)                                    m x n    of c: tangential, D_i . c_i = 0
    every T steps    P  <-  r leading singular vectors of D                            subspace, sides as in galore.py
                     R   =  D P                                               m x r    project
                     N   =  Adam(R),  N_g = Adam(dg)                                   rule, moments kept
                     c  <-  (c - s * scale * N P^T) / |.|                     m x n    back to the sphere, row by row
                     g  <-  (1 - lr * decay) * (g - s * N_g)                  m x 1
                     W  <-  g c                               with s = lr * sqrt(1 - b2^t) / (1 - b1^t)

Paper, released optimizer and released script are three different things; this is a clean form of the optimizer.
Departures from it: the length that was learnt is kept, not overwritten by |W_i| at each step; the direction's gradient
is tangential, as weight normalisation has it; W itself holds the direction, so there is no copy of it; parameters
are written in place. A row of zeros has no direction and stays. Weight decay acts on lengths alone, where it
means something. The paper's LoRA variant is peft's DoRA with ``GaLoreAdamW`` on its factors.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from ..core.batches import ask
from ..core.rules import MOMENTS
from ..core.types import Group, State
from ..distributed import Block, FullMatrix, FullShard, LowRankUpdate, block_of, blocks, has_subspace
from ..numbers import add_, decay_of, is_zero
from ..state.spec import Placement, StateSpec, wide_dtype
from .basis import Basis
from .optimizer import LowRankOptimizer
from .singular import Columns, iterated

SHORTEST = 1e-30  # a row of this length or less has no direction


class GradNormLoRPAdamW(LowRankOptimizer):
    """AdamW on weight-normalised rows: lengths in full, directions in a low-rank subspace (arXiv:2412.19616).

    Groups without a ``rank`` get plain AdamW.

    Args:
        params, lr, betas, eps, rank, update_proj_gap, proj_type, subspace_method, shard_basis, state_dtype: as for
            ``GaLoreAdamW``.
        scale: factor on the update of directions, which are of length one.
        weight_decay: decoupled, on the lengths of a matrix's rows, and on the parameters without a rank.
        torch_keywords: as for ``GaLoreAdamW``.

    State of an m x n matrix: that of ``GaLoreAdamW`` and 3 * m fp32 numbers: the lengths and their moments.

    Raises:
        ValueError: at construction, naming key and value, for an unknown key or a value out of range.
        RuntimeError: at ``step``, for sparse gradients, or parameters split in an unknown way (UnsupportedLayout).

    Example:
        >>> from torch import nn
        >>> from gracile.optim import GradNormLoRPAdamW, param_groups
        >>> model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 8))
        >>> optimizer = GradNormLoRPAdamW(param_groups(model, rank=4, target_modules="all-linear"), lr=0.01)
        >>> model(torch.randn(16, 64)).square().mean().backward()
        >>> optimizer.step()
        >>> length = optimizer.state[model[0].weight]["length"]  # of each row, learnt on its own
        >>> length.shape, torch.allclose(model[0].weight.norm(dim=1, keepdim=True), length)
        (torch.Size([32, 1]), True)
    """

    captures = True
    moves_int8_weights = False  # whose rows it rewrites
    finds_together = False  # the gradient of directions is a matrix of its own
    stack_copies = 2  # of the weights, and of the gradient, which becomes that of directions

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
        *,
        rank: int | None = None,
        update_proj_gap: int = 200,
        scale: float = 0.25,
        proj_type: str = "std",
        subspace_method: str = "iterate",
        shard_basis: bool | None = None,
        state_dtype: torch.dtype | None = None,
        **torch_keywords: object,
    ) -> None:
        super().__init__(params, locals())

    def basis_specs(self, shard: FullMatrix, group: Group) -> list[StateSpec]:
        placement = Placement.LINES if shard.side.right else Placement.REPLICATED
        lengths = StateSpec("length", (shard.shape[0], 1), wide_dtype(shard), placement)
        moments = (replace(lengths, name=f"length_{key}") for key in MOMENTS)
        return [*super().basis_specs(shard, group), lengths, *moments]

    def initialize(self, shard: FullShard, group: Group, state: State) -> None:
        super().initialize(shard, group, state)
        if has_subspace(shard):
            state["length"].copy_(shard.row_norms(shard.gather_weights().to(wide_dtype(shard))))

    def find_basis(self, G: Tensor, shard: FullMatrix, group: Group, state: State) -> Columns:
        W, previous = shard.gather_weights(keep=True), self.previous_columns(shard, group, state)
        if shard.in_blocks(twice=True) and group["subspace_method"] == "iterate":
            D = DirectionsInBlocks(G, W, shard, Lengths.of(shard, state))
            return iterated(D.gram_times, shard.side, previous, W.new_empty(0))
        whole = Directions(G, W, shard, Lengths.of(shard, state)).D.to(shard.dtype)  # which frees the wider one
        return self.singular_vectors(whole, previous, shard, group)

    def update(self, G: Tensor, shard: FullShard, group: Group, state: State) -> None:
        if not has_subspace(shard):
            super().update(G, shard, group, state)
            return
        P = self.basis(shard, group, state)
        W, lengths = shard.gather_weights(), Lengths.of(shard, state)
        D = (DirectionsInBlocks if shard.in_blocks() else Directions)(G, W, shard, lengths)
        R, dg = D.project(P), D.dg
        del D  # before the next m x n
        N, correction = ask(self.rule, R, state, group, shard)
        moments = {"step": state["step"]} | {key: state[f"length_{key}"] for key in MOMENTS}
        N_g, _ = ask(self.rule, dg, moments, group, shard)
        if is_zero(group["lr"]):
            return  # put together again, W would differ by a rounding
        s = group["lr"] * correction
        moved = P.lift(N).times(-s * group["scale"])
        del R, N
        g = lengths.g  # becomes the new one
        add_(g, torch.where(lengths.directed, N_g, lengths.zero), -s).mul_(1 - decay_of(group))
        if not shard.in_blocks():
            shard.rewrite(_rotated(W, moved, lengths, shard))
            return
        for block in blocks(W.shape):
            shard.rewrite_block(_rotated(block.of(W), block_of(moved, block), lengths.part(block), shard), block)


class Lengths(NamedTuple):
    """Of rows (m x 1): g, 1 / g as it was or 0 of those that have no direction, and whether they have one; and a zero,
    which is made once a step."""

    g: Tensor
    inverse: Tensor
    directed: Tensor
    zero: Tensor

    @classmethod
    def of(cls, shard: FullMatrix, state: State) -> Lengths:
        g = state["length"]
        if torch.compiler.is_compiling():  # which a workspace's numbers would be compiled again for
            zero = g.new_zeros(())
        else:
            zero = shard.workspace.number(0.0, shard.device)
        directed = g.abs() > SHORTEST
        return cls(g, torch.where(directed, 1 / g, zero), directed, zero)

    def part(self, block: Block) -> Lengths:
        return Lengths(*map(block.of, self))


def _rotated(W: Tensor, moved: LowRankUpdate, lengths: Lengths, shard: FullMatrix) -> Tensor:
    """Rows of W whose directions have ``moved``, at their new lengths."""
    c = W.to(lengths.g.dtype).mul_(lengths.inverse)  # W itself where it is fp32
    moved.add_to_(c)
    size = shard.row_norms(c)
    return c.mul_(torch.where(lengths.directed, lengths.g / size, lengths.zero))


class Directions:
    """The gradient of directions, D (m x n), and of lengths, dg (m x 1), in fp32 at least."""

    def __init__(self, G: Tensor, W: Tensor, shard: FullMatrix, lengths: Lengths) -> None:
        g, spare = lengths.g, shard.spare(G)
        if spare is not None and spare.dtype == g.dtype:  # a stack's copy of gradients
            D = spare.mul_(g)
        else:
            D, spare = torch.mul(G, g), None
        self.dg = shard.row_sums(D.mul_(W)) * lengths.inverse.square()
        D = torch.mul(G, g, out=D) if spare is None else shard.refill(D).mul_(g)
        self.D = D.addcmul_(W, self.dg, value=-1)  # g (G - dg c), with g c = W

    def project(self, P: Basis) -> Tensor:
        return P.project(self.D)


class DirectionsInBlocks:
    """``Directions`` of a large matrix, whose D is never there as a whole."""

    def __init__(self, G: Tensor, W: Tensor, shard: FullMatrix, lengths: Lengths) -> None:
        self.G, self.W, self.g, self.side, self.dtype = G, W, lengths.g, shard.side, shard.dtype
        sums = [
            shard.row_sums(torch.mul(block.of(G), block.of(self.g)).mul_(block.of(W)))
            for block in blocks(shard.side.shape)
        ]
        self.dg = torch.cat(sums).mul_(lengths.inverse.square())

    def _by_lines(self) -> Iterator[tuple[Block, Tensor]]:
        for block in blocks(self.side.shape, self.side.line_axis):
            D = torch.mul(block.of(self.G), block.of(self.g))
            yield block, D.addcmul_(block.of(self.W), block.of(self.dg), value=-1)

    def project(self, P: Basis) -> Tensor:
        R = P.columns.new_empty(self.side.projected_shape)
        for block, D in self._by_lines():
            block.of(R).copy_(P.project(D))
        return R

    def gram_times(self, Q: Tensor) -> Tensor:
        """D^T D Q on the right, D D^T Q on the left."""
        Z = torch.zeros_like(Q)
        for _, D in self._by_lines():
            D = D.to(self.dtype).to(Q.dtype)  # rounded, as a whole one is
            lines = D if self.side.right else D.t()
            Z.addmm_(lines.t(), lines @ Q)
        return Z
