"""GaLore with Adafactor: the authors' arithmetic, the plain rule of Hugging Face, and what its options mean."""

import math
from functools import partial

import galore_torch
import pytest
import torch
from torch import nn
from transformers.optimization import Adafactor

from gracile import optim
from gracile.optim import state_bytes

# the authors' exact singular vectors; the default is one cheap iteration
GaLoreAdafactor = partial(optim.GaLoreAdafactor, subspace_method="svd")

SHAPES = {"tall": (40, 24), "wide": (24, 40), "square": (32, 32)}
RANK, GAP = 6, 20
FIXED = {"relative_step": False, "scale_parameter": False}
CONFIGS = {
    "defaults": {},
    "first-moment": {"beta1": 0.9},
    "external-lr": {"lr": 0.01, "weight_decay": 0.5, **FIXED},
    "scaled-lr": {"lr": 0.05, "relative_step": False, "eps": (1e-3, 0.1), "beta1": 0.5},
    "relative-and-decay": {"weight_decay": 0.5, "clip_threshold": 0.5, "decay_rate": -0.5},
    "relative-unscaled": {"scale_parameter": False, "weight_decay": 0.5},
    "warm-up": {"warmup_init": True},
}

by_shape = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
by_config = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())


# ---- helpers --------------------------------------------------------------------------------------------------------


def weight(*shape, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return nn.Parameter((0.02 * torch.randn(shape, generator=generator, dtype=torch.float64)).to(dtype))


def gradients(*shape, steps=50, seed=1, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return [(1 + t % 3) * torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for t in range(steps)]


def step(optimizer, W, G):
    """How far the weight moved down."""
    before = W.detach().clone()
    W.grad = G.clone()
    optimizer.step()
    return before - W.detach()


def assert_together(ours, theirs, start):
    """1e-6 is asked. Weights that hardly move must also agree to a hundredth of their way, or to a rounding."""
    way = (theirs - start).abs().max().item()
    assert (ours - theirs).abs().max() <= min(1e-6, max(0.01 * way, 4e-9))
    return way


# ---- parity ---------------------------------------------------------------------------------------------------------


@by_shape
@by_config
def test_given_gradients_lead_where_galore_torch_leads(shape, config):
    """50 steps with refreshes at 0, 20 and 40, a plain vector beside the matrix."""
    group = {"rank": RANK, "update_proj_gap": GAP, "scale": 0.25, "proj_type": "std"}
    ours, theirs, b, c = weight(*shape), weight(*shape), weight(9, seed=2), weight(9, seed=2)
    start, begin = ours.detach().clone(), b.detach().clone()
    one = GaLoreAdafactor([{"params": [ours], **group}, {"params": [b]}], **config)
    other = galore_torch.GaLoreAdafactor([{"params": [theirs], **group}, {"params": [c]}], **config)
    for G, g in zip(gradients(*shape), gradients(9, seed=3), strict=True):
        ours.grad, theirs.grad, b.grad, c.grad = G.clone(), G.clone(), g.clone(), g.clone()
        one.step()
        other.step()
        way = assert_together(ours, theirs, start)
        assert_together(b, c, begin)
    assert way > (1e-7 if config.get("warmup_init") else 1e-5)


@pytest.mark.parametrize(
    ("shape", "rank", "proj_type"),
    [((40, 24), RANK, side) for side in ("left", "right", "reverse_std")]
    + [((24, 40), RANK, side) for side in ("left", "right", "reverse_std")]
    + [((40, 24), 24, "std"), ((12, 20), 100, "std"), ((1, 24), RANK, "std"), ((24, 1), RANK, "std")],
)
def test_every_side_and_rank_is_that_of_galore_torch(shape, rank, proj_type):
    group = {"rank": rank, "update_proj_gap": GAP, "scale": 0.5, "proj_type": proj_type}
    ours, theirs = weight(*shape), weight(*shape)
    keys = {"lr": 0.01, "weight_decay": 0.5, "beta1": 0.9, **FIXED}
    one = GaLoreAdafactor([{"params": [ours], **group}], **keys)
    other = galore_torch.GaLoreAdafactor([{"params": [theirs], **group}], **keys)
    for G in gradients(*shape, steps=30):
        step(one, ours, G)
        step(other, theirs, G)
        assert (ours - theirs).abs().max() <= 1e-6


@pytest.mark.parametrize("shape", [(12, 20), (9,), (), (5, 4, 3)], ids=str)
@by_config
def test_a_plain_group_is_adafactor_of_transformers(shape, config):
    ours, theirs = weight(*shape), weight(*shape)
    start = ours.detach().clone()
    one, other = GaLoreAdafactor([ours], **config), Adafactor([theirs], **config)
    for G in gradients(*shape, steps=30):
        step(one, ours, G)
        step(other, theirs, G)
        way = assert_together(ours, theirs, start)
    assert way > (1e-7 if config.get("warmup_init") else 1e-5)


@by_config
@pytest.mark.parametrize("t", [9_990, 40_000])
def test_far_into_a_run_it_still_is_adafactor_of_transformers(config, t):
    """The relative learning rate falls from step 10000 on, that of a warm-up rises until then."""
    ours, theirs = weight(12, 20), weight(12, 20)
    start = ours.detach().clone()
    one, other = GaLoreAdafactor([ours], **config), Adafactor([theirs], **config)
    for G in gradients(12, 20, steps=20):
        step(one, ours, G)
        step(other, theirs, G)
        if one.state[ours]["step"] == 1:
            one.state[ours]["step"].fill_(t)
            other.state[theirs]["step"] = t
        assert_together(ours, theirs, start)
    assert one.state[ours]["step"] == other.state[theirs]["step"] == t + 19


# ---- what the options mean ------------------------------------------------------------------------------------------


def test_the_first_update_is_a_rank_one_estimate_of_the_second_moment_in_fp64():
    """b2 is 0 at step 1: N = R / sqrt(C_i D_j / mean C), with the sums of squares of this gradient alone."""
    W, (G,) = weight(40, 24, dtype=torch.float64), gradients(40, 24, steps=1, dtype=torch.float64)
    optimizer = GaLoreAdafactor([W], lr=1.0, rank=RANK, clip_threshold=1e9, scale=0.5, **FIXED)
    moved = step(optimizer, W, G)
    P = optimizer.state[W]["basis"]
    R = G @ P
    C, D = R.square().mean(dim=1), R.square().mean(dim=0)
    N = R / torch.sqrt(C[:, None] * D[None, :] / C.mean())
    torch.testing.assert_close(moved, 0.5 * N @ P.T, rtol=0, atol=1e-10)
    torch.testing.assert_close(optimizer.state[W]["exp_avg_sq_row"], C, rtol=1e-12, atol=0)
    torch.testing.assert_close(optimizer.state[W]["exp_avg_sq_col"], D, rtol=1e-12, atol=0)


@pytest.mark.parametrize("threshold", [0.1, 0.7])
@pytest.mark.parametrize("shape", [(40, 24), (24, 40)])
def test_no_update_of_the_coordinates_has_a_root_mean_square_above_the_threshold(shape, threshold):
    """Lifting keeps norms; later gradients a hundredfold larger would otherwise be larger steps."""
    W = weight(*shape, dtype=torch.float64)
    optimizer = GaLoreAdafactor([W], lr=1.0, rank=RANK, clip_threshold=threshold, scale=1.0, **FIXED)
    for t, G in enumerate(gradients(*shape, steps=10, dtype=torch.float64)):
        size = step(optimizer, W, (100 if t == 5 else 1) * G).norm() / math.sqrt(RANK * max(shape))
        assert size <= threshold * (1 + 1e-9)
        if t in (0, 5):
            torch.testing.assert_close(size.item(), threshold, rtol=1e-9, atol=0)


@pytest.mark.parametrize("shape", [(40, 24), (24, 40)])
def test_a_scaled_learning_rate_counts_in_units_of_the_weights(shape):
    """Of their root mean square, but at least the second eps."""
    for size, unit in [(2.0, 2.0), (0.1, 0.1), (1e-5, 1e-3), (0.0, 1e-3)]:
        W = nn.Parameter(torch.full(shape, size, dtype=torch.float64))
        X = nn.Parameter(torch.zeros(shape, dtype=torch.float64))
        one = GaLoreAdafactor([W], lr=0.1, relative_step=False, rank=RANK)
        other = GaLoreAdafactor([X], lr=0.1 * unit, rank=RANK, **FIXED)
        (G,) = gradients(*shape, steps=1, dtype=torch.float64)
        torch.testing.assert_close(step(one, W, G), step(other, X, G), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("shape", [*SHAPES.values(), (1, 24), (24, 1)], ids=str)
@pytest.mark.parametrize("beta1", [None, 0.9])
def test_state_is_the_basis_and_the_sums_of_the_coordinates(shape, beta1):
    W = weight(*shape)
    optimizer = GaLoreAdafactor([W], rank=RANK, beta1=beta1)
    step(optimizer, W, gradients(*shape, steps=1)[0])
    short, long, r = min(shape), max(shape), min(RANK, *shape)
    forms = {key: tuple(value.shape) for key, value in optimizer.state[W].items()}
    coordinates = (long, r) if shape[0] >= shape[1] else (r, long)
    wanted = {"step": (), "basis": (short, r), "exp_avg_sq_row": coordinates[:1], "exp_avg_sq_col": coordinates[1:]}
    assert forms == wanted | ({} if beta1 is None else {"exp_avg": coordinates})
    assert state_bytes(optimizer) == 4 * (short * r + r + long + (0 if beta1 is None else r * long) + 1)
    assert state_bytes(optimizer) == optim.GaLoreAdafactor.state_bytes_for(shape, rank=RANK, beta1=beta1)


@pytest.mark.parametrize("beta1", [None, 0.9])
def test_the_state_of_a_bf16_parameter_is_that_of_an_fp32_one_given_the_same_gradients(beta1):
    low, high = weight(12, 20, dtype=torch.bfloat16), weight(12, 20)
    keys = {"lr": 0.01, "beta1": beta1, **FIXED}
    one, other = GaLoreAdafactor([low], **keys), GaLoreAdafactor([high], **keys)
    for G in gradients(12, 20, dtype=torch.bfloat16):
        step(one, low, G)
        step(other, high, G.float())
        for key, value in other.state[high].items():
            assert one.state[low][key].dtype == torch.float32
            assert torch.equal(one.state[low][key], value)
    torch.testing.assert_close(low.float(), high, rtol=0, atol=0.02)


@by_shape
def test_a_zero_gradient_moves_nothing_and_a_bf16_matrix_stays_finite(shape):
    W = weight(*shape, dtype=torch.bfloat16)
    optimizer = GaLoreAdafactor([W], rank=RANK, lr=0.01, **FIXED)
    assert not step(optimizer, W, torch.zeros(shape, dtype=torch.bfloat16)).any()
    for G in gradients(*shape, steps=10, dtype=torch.bfloat16):
        assert step(optimizer, W, G).any()
    assert torch.isfinite(W).all()


@by_config
@pytest.mark.parametrize("shape", [(40, 24), (24, 40)])
def test_training_continues_to_the_bit_after_a_file(config, shape, tmp_path):
    keys = {"rank": RANK, "update_proj_gap": 4, **config}
    W, sequence = weight(*shape), gradients(*shape, steps=10)
    optimizer = GaLoreAdafactor([W], **keys)
    for G in sequence[:6]:
        step(optimizer, W, G)
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    X = nn.Parameter(W.detach().clone())
    resumed = GaLoreAdafactor([X], **keys)
    resumed.load_state_dict(torch.load(tmp_path / "optimizer.pt", weights_only=True))
    for G in sequence[6:]:
        assert torch.equal(step(optimizer, W, G), step(resumed, X, G))
        assert torch.equal(W, X)


def test_a_scheduler_drives_an_external_learning_rate():
    W, (G,) = weight(40, 24, dtype=torch.float64), gradients(40, 24, steps=1, dtype=torch.float64)
    optimizer = GaLoreAdafactor([W], lr=0.1, rank=RANK, **FIXED)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: 0.5**t)
    first = step(optimizer, W, G)
    scheduler.step()
    torch.testing.assert_close(step(optimizer, W, G), 0.5 * first, rtol=1e-9, atol=1e-12)


# ---- refusals -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"lr": 0.125}, ["lr", "0.125", "relative_step"]),
        ({"relative_step": False}, ["lr", "None", "relative_step"]),
        ({"lr": -0.125, "relative_step": False}, ["lr", "-0.125"]),
        ({"lr": 0.1, "relative_step": False, "warmup_init": True}, ["warmup_init", "True", "relative_step"]),
        ({"eps": 1e-30}, ["eps", "1e-30"]),
        ({"eps": (1e-30, -1e-3)}, ["eps", "-0.001"]),
        ({"eps": (1e-30, 1e-3, 1.0)}, ["eps", "(1e-30, 0.001, 1.0)"]),
        ({"clip_threshold": 0.0}, ["clip_threshold", "0.0"]),
        ({"clip_threshold": None}, ["clip_threshold", "None"]),
        ({"decay_rate": 0.8}, ["decay_rate", "0.8"]),
        ({"decay_rate": 0}, ["decay_rate", "0"]),
        ({"beta1": 1.0}, ["beta1", "1.0"]),
        ({"beta1": -0.25}, ["beta1", "-0.25"]),
        ({"scale_parameter": 1}, ["scale_parameter", "1"]),
        ({"relative_step": 0}, ["relative_step", "0"]),
        ({"weight_decay": -0.5}, ["weight_decay", "-0.5"]),
    ],
)
def test_bad_values_are_refused(keys, words):
    with pytest.raises(ValueError) as error:
        GaLoreAdafactor([weight(4, 4)], rank=2, **keys)
    assert all(word in str(error.value) for word in words)
