"""APOLLO: the authors' steps, the scaling in closed form, the random subspace, the limiter, saving, bf16."""

import math
import warnings

import pytest
import torch
from apollo_torch import APOLLOAdamW as Reference
from torch import nn

from gracile.optim import APOLLOAdamW, state_bytes
from gracile.optim.distributed.projection import ProjectionSide
from gracile.optim.low_rank.gaussian import gaussian_columns

SHAPES = [(40, 24), (24, 40), (32, 32)]
STEPS = 50
RANK = 6
BETAS = (0.9, 0.999)

by_shape = pytest.mark.parametrize("shape", SHAPES, ids=["tall", "wide", "square"])


def weight(*shape, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return nn.Parameter((0.02 * torch.randn(*shape, generator=generator, dtype=torch.float64)).to(dtype))


def gradients(*shape, steps=STEPS, seed=1, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return [(1 + t % 3) * torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype) for t in range(steps)]


def moved(optimizer, parameter, G):
    before = parameter.detach().clone()
    parameter.grad = G.clone()
    optimizer.step()
    return before - parameter.detach()


def correction(t):
    return math.sqrt(1 - BETAS[1] ** t) / (1 - BETAS[0] ** t)


def is_right(shape, proj_type="std"):
    return {"std": shape[0] >= shape[1], "left": False, "right": True}[proj_type]


def drawn(shape, rank, right, seed):
    """P as the paper's authors draw it: r rows of numbers on the right, r columns on the left."""
    generator = torch.Generator().manual_seed(seed)
    size = (rank, shape[1]) if right else (shape[0], rank)
    P = torch.randn(size, generator=generator).double() / math.sqrt(rank)
    return P.t() if right else P


def advanced(seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, torch.iinfo(torch.int64).max, (15,), generator=generator).tolist()[-1]


def raw_adam(history, eps=1e-6):
    """N without bias correction: sums over the whole history."""
    t = len(history)
    M = sum((1 - BETAS[0]) * BETAS[0] ** (t - 1 - s) * R for s, R in enumerate(history))
    V = sum((1 - BETAS[1]) * BETAS[1] ** (t - 1 - s) * R**2 for s, R in enumerate(history))
    return M / (V.sqrt() + eps)


def columns_seen(shape, optimizer, parameter):
    """P as the last step used it, where b1 = 0 and the gradient was a unit matrix: the first moment is P itself."""
    R = optimizer.state[parameter]["exp_avg"]
    short = min(shape)
    return (R[:short] if is_right(shape) else R[:, :short].t()).clone()


# ---- parity with the authors' code ----------------------------------------------------------------------------------

VARIANTS = {
    "channel": {},
    "tensor": {"scale_type": "tensor", "scale": 4.0},
    "svd": {"proj": "svd", "scale": 2.0},
    "tensor svd": {"proj": "svd", "scale_type": "tensor"},
    "front": {"scale_front": True, "scale": 4.0},
    "no limiter": {"disable_nl": True, "scale": 2.0},
    "mini": {"scale_type": "tensor", "rank": 1, "scale": 16.0, "scale_front": True},
}


@by_shape
@pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS.keys())
def test_given_gradients_lead_where_apollo_torch_leads(shape, variant):
    """Refreshes at 0, 20 and 40, decay; a plain vector comes first, so that the two matrices have seeds 2 and 3."""
    group = {"rank": RANK, "update_proj_gap": 20, "proj_type": "std", "scale": 1.0, "proj": "random"}
    group |= {"scale_type": "channel", "weight_decay": 0.2} | variant
    switches = {key: group.pop(key) for key in ("scale_front", "disable_nl") if key in group}
    sizes = [(9,), shape, shape[::-1]]
    ours, theirs = ([weight(*size, seed=i) for i, size in enumerate(sizes)] for _ in range(2))
    one = APOLLOAdamW([{"params": ours[:1]}, {"params": ours[1:], **group}], lr=0.01, **switches)
    other = Reference([{"params": theirs[:1]}, {"params": theirs[1:], **group}], lr=0.01, **switches)
    start = [p.detach().clone() for p in ours]
    for given in zip(*(gradients(*size, seed=i) for i, size in enumerate(sizes)), strict=True):
        for p, q, G in zip(ours, theirs, given, strict=True):
            p.grad, q.grad = G.clone(), G.clone()
        one.step()
        other.step()
        for p, q in zip(ours, theirs, strict=True):
            assert (p - q).abs().max() <= 1e-6
    assert all((p - before).abs().max() > 0.02 for p, before in zip(ours, start, strict=True))


def test_a_row_and_a_rank_above_the_short_side_follow_apollo_torch():
    """The rank of ``svd`` is capped by the number of singular vectors; that of a row is 1."""
    keys = {"update_proj_gap": 5, "proj_type": "std", "scale": 1.0}
    for shape, group in [
        ((24, 8), {"rank": 100, "proj": "svd", "scale_type": "channel"}),
        ((1, 20), {"rank": 1, "proj": "random", "scale_type": "tensor"}),
    ]:
        W, V = weight(*shape), weight(*shape)
        one, other = APOLLOAdamW([{"params": [W], **group, **keys}]), Reference([{"params": [V], **group, **keys}])
        for G in gradients(*shape, steps=12):
            torch.testing.assert_close(moved(one, W, G), moved(other, V, G), rtol=0, atol=1e-6)


# ---- the scaling ----------------------------------------------------------------------------------------------------


@by_shape
@pytest.mark.parametrize("proj_type", ["std", "left", "right"])
@pytest.mark.parametrize("scale_type", ["channel", "tensor"])
def test_updates_are_the_gradient_with_the_norms_of_adam_in_the_subspace(shape, proj_type, scale_type):
    """A dense history in fp64, with two refreshes at which moments stay; channels run along the projected axis."""
    W, right, seed = weight(*shape, dtype=torch.float64), is_right(shape, proj_type), 7
    keys = {"rank": RANK, "update_proj_gap": 5, "scale": 9.0, "disable_nl": True, "lr": 0.1}
    optimizer = APOLLOAdamW([W], seed=seed, proj_type=proj_type, scale_type=scale_type, **keys)
    axis = (1 if right else 0) if scale_type == "channel" else (0, 1)
    history = []
    for t, G in enumerate(gradients(*shape, dtype=torch.float64, steps=12), start=1):
        if t in (6, 11):
            seed = advanced(seed)
        P = drawn(shape, RANK, right, seed)
        R = G @ P if right else P.t() @ G
        history.append(R)
        Z = moved(optimizer, W, G) / (0.1 * 3.0 * correction(t))
        ratio = Z / G
        s = ratio.mean(dim=axis, keepdim=True)
        assert (ratio - s).abs().max() < 1e-9 * s.abs().max()  # parallel
        norms = [torch.linalg.vector_norm(X, dim=axis, keepdim=True) for X in (Z, G, raw_adam(history), R)]
        torch.testing.assert_close(norms[0], norms[2] * norms[1] / norms[3], rtol=2e-6, atol=0)


@by_shape
@pytest.mark.parametrize("scale_type", ["channel", "tensor"])
def test_with_the_whole_space_for_a_subspace_the_norms_are_those_of_adam(shape, scale_type, monkeypatch):
    monkeypatch.setattr(
        "gracile.optim.low_rank.apollo.gaussian_stack", lambda frame, *_: torch.eye(*frame.basis_shape)[None]
    )
    W = weight(*shape, dtype=torch.float64)
    optimizer = APOLLOAdamW([W], lr=1.0, rank=min(shape), scale_type=scale_type, disable_nl=True)
    history = []
    for t, G in enumerate(gradients(*shape, dtype=torch.float64, steps=8), start=1):
        history.append(G)
        axis = (1 if is_right(shape) else 0) if scale_type == "channel" else (0, 1)
        Z, N = moved(optimizer, W, G) / correction(t), raw_adam(history)
        torch.testing.assert_close(Z.norm(dim=axis), N.norm(dim=axis), rtol=1e-6, atol=0)


@by_shape
def test_without_memory_each_channel_is_the_gradient_times_root_r_over_its_projected_norm(shape):
    """b1 = b2 = eps = 0 makes N = sign(R), of norm sqrt(r)."""
    W = weight(*shape, dtype=torch.float64)
    optimizer = APOLLOAdamW([W], lr=1.0, betas=(0.0, 0.0), eps=0.0, rank=RANK, disable_nl=True, seed=3)
    P, axis = drawn(shape, RANK, is_right(shape), 3), 1 if is_right(shape) else 0
    for G in gradients(*shape, dtype=torch.float64, steps=3):
        R = G @ P if axis else P.t() @ G
        expected = G * math.sqrt(RANK) / R.norm(dim=axis, keepdim=True)
        torch.testing.assert_close(moved(optimizer, W, G), expected, rtol=2e-6, atol=1e-12)


@pytest.mark.parametrize("keys", [{"proj": "svd", "rank": RANK}, {"scale_type": "tensor", "rank": 1}])
@by_shape
def test_transposing_the_matrix_transposes_the_run(shape, keys):
    """At rank 1 both sides draw the same numbers; at other ranks they lay them out differently, as the authors do."""
    W = weight(*shape, dtype=torch.float64)
    V = nn.Parameter(W.detach().t().clone())
    keys = {"update_proj_gap": 7, "lr": 0.01, **keys}
    sides = [{}, {}] if shape[0] != shape[1] else [{"proj_type": "right"}, {"proj_type": "left"}]
    one, other = APOLLOAdamW([W], **sides[0], **keys), APOLLOAdamW([V], **sides[1], **keys)
    generator = torch.Generator().manual_seed(5)
    G = torch.randn(*shape, generator=generator, dtype=torch.float64)  # one gradient: signs of an SVD are free
    for t in range(10):
        torch.testing.assert_close(moved(one, W, (1 + t) * G), moved(other, V, (1 + t) * G.t()).t(), rtol=0, atol=1e-8)


# ---- the random subspace --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("right", [True, False])
def test_projection_keeps_squared_norms_in_expectation(right):
    generator = torch.Generator().manual_seed(0)
    g = torch.randn(24, 3, generator=generator) * torch.tensor([1.0, 10.0, 0.1])
    frame = ProjectionSide((40, 24) if right else (24, 40), 8, right)
    seeds = 4000
    total = sum((gaussian_columns(frame, seed, g.device).t() @ g).square().sum(dim=0) for seed in range(seeds))
    torch.testing.assert_close(total / seeds, g.square().sum(dim=0), rtol=0.03, atol=0)


@by_shape
def test_the_subspace_changes_at_every_gap_and_only_there(shape):
    optimizer = APOLLOAdamW([W := weight(*shape)], betas=(0.0, 0.9), rank=RANK, update_proj_gap=4, seed=11)
    seen = []
    for _ in range(12):
        moved(optimizer, W, torch.eye(*shape))
        seen.append(columns_seen(shape, optimizer, W))
    changes = [t for t in range(1, 12) if not torch.equal(seen[t], seen[t - 1])]
    assert changes == [4, 8]
    assert not torch.equal(seen[0], seen[8])
    for t, seed in ((0, 11), (4, advanced(11)), (8, advanced(advanced(11)))):
        P = drawn(shape, RANK, is_right(shape), seed)[: min(shape)].float()
        torch.testing.assert_close(seen[t], P, rtol=1e-6, atol=1e-7)


def test_the_seed_and_the_position_make_the_subspace_and_nothing_else():
    shape = (40, 24)

    def subspaces(seed, noise, count=2):
        torch.manual_seed(noise)
        held = [weight(*shape) for _ in range(count)]
        optimizer = APOLLOAdamW(held, betas=(0.0, 0.9), rank=RANK, seed=seed)
        for p in held:
            p.grad = torch.eye(*shape)
        optimizer.step()
        return [columns_seen(shape, optimizer, p) for p in held]

    first, again, next_seed = subspaces(5, 0), subspaces(5, 1), subspaces(6, 0)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first[0], first[1])
    assert torch.equal(first[1], next_seed[0])


@by_shape
def test_no_subspace_is_stored_unless_it_was_learnt(shape):
    """Two moments, a seed (8 bytes), a norm and a counter; ``svd`` keeps P instead of the seed."""
    sizes = {}
    for proj in ("random", "svd"):
        W = weight(*shape)
        optimizer = APOLLOAdamW([W], rank=RANK, proj=proj)
        moved(optimizer, W, torch.ones(*shape))
        sizes[proj] = state_bytes(optimizer)
    moments = 4 * 2 * RANK * max(shape)
    assert sizes == {"random": moments + 8 + 4 + 4, "svd": moments + 4 * RANK * min(shape) + 4 + 4}


# ---- the limiter ----------------------------------------------------------------------------------------------------


@by_shape
@pytest.mark.parametrize("front", [False, True])
def test_the_norm_grows_by_at_most_one_percent_a_step(shape, front):
    """Raw norms of a constant gradient rise fast; the limiter sees ``scale`` where it is in front."""
    keys = {"rank": RANK, "lr": 1.0, "update_proj_gap": 10**6, "scale": 16.0, "scale_front": front}
    W, V = weight(*shape, dtype=torch.float64), weight(*shape, dtype=torch.float64)
    one, free = APOLLOAdamW([W], **keys), APOLLOAdamW([V], disable_nl=True, **keys)
    (G,) = gradients(*shape, dtype=torch.float64, steps=1)
    norms, raw = [], []
    for t in range(1, 11):
        Z, unlimited = moved(one, W, G) / correction(t), moved(free, V, G) / correction(t)
        norms.append(Z.norm().item())
        raw.append(unlimited.norm().item())
        torch.testing.assert_close(Z / Z.norm(), unlimited / unlimited.norm(), rtol=1e-9, atol=1e-12)
        assert one.state[W]["update_norm"].item() == pytest.approx(norms[-1] / (1 if front else 4), rel=1e-6)
    assert raw[5] > 1.2 * raw[0]
    assert norms[0] == pytest.approx(raw[0], rel=1e-9)
    assert norms == pytest.approx([norms[0] * 1.01**t for t in range(10)], rel=1e-6)


def test_a_zero_gradient_first_does_not_hold_updates_down_for_a_thousand_steps():
    optimizer = APOLLOAdamW([W := weight(40, 24)], rank=RANK, lr=1.0)
    assert moved(optimizer, W, torch.zeros(40, 24)).abs().max() == 0
    assert optimizer.state[W]["update_norm"] == 0
    for G in gradients(40, 24, steps=2):
        moved(optimizer, W, G)
    assert optimizer.state[W]["update_norm"] > 1


# ---- saving, dtypes, values -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("proj", ["random", "svd"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_saved_run_continues_to_the_bit_across_a_refresh(proj, dtype, tmp_path):
    keys = {"rank": RANK, "update_proj_gap": 5, "proj": proj, "weight_decay": 0.1, "seed": 2**40}
    sizes = [(40, 24), (24, 40)]
    undisturbed = [weight(*size, dtype=dtype) for size in sizes]
    one = APOLLOAdamW(undisturbed, **keys)
    given = list(zip(*(gradients(*size, steps=17, dtype=dtype) for size in sizes), strict=True))
    for pair in given[:8]:
        for p, G in zip(undisturbed, pair, strict=True):
            p.grad = G
        one.step()
    torch.save(one.state_dict(), tmp_path / "optimizer.pt")
    resumed = [nn.Parameter(p.detach().clone()) for p in undisturbed]
    other = APOLLOAdamW(resumed, **keys | {"seed": 1})  # what was saved wins
    other.load_state_dict(torch.load(tmp_path / "optimizer.pt", weights_only=True))
    for pair in given[8:]:
        for p, q, G in zip(undisturbed, resumed, pair, strict=True):
            p.grad, q.grad = G.clone(), G.clone()
        one.step()
        other.step()
        for p, q in zip(undisturbed, resumed, strict=True):
            assert torch.equal(p, q)
            assert all(torch.equal(v, other.state[q][k]) for k, v in one.state[p].items())


def test_bf16_projects_and_remembers_in_fp32():
    """P itself rounded to bf16 would be off by 1e-3."""
    shape = (40, 24)
    W = weight(*shape, dtype=torch.bfloat16)
    optimizer = APOLLOAdamW([W], lr=0.01, betas=(0.0, 0.999), rank=RANK, update_proj_gap=20)
    for t, G in enumerate(gradients(*shape, dtype=torch.bfloat16)):
        moved(optimizer, W, G)
        if t == 0:
            R = G.double() @ drawn(shape, RANK, True, 1)
            torch.testing.assert_close(optimizer.state[W]["exp_avg"].double(), R, rtol=1e-5, atol=1e-5)
    state = optimizer.state[W]
    assert {state[key].dtype for key in ("exp_avg", "exp_avg_sq", "update_norm")} == {torch.float32}
    assert W.dtype == torch.bfloat16
    assert torch.isfinite(W).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_channel_whose_gradient_vanishes_stays_where_it_is(dtype):
    W, (G,) = weight(40, 24, dtype=dtype), gradients(40, 24, steps=1, dtype=dtype)
    optimizer = APOLLOAdamW([W], rank=RANK)
    moved(optimizer, W, G)
    G[3] = 0
    assert not moved(optimizer, W, G)[3].any()


def test_one_rank_by_channel_warns_and_by_tensor_does_not():
    with pytest.warns(UserWarning, match="APOLLO-Mini is scale_type='tensor'") as told:
        APOLLOAdamW([{"params": [weight(4, 4)]}], rank=1)
    assert len(told) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        APOLLOAdamW([weight(4, 4)], rank=1, scale_type="tensor")
        APOLLOAdamW([{"params": [weight(4, 4)], "scale_type": "tensor"}], rank=1)
        APOLLOAdamW([weight(4, 4)], rank=2)


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"scale": -1.0}, ["scale", "-1.0"]),
        ({"proj": "qr"}, ["proj", "'qr'", "random, svd"]),
        ({"scale_type": "row"}, ["scale_type", "'row'", "channel, tensor"]),
        ({"seed": -1}, ["seed", "-1"]),
    ],
)
def test_bad_values_are_refused(keys, words):
    with pytest.raises(ValueError) as error:
        APOLLOAdamW([weight(4, 4)], rank=2, **keys)
    assert all(word in str(error.value) for word in words)
