"""Products of bf16 and of fp16 matrices on CPUs that have no instructions for bf16.

torch leaves a bf16 product to oneDNN where that has kernels (x86 from AVX-512 on, Arm with BF16), and makes it in a
loop of its own elsewhere: at 0.3 to 3 GFLOP/s, where fp32 has 30 to 80. There it is made here in fp32, by blocks, and
rounded once. Which of the two is asked of oneDNN, as torch does (``aten/src/ATen/native/mkldnn/Matmul.cpp``), and not
of a clock: the answer, and so the bits, are the same in every process, every run, and a rehearsal on tensors without
memory.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from .shard_range import spans

BLOCK = 1024  # rows and columns that are made wider at a time: 4 MiB in fp32
NARROW = (torch.bfloat16, torch.float16)


def _has_kernels() -> bool:
    """Whether torch has kernels of oneDNN for bf16; a torch that was built without oneDNN has not."""
    known = getattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", None)
    return known is not None and known()


IN_FP32 = not _has_kernels()


def matmul(left: Tensor, right: Tensor, out: Tensor | None = None) -> Tensor:
    """left right (m x k, k x n), of matrices or of stacks of them, in one new tensor or in ``out``."""
    if not _is_widened(left, right):
        return torch.matmul(left, right, out=out)
    if out is None:
        out = left.new_empty(*left.shape[:-1], right.shape[-1])
    for at, product in _in_blocks(left, right):
        out[at].copy_(product)
    return out


def addmm(dense: Tensor, left: Tensor, right: Tensor, alpha: float, out: Tensor | None = None) -> Tensor:
    """dense + alpha * left right, of matrices or of stacks of them, in one new tensor or in ``out``."""
    if not _is_widened(left, right):
        add = torch.addmm if dense.dim() == 2 else torch.baddbmm
        return add(dense, left, right, alpha=alpha, out=out)
    return _addmm_in_blocks(dense, left, right, alpha, torch.empty_like(dense) if out is None else out)


def addmm_(dense: Tensor, left: Tensor, right: Tensor, alpha: float) -> Tensor:
    """dense += alpha * left right."""
    if not _is_widened(left, right):
        add = dense.addmm_ if dense.dim() == 2 else dense.baddbmm_
        return add(left, right, alpha=alpha)
    return _addmm_in_blocks(dense, left, right, alpha, dense)


def _is_widened(left: Tensor, right: Tensor) -> bool:
    """Whether a product is made here. What does not fit together is left to torch, to do or to refuse."""
    if not IN_FP32 or left.device.type != "cpu" or left.dtype not in NARROW:
        return False
    return left.dtype == right.dtype and left.dim() in (2, 3) and left.shape[:-2] == right.shape[:-2]


def _addmm_in_blocks(dense: Tensor, left: Tensor, right: Tensor, alpha: float, out: Tensor) -> Tensor:
    for at, product in _in_blocks(left, right):
        out[at].copy_(product.mul_(alpha).add_(dense[at]))
    return out


def _in_blocks(left: Tensor, right: Tensor) -> Iterator[tuple[tuple[slice, ...], Tensor]]:
    """left right in fp32, and where of all of it: a block of one product, or as many of a stack as are no larger."""
    (m, k), n = left.shape[-2:], right.shape[-1]
    stacks: list[tuple[slice, ...]] = [()]
    if left.dim() == 3:
        stacks = [(span,) for span in spans(len(left), max(1, BLOCK**2 // max(1, m * k, k * n, m * n)))]
    for stack in stacks:
        for rows in spans(m, BLOCK):
            for columns in spans(n, BLOCK):
                row, column, at = (*stack, rows), (*stack, slice(None), columns), (*stack, rows, columns)
                yield at, _block(left[row], right[column])


def _block(left: Tensor, right: Tensor) -> Tensor:
    """left right in fp32, of which some columns and rows are made wider at a time."""
    product = left.new_zeros(*left.shape[:-1], right.shape[-1], dtype=torch.float32)
    add = product.addmm_ if product.dim() == 2 else product.baddbmm_
    for inner in spans(left.shape[-1], BLOCK):
        add(left[..., inner].float(), right[..., inner, :].float())
    return product
