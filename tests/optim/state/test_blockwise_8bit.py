"""8-bit moments: a part of one holds the very codes that the whole holds there."""

import itertools
from types import SimpleNamespace

import pytest
import torch

from gracile.optim.distributed import Runs
from gracile.optim.state.blockwise_8bit import BLOCK, IN_8_BITS, dequantize, quantize_
from gracile.optim.state.spec import Placement, StateSpec

pytest.importorskip("bitsandbytes")


class Part:
    """What ``quantized`` asks of a shard. The other processes' largest values are known beforehand."""

    split = True

    def __init__(self, runs, whole):
        self.runs = runs
        padded = torch.nn.functional.pad(whole.flatten(), (0, -whole.numel() % BLOCK))
        self.largest = padded.abs().view(-1, BLOCK).amax(dim=1)

    def all_reduce_max_(self, tensor):
        assert (tensor <= self.largest).all(), "a part cannot exceed the whole"
        return torch.maximum(tensor, self.largest)


def moment(rows, columns, seed=0):
    """Values of very different sizes, so that a block's scale matters."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(rows, columns, generator=generator)
    return values * torch.exp(3 * torch.randn(rows, columns, generator=generator))


def codes_for(key, own, shard):
    """Zeros for a moment of which a process holds ``own``."""
    shard.parameter, shard.device = own, own.device
    return IN_8_BITS.new(StateSpec(key, (shard.runs.whole,), placement=Placement.ELEMENTS), shard)


def whole_codes(values, key):
    shard = SimpleNamespace(split=False, runs=Runs(1, values.numel(), 0, 0, values.numel()))
    state = codes_for(key, values, shard)
    quantize_(values, state, key, shard)
    return state[key], dequantize(state, key, shard)


@pytest.mark.parametrize("key", ["exp_avg", "exp_avg_sq"])
@pytest.mark.parametrize(("rows", "columns"), [(401, 12), (64, 128), (37, 300)])
@pytest.mark.parametrize("bounds", [(0, 1 / 3, 1), (0, 0.01, 0.02, 1), (0, 0.5, 0.5, 1)])
def test_ranges_of_a_moment_hold_its_codes(rows, columns, bounds, key):
    """As rows on the right, and as any range of a tensor without a subspace. One part may be empty."""
    values = moment(rows, columns)
    values = values.square() if key == "exp_avg_sq" else values
    codes, dequantized = whole_codes(values, key)
    ends = [int(bound * values.numel()) for bound in bounds]
    for begin, end in itertools.pairwise(ends):
        part = Part(Runs(1, end - begin, begin, 0, values.numel()), values)
        own = values.flatten()[begin:end]
        state = codes_for(key, own, part)
        quantize_(own, state, key, part)
        assert torch.equal(state[key], codes.flatten()[begin:end])
        assert torch.equal(dequantize(state, key, part), dequantized.flatten()[begin:end])


@pytest.mark.parametrize(("rows", "columns"), [(12, 401), (20, 512), (30, 300)])
@pytest.mark.parametrize("share", [64, 100, 256, 1000])
def test_columns_of_a_moment_hold_its_codes(rows, columns, share):
    """As on the left: blocks run from row to row, and where 256 does not divide the columns they begin anywhere."""
    values = moment(rows, columns)
    codes, dequantized = whole_codes(values, "exp_avg")
    for first in range(0, columns + share, share):
        begin, end = min(first, columns), min(first + share, columns)
        part = Part(Runs(rows, end - begin, begin, columns, values.numel()), values)
        own = values[:, begin:end].contiguous()
        state = codes_for("exp_avg", own, part)
        quantize_(own, state, "exp_avg", part)
        assert torch.equal(state["exp_avg"], codes[:, begin:end])
        assert torch.equal(dequantize(state, "exp_avg", part), dequantized[:, begin:end])


def test_the_size_of_the_whole_decides_what_is_held_in_8_bits():
    small = Part(Runs(1, 4000, 0, 0, 4095), torch.ones(4095))
    large = Part(Runs(1, 10, 0, 0, 4096), torch.ones(4096))
    assert codes_for("x", torch.empty(4000), small)["x"].dtype == torch.float32
    assert codes_for("x", torch.empty(10), large)["x"].dtype == torch.uint8


@pytest.mark.parametrize(("key", "signed"), [("exp_avg", True), ("exp_avg_sq", False)])
def test_codes_are_those_of_bitsandbytes(key, signed):
    """Second moments have no sign: all 256 codes stand for numbers that come."""
    from bitsandbytes.functional import create_dynamic_map, quantize_blockwise

    values = moment(64, 128).square()
    codes, _ = whole_codes(values, key)
    theirs, _ = quantize_blockwise(values, code=create_dynamic_map(signed=signed), blocksize=BLOCK)
    assert torch.equal(codes, theirs)
