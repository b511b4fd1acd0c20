"""Weights in 8 bits: their grid, what is written back to it, and what torch does to them."""

import copy

import pytest
import torch
from oracle import int8 as oracle

from gracile import int8_weight
from gracile.int8_weight import Int8Weight, quantize, write

SHAPES = {"tall": (40, 12), "wide": (3, 1100), "ragged": (5, 300), "even": (4, 512), "one": (1, 1)}
by_shape = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())


def weights(shape, size=0.02, seed=0):
    return size * torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def by_chance(seed):
    draw = torch.Generator().manual_seed(seed)
    return lambda begin, end: torch.randint(0, 65536, (end - begin,), generator=draw, dtype=torch.int32)


@by_shape
def test_a_new_weight_is_within_half_a_step_and_has_room_to_grow(shape):
    W = weights(shape)
    held = quantize(W)
    spread = held.scales.repeat_interleave(256, 1)[:, : shape[1]]
    assert ((held.open() - W).abs() <= 0.5001 * spread).all()
    assert held.codes.abs().max() <= 101
    assert held.stored_bytes == W.numel() + 4 * shape[0] * -(-shape[1] // 256)


@by_shape
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_zero_updates_leave_codes_and_scales(shape, dtype):
    held = quantize(weights(shape).to(dtype))
    codes, scales = held.codes.clone(), held.scales.clone()
    ends = [lambda begin, end, u=u: torch.full((end - begin,), u, dtype=torch.int32) for u in (0, 65535)]
    for noise in [*ends, None, *map(by_chance, range(100))]:  # an error in the last bit would show at the ends
        write(held, held.open(torch.float32), noise)
    assert torch.equal(held.codes, codes)
    assert torch.equal(held.scales, scales)


@by_shape
@pytest.mark.parametrize("factor", [1e-4, 0.2, 0.449, 0.5, 1.2, 1.27, 1.3, 9.0, 1e4])
def test_written_as_the_oracle_does(shape, factor):
    held = quantize(weights(shape))
    wide, noise = factor * weights(shape, seed=1), by_chance(2)(0, shape[0] * shape[1]).view(shape)
    codes, scales = oracle.written(held.scales, wide, 256, noise)
    write(held, wide, lambda begin, end: noise.view(-1)[begin:end])
    assert torch.equal(held.scales, scales)
    assert torch.equal(held.codes, codes)


def test_the_mean_of_many_draws_is_the_weight():
    held = quantize(torch.full((1, 256), 1.0))
    for value in (0.30001, -0.30001, 0.004, -0.004, 0.9999):
        wide = torch.full((4096, 256), value)
        wide[:, 0] = 1.0  # which keeps the scale
        drawn = held.like(torch.zeros(4096, 256, dtype=torch.int8), held.scales.expand(4096, 1).clone())
        write(drawn, wide, by_chance(0))
        off = (drawn.open()[:, 1:].double() - value).mean()
        share = value / held.scales.item() % 1
        assert abs(off) <= 4 * held.scales.item() * (share * (1 - share) / (4096 * 255)) ** 0.5 + 1e-9


def test_what_does_not_move_does_not_wander():
    """Found anew in each step, scales move the others by 0.7 steps of their grid; a column at the edge is not held."""
    held = quantize(weights((256, 256)))
    start, step = held.open(), held.scales.mean()
    for turn in range(200):
        wide = held.open(torch.float32)
        wide[:, 0] += 1e-4
        write(held, wide, by_chance(turn))
    moved = held.open() - start
    assert moved[:, 0].mean() == pytest.approx(0.02, rel=0.01)
    assert moved[:, 1:].square().mean().sqrt() <= 0.1 * step


def test_a_column_that_outgrows_its_group_is_not_held_and_widens_the_scale_once():
    held = quantize(weights((512, 256)))
    before, start, seen = held.scales.clone(), held.open()[:, 0].mean(), []
    for turn in range(300):
        wide = held.open(torch.float32)
        wide[:, 0] += 4e-4
        write(held, wide, by_chance(turn))
        seen.append(held.scales.clone())
    assert held.open()[:, 0].mean() - start == pytest.approx(300 * 4e-4, abs=2e-3)  # 4 sigma
    ratio = held.scales / before
    assert set(ratio.view(-1).tolist()) <= {1.0, 2.0, 4.0}
    assert ratio.max() > 1
    changes = sum((a != b).sum().item() for a, b in zip([before, *seen], seen, strict=False))
    assert changes <= 2 * 512  # no scale goes back and forth


def test_not_finite_is_no_number_and_stays_in_its_group():
    held = quantize(weights((4, 512)))
    wide = held.open()
    wide[1, 3], wide[2, 400] = torch.nan, -torch.inf
    write(held, wide, by_chance(0))
    lost = held.open().isnan()
    assert lost[1, :256].all()
    assert lost[2, 256:].all()
    assert lost.sum() == 512
    write(held, torch.ones(4, 512), by_chance(1))
    assert held.open().isnan().sum() == 512  # what is lost is not found again


def test_a_group_of_zeros_takes_any_weight():
    held = quantize(torch.zeros(2, 300))
    assert not held.open().any()
    for size in (1e-30, 1e-3, 1e5):
        write(held, torch.full((2, 300), size))
        assert torch.allclose(held.open(), torch.tensor(size), rtol=0.01, atol=1e-28)


def test_huge_weights_are_not_infinite():
    held = quantize(torch.zeros(1, 256))
    write(held, torch.full((1, 256), 3e38), by_chance(0))
    assert held.open().isfinite().all()


# ---- torch ----------------------------------------------------------------------------------------------------------


def test_rows_copies_and_other_dtypes_keep_codes():
    held = quantize(weights((6, 300)))
    for other in (held[2:4], held.view(-1)[600:1200], copy.deepcopy(held)[2:4], held.to(torch.bfloat16)[2:4]):
        assert isinstance(other, Int8Weight)
        assert torch.equal(other.codes.view(2, 300), held.codes[2:4])
        assert torch.equal(other.scales, held.scales[2:4])
        assert other.scales.dtype == torch.float32
    right = held[:, 256:]
    assert isinstance(right, Int8Weight)
    assert torch.equal(right.open(), held.open()[:, 256:])
    assert not isinstance(held[:, 1:4], Int8Weight)
    assert torch.equal(held[:, 1:4], held.open()[:, 1:4])
    assert torch.equal(held[3], held.open()[3])
    assert torch.equal(held + 1, held.open() + 1)
    assert type(torch.zeros_like(held)) is torch.Tensor


def test_what_torch_writes_in_place_is_rounded():
    held = quantize(weights((6, 300)))
    wanted = held.open() + 0.001
    held.add_(torch.full((6, 300), 0.001))
    assert (held.open() - wanted).abs().max() <= held.scales.max() / 2 + 1e-7
    held.copy_(torch.ones(6, 300))
    assert torch.allclose(held.open(), torch.ones(()), rtol=1e-4)


@pytest.mark.parametrize("given", [(torch.zeros(3), 256), (torch.zeros(2, 3, 4), 256), (torch.zeros(2, 3), 0)])
def test_what_cannot_be_quantized_is_refused(given):
    with pytest.raises(ValueError, match=r"matrices|group_size"):
        quantize(*given)


def test_rows_are_worked_on_some_at_a_time(monkeypatch):
    W = weights((50, 70))
    whole = quantize(W)
    monkeypatch.setattr(int8_weight, "ON_CPU", 140)
    parts = quantize(W)
    assert torch.equal(parts.codes, whole.codes)
    assert torch.equal(parts.open(torch.bfloat16), whole.open(torch.bfloat16))
    noise = by_chance(0)(0, 3500)
    for held in (whole, parts):
        monkeypatch.setattr(int8_weight, "ON_CPU", 2**18 if held is whole else 210)
        write(held, 1.3 * W, lambda begin, end: noise[begin:end])
    assert torch.equal(parts.codes, whole.codes)
