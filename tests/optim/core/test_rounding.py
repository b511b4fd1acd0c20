"""Stochastic rounding: of numbers, of weights, of moments, and the same noise however a parameter is split."""

import math

import pytest
import torch
from catalogue import VARIANTS
from torch import nn

from gracile import optim
from gracile.optim.core.keywords import keyword_names
from gracile.optim.core.rounding import noise, round_, widened
from gracile.optim.distributed import Runs, ShardRange
from gracile.optim.distributed.process_group import FakeGroup

BF16 = torch.bfloat16
DRAWS = 2**18
KEYS = {"lr": 1e-3, "stochastic_rounding": True, "state_dtype": BF16}
BY_CLASS = {v.cls: v.quadratic for v in reversed(VARIANTS.values()) if v.quadratic}


def in_a_row(begin, end):
    return torch.arange(begin, end, dtype=torch.int32)


def rounded(values, key=(1, 2)):
    wide = torch.as_tensor(values, dtype=torch.float32)
    narrow = torch.empty(wide.shape, dtype=BF16)
    round_(narrow, wide, key, in_a_row)
    return narrow


# ---- numbers --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [1.001, -1.001, 0.0199, 3e-39, -7.7e20, 1 + 2**-8])
def test_the_mean_is_the_value(value):
    """Within four standard deviations, of which one draw has at most half a spacing."""
    wide = torch.full((DRAWS,), value)
    found = rounded(wide).double()
    below, above = found.min(), found.max()
    assert below < wide[0].double() < above or below == above == wide[0].double()
    assert abs(float(found.mean()) - float(wide[0].double())) <= 4 * float(above - below) / 2 / math.sqrt(DRAWS)


def test_what_bf16_holds_stays_and_nothing_becomes_infinite():
    held = torch.randn(4096).to(BF16).float()
    special = torch.tensor([0.0, -0.0, math.inf, -math.inf, torch.finfo(BF16).max, torch.finfo(BF16).tiny])
    for exact in (held, special):
        assert torch.equal(rounded(exact).float(), exact)
    assert rounded([math.nan, -math.nan]).isnan().all()
    wide = torch.full((4096,), torch.finfo(torch.float32).max)
    assert rounded(wide).isfinite().all()
    assert rounded(-wide).isfinite().all()
    payloads = torch.tensor([0x7F800001, 0x7FFFFFFF, -1], dtype=torch.int32).view(torch.float32)
    assert rounded(payloads).isnan().all()


@pytest.mark.parametrize("key", [(0, 0), (1, 0), (123456789, -987654321)])
def test_noise_is_uniform_and_of_no_pattern(key):
    drawn = noise(in_a_row(0, DRAWS), key).double()
    assert drawn.min() >= 0
    assert drawn.max() < 2**16

    counts = torch.bincount(drawn.long() >> 6, minlength=1024).double()
    spread = (counts - DRAWS / 1024).square().sum() / (DRAWS / 1024)
    assert abs(spread - 1023) < 4 * math.sqrt(2 * 1023)

    def correlation(one, other):
        return float(torch.corrcoef(torch.stack([one, other]))[0, 1]) * math.sqrt(len(one))

    beside = [noise(in_a_row(0, DRAWS), (key[0] + a, key[1] + b)).double() for a, b in ((1, 0), (0, 1))]
    neighbours = [(drawn[1:], drawn[:-1]), (drawn[512:], drawn[:-512]), *((drawn, other) for other in beside)]
    for one, other in neighbours:
        assert abs(correlation(one, other)) < 4


def test_runs_of_places_are_those_of_the_whole():
    """Columns 3 to 7 of a 5 x 9 tensor."""
    from gracile.optim.core.rounding import _in_runs

    whole = in_a_row(0, 45).view(5, 9)
    places = _in_runs(Runs(5, 4, 3, 9, 45), torch.device("cpu"))
    assert torch.equal(places(0, 20), whole[:, 3:7].reshape(-1))
    assert torch.equal(places(6, 13), whole[:, 3:7].reshape(-1)[6:13])


# ---- weights --------------------------------------------------------------------------------------------------------


def stepped(weight, gradient, steps, **keys):
    p = nn.Parameter(weight.clone())
    optimizer = optim.Lion([p], **keys)
    for _ in range(steps):
        p.grad = gradient.to(p.dtype)
        optimizer.step()
    return p.detach().float()


def test_weights_decay():
    """lr * weight_decay = 1e-4 a step is lost whole to nearest rounding."""
    start, steps = torch.full((64, 64), 0.37, dtype=BF16), 400
    keys = {"lr": 1e-3, "weight_decay": 0.1, "betas": (0.9, 0.99)}
    expected = float(start[0, 0]) * (1 - 1e-4) ** steps
    nearest = stepped(start, torch.zeros(64, 64), steps, **keys)
    by_chance = stepped(start, torch.zeros(64, 64), steps, **keys, stochastic_rounding=True)
    assert torch.equal(nearest, start.float())
    assert float(by_chance.mean()) == pytest.approx(expected, rel=5e-4)


def test_small_updates_count():
    start = torch.full((64, 64), 0.02, dtype=BF16)
    moved = stepped(start, torch.ones(64, 64), 300, lr=1e-6, stochastic_rounding=True) - start.float()
    assert not (stepped(start, torch.ones(64, 64), 300, lr=1e-6) - start.float()).any()
    assert float(moved.mean()) == pytest.approx(-3e-4, rel=0.05)


def test_two_parameters_two_steps_and_two_seeds_have_noise_of_their_own():
    def run(seed):
        held = [nn.Parameter(torch.full((32, 32), 0.37, dtype=BF16)) for _ in range(2)]
        optimizer = optim.Lion(held, lr=1e-3, stochastic_rounding=True, rounding_seed=seed)
        seen = []
        for _ in range(2):
            for p in held:
                p.grad = torch.ones_like(p)
            optimizer.step()
            seen += [p.detach().clone() for p in held]
        return seen

    one, other = run(0), run(1)
    assert all(torch.equal(a, b) for a, b in zip(one, run(0), strict=True))
    assert not torch.equal(one[0], one[1])
    assert not torch.equal(one[0], other[0])
    assert not torch.equal(one[2] - one[0], one[0] - 0.37)


@pytest.mark.parametrize("cls", [optim.Lion, optim.GaLoreAdamW], ids=["Lion", "GaLoreAdamW"])
def test_a_transposed_weight_is_rounded_as_one_that_is_not(cls):
    """Places are those of its elements in a row, and not those in memory."""

    def run(weight):
        p = nn.Parameter(weight)
        optimizer = cls([{"params": [p], **({"rank": 3} if cls is optim.GaLoreAdamW else {})}], **KEYS)
        for t in range(5):
            G = torch.randn(12, 7, generator=torch.Generator().manual_seed(t)).to(BF16)
            p.grad = torch.empty_like(p).copy_(G)  # strides as the weight's, as autograd has them
            optimizer.step()
        return p.detach()

    start = torch.randn(12, 7, generator=torch.Generator().manual_seed(9)).to(BF16)
    across = start.t().contiguous().t()
    assert not across.is_contiguous()
    assert torch.equal(run(across), run(start.clone()))


# ---- moments --------------------------------------------------------------------------------------------------------


def test_a_second_moment_decays():
    """b2 = 0.999, no gradient any more: 0.37 after 1000 steps, and 1 for ever when rounded to nearest."""

    def left(steps=300, **keys):
        p = nn.Parameter(torch.ones(64, 64))
        optimizer = optim.GaLoreAdamW([p], lr=1e-4, state_dtype=BF16, **keys)
        p.grad = torch.ones_like(p)
        optimizer.step()
        first = optimizer.state[p]["exp_avg_sq"].float().mean()
        for _ in range(steps):
            p.grad = torch.zeros_like(p)
            optimizer.step()
        assert optimizer.state[p]["exp_avg_sq"].dtype == BF16
        return float(optimizer.state[p]["exp_avg_sq"].float().mean() / first)

    assert left() > 0.99
    assert left(stochastic_rounding=True) == pytest.approx(0.999**300, rel=0.01)


# ---- every class ----------------------------------------------------------------------------------------------------


def trained(cls, use, steps, dtype=BF16, state=None, **keys):
    """Matrices 16 x 16 and 24 x 16 and a vector, on a quadratic; its weights and the optimizer."""
    generator = torch.Generator().manual_seed(3)
    held = [nn.Parameter((0.3 * torch.randn(s, generator=generator)).to(dtype)) for s in ((16, 16), (24, 16), (16,))]
    optimizer = cls([{"params": held[:2], **(use.matrices or {})}, {"params": held[2:]}], **use.keys | keys)
    first = 0
    if state is not None:
        values, told, first = state
        for p, value in zip(held, values, strict=True):
            p.data.copy_(value)
        optimizer.load_state_dict(told)
    for t in range(first, steps):
        noisy = torch.Generator().manual_seed(t)
        for p in held:
            p.grad = (p.detach().float() + 0.3 * torch.randn(p.shape, generator=noisy)).to(dtype)
        optimizer.step()
    return held, optimizer


@pytest.mark.parametrize("cls", BY_CLASS, ids=[cls.__name__ for cls in BY_CLASS])
def test_every_class_goes_on_with_the_same_noise(cls):
    """In bf16, moments too where the class has them; saved after five steps of nine, across a refresh."""
    use = BY_CLASS[cls]
    keys = {"stochastic_rounding": True, "lr": 1e-3}
    if "state_dtype" in keyword_names(cls):
        keys["state_dtype"] = BF16
    whole, optimizer = trained(cls, use, 9, **keys)
    values, half = trained(cls, use, 5, **keys)
    resumed, _ = trained(cls, use, 9, state=(values, half.state_dict(), 5), **keys)
    for p, q in zip(whole, resumed, strict=True):
        assert p.dtype == BF16
        assert torch.equal(p, q)
    if "state_dtype" in keys:
        assert all(s["exp_avg"].dtype == BF16 for s in optimizer.state.values() if "exp_avg" in s)
    nearest, _ = trained(cls, use, 9, **keys | {"stochastic_rounding": False})
    assert any(not torch.equal(p, q) for p, q in zip(whole, nearest, strict=True))


def test_fp32_is_as_it_was_and_fp16_is_refused():
    use = BY_CLASS[optim.GaLoreAdamW]
    plain, _ = trained(optim.GaLoreAdamW, use, 6, dtype=torch.float32)
    asked, _ = trained(optim.GaLoreAdamW, use, 6, dtype=torch.float32, stochastic_rounding=True)
    assert all(torch.equal(p, q) for p, q in zip(plain, asked, strict=True))
    with pytest.raises(ValueError, match="stochastic_rounding=True is for bfloat16 and wider parameters"):
        optim.GaLoreAdamW([nn.Parameter(torch.ones(3, dtype=torch.float16))], stochastic_rounding=True)


def test_a_failed_step_leaves_bf16_weights_in_place():
    p = nn.Parameter(torch.ones(4, 4, dtype=BF16))
    optimizer = optim.GaLoreAdamW([p], stochastic_rounding=True)
    p.grad = torch.ones_like(p)
    optimizer.step()
    optimizer.state[p]["exp_avg"] = torch.ones(3)
    with pytest.raises(RuntimeError):
        optimizer.step()
    assert p.dtype == BF16
    assert optimizer.param_groups[0]["params"] == [p]


# ---- parts ----------------------------------------------------------------------------------------------------------

M, N, RANK = 11, 7, 3
BOUNDS = (0, 19, 19, 50, 77)  # rows are cut, and one process has nothing


def made_of(wide):
    """What a step makes of a tensor, a function of its elements alone."""
    return wide.mul_(1.001).add_(1e-4)


def whole_and_parts(proj_type):
    optimizer = optim.GaLoreAdamW([torch.ones(M, N)], rank=RANK, proj_type=proj_type, state_dtype=BF16)
    (ref,), group = optimizer.registry.of_group(optimizer.param_groups[0]), optimizer.param_groups[0]
    weights = torch.randn(M, N, generator=torch.Generator().manual_seed(1)).to(BF16)
    flat = weights.view(-1)
    whole = optimizer.shard_on(flat.clone(), flat, ShardRange((M, N), (0, M * N), 0, FakeGroup(0, 1)), ref, group)
    parts = []
    for index in range(len(BOUNDS) - 1):
        own = flat[BOUNDS[index] : BOUNDS[index + 1]]
        parts.append(
            optimizer.shard_on(own.clone(), own, ShardRange((M, N), BOUNDS, 0, FakeGroup(index, 4)), ref, group)
        )
    return optimizer, group, whole, parts


def advance(optimizer, group, shard, moments):
    """One step; the moments of a part are its lines of the whole ones."""
    state = {"step": torch.tensor(5.0)}
    specs = optimizer.by_chance(shard, group)
    assert [spec.name for spec in specs] == ["exp_avg", "exp_avg_sq"]
    for spec, whole in zip(specs, moments, strict=True):
        first, last = shard.lines
        state[spec.name] = whole.narrow(spec.axis, first, last - first).clone()
    with widened(shard, state, specs, {"rounding_seed": 9}) as seen:
        made_of(shard.parameter)
        for spec in specs:
            made_of(seen[spec.name])
    return state


@pytest.mark.parametrize("proj_type", ["right", "left"])
def test_parts_are_rounded_as_the_whole(proj_type):
    """Rows that two processes touch, columns, and a process that holds nothing."""
    optimizer, group, whole, parts = whole_and_parts(proj_type)
    shape = whole.side.projected_shape
    moments = [torch.rand(shape, generator=torch.Generator().manual_seed(t)).to(BF16) for t in (2, 3)]
    expected = advance(optimizer, group, whole, moments)
    assert not torch.equal(expected["exp_avg"], made_of(moments[0].float()).to(BF16))
    for shard in parts:
        found = advance(optimizer, group, shard, moments)
        begin, end = shard.held.start, shard.held.stop
        assert torch.equal(shard.parameter.view(-1), whole.parameter.view(-1)[begin:end])
        first, last = shard.lines
        for spec in optimizer.by_chance(shard, group):
            assert torch.equal(found[spec.name], expected[spec.name].narrow(spec.axis, first, last - first))


def test_packed_moments_are_rounded_by_the_places_of_their_weights():
    """A mask's moments, of a whole matrix and of two parts of it."""

    def run(own, index, bounds):
        optimizer = optim.RigLAdamW([torch.ones(8, 6)], sparsity=0.5, t_end=9, state_dtype=BF16)
        (ref,), group = optimizer.registry.of_group(optimizer.param_groups[0]), optimizer.param_groups[0]
        held = ShardRange((8, 6), bounds, 0, FakeGroup(index, len(bounds) - 1))
        shard = optimizer.shard_on(torch.zeros(held.numel, dtype=BF16), torch.zeros(held.numel), held, ref, group)
        state = {"step": torch.tensor(2.0), "indices": (own - held.start).int()}
        state |= {name: values[own].to(BF16) for name in ("exp_avg", "exp_avg_sq")}
        with widened(shard, state, optimizer.by_chance(shard, group), {"rounding_seed": 0}) as seen:
            made_of(seen["exp_avg"])
        return state["exp_avg"]

    values = torch.rand(48, generator=torch.Generator().manual_seed(0))
    places = torch.tensor([0, 3, 4, 17, 20, 21, 30, 41, 47])
    whole = run(places, 0, (0, 48))
    assert not torch.equal(whole, made_of(values[places].to(BF16).float()).to(BF16))
    parts = [run(places[places < 21], 0, (0, 21, 48)), run(places[places >= 21], 1, (0, 21, 48))]
    assert torch.equal(torch.cat(parts), whole)
