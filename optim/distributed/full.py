"""A parameter that this process holds entirely: one process, or a replica under DistributedDataParallel.

Methods use a shard by its verbs. A matrix comes as its lines: a line is what belongs to one row of coordinates, a
row of the matrix where the right side is projected, a column where the left is. What is one line's business needs no
other process; ``all_reduce_``, ``norm``, ``mean``, ``row_sums`` and ``solve`` are what lines have in common.

Verbs communicate where a parameter is split (flat.py, matrix.py), attributes never do.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeGuard

import torch
from torch import Tensor

from ...int8_weight import Int8Weight, open_weight
from ..numbers import Number, add_, is_zero
from .blocked import Block, BlockedUpdate, WrittenUpdate, block_of, blocks, is_large, squares_in_blocks
from .process_group import ProcessGroup
from .products import matmul
from .projection import LowRankUpdate, ProjectionSide, add_product_
from .shard_range import Runs
from .workspace import Workspace

PRODUCT = 2**22  # elements of a product that a CPU makes at a time: 16 MiB in fp32


Update = Tensor | LowRankUpdate | WrittenUpdate


class PendingSolve:
    """Something found from a whole matrix, on one process while others find theirs; then every process gets it."""

    def __init__(
        self, find: Callable[[Tensor], Tensor], matrix: Tensor | None, share: Callable[[Tensor | None], Tensor]
    ) -> None:
        self._find, self._matrix, self._share = find, matrix, share
        self._found: Tensor | None = None

    def solve(self) -> None:
        """Find it, where this process has the matrix."""
        if self._matrix is not None:
            self._found, self._matrix = self._find(self._matrix), None

    def result(self) -> Tensor:
        """What was found. Collective: every process asks in the order in which the solves were begun."""
        self.solve()
        return self._share(self._found)


class FullShard:
    """A tensor of any shape whose moments live in its own coordinates."""

    ranked = False  # whether its moments live in a subspace
    split = False  # whether other processes hold parts of it
    maximize = False  # whether the parameter goes up: its gradient is then seen turned round
    born_stacked = False  # whether parameter, gradient and state are parts of tensors that hold those of many alike
    alone = False  # whether other processes, of several, know nothing of it
    # where weights are rounded by chance as they are written: what writes a block that was widened
    round_block: Callable[[Tensor, Block], None] | None = None
    round_places: Callable[[Tensor, Tensor, Tensor], None] | None = None  # what writes some elements (narrow, wide, at)

    def __init__(self, parameter: Tensor, position: int, workspace: Workspace) -> None:
        self.parameter = parameter
        self.shape = tuple(parameter.shape)
        self.position = position  # among all parameters of the optimizer: the same on every process
        self.workspace = workspace
        self._narrow: Tensor | None = None  # the parameter, while a wider one is in its place

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights that the optimizer steps: an engine's masters are wider than the model's."""
        return (self.parameter if self._narrow is None else self._narrow).dtype

    @property
    def first_element(self) -> int:
        """Which element of the flattened parameter is the first of those that this process holds."""
        return 0

    @contextmanager
    def in_place_of_weights(self, wide: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """``wide`` is what methods see as ``parameter``; gives the parameter and ``wide``."""
        self._narrow, self.parameter = self.parameter, wide
        try:
            yield self._narrow, wide
        finally:
            self.parameter, self._narrow = self._narrow, None

    @property
    def device(self) -> torch.device:
        return self.parameter.device

    @property
    def host(self) -> str:
        """Where clocks live: the CPU, or nowhere when only shapes are asked for."""
        return "meta" if self.parameter.device.type == "meta" else "cpu"

    @property
    def gradient(self) -> Tensor:
        """The gradient of what this process holds, laid out as ``parameter``."""
        grad = self.held_gradient
        assert grad is not None, "only parameters with a gradient are stepped"
        return -grad if self.maximize else grad

    @property
    def held_gradient(self) -> Tensor | None:
        """``gradient`` as autograd left it."""
        return (self.parameter if self._narrow is None else self._narrow).grad

    def let_gradient_go(self) -> None:
        """Hold the gradient no longer, when its parameter has moved."""

    def gather_grad(self) -> Tensor:
        """The gradient as the rule or the method wants it: of a matrix, its lines. Collective; once a step."""
        return self.gradient

    def spare(self, G: Tensor) -> Tensor | None:
        """The memory of a gathered gradient, where it is a copy that a method may write its update to."""
        return None

    def refill(self, G: Tensor) -> Tensor:
        """The gradient once more, in the memory that ``spare`` gave."""
        raise NotImplementedError

    @property
    def coordinates_shape(self) -> tuple[int, ...]:
        """The shape of what the rule sees."""
        return tuple(self.parameter.shape)

    @property
    def runs(self) -> Runs:
        """Where the coordinates that this process holds lie among all of them."""
        return Runs.all_of(self.coordinates_shape)

    def in_blocks(self, twice: bool = False) -> bool:
        """Whether what is made of a matrix is made in blocks, or in ones that are made ``twice``. Compiled code makes
        all at once: it fuses what would be made on the way."""
        if torch.compiler.is_compiling():
            return False
        return not self.split and self.parameter.dim() == 2 and is_large(self.parameter.shape, twice)

    # ---- what all elements have in common ---------------------------------------------------------------------------

    def all_reduce_max_(self, tensor: Tensor) -> Tensor:
        """The largest of each element over all processes, in place."""
        return tensor

    def norm(self, like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """The Frobenius norm of a tensor laid out as this parameter or its coordinates; a scalar on its device."""
        norm: Tensor = torch.linalg.vector_norm(like, dtype=dtype)
        return norm

    def mean(self, like: Tensor, dim: int) -> Tensor:
        """The mean over one dimension of a tensor laid out as this parameter or its coordinates."""
        return like.mean(dim=dim)

    def rms(self, like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """The root mean square of a tensor laid out as this parameter or its coordinates; a scalar on its device."""
        rms: Tensor = self.norm(like, dtype) / math.sqrt(max(1, self.count(like)))
        return rms

    def weight_rms(self) -> Tensor:
        """The root mean square of the weights, in fp32 at least; a scalar on their device."""
        W = self.parameter
        if isinstance(W, Int8Weight):
            norm = squares_in_blocks(W.shape, lambda block: open_weight(block.of(W), self._wide), self._wide).sqrt_()
        else:
            norm = torch.linalg.vector_norm(W, dtype=self._wide)
        rms: Tensor = norm / math.sqrt(max(1, W.numel()))
        return rms

    def count(self, like: Tensor) -> int:
        """How many elements all processes together hold of such a tensor."""
        return like.numel()

    # ---- the whole tensor, where a method needs it ------------------------------------------------------------------

    @property
    def processes(self) -> ProcessGroup:
        """The processes that must agree about this parameter."""
        return ProcessGroup.of_replicas(self.parameter.device)

    def gather_whole(self, own: Tensor) -> Tensor:
        """The whole tensor of which ``own``, laid out as this parameter, is this process's part. Collective."""
        return own

    def part_of(self, whole: Tensor) -> Tensor:
        """The inverse of ``gather_whole``."""
        return whole

    def gather_whole_at(self, own: Tensor, owner: int) -> Tensor | None:
        """``gather_whole`` for process ``owner`` alone; None elsewhere, but where each has all of it. Collective."""
        return own

    def broadcast_whole(self, own: Tensor, found: Tensor | None, owner: int, processes: ProcessGroup) -> Tensor:
        """What ``gather_whole_at`` gave ``owner``, as it is there now, on all processes. Collective."""
        return processes.broadcast_(own, owner)

    def column_squares(self) -> Tensor:
        """This process's share of the sums over rows of the squared weights (n), in fp32 at least."""
        squares: Tensor = self.parameter.detach().to(self._wide).square().sum(0)
        return squares

    def divide_columns(self, divisors: Tensor) -> None:
        """W <- W / divisors (n), rounded once."""
        self.parameter.copy_(self.parameter / divisors)

    @property
    def _wide(self) -> torch.dtype:
        return torch.promote_types(self.parameter.dtype, torch.float32)

    # ---- writing ----------------------------------------------------------------------------------------------------

    def write(self, update: Update, step_size: Number, decay: Number, decay_first: bool) -> None:
        """W <- W - step_size * update, and W <- W - decay * W before or, as in GaLore's code, after it.

        ``update`` is laid out as ``gather_grad`` gives the gradient. Collective.
        """
        if self.round_block is not None:
            self._write_rounded(update, step_size, decay, decay_first)
            return
        W = self.parameter
        _decay_(W, decay, decay_first, before=True)
        self.add_(update, -step_size)
        _decay_(W, decay, decay_first, before=False)

    def _write_rounded(self, update: Update, step_size: Number, decay: Number, decay_first: bool) -> None:
        """``write`` of weights that are wider for a moment, a block at a time."""
        assert self.round_block is not None
        axis = update.axis if isinstance(update, BlockedUpdate) else 0
        if isinstance(update, LowRankUpdate):
            update = update.to(torch.float32)  # once, not for each block
        in_groups = self.parameter.group_size if axis and isinstance(self.parameter, Int8Weight) else 1
        for block in blocks(self.shape, axis, in_groups):
            W = open_weight(block.of(self.parameter), torch.float32)
            _decay_(W, decay, decay_first, before=True)
            self._add_to(W, block_of(update, block), -step_size)
            _decay_(W, decay, decay_first, before=False)
            self.round_block(W, block)
            del W  # before the next

    def add_(self, update: Update, alpha: Number) -> None:
        """W <- W + alpha * update."""
        self._add_to(self.parameter, update, alpha)

    def _add_to(self, weights: Tensor, update: Update, alpha: Number) -> None:
        if isinstance(update, LowRankUpdate):
            self._add_product(weights, update, alpha)
        elif isinstance(update, WrittenUpdate):
            update.add_to_weights_(weights, alpha)
        else:
            add_(weights, update, alpha)

    def _add_product(self, weights: Tensor, update: LowRankUpdate, alpha: Number) -> None:
        """weights += alpha * update, rounded to the weights once.

        On a CPU ``addmm_`` adds the r products to the weight in several portions and rounds at the weight's size each
        time: 5e-6 off after 50 steps at weights of size one. A product of its own, some rows at a time, in memory that
        all matrices of a step share, stays on the authors' bits. GPUs sum in registers first and need neither.
        """
        left, right = update.left.to(weights.dtype), update.right.to(weights.dtype)
        if weights.device.type != "cpu":
            add_product_(weights, left, right, alpha * update.factor)
            return
        factor = update.factor
        if isinstance(alpha, Tensor) or isinstance(factor, Tensor) or torch.compiler.is_compiling():
            add_(weights, matmul(left, right), alpha * factor)
            return
        exact = math.frexp(factor)[0] == 0.5  # a power of two, such as 0.25: no rounding, so no pass of its own
        rows = max(1, PRODUCT // max(1, weights.shape[1]))
        for own, lines in zip(torch.split(weights, rows), torch.split(left, rows), strict=True):
            product = matmul(lines, right, out=self.workspace.like(own))
            if exact:
                own.add_(product, alpha=alpha * factor)
            else:
                own.add_(product.mul_(factor), alpha=alpha)


def _decay_(weights: Tensor, decay: Number, decay_first: bool, before: bool) -> None:
    """What of decay comes ``before`` the update, or after it."""
    if is_zero(decay) or before != decay_first:
        return
    if decay_first:
        weights.mul_(1 - decay)
    else:
        add_(weights, weights, -decay)


class FullMatrix(FullShard):
    """An m x n matrix whose moments live in a subspace of rank r."""

    ranked = True
    solvers = 1  # how many matrices can be solved at the same time, each by a process of its own

    def __init__(self, parameter: Tensor, position: int, workspace: Workspace, side: ProjectionSide) -> None:
        super().__init__(parameter, position, workspace)
        self.side = side

    @property
    def coordinates_shape(self) -> tuple[int, ...]:
        return self.side.projected_shape

    @property
    def block_shape(self) -> tuple[int, int]:
        """The shape of what ``gather_grad`` and ``gather_weights`` give: all lines, or those that this process works
        on."""
        return self.side.shape

    def gather_weights(self, keep: bool = False) -> Tensor:
        """The lines of the weights. Collective, but where they were kept for this call by the one before."""
        return self.parameter

    def lines_of(self, own: Tensor) -> Tensor:
        """The lines of what is laid out as ``parameter``, as ``gather_grad`` has those of the gradient. Collective."""
        return own

    def rewrite(self, weights: Tensor) -> None:
        """W <- weights, laid out as ``gather_weights`` gives them. Collective."""
        if weights is not self.parameter:
            self.parameter.copy_(weights)

    def rewrite_block(self, weights: Tensor, block: Block) -> None:
        """``rewrite`` of a block of a matrix that is moved in blocks."""
        if self.round_block is not None:
            self.round_block(weights, block)
        elif weights.dtype != self.parameter.dtype or weights.data_ptr() != block.of(self.parameter).data_ptr():
            block.of(self.parameter).copy_(weights)

    def own(self, like: Tensor) -> Tensor:
        """The lines of which this process is the one that counts them."""
        return like

    def own_rows(self, like: Tensor, begin: int, end: int) -> Tensor:
        """``own``, and of these the rows from ``begin`` to ``end`` of the whole matrix. On the right only."""
        return like[begin:end]

    def all_reduce_(self, tensor: Tensor) -> Tensor:
        """A sum over this process's own lines, made the sum over all lines, in place."""
        return tensor

    def row_sums(self, like: Tensor) -> Tensor:
        """m x 1."""
        sums: Tensor = like.sum(dim=-1, keepdim=True)
        return sums

    def row_norms(self, like: Tensor) -> Tensor:
        """m x 1."""
        norms: Tensor = torch.linalg.vector_norm(like, dim=-1, keepdim=True)
        return norms

    def solve(self, block: Tensor, find: Callable[[Tensor], Tensor]) -> PendingSolve:
        """``find`` of the whole matrix that ``block`` is the lines of, begun. Collective."""
        return PendingSolve(find, block, _found)

    def shard_rows(self, rows: Tensor) -> Tensor:
        """What this process keeps of the rows of a basis, which all processes have."""
        return rows

    def all_gather_rows(self, own: Tensor, count: int) -> Tensor:
        """All ``count`` rows of a basis from what each process keeps. Collective."""
        return own


def _found(columns: Tensor | None) -> Tensor:
    assert columns is not None, "a whole matrix is solved where it is"
    return columns


def has_subspace(shard: FullShard) -> TypeGuard[FullMatrix]:
    return shard.ranked
