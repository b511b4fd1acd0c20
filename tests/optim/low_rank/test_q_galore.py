"""8-bit GaLore and Q-GaLore: parity with the authors and bitsandbytes, the packed projector, the lazy clock."""

from functools import partial

import bitsandbytes
import galore_torch
import pytest
import torch
from torch import nn

from gracile import optim
from gracile.optim import state_bytes

# the authors' exact singular vectors; the default is one cheap iteration
GaLoreAdamW = partial(optim.GaLoreAdamW, subspace_method="svd")
GaLoreAdamW8bit = partial(optim.GaLoreAdamW8bit, subspace_method="svd")

SHAPES = {"tall": (20, 12), "wide": (12, 20), "square": (16, 16)}
LARGE = {"tall": (160, 96), "wide": (96, 160), "square": (128, 128)}  # 48 coordinates a line are more than 4096
RANK = 4

by_shape = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
by_large_shape = pytest.mark.parametrize("shape", LARGE.values(), ids=LARGE.keys())
by_bits = pytest.mark.parametrize("bits", [4, 8])


# ---- helpers --------------------------------------------------------------------------------------------------------


def weight(*shape, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return nn.Parameter((0.02 * torch.randn(*shape, generator=generator, dtype=torch.float64)).to(dtype))


def gradients(*shape, steps=50, seed=1, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return [(1 + t % 3) * torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype) for t in range(steps)]


def step(optimizer, W, G):
    W.grad = G.clone()
    optimizer.step()
    return optimizer.state[W]


class Watched(optim.GaLoreAdamW8bit):
    """Notes the steps, counted from 0, at which a matrix was given a new subspace; exact singular vectors."""

    def __init__(self, params, **keys):
        super().__init__(params, **{"subspace_method": "svd", **keys})

    def find_basis(self, G, shard, group, state):
        self.refreshes = [*getattr(self, "refreshes", []), int(state["step"].item())]
        return super().find_basis(G, shard, group, state)


def orthonormal(side, count, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(side, count, generator=generator, dtype=torch.float64))[0]


def spanned(columns, shape, seed):
    """A gradient whose subspace on the shorter side is that of ``columns``, with singular values of 1 to 2."""
    other = orthonormal(max(shape), columns.shape[1], seed)
    G = (columns * torch.linspace(2, 1, columns.shape[1], dtype=torch.float64)) @ other.T
    return (G.T if shape[0] >= shape[1] else G).float()


def leading(G, rank):
    """The leading singular vectors of the shorter side, their signs aside."""
    U, _, Vh = torch.linalg.svd(G.double(), full_matrices=False)
    return Vh[:rank].T if G.shape[0] >= G.shape[1] else U[:, :rank]


def opened_basis(state, shape, bits, size, rank=RANK):
    """P^ read code by code."""
    codes = state["basis"].to(torch.int64)
    if bits == 4:
        codes = torch.stack([codes % 16, codes // 16], dim=2).reshape(codes.shape[0], -1)[:, :size]
    values = codes.double() * state["basis_scale"].double() + state["basis_minimum"].double()
    return values.flatten()[: min(shape) * rank].view(min(shape), rank)


# ---- 8-bit moments --------------------------------------------------------------------------------------------------


@by_large_shape
@pytest.mark.parametrize("keys", [{"lr": 0.01, "weight_decay": 0.5}, {}], ids=["decay", "defaults"])
def test_given_gradients_lead_where_galore_torch_leads(shape, keys, monkeypatch):
    """50 steps, refreshes at 0, 20 and 40, 8-bit moments; a plain matrix without decay beside."""
    monkeypatch.setattr(torch.cuda, "synchronize", lambda *_: None)
    ours, theirs, b, c = weight(*shape), weight(*shape), weight(64, 80, seed=2), weight(64, 80, seed=2)
    ranked = {"rank": 48, "update_proj_gap": 20, "scale": 0.25, "proj_type": "std"}
    plain = {"weight_decay": 0.0}
    one = GaLoreAdamW8bit([{"params": [ours], **ranked}, {"params": [b], **plain}], **keys)
    other = galore_torch.GaLoreAdamW8bit([{"params": [theirs], **ranked}, {"params": [c], **plain}], **keys)
    start = ours.detach().clone()
    for G, g in zip(gradients(*shape), gradients(64, 80, seed=3), strict=True):
        ours.grad, theirs.grad, b.grad, c.grad = G.clone(), G.clone(), g.clone(), g.clone()
        one.step()
        other.step()
        assert (ours - theirs).abs().max() <= 1e-6
        assert (b - c).abs().max() <= 1e-6
    assert one.state[ours]["exp_avg"].dtype == other.state[theirs]["state1"].dtype == torch.uint8
    assert (ours - start).abs().max() > 2 * one.defaults["lr"]


@pytest.mark.parametrize("shape", [(64, 80), (4096,), (4095,), (3, 7), (8, 16, 33)])
def test_a_plain_group_is_adamw8bit_of_bitsandbytes(shape):
    """Without decay, which comes after the step here as in GaLore; gradients of the size of eps show where eps is."""
    ours, theirs = weight(*shape), weight(*shape)
    keys = {"lr": 0.01, "betas": (0.8, 0.99), "eps": 0.1, "weight_decay": 0.0}
    one, other = GaLoreAdamW8bit([ours], **keys), bitsandbytes.optim.AdamW8bit([theirs], **keys)
    for G in gradients(*shape):
        ours.grad, theirs.grad = G.clone(), G.clone()
        one.step()
        other.step()
        assert (ours - theirs).abs().max() <= 1e-6
    assert one.state[ours]["exp_avg"].dtype == other.state[theirs]["state1"].dtype


def test_weights_of_a_plain_group_decay_after_the_step():
    ours, theirs = weight(64, 80), weight(64, 80)
    one, other = GaLoreAdamW8bit([ours], lr=0.01, weight_decay=0.5), GaLoreAdamW8bit([theirs], lr=0.01, weight_decay=0)
    for G in gradients(64, 80, steps=10):
        with torch.no_grad():
            theirs.copy_(ours)
        step(one, ours, G)
        step(other, theirs, G)
        torch.testing.assert_close(ours, theirs * (1 - 0.005), rtol=0, atol=1e-8)


@pytest.mark.parametrize("numel", [4095, 4096, 4097])
def test_moments_of_fewer_than_4096_elements_are_fp32_and_others_codes_with_a_scale_a_block(numel):
    W = weight(numel)
    state = step(GaLoreAdamW8bit([W]), W, gradients(numel, steps=1)[0])
    forms = {key: (tuple(value.shape), value.dtype) for key, value in state.items()}
    keys = ("exp_avg", "exp_avg_sq")
    moments = dict.fromkeys(keys, ((numel,), torch.float32 if numel < 4096 else torch.uint8))
    if numel >= 4096:
        moments |= {f"{key}_absmax": ((-(-numel // 256),), torch.float32) for key in keys}
    assert forms == {"step": ((), torch.float32)} | moments


@by_large_shape
@by_bits
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bytes_are_those_of_the_formula(shape, bits, dtype):
    """A byte a moment and 4 for each block; P in its dtype, or in codes with 8 bytes a group of 256."""
    short, long, size = min(shape), max(shape), dtype.itemsize
    moments = 2 * (48 * long + 4 * -(-48 * long // 256)) + 4
    lazy = 4 + 8 + 8 + 4 * 5
    groups = -(-48 * short // 256)
    for keys, basis in [
        ({}, size * 48 * short),
        ({"quant": True, "quant_n_bit": bits}, groups * (256 * bits // 8 + 8)),
        ({"quant": True, "quant_n_bit": bits, "cos_threshold": 0.4}, groups * (256 * bits // 8 + 8) + lazy),
    ]:
        W = weight(*shape, dtype=dtype)
        optimizer = GaLoreAdamW8bit([W], rank=48, **keys)
        step(optimizer, W, gradients(*shape, steps=1, dtype=dtype)[0])
        assert state_bytes(optimizer) == optim.GaLoreAdamW8bit.state_bytes_for(shape, dtype, rank=48, **keys)
        assert state_bytes(optimizer) == moments + basis


def test_without_bitsandbytes_the_constructor_says_what_to_install(monkeypatch):
    monkeypatch.setattr("gracile.optim.state.blockwise_8bit.find_spec", lambda name: None)
    with pytest.raises(ImportError) as error:
        GaLoreAdamW8bit([weight(4, 4)])
    assert "bitsandbytes" in str(error.value)
    assert "gracile[8bit]" in str(error.value)


@by_shape
@pytest.mark.parametrize("lazy", [{}, {"cos_threshold": 1.0}], ids=["plain", "lazy"])
def test_with_all_storage_choices_off_it_is_galore(shape, lazy):
    """Small moments stay fp32. A lazy clock whose gaps never grow is the plain one, here to the bit."""
    ours, theirs = weight(*shape, dtype=torch.float64), weight(*shape, dtype=torch.float64)
    keys = {"rank": RANK, "update_proj_gap": 20, "lr": 0.01, "eps": 0.0, "weight_decay": 0.3}
    one, other = Watched([ours], **lazy, **keys), GaLoreAdamW([theirs], state_dtype=torch.float32, **keys)
    for G in gradients(*shape, dtype=torch.float64):
        step(one, ours, G)
        step(other, theirs, G)
        assert torch.equal(ours, theirs)
    assert one.refreshes == [0, 20, 40]


# ---- the packed projector -------------------------------------------------------------------------------------------


@by_shape
@by_bits
@pytest.mark.parametrize("size", [7, 256])
def test_the_unpacked_basis_projects_and_lifts(shape, bits, size):
    """b1 = 0 and fp32 moments: the first moment is R = G P^, and the weight moves along N P^T."""
    W, right = weight(*shape, dtype=torch.float64), shape[0] >= shape[1]
    keys = {"betas": (0.0, 0.9), "lr": 0.1, "weight_decay": 0.0, "scale": 0.5, "update_proj_gap": 3}
    optimizer = GaLoreAdamW8bit([W], rank=RANK, quant=True, quant_n_bit=bits, quant_group_size=size, **keys)
    for t, G in enumerate(gradients(*shape, steps=7, dtype=torch.float64)):
        before = W.detach().clone()
        state = step(optimizer, W, G)
        P = opened_basis(state, shape, bits, size)
        R = G @ P if right else P.T @ G
        torch.testing.assert_close(state["exp_avg"].double(), R, rtol=0, atol=1e-5)
        N = state["exp_avg"].double() / ((state["exp_avg_sq"].double() / (1 - 0.9 ** (t + 1))).sqrt() + 1e-8)
        torch.testing.assert_close(before - W.detach(), 0.05 * (N @ P.T if right else P @ N), rtol=0, atol=1e-6)


@by_shape
@by_bits
@pytest.mark.parametrize("size", [7, 256])
def test_the_unpacked_basis_is_the_svds_within_half_a_step_of_each_group(shape, bits, size):
    W = weight(*shape)
    (G,) = gradients(*shape, steps=1)
    keys = {"quant": True, "quant_n_bit": bits, "quant_group_size": size}
    P = opened_basis(step(GaLoreAdamW8bit([W], rank=RANK, **keys), W, G), shape, bits, size)
    exact = leading(G, RANK)
    exact = exact * torch.sign((exact * P).sum(dim=0))
    off = 0.0
    for codes, values in zip(P.flatten().split(size), exact.flatten().split(size), strict=True):
        half_a_step = (values.max() - values.min()) / (2**bits - 1) / 2
        assert (codes - values).abs().max() <= half_a_step + 1e-6
        off = max(off, (codes - values).abs().max().item())
    assert off > 1e-4


# ---- the lazy clock -------------------------------------------------------------------------------------------------


def beyond_chance(overlap, rank, side):
    return (overlap - rank / side) / (1 - rank / side)


@pytest.mark.parametrize("shape", [(64, 96), (96, 64)])
@pytest.mark.parametrize("rank", [8, 16, 32])
@pytest.mark.parametrize("method", ["iterate", "svd"])
def test_noise_never_widens_the_gap_and_a_constant_gradient_does(shape, rank, method):
    """A chance level of 1/8, 1/4 and 1/2 of the subspace."""
    keys = {"update_proj_gap": 2, "cos_threshold": 0.4, "subspace_method": method}
    for steps, gap, seed_of in ((60, 2, lambda t: t), (31, 8, lambda t: 0)):
        W = weight(*shape)
        optimizer = GaLoreAdamW8bit([W], rank=rank, **keys)
        for t in range(steps):
            W.grad = torch.randn(shape, generator=torch.Generator().manual_seed(seed_of(t)))
            optimizer.step()
            if t and gap == 2:
                assert optimizer.state[W]["overlap"].abs() < 0.15
        assert optimizer.state[W]["refresh_gap"] == gap


@pytest.mark.parametrize("method", ["iterate", "svd"])
def test_coordinates_keep_their_meaning_where_the_subspace_does(method):
    """A subspace that is found from a random start has its old basis: moments stay what they were."""
    W, G = weight(40, 24), spanned(orthonormal(24, 4, seed=5), (40, 24), seed=1)
    optimizer = GaLoreAdamW8bit([W], rank=4, update_proj_gap=1, cos_threshold=1.0, subspace_method=method)
    first = step(optimizer, W, G)["basis"].clone()
    second = step(optimizer, W, G)["basis"]
    torch.testing.assert_close(second, first, rtol=0, atol=1e-5)


@by_shape
@pytest.mark.parametrize("quant", [{}, {"quant": True, "quant_n_bit": 8}], ids=["exact", "packed"])
def test_a_subspace_that_stays_doubles_the_gap_at_the_sixth_refresh_and_again_five_later(shape, quant):
    """The singular vectors' signs flip and their order changes: what counts is the subspace."""
    W, columns = weight(*shape), orthonormal(min(shape), RANK, seed=5)
    optimizer = Watched([W], rank=RANK, update_proj_gap=2, cos_threshold=0.9, **quant)
    for t in range(40):
        order = columns if t % 4 else columns.flip(1)
        state = step(optimizer, W, (-1) ** (t // 2) * spanned(order, shape, seed=t))
        sixth, eleventh = t >= 10, t >= 30
        assert state["refresh_gap"] == (8 if eleventh else 4 if sixth else 2)
        assert state["next_refresh"] == min(r for r in [2, 4, 6, 8, 10, 14, 18, 22, 26, 30, 38, 46] if r > t)
        seen = sum(r <= t for r in ([38] if eleventh else [14, 18, 22, 26] if sixth else [2, 4, 6, 8]))
        assert torch.isfinite(state["overlaps"]).sum() == seen
        torch.testing.assert_close(
            state["overlaps"][5 - seen :], torch.ones(seen), rtol=0, atol=2e-2 if quant else 1e-5
        )
    assert optimizer.refreshes == [0, 2, 4, 6, 8, 10, 14, 18, 22, 26, 30, 38]


@by_shape
def test_a_subspace_that_is_always_new_keeps_the_gap(shape):
    W, columns = weight(*shape), orthonormal(min(shape), 3 * RANK, seed=5)
    optimizer = Watched([W], rank=RANK, update_proj_gap=3, cos_threshold=0.01)
    for t in range(40):
        third = t // 3 % 3
        state = step(optimizer, W, spanned(columns[:, third * RANK : (third + 1) * RANK], shape, seed=t))
    assert optimizer.refreshes == list(range(0, 40, 3))
    assert state["refresh_gap"] == 3
    least = beyond_chance(0, RANK, min(shape))
    assert (state["overlaps"] - least).abs().max() < 1e-5


@by_shape
def test_overlaps_are_those_of_the_svd_subspaces_newest_last(shape):
    W, generator = weight(*shape), torch.Generator().manual_seed(2)
    keys = {"update_proj_gap": 1, "cos_threshold": 1.0, "subspace_method": "svd"}
    optimizer = GaLoreAdamW8bit([W], rank=RANK, **keys)
    walk = gradients(*shape, steps=9)
    previous, told = None, []
    for t, noise in enumerate(walk):
        G = (walk[0] + 0.1 * t * noise) * (1 if torch.rand(1, generator=generator) < 0.5 else -1)
        P = leading(G, RANK)
        if previous is not None:
            overlap = torch.linalg.svdvals(previous.T @ P).square().sum().item() / RANK
            told.append(beyond_chance(overlap, RANK, min(shape)))
        previous = P
        state = step(optimizer, W, G)
        latest = torch.tensor([float("nan")] * 5 + told)[-5:]
        torch.testing.assert_close(state["overlaps"], latest, rtol=0, atol=1e-5, equal_nan=True)
    assert min(told) < 0.8 < max(told)


@pytest.mark.parametrize(("threshold", "doublings"), [(0.15, 2), (0.24, 2), (0.26, 0)])
def test_half_a_subspace_that_stays_is_an_overlap_of_a_half(threshold, doublings):
    """Of which a third of the space is there by chance."""
    W, columns = weight(20, 12), orthonormal(12, 6, seed=5)
    keys = {"update_proj_gap": 2, "gamma_proj": 3, "queue_size": 2, "cos_threshold": threshold}
    optimizer = Watched([W], rank=4, **keys)
    for t in range(20):
        count = len(getattr(optimizer, "refreshes", []))
        kept = [0, 1, 2, 3] if count % 2 else [0, 1, 4, 5]
        state = step(optimizer, W, spanned(columns[:, kept], (20, 12), seed=t))
    assert optimizer.refreshes == ([0, 2, 4, 10, 16] if doublings else list(range(0, 20, 2)))
    assert state["refresh_gap"] == 2 * 3**doublings


def test_the_average_is_over_the_latest_overlaps():
    """-0.2, -0.2, 1, 1 with a queue of three: above 0.5 only with the fourth."""
    W, columns = weight(20, 12), orthonormal(12, 6, seed=5)
    optimizer = Watched([W], rank=2, update_proj_gap=1, queue_size=3, cos_threshold=0.5)
    for t, first in enumerate([0, 2, 4, 4, 4, 4]):
        state = step(optimizer, W, spanned(columns[:, first : first + 2], (20, 12), seed=t))
        assert state["refresh_gap"] == (1 if t < 4 else 2)
    assert optimizer.refreshes == [0, 1, 2, 3, 4]


@by_shape
@pytest.mark.parametrize("quant", [False, True])
def test_a_nan_gradient_at_a_refresh_keeps_the_basis_and_does_not_enter_the_queue(shape, quant):
    W, columns = weight(*shape), orthonormal(min(shape), RANK, seed=5)
    optimizer = Watched([W], rank=RANK, update_proj_gap=2, cos_threshold=0.9, quant=quant, quant_n_bit=8)
    for t in range(4):
        state = step(optimizer, W, spanned(columns, shape, seed=t))
    before = {key: value.clone() for key, value in state.items() if key.startswith("basis") or key == "overlaps"}
    bad = spanned(columns, shape, seed=9)
    bad[0, 0] = float("nan")
    with pytest.warns(UserWarning, match="not finite"):
        state = step(optimizer, W, bad)
    for key, value in before.items():
        torch.testing.assert_close(state[key], value, rtol=0, atol=0, equal_nan=True)
    step(optimizer, W, spanned(columns, shape, seed=10))
    state = step(optimizer, W, spanned(columns, shape, seed=11))
    assert optimizer.refreshes == [0, 2, 4, 6]
    assert torch.isfinite(state["overlaps"]).tolist() == [False] * 3 + [True] * 2


def test_each_matrix_has_a_clock_of_its_own():
    held, columns = [weight(20, 12), weight(12, 20)], orthonormal(12, 8, seed=5)
    optimizer = GaLoreAdamW8bit(held, rank=4, update_proj_gap=1, queue_size=2, cos_threshold=0.5)
    for t in range(6):
        held[0].grad = spanned(columns[:, :4], (20, 12), seed=t)
        held[1].grad = spanned(columns[:, 4:] if t % 2 else columns[:, :4], (12, 20), seed=t)
        optimizer.step()
    assert [optimizer.state[W]["refresh_gap"].item() for W in held] == [2, 1]


@by_large_shape
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lazy_packed_8_bit_training_continues_to_the_bit_after_a_file(shape, dtype, tmp_path):
    """Saved with a queue half full; continued over a doubling."""
    keys = {"rank": 48, "update_proj_gap": 1, "cos_threshold": 0.1, "quant": True}
    W, drawn = weight(*shape, dtype=dtype), gradients(*shape, steps=10, dtype=dtype)
    sequence = [G + 4 * drawn[0] for G in drawn]
    optimizer = GaLoreAdamW8bit([W], **keys)
    for G in sequence[:4]:
        state = step(optimizer, W, G)
    assert torch.isfinite(state["overlaps"]).sum() == 3
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    X = nn.Parameter(W.detach().clone())
    resumed = GaLoreAdamW8bit([X], **keys)
    resumed.load_state_dict(torch.load(tmp_path / "optimizer.pt", weights_only=True))
    for G in sequence[4:]:
        one, other = step(optimizer, W, G), step(resumed, X, G)
        assert torch.equal(W, X)
        assert one.keys() == other.keys()
        assert all(torch.equal(one[key].nan_to_num(-1), other[key].nan_to_num(-1)) for key in one)
    assert one["refresh_gap"] == 2


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"quant": 1}, ["quant must", "1"]),
        ({"quant_n_bit": 2}, ["quant_n_bit", "2"]),
        ({"quant_group_size": 1}, ["quant_group_size", "1"]),
        ({"cos_threshold": 1.5}, ["cos_threshold", "1.5"]),
        ({"gamma_proj": 0.5}, ["gamma_proj", "0.5"]),
        ({"queue_size": 0}, ["queue_size", "0"]),
    ],
)
def test_bad_values_are_refused(keys, words):
    with pytest.raises(ValueError) as error:
        GaLoreAdamW8bit([weight(4, 4)], rank=2, **keys)
    assert all(word in str(error.value) for word in words)


@pytest.mark.parametrize("cos_threshold", [None, 0.4], ids=["warm", "lazy"])
@pytest.mark.parametrize("proj_type", ["right", "left"])
def test_the_order_of_the_sums_moves_no_code(cos_threshold, proj_type):
    """Lines in another order, as processes share them out, have the same subspace: a code that flips with the last bit
    of a sum would move its weights by a fifteenth of what it is."""
    keys = {"rank": 12, "update_proj_gap": 2, "proj_type": proj_type, "cos_threshold": cos_threshold}
    keys |= {"quant": True, "quant_n_bit": 4, "quant_group_size": 128}
    for seed in range(4):
        generator = torch.Generator().manual_seed(seed)
        order = torch.randperm(401, generator=generator)
        W, other = weight(401, 113), weight(401, 113)
        turned = [W, other] if proj_type == "right" else [nn.Parameter(p.detach().t().contiguous()) for p in (W, other)]
        optimizers = [optim.GaLoreAdamW8bit([{"params": [p], **keys}], lr=0.0) for p in turned]
        decays = 1.5 ** -torch.arange(113.0)  # directions of little energy, which rounding turns the most
        for _ in range(3):
            G = torch.randn(401, 113, generator=generator) * decays
            both = [G, G[order]] if proj_type == "right" else [G.t(), G[order].t()]
            states = [step(o, p, g) for o, p, g in zip(optimizers, turned, both, strict=True)]
            assert torch.equal(states[0]["basis"], states[1]["basis"])
            torch.testing.assert_close(states[0]["basis_scale"], states[1]["basis_scale"], rtol=3e-7, atol=0)
