"""Rows in 4 or 8 bits: half a step at most, whatever the rows' place and size, and half a byte a code."""

import pytest
import torch

from gracile.optim.state.packed_rows import packed, packed_specs, unpacked
from gracile.optim.state.spec import ERRORS, Placement, new_tensor

WIDTHS = [1, 2, 3, 7, 64, 257]

by_bits = pytest.mark.parametrize("bits", [4, 8])
by_width = pytest.mark.parametrize("width", WIDTHS)


def normal(rows, width, seed=0):
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(seed))


def round_trip(values, bits):
    return unpacked("x", packed("x", values, bits), values.shape[1], bits)


def half_steps(values, bits):
    """Half the distance of two codes, for each row, in fp64."""
    values = values.double()
    return (values.amax(dim=1, keepdim=True) - values.amin(dim=1, keepdim=True)) / (2**bits - 1) / 2


def assert_within_half_a_step(values, bits):
    """And a rounding of the fp32 sum at the size of the row."""
    off = (round_trip(values, bits).double() - values.double()).abs()
    rounding = 2e-7 * values.double().abs().amax(dim=1, keepdim=True)
    assert (off <= half_steps(values, bits) * (1 + 1e-4) + rounding).all()


@by_bits
@by_width
def test_a_row_comes_back_within_half_a_step_of_its_range(bits, width):
    values = normal(20, width)
    assert_within_half_a_step(values, bits)
    assert round_trip(values, bits).shape == values.shape
    assert round_trip(values, bits).dtype == torch.float32


@by_bits
@pytest.mark.parametrize("size", [1e-30, 1e-12, 1e-4, 1e6, 1e30])
def test_resolution_follows_the_size_of_the_row(bits, size):
    """A smallest step of 1e-5, as in Q-GaLore's code, would leave nothing of small rows."""
    values = size * normal(5, 33)
    assert_within_half_a_step(values, bits)
    assert (round_trip(values, bits) - values).abs().max() < (0.2 if bits == 4 else 0.02) * size


@by_bits
@by_width
@pytest.mark.parametrize(("low", "high"), [(2.0, 3.0), (-3.0, -2.0), (1000.0, 1001.0)])
def test_rows_far_from_zero_lose_no_more_than_rows_around_it(bits, width, low, high):
    """A zero point clamped among the codes is off by 2.0 on values in 2..3."""
    values = low + (high - low) * torch.rand(9, width, generator=torch.Generator().manual_seed(1))
    assert_within_half_a_step(values, bits)


@by_bits
@pytest.mark.parametrize("value", [0.0, 2.5, -1e-30, 7e20, 0.1])
def test_a_constant_row_is_exact(bits, value):
    values = torch.full((3, 7), value)
    assert torch.equal(round_trip(values, bits), values)


@by_bits
def test_each_row_has_a_range_of_its_own(bits):
    """A row a million times larger than its neighbour costs the neighbour nothing."""
    values = normal(2, 50)
    values[1] *= 1e6
    assert_within_half_a_step(values, bits)
    assert torch.equal(round_trip(values, bits)[:1], round_trip(values[:1], bits))


@by_bits
def test_the_smallest_of_a_row_is_exact_and_the_largest_to_rounding(bits):
    values = normal(30, 41)
    back = round_trip(values, bits)
    assert torch.equal(back.amin(dim=1), values.amin(dim=1))
    torch.testing.assert_close(back.amax(dim=1), values.amax(dim=1), rtol=1e-6, atol=0)
    assert torch.equal(back.argmax(dim=1), values.argmax(dim=1)) or bits == 4


@by_bits
def test_whole_numbers_up_to_the_last_code_are_exact(bits):
    last = 2**bits - 1
    row = torch.arange(last + 1, dtype=torch.float32)
    values = torch.stack([row, row.flip(0), 3 * row - 40, -0.5 * row])
    assert torch.equal(round_trip(values, bits), values)


@by_bits
@by_width
def test_packing_what_was_unpacked_changes_no_code(bits, width):
    """Error feedback packs and unpacks at every step: nothing may drift without gradients."""
    once = packed("x", normal(20, width), bits)
    twice = packed("x", unpacked("x", once, width, bits), bits)
    assert torch.equal(once["x"], twice["x"])
    assert torch.equal(once["x_minimum"], twice["x_minimum"])
    torch.testing.assert_close(once["x_scale"], twice["x_scale"], rtol=1e-5, atol=0)


def test_two_codes_share_a_byte_the_first_in_its_low_half():
    row = torch.tensor([[0.0, 15.0, 3.0, 4.0, 9.0]])
    held = packed("x", row, 4)
    assert held["x"].tolist() == [[0xF0, 0x43, 0x09]]
    assert held["x_scale"].item() == 1.0
    assert held["x_minimum"].item() == 0.0


def test_eight_bits_are_one_code_a_byte():
    held = packed("x", torch.tensor([[-1.0, 254.0, 127.0]]), 8)
    assert held["x"].tolist() == [[0, 255, 128]]
    assert held["x_minimum"].item() == -1.0


@by_bits
@by_width
def test_codes_take_their_bits_and_eight_bytes_a_row_more(bits, width):
    held = packed("x", normal(6, width), bits)
    bytes_a_row = (width + 1) // 2 if bits == 4 else width
    assert held["x"].shape == (6, bytes_a_row)
    assert sum(v.numel() * v.element_size() for v in held.values()) == 6 * (bytes_a_row + 8)
    assert all(v.untyped_storage().nbytes() == v.numel() * v.element_size() for v in held.values())


@by_bits
@by_width
def test_the_empty_state_is_zeros_in_the_form_of_packed_values(bits, width):
    specs = packed_specs("x", 6, width, bits, Placement.LINES, ERRORS)
    empty = {spec.name: new_tensor(spec.shape, spec.dtype, "cpu", spec) for spec in specs}
    full = packed("x", normal(6, width), bits)
    form = {key: (value.shape, value.dtype) for key, value in full.items()}
    assert {key: (value.shape, value.dtype) for key, value in empty.items()} == form
    assert torch.equal(unpacked("x", empty, width, bits), torch.zeros(6, width))


@by_bits
def test_bf16_values_are_packed_as_the_fp32_numbers_they_are(bits):
    values = normal(6, 33).bfloat16()
    left, right = packed("x", values, bits), packed("x", values.float(), bits)
    assert all(torch.equal(left[key], right[key]) for key in right)


@by_bits
def test_the_values_given_are_left_alone(bits):
    values = normal(6, 33)
    before = values.clone()
    packed("x", values, bits)
    assert torch.equal(values, before)
