"""Linear layers for inference whose zeros are not stored: a trained weight and its mask, packed.

    S: the places of W (m x n) that the mask keeps, or W != 0
    condensed   k places in every row that is not empty (SRigL, Lasby et al. 2023, arXiv:2305.02299)
                V: m' x k values,  J: m' x k columns,  m' rows that are not empty
                y_i = sum_j V_ij x[J_ij] + bias_i,   y_i = bias_i for an empty row
    CSR         the same of rows of any length, one behind the other, and where each starts

What is kept is the mask's: a weight that has just grown and is exactly zero stays, and so does a row whose values
cancel (the authors' code looks for rows whose sum is not zero, and reads a bias that may not be there).

On a CPU both are computed by what was fastest (benchmarks/sparse_layers.py): up to 15 tokens by MKL's CSR with 32-bit
places, one token as matrix times vector; more by ``embedding_bag`` over x^T, 32 tokens at a time, so that x^T stays in
the cache. In the authors' form, gathered inputs times values, summed, an array of the size of V is made; as compiled by
torch.compile the gather is done one element at a time: both are slower, and neither is used where MKL is there.
16-bit weights are widened piece by piece and summed in fp32, which is faster and closer than 16-bit sums.
"""

from __future__ import annotations

import warnings
from abc import abstractmethod
from collections.abc import Iterator, Mapping
from functools import cache
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...validation import require
from ..core.factored_linear import FactoredLinear

Packed = TypeVar("Packed", bound="InferenceLinear")
PADDING = 0.25  # at most this share of stored values may be there only to make rows equally long
FEW = 16  # tokens from which on embedding_bag is faster than CSR
TOKENS = 32  # that embedding_bag sees at a time
PIECE = 2**19  # elements of what is made for a moment: 2 MiB, of the size of a cache
INT32 = 2**31 - 1


class InferenceLinear(FactoredLinear):
    """y = x W^T + bias with W packed into buffers, without its zeros: the base of the layers for inference.

    Nothing is trained: ``from_linear`` and ``from_tensors`` make one.

    Args:
        in_features: n, the columns of W.
        out_features: m, the rows of W.
        tensors: the buffers by name, as ``pack`` makes them.
        bias: its values (out), or None.

    Raises:
        ValueError: for a mask of another shape, a W that the form cannot hold, or an input of another width or dtype.
        TypeError: where this class itself is constructed, which is abstract.

    Example:
        >>> from torch import nn
        >>> from gracile.models.layers import CSRLinear, InferenceLinear
        >>> linear = nn.Linear(64, 32)
        >>> mask = linear.weight > 0.1  # what is kept of the weight; without a mask what is not zero
        >>> layer = CSRLinear.from_linear(linear, mask=mask)
        >>> isinstance(layer, InferenceLinear), layer.values.numel() == int(mask.sum())
        (True, True)
        >>> torch.equal(layer.merge().weight, linear.weight * mask)
        True
    """

    form: ClassVar[str]
    places: ClassVar[dict[str, torch.dtype]]  # buffers of whole numbers, and their dtype where they are used
    values: Tensor
    _made: Any = None

    def __init__(
        self, in_features: int, out_features: int, tensors: Mapping[str, Tensor | None], bias: Tensor | None = None
    ) -> None:
        super().__init__(in_features, out_features, bias=False)
        if bias is not None:
            self.bias = nn.Parameter(bias.detach().clone(), requires_grad=False)
        for name, tensor in tensors.items():
            self.register_buffer(name, tensor)

    @classmethod
    def from_linear(cls: type[Packed], linear: nn.Linear, *, mask: Tensor | None = None, **options: Any) -> Packed:
        """``linear`` with what ``mask`` (out x in, bool) keeps of its weight; without one, what is not zero."""
        weight = linear.weight.detach()
        if mask is None:
            mask = weight != 0
        expectation = f"mask must be a bool tensor of shape {tuple(weight.shape)}"
        require(mask.dtype == torch.bool and mask.shape == weight.shape, expectation, (mask.dtype, tuple(mask.shape)))
        require(weight.numel() <= INT32, "places are 32-bit numbers: in * out must be below 2^31", weight.numel())
        packed = cls.pack(weight.masked_fill(~mask, 0), mask, **options)
        layer = cls(linear.in_features, linear.out_features, packed, linear.bias)
        return layer.train(linear.training)

    @classmethod
    def from_tensors(cls: type[Packed], in_features: int, out_features: int, tensors: Mapping[str, Tensor]) -> Packed:
        """The layer whose ``state_dict`` is ``tensors``; their whole numbers may be of any dtype."""
        own = {name: t.to(cls.places[name]) if name in cls.places else t for name, t in tensors.items()}
        bias = own.pop("bias", None)
        return cls(in_features, out_features, own, bias)

    @classmethod
    @abstractmethod
    def pack(cls, weight: Tensor, mask: Tensor) -> dict[str, Tensor | None]:
        """Buffers that hold ``weight`` (out x in), which is zero where ``mask`` is False."""

    @abstractmethod
    def product(self, x: Tensor) -> Tensor:
        """x W^T for x: N x n, N >= 1; in fp32 for 16-bit x on a CPU."""

    def forward(self, x: Tensor) -> Tensor:  # x: ... x n; y: ... x m
        if torch.is_autocast_enabled(x.device.type):
            return self._autocast(x)
        n, dtype, bias = self.in_features, x.dtype, self.bias
        # no message is put together before it is needed: one token of a small layer is some microseconds
        if dtype != self.values.dtype or x.shape[-1] != n:
            raise ValueError(f"x must be ... x {n} in {self.values.dtype}, got {tuple(x.shape)} in {x.dtype}")
        shape = x.shape[:-1]
        y = self.product(x.reshape(-1, n)) if x.numel() else x.new_zeros(0, self.out_features)
        if y.dtype != dtype:
            y = y.to(dtype)
        if bias is not None:
            y = y + bias
        return y.reshape(*shape, self.out_features).contiguous()

    def _autocast(self, x: Tensor) -> Tensor:
        kind = x.device.type
        with torch.autocast(kind, enabled=False):
            return self(x.to(self.values.dtype)).to(torch.get_autocast_dtype(kind))

    def _kernel(self) -> Any:
        """W as a kernel takes it, made of the buffers where it is first needed, and kept until they change."""
        if self._made is None:
            with torch.inference_mode(False), torch.no_grad():  # else it could be used in inference mode alone
                self._made = self.prepare()
        return self._made

    def prepare(self) -> Any:
        return None

    def _apply(self, fn: Any, recurse: bool = True) -> nn.Module:
        self._made = None  # of another device or dtype from now on
        return super()._apply(fn, recurse)

    def _load_from_state_dict(self, *arguments: Any) -> None:
        self._made = None
        super()._load_from_state_dict(*arguments)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_made": None}  # a copy makes its own

    def reset_parameters(self) -> None:
        raise RuntimeError(f"{type(self).__name__} is for inference: it holds a trained weight, and draws none")

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, stored={self.values.numel()}"


class RowLinear(InferenceLinear):
    """Places row by row: ``values`` and ``columns``, and in ``starts`` where each row begins."""

    columns: Tensor
    starts: Tensor
    fan_in: int | None = None  # how long every row is, where all are of one length

    def __init__(
        self, in_features: int, out_features: int, tensors: Mapping[str, Tensor | None], bias: Tensor | None = None
    ) -> None:
        super().__init__(in_features, out_features, tensors, bias)
        _say_nothing_of_csr()

    def forward(self, x: Tensor) -> Tensor:
        S, n = self._made, self.in_features
        # one token of a small layer is some microseconds: the shortest way for it, past all that is not needed
        if S is None or x.numel() != n or x.shape[-1] != n or x.dtype != S.dtype or torch.is_autocast_enabled("cpu"):
            return super().forward(x)
        y, bias = S.mv(x.reshape(n)), self.bias
        return (y if bias is None else y + bias).view(*x.shape[:-1], -1)

    def product(self, x: Tensor) -> Tensor:
        if len(x) < FEW and (S := self._kernel()) is not None:
            return _csr_product(S, x)
        return row_sums(self.values.view(-1), self.columns.view(-1), self.starts, x, self.fan_in)

    def prepare(self) -> Tensor | None:
        """torch's CSR tensor, which shares the memory of the buffers."""
        if not _mkl_takes(self.values):
            return None
        return _csr(self.values.view(-1), self.columns.view(-1), self.starts, self.in_features)


class CondensedLinear(RowLinear):
    """For inference: every row of W that is not empty has the same number k of weights (SRigL, arXiv:2305.02299).

    ``values`` and ``columns`` are m' x k, for m' rows that are not empty. Shorter rows are filled with zeros up to the
    longest where that takes at most a quarter more; else rows are too uneven, and ``CSRLinear`` is for them.

    Args:
        in_features, out_features, tensors, bias: as for ``InferenceLinear``.

    Raises:
        ValueError: as ``InferenceLinear``.

    Example:
        >>> from torch import nn
        >>> from gracile.models.layers import CondensedLinear
        >>> linear, x = nn.Linear(64, 32), torch.randn(16, 64)
        >>> _ = linear.weight.data[:, 8:].zero_()  # eight weights in every row
        >>> layer = CondensedLinear.from_linear(linear)
        >>> layer.values.shape, torch.allclose(layer(x), linear(x), atol=1e-5)
        (torch.Size([32, 8]), True)
    """

    form = "condensed"
    places: ClassVar = {"columns": torch.int32, "rows": torch.int64}
    rows: Tensor | None  # those that are not empty (m'), where not all are

    def __init__(
        self, in_features: int, out_features: int, tensors: Mapping[str, Tensor | None], bias: Tensor | None = None
    ) -> None:
        super().__init__(in_features, out_features, {"rows": None, **tensors}, bias)
        k, rows, device = self.values.shape[1], self.rows, self.values.device
        lengths = torch.full((out_features,), k, dtype=torch.int32, device=device)
        if rows is None:
            self.fan_in = k
        else:
            lengths = lengths.zero_().index_fill_(0, rows, k)
        starts = F.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))
        self.register_buffer("starts", starts, persistent=False)

    @classmethod
    def pack(cls, weight: Tensor, mask: Tensor) -> dict[str, Tensor | None]:
        lengths = mask.sum(1)
        rows = lengths.nonzero().view(-1)
        lengths = lengths[rows]
        k = int(lengths.max()) if len(rows) else 0
        times = k * len(rows) / max(1, int(lengths.sum()))
        limit = f"filled up to the longest, at most {1 + PADDING} times as many values (CSRLinear takes any)"
        require(times <= 1 + PADDING, f"rows of W must be of about one length: {limit}", round(times, 2))
        inside = torch.arange(k, device=weight.device) < lengths[:, None]
        columns = torch.empty(len(rows), k, dtype=torch.int64, device=weight.device)
        columns[inside] = mask.nonzero()[:, 1]
        last = columns.gather(1, lengths[:, None] - 1) if k else columns  # filled with the last: columns still ascend
        columns = torch.where(inside, columns, last)
        values = weight[rows].gather(1, columns).masked_fill(~inside, 0)
        every = len(rows) == len(weight)
        return {"values": values, "columns": columns.int(), "rows": None if every else rows}

    @torch.no_grad()
    def dense(self) -> Tensor:
        packed = self.values.new_zeros(len(self.values), self.in_features)
        packed.scatter_add_(1, self.columns.long(), self.values)
        if self.rows is None:
            return packed
        return packed.new_zeros(self.out_features, self.in_features).index_copy_(0, self.rows, packed)


class CSRLinear(RowLinear):
    """For inference: rows of any length, in compressed sparse row (CSR) form.

    ``values`` and ``columns`` hold one row behind the other, ``starts`` where each begins (m + 1).

    Args:
        in_features, out_features, tensors, bias: as for ``InferenceLinear``.

    Raises:
        ValueError: as ``InferenceLinear``.

    Example:
        >>> from torch import nn
        >>> from gracile.models.layers import CSRLinear
        >>> from gracile.optim import RigLAdamW
        >>> linear, x = nn.Linear(64, 32), torch.randn(16, 64)
        >>> optimizer = RigLAdamW([{"params": [linear.weight], "sparsity": 0.9}], t_end=750)  # masks the weight
        >>> layer = CSRLinear.from_linear(linear)
        >>> layer.values.shape, layer.starts.shape, torch.allclose(layer(x), linear(x), atol=1e-5)
        (torch.Size([205]), torch.Size([33]), True)
    """

    form = "csr"
    places: ClassVar = {"columns": torch.int32, "starts": torch.int32}

    @classmethod
    def pack(cls, weight: Tensor, mask: Tensor) -> dict[str, Tensor | None]:
        starts = F.pad(mask.sum(1).cumsum(0), (1, 0))
        return {"values": weight[mask], "columns": mask.nonzero()[:, 1].int(), "starts": starts.int()}

    @torch.no_grad()
    def dense(self) -> Tensor:
        m, n = self.out_features, self.in_features
        rows = torch.arange(m, device=self.values.device)
        rows = rows.repeat_interleave(self.starts.diff(), output_size=len(self.values))
        return self.values.new_zeros(m * n).index_add_(0, rows * n + self.columns, self.values).view(m, n)


# ---- sums over rows -------------------------------------------------------------------------------------------------


def row_sums(values: Tensor, columns: Tensor, starts: Tensor, x: Tensor, fan_in: int | None = None) -> Tensor:
    """y_ti = sum over j from starts_i to starts_i+1 of values_j x[t, columns_j]: N x m.

    Args:
        values, columns, starts: m rows in CSR, places in int32.
        x: N x n. 16-bit ones on a CPU are summed in fp32, and y is fp32.
        fan_in: how long each row is, where all are of one length.
    """
    if not is_narrow(x):
        return _row_sums(values, columns, starts, x, fan_in)
    x, m = x.float(), len(starts) - 1
    y = x.new_empty(len(x), m)
    for a, b, first, last in _pieces(starts, len(values)):
        y[:, a:b] = _row_sums(values[first:last].float(), columns[first:last], starts[a : b + 1] - first, x, fan_in)
    return y


def is_narrow(x: Tensor) -> bool:
    """Whether ``x`` is widened to be computed with: few CPUs have instructions for 16-bit numbers."""
    return x.device.type == "cpu" and x.element_size() < 4


def _pieces(starts: Tensor, stored: int) -> Iterator[tuple[int, int, int, int]]:
    """Rows a to b, and the values first to last that are theirs."""
    m = len(starts) - 1
    rows = max(1, PIECE * m // stored)
    for a in range(0, m, rows):
        b = min(a + rows, m)
        yield a, b, int(starts[a]), int(starts[b])


def _row_sums(values: Tensor, columns: Tensor, starts: Tensor, x: Tensor, fan_in: int | None) -> Tensor:
    N, n = x.shape
    if N < FEW and _mkl_takes(x):
        return _csr_product(_csr(values, columns, starts, n), x)
    if N == 1 and x.device.type == "cpu":
        terms = x[0].index_select(0, columns) * values
        if fan_in is not None:
            return terms.view(1, -1, fan_in).sum(-1)
        return torch.segment_reduce(terms, "sum", offsets=starts, initial=0)[None]
    return torch.cat([_bags(values, columns, starts, part.mT.contiguous()).mT for part in x.split(TOKENS)])


def _mkl_takes(x: Tensor) -> bool:
    return x.device.type == "cpu" and x.element_size() >= 4 and torch.backends.mkl.is_available()


def _csr(values: Tensor, columns: Tensor, starts: Tensor, n: int) -> Tensor:
    return torch.sparse_csr_tensor(starts, columns, values, (len(starts) - 1, n), check_invariants=False)


def _csr_product(S: Tensor, x: Tensor) -> Tensor:
    return (S @ x.view(-1)).view(1, -1) if len(x) == 1 else (S @ x.mT).mT


def _bags(values: Tensor, columns: Tensor, starts: Tensor, xT: Tensor) -> Tensor:  # n x N to m x N
    return F.embedding_bag(columns, xT, starts, mode="sum", per_sample_weights=values, include_last_offset=True)


@cache
def _say_nothing_of_csr() -> None:
    """torch says once in a process that its CSR tensors are in beta: let it say so here."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        none = torch.zeros(0, dtype=torch.int32)
        torch.sparse_csr_tensor(torch.zeros(1, dtype=torch.int32), none, torch.zeros(0), (0, 1), check_invariants=False)
