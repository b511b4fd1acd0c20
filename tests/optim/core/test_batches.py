"""Parameters that are moved together go where each goes alone."""

from dataclasses import replace

import pytest
import torch
from catalogue import VARIANTS
from torch import nn

from gracile import optim
from gracile.models.convert import convert
from gracile.optim.core import batches
from gracile.optim.core import optimizer as stepping
from gracile.optim.core.rules import ADAM, LION, TORCH_ADAM
from gracile.optim.distributed import FullShard, ProjectionSide, StackedState, stack_of, stacked
from gracile.optim.factored import sst
from gracile.optim.low_rank import optimizer as optimizer_of
from gracile.optim.low_rank.optimizer import LowRankOptimizer
from gracile.optim.low_rank.singular import PendingIteration, orthogonal_iteration, orthogonal_iterations

SHAPES = [(24, 16), (16, 24), (24, 16), (32, 32), (24, 16)]
OTHERS = [(20, 8), (16,), (16,)]
STEPS = 10
NAMES = [name for name, variant in VARIANTS.items() if variant.quadratic]
BATCHED = {  # variants whose matrices are
    "Lion", "GaLoreAdamW", "GaLoreAdamW iterate", "GaLoreLion", "GaLoreAdamW8bit", "GaLoreAdamW8bit Q-GaLore",
    "GaLoreAdafactor", "GaLoreAdafactor relative", "GradNormLoRPAdamW", "LDAdamW", "LDAdamW alone", "FiraAdamW",
    "GaLorePlusAdamW", "GaLorePlusAdamW heads", "APOLLOAdamW", "APOLLOAdamW Mini", "APOLLOAdamW svd", "DCTAdamW",
    "DCTAdamW fed back", "DCTAdamW fed back in 8 bits", "DCTAdamW fed back in 4 bits", "SETAdamW", "RigLAdamW",
    "SRigLAdamW", "SparseAdamW", "SparseAdamW frozen", "BlockSparseAdamW", "WGSEFAdamW", "WGSEFAdamW pruned",
}  # fmt: skip


def trained(variant, frozen=(), dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    held = [nn.Parameter(0.3 * torch.randn(s, generator=generator, dtype=dtype)) for s in SHAPES + OTHERS]
    use, matrices = variant.quadratic, held[: len(SHAPES)]
    groups = [{"params": matrices, **(use.matrices or {})}, {"params": held[len(SHAPES) :]}]
    optimizer = variant.cls(groups, **{"weight_decay": 0.1, **use.keys})
    for t in range(STEPS):
        for number, p in enumerate(held):
            G = torch.randn(p.shape, generator=generator, dtype=dtype)
            p.grad = None if number in frozen and t < 3 else G  # whose clock is then another
        optimizer.step()
    return [p.detach() for p in held] + [v for p in held for v in optimizer.state[p].values()]


def compared_in(name):
    """A dtype, and how close. Rounding gradients once to fp32 moves LDAdamW's error further than the others' bound."""
    if name == "LDAdamW":
        return torch.float64, {"rtol": 1e-10, "atol": 1e-12}
    return torch.float32, {"rtol": 1e-4, "atol": 2e-6}


def close(one, other, loose, name):
    assert torch.allclose(one.double(), other.double(), **loose), (name, float((one - other).abs().max()))


@pytest.fixture
def together(monkeypatch):
    """As on a GPU. The sizes of the batches that were moved."""
    sizes, write, move = [], batches.write_together, batches.move_in_place

    def written(shards, *rest):
        sizes.append(len(shards))
        write(shards, *rest)

    def moved(items, rule):
        sizes.append(len(items))
        move(items, rule)

    def stack(shards):
        sizes.append(len(shards))
        return stack_of(shards)

    for module in (batches, optimizer_of, stepping):
        monkeypatch.setattr(module, "launches_cost", lambda device: True)
    monkeypatch.setattr(stepping, "write_together", written)
    monkeypatch.setattr(stepping, "move_in_place", moved)
    monkeypatch.setattr(stepping, "stack_of", stack)
    return sizes


@pytest.mark.parametrize("name", NAMES)
def test_a_batch_moves_each_as_it_would_move_alone(name, together, monkeypatch):
    variant = VARIANTS[name]
    dtype, loose = compared_in(name)
    frozen = () if variant.cls.together else (0, 6)
    moved = trained(variant, frozen, dtype)
    whole = sum(together)
    with monkeypatch.context() as patch:
        for module in (batches, optimizer_of, stepping):
            patch.setattr(module, "launches_cost", lambda device: False)
        alone = trained(variant, frozen, dtype)
    assert sum(together) == whole
    for one, other in zip(moved, alone, strict=True):
        close(one, other, loose, name)
    others = 2 * STEPS  # those of one dimension, at least
    assert whole >= others or variant.cls.rule.together is None or "8bit" in name
    assert (whole > (3 if variant.cls.rule.together else 1) * STEPS) == (name in BATCHED), whole


def test_a_batch_is_no_larger_than_its_workspace(together, monkeypatch):
    monkeypatch.setattr(batches, "AT_ONCE", 150)
    trained(VARIANTS["GaLoreLion"])
    assert 1 < max(together) <= 3, "coordinates of 24 x 4 and 32 x 4, and parameters of 16"


# ---- stacks ---------------------------------------------------------------------------------------------------------

MATRICES = sorted(name for name in BATCHED if issubclass(VARIANTS[name].cls, LowRankOptimizer))
FOUND_ALONE = {"APOLLOAdamW svd", "GradNormLoRPAdamW"}  # and moved before the next one's is


def stepped(variant, matrices, gradients, groups=None):
    """The optimizer after a step for each of ``gradients`` (matrices x their shape)."""
    use = variant.quadratic
    optimizer = variant.cls(
        [{"params": matrices, **use.matrices, **(groups or {})}], **{"weight_decay": 0.1, **use.keys}
    )
    for G in gradients:
        for p, own in zip(matrices, G, strict=True):
            p.grad = own
        optimizer.step()
    return optimizer


@pytest.mark.parametrize("name", MATRICES)
def test_in_a_stack_bf16_weights_go_where_each_goes_alone(name, together, monkeypatch):
    """Two steps: errors of rounding grow where they choose columns and signs."""
    generator = torch.Generator().manual_seed(1)
    W, G = (size * torch.randn(2, 3, 24, 16, generator=generator).to(torch.bfloat16) for size in (0.01, 1))
    moved = {}
    for on_a_gpu in (True, False):
        for module in (batches, optimizer_of, stepping):
            monkeypatch.setattr(module, "launches_cost", lambda device, costs=on_a_gpu: costs)
        held = [nn.Parameter(own.clone()) for own in W[0]]
        stepped(VARIANTS[name], held, G)
        moved[on_a_gpu] = torch.stack([p.detach() for p in held])
    assert together == [3] * (1 if name in FOUND_ALONE else 2)
    apart = (moved[True] - moved[False]).float().norm()
    assert apart <= 0.02 * (moved[False] - W[0]).float().norm()


@pytest.mark.parametrize("name", MATRICES)
def test_a_stack_is_cut_where_memory_ends(name, together, monkeypatch):
    """Seven matrices, three at once: the last is alone."""
    generator = torch.Generator().manual_seed(1)
    W, G = torch.randn(7, 16, 24, generator=generator), torch.randn(2, 7, 16, 24, generator=generator)
    held = [nn.Parameter(own.clone()) for own in W]
    monkeypatch.setattr(stepping.ShardedOptimizer, "_movable", bounded_to_three(stepping.ShardedOptimizer._movable))
    stepped(VARIANTS[name], held, G)
    assert together == [3, 3] * (1 if name in FOUND_ALONE else 2)
    for module in (batches, optimizer_of, stepping):
        monkeypatch.setattr(module, "launches_cost", lambda device: False)
    alone = [nn.Parameter(own.clone()) for own in W]
    stepped(VARIANTS[name], alone, G)
    for p, q in zip(held, alone, strict=True):
        close(p.detach(), q.detach(), {"rtol": 1e-4, "atol": 2e-6}, name)


def bounded_to_three(movable):
    return lambda self, item, stacks: movable(self, item, stacks)._replace(numbers=batches.MATRICES_AT_ONCE // 3)


@pytest.mark.parametrize("shape", [(24, 16), (16, 24), (16, 16)], ids=["tall", "wide", "square"])
@pytest.mark.parametrize("name", MATRICES)
def test_matrices_born_in_one_tensor_move_as_one_on_a_cpu(name, shape, monkeypatch):
    """Parameters, gradients and, where they lie so, states are seen and written where they are."""
    monkeypatch.setattr(FullShard, "born_stacked", True)
    generator = torch.Generator().manual_seed(2)
    dtype, loose = compared_in(name)
    W, G = (torch.randn(*n, *shape, generator=generator, dtype=dtype) for n in ((4,), (6, 4)))
    alone = [nn.Parameter(own.clone()) for own in W]
    with monkeypatch.context() as patch:
        patch.setattr(batches, "BORN_STACKED_BELOW", 0)
        expected = stepped(VARIANTS[name], alone, G)
    stacks = []
    monkeypatch.setattr(stepping, "stack_of", lambda shards: (stacks.append(len(shards)), stack_of(shards))[1])
    parts = [nn.Parameter(own) for own in W]  # views
    found = stepped(VARIANTS[name], parts, G)
    assert stacks == [4] * (4 if name in FOUND_ALONE else 6)
    for number, (p, q) in enumerate(zip(parts, alone, strict=True)):
        assert p.data_ptr() == W[number].data_ptr()
        close(p.detach(), q.detach(), loose, name)
        for key, value in found.state[p].items():
            close(value, expected.state[q][key], loose, key)


def test_state_that_lies_in_one_tensor_is_written_there():
    M = torch.zeros(3, 4, 2)
    views = [{"exp_avg": own, "norm": torch.ones(()), "step": torch.tensor(2.0)} for own in M]
    state = StackedState(views, only_read=("norm",))
    assert state["exp_avg"].data_ptr() == M.data_ptr()
    assert (state["step"].item(), state["norm"].shape) == (2.0, (3, 1, 1))
    state["exp_avg"].add_(1)
    state["norm"].mul_(5)
    state.write_back()
    assert M.min() == 1
    assert views[0]["norm"] == 1, "only read"


def test_a_stack_is_a_view_where_its_parts_lie_one_after_the_other():
    whole = torch.arange(48.0).view(4, 3, 4)
    for parts in (list(whole), list(whole[1:3]), [t.t() for t in whole], list(whole.view(-1)[:3])):
        found, is_view = stacked(parts)
        assert is_view
        assert torch.equal(found, torch.stack(parts))
        assert found.data_ptr() == parts[0].data_ptr()
    others = ([whole[0], whole[1], whole[3]], [whole[1], whole[0]], [whole[0], whole[0]], [t.clone() for t in whole])
    gaps = (list(whole[::2]), list(whole[:, :2]), [whole[0, :, :2], whole[0, :, 2:]])
    for parts in (
        *others,
        *gaps,
        [whole[0], whole[1].t().contiguous().t()],
        [whole[0, :2, :2].t(), whole[0, 1:, :2].t()],
    ):
        found, is_view = stacked(parts)
        assert not is_view
        assert torch.equal(found, torch.stack(parts))


@pytest.mark.parametrize(("rows", "one"), [(256, True), (272, True), (257, False)])
def test_codes_of_a_stack_are_those_of_each(rows, one, together, monkeypatch):
    """Moments of 16 and 17 blocks a matrix; where a block would reach into the next matrix, each is alone."""
    generator = torch.Generator().manual_seed(3)
    W, G = torch.randn(3, rows, 32, generator=generator), torch.randn(2, 3, rows, 32, generator=generator)
    use = {"rank": 16, "update_proj_gap": 100}
    held, alone = ([nn.Parameter(own.clone()) for own in W] for _ in range(2))
    found = stepped(VARIANTS["GaLoreAdamW8bit"], held, G, use)
    assert together == ([3, 3] if one else [])
    for module in (batches, optimizer_of, stepping):
        monkeypatch.setattr(module, "launches_cost", lambda device: False)
    expected = stepped(VARIANTS["GaLoreAdamW8bit"], alone, G, use)
    for p, q in zip(held, alone, strict=True):
        close(p.detach(), q.detach(), {"rtol": 1e-3, "atol": 1e-3}, "weights")
        for key, value in found.state[p].items():
            assert value.dtype == expected.state[q][key].dtype
            apart = (value.double() - expected.state[q][key].double()).abs()
            assert apart.mean() < 0.02 if key in ("exp_avg", "exp_avg_sq") else apart.max() < 1e-3, key


# ---- layers ---------------------------------------------------------------------------------------------------------


LAYERED = ["SLTrainAdamW", "SLTrainAdamW8bit", "SSTAdamW", "ReLoRAAdamW"]
WIDER = [(name, {"state_dtype": torch.float64}) for name in LAYERED if "8bit" not in name]


@pytest.mark.parametrize(("name", "more"), [*((name, {}) for name in LAYERED), *WIDER])
def test_parts_of_layers_move_together_as_each_would_alone(name, more, together, monkeypatch):
    """With draws, merges and resets after the fifth step, ages of their own, and parameters of no layer, which are
    moved with the parts where weights are narrower than moments."""

    def trained(on_a_gpu):
        for module in (batches, optimizer_of, stepping, sst):
            monkeypatch.setattr(module, "launches_cost", lambda device: on_a_gpu)
        torch.manual_seed(0)
        variant = VARIANTS[name]
        kind, keys, _ = variant.layer
        model = nn.Sequential(nn.Linear(12, 12), nn.Linear(12, 12), nn.Linear(12, 8), nn.Linear(8, 8))
        convert(model, kind, ["0", "1", "2"], rank=3, **keys)
        held = [p for p in model.parameters() if p.requires_grad]
        optimizer = variant.cls([{"params": held, "weight_decay": 0.1}], **variant.cells.keys, **more)
        for _ in range(8):
            for p in held:
                p.grad = torch.randn(p.shape)
            optimizer.step()
        return [p.detach() for p in model.parameters()] + [v for p in held for v in optimizer.state[p].values()]

    moved = trained(on_a_gpu=True)
    assert sum(together) >= 8 * 9
    for one, other in zip(moved, trained(on_a_gpu=False), strict=True):
        close(one, other, {"rtol": 1e-4, "atol": 2e-6}, name)


# ---- rules ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", [ADAM, TORCH_ADAM, LION], ids=["adam", "torch's", "lion"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_rule_for_many_is_the_rule_for_each(rule, dtype):
    """At the first step and later, gradients near eps and zeros among them."""
    keys = {"betas": (0.9, 0.99), "eps": 1e-3}
    generator = torch.Generator().manual_seed(0)
    shapes = [(5, 3), (7,), (2, 2, 2)]
    names = ["exp_avg"] if rule is LION else ["exp_avg", "exp_avg_sq"]
    alone, many = ([{name: torch.zeros(s, dtype=dtype) for name in names} for s in shapes] for _ in range(2))
    for t in range(1, 6):
        R = [1e-3 * torch.randn(s, generator=generator).round(decimals=3).to(dtype) for s in shapes]
        for state in (*alone, *many):
            state["step"] = torch.tensor(float(t))
        moved, correction = rule.together(R, many, keys, lambda t=t: torch.tensor(float(t)))
        for own, state, other, theirs in zip(R, alone, many, moved, strict=True):
            N, factor = rule.direction(own, state, keys)
            loose = 0.05 if dtype == torch.bfloat16 else 2e-6
            pairs = [(theirs, N), *((other[name], state[name]) for name in names)]
            assert correction == pytest.approx(factor)
            assert all(float((a - b).float().norm()) <= loose * float(b.float().norm()) for a, b in pairs)


def test_a_direction_asks_the_rule_once():
    def twice():
        yield torch.zeros(1), {}
        yield torch.zeros(1), {}

    with pytest.raises(RuntimeError, match="once"):
        batches.found_alone(twice(), replace(LION, direction=lambda R, state, group: (R, 1.0)), {}, None)


def test_plain_parameters_of_every_dtype_are_batched_apart(together):
    held = [nn.Parameter(torch.ones(4, dtype=dtype)) for dtype in (torch.float32, torch.bfloat16) * 2]
    optimizer = optim.Lion(held, lr=0.1)
    for p in held:
        p.grad = torch.ones_like(p)
    optimizer.step()
    assert together == [2, 2]
    assert all(torch.allclose(p.float(), torch.full((4,), 0.9), atol=1e-2) for p in held)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_fused_kernel_is_given_tensors_that_are_laid_out_alike(together, monkeypatch, dtype):
    """On a GPU it takes no others: transposed weights, bf16 weights with fp32 moments, gradients of other strides."""
    fused, lists = torch._fused_adamw_, []

    def watched(*tensors, **keys):
        lists.append(tensors[:4])
        return fused(*tensors, **keys)

    monkeypatch.setattr(torch, "_fused_adamw_", watched)
    held = [nn.Parameter(torch.randn(6, 4).to(dtype)) for _ in range(2)]
    held += [nn.Parameter(torch.randn(4, 6).t().to(dtype)) for _ in range(2)]
    matrices = [nn.Parameter(torch.randn(4, 12).t().to(dtype)) for _ in range(2)]
    optimizer = optim.GaLoreAdamW([{"params": matrices, "rank": 2}, {"params": held}], lr=0.1)
    for t in range(2):
        for p in [*held, *matrices]:
            p.grad = torch.randn(p.shape).to(dtype)
        optimizer.step()
        for key in ("exp_avg", "exp_avg_sq") if t == 0 else ():  # as torch's AdamW has those of a transposed weight
            transposed = optimizer.state[held[2]][key].t().contiguous().t()
            optimizer.state[held[2]][key] = transposed
    assert lists
    for together_with in lists:
        assert all(len({(t.dtype, t.stride()) for t in own}) == 1 for own in zip(*together_with, strict=True))


# ---- subspaces ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cold", [False, True])
@pytest.mark.parametrize("proj_type", ["left", "right"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_iterations_together_are_those_of_each(dtype, proj_type, cold):
    """Among them a gradient of nothing, one that is not finite, one of rank one."""
    side = ProjectionSide.of((40, 24), 6, proj_type)
    generator = torch.Generator().manual_seed(0)
    gradients = [torch.randn(40, 24, generator=generator, dtype=torch.float64).to(dtype) for _ in range(5)]
    gradients[1].zero_()
    gradients[2][3, 4] = torch.inf
    gradients[3].copy_(gradients[3][:, :1] @ gradients[3][:1])
    previous = [torch.linalg.qr(torch.randn(*side.basis_shape, generator=generator))[0].to(dtype) for _ in gradients]
    pending = [PendingIteration(G, side, None if cold else P) for G, P in zip(gradients, previous, strict=True)]
    found = orthogonal_iterations(pending)
    for one, own in zip(pending, found, strict=True):
        alone = orthogonal_iteration(one.gradient, side, one.previous)
        assert own.dtype == alone.dtype == dtype
        assert torch.equal(own.isfinite().all(), alone.isfinite().all())
        if own.isfinite().all():
            loose = {torch.float32: 2e-4, torch.float64: 1e-9, torch.bfloat16: 2e-2}[dtype]
            held = [
                float(torch.linalg.vector_norm(one.gradient @ P if side.right else P.mT @ one.gradient))
                for P in (own, alone)
            ]
            assert held[0] == pytest.approx(held[1], rel=loose, abs=1e-6), "the same energy"
            if one.gradient is gradients[0] or one.gradient is gradients[4]:  # of full rank
                assert float((own @ own.mT - alone @ alone.mT).abs().max()) <= loose, "the same subspace"
            assert float((own.mT.double() @ own.double() - torch.eye(6)).abs().max()) <= loose


@pytest.mark.parametrize(("at_once", "most"), [(10**6, 3), (24 * 4, 1)])
def test_subspaces_are_found_together_as_far_as_memory_goes(at_once, most, together, monkeypatch):
    found, iterate = [], PendingIteration.run
    monkeypatch.setattr(optimizer_of, "FOUND_AT_ONCE", at_once)
    watched = staticmethod(lambda pending: (found.append(len(pending)), iterate(pending))[1])
    monkeypatch.setattr(PendingIteration, "run", watched)
    trained(VARIANTS["GaLoreLion"])
    assert max(found) == most
    assert sum(found) == 3 * len(SHAPES), "at steps 0, 4 and 8"


def test_where_a_subspace_needs_a_matrix_or_gradients_are_copies_each_is_found_alone(together, monkeypatch):
    found, iterate = [], PendingIteration.run
    watched = staticmethod(lambda pending: (found.append(len(pending)), iterate(pending))[1])
    monkeypatch.setattr(PendingIteration, "run", watched)
    trained(VARIANTS["GradNormLoRPAdamW"])
    held = [nn.Parameter(torch.randn(8, 6)) for _ in range(3)]
    optimizer = optim.GaLoreAdamW([{"params": held, "rank": 2}], maximize=True)
    for p in held:
        p.grad = torch.randn_like(p)
    optimizer.step()
    assert set(found) == {1}
