"""Clipping in two backward passes, with no gradient kept: the steps of ordinary clipping, and skipped whole where the
norm is not finite."""

import sys
from pathlib import Path

import pytest
import torch
from catalogue import VARIANTS
from torch import nn
from torch.nn.functional import cross_entropy, dropout

from gracile import optim
from gracile.optim import release_gradients
from gracile.optim.core.optimizer import ShardedOptimizer
from gracile.optim.released import FreedGradient

sys.path.insert(0, str(Path(__file__).parents[1] / "distributed"))
cells = pytest.importorskip("cells", reason="needs DeepSpeed, as the cells of the distributed matrix do")

CLIP = 0.05
STEPS = 13  # three refreshes, three changes of masks, a pruning, a merge
NAMES = [name for name, v in VARIANTS.items() if v.cells and issubclass(v.cls, ShardedOptimizer)]
FIRST = {VARIANTS[name].state: name for name in reversed(NAMES)}.values()  # one of each kind of state


def apart(one, other):
    return max(
        (torch.linalg.vector_norm(a - b) / torch.linalg.vector_norm(a)).item() for a, b in zip(one, other, strict=True)
    )


def trained(name, released, broken=None):
    """Weights, the optimizer, and norms; the loss of step ``broken`` is infinite. In fp64: in fp32 a last bit of a norm
    may decide over a code of an error in 8 bits, which moves weights by 2e-5."""
    cell = {"optimizer": name}
    net = cells.build(cell).double()
    optimizer = cells.make_optimizer(net, cell, together=False)
    freed = release_gradients(net, optimizer, keep="nothing") if released else None
    norms = []
    for step in range(STEPS):

        def closure(step=step):
            loss = net(*cells.batch(step, 0)) * (torch.inf if step == broken else 1)
            loss.backward()
            return loss

        if freed is None:
            closure()
            norm = nn.utils.clip_grad_norm_(net.parameters(), CLIP)
        else:
            _, norm = freed.clipped_backward(closure, CLIP)
        norms.append(norm)
        if released or norm.isfinite():  # a scaler asks so
            optimizer.step()
        optimizer.zero_grad()
    return list(net.parameters()), optimizer, torch.stack(norms)


EACH = [pytest.param(name, marks=() if name in FIRST else pytest.mark.thorough) for name in NAMES]


@pytest.mark.parametrize("name", EACH)
def test_each_class_moves_as_by_an_ordinary_clipped_step(name):
    """With refreshes, mask changes, prunings and merges."""
    (one, _, norms), (other, _, found) = (trained(name, released) for released in (False, True))
    torch.testing.assert_close(found, norms, rtol=1e-12, atol=0)
    assert (norms > CLIP).any()
    assert apart(one, other) <= 1e-12


@pytest.mark.parametrize("name", ["GaLoreAdamW", *[pytest.param(name, marks=pytest.mark.thorough) for name in NAMES]])
@pytest.mark.parametrize("broken", [0, 4])
def test_a_step_whose_norm_is_not_finite_is_skipped_whole(name, broken):
    """Step 4 would refresh."""
    (one, ordinary, _), (other, freed, norms) = (trained(name, released, broken) for released in (False, True))
    assert [step for step, norm in enumerate(norms) if not norm.isfinite()] == [broken]
    assert apart(one, other) <= 1e-12
    steps = [{int(held["step"]) for held in optimizer.state.values()} for optimizer in (ordinary, freed)]
    assert steps[0] == steps[1]


# ---- one step -------------------------------------------------------------------------------------------------------


def small():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(24, 40), nn.Tanh(), nn.Linear(40, 24))


def galore(model):
    groups = optim.param_groups(model, rank=4, target_modules="all-linear", update_proj_gap=3)
    return optim.GaLoreAdamW(groups, lr=0.01)


def closure_of(model, seed, calls=None, drop=0.0):
    generator = torch.Generator().manual_seed(seed)
    x, y = torch.randn(16, 24, generator=generator), torch.randint(24, (16,), generator=generator)

    def closure():
        loss = cross_entropy(dropout(model(x.to(model[0].weight.dtype)), drop).float(), y)
        if calls is not None:
            calls.append([p.detach().clone() for p in model.parameters()])
        loss.backward()
        return loss

    return closure


def test_the_first_pass_moves_nothing_and_keeps_nothing():
    model = small()
    optimizer, calls, left = galore(model), [], []
    released = release_gradients(model, optimizer, keep="nothing")
    closure = closure_of(model, 0, calls)

    def watched():
        loss = closure()
        left.append([p.grad for p in model.parameters()])
        return loss

    loss, norm = released.clipped_backward(watched, CLIP)
    assert all(map(torch.equal, *calls))
    assert left[0] == [None] * 4
    assert all(isinstance(grad, FreedGradient) for grad in left[1])
    assert not any(map(torch.equal, calls[0], model.parameters()))
    torch.testing.assert_close(nn.utils.get_total_norm([p.grad for p in model.parameters()]), torch.tensor(CLIP))
    assert loss.isfinite()
    assert norm > CLIP
    optimizer.step()
    closure()  # ordinary again
    torch.testing.assert_close(nn.utils.get_total_norm(left[1]), torch.tensor(CLIP))
    assert nn.utils.get_total_norm([p.grad for p in model.parameters()]) > CLIP


def test_both_passes_draw_the_same_numbers():
    """And the step after has those that it has with one pass."""

    def run(released):
        model = small()
        optimizer = galore(model)
        freed = release_gradients(model, optimizer, keep="nothing") if released else None
        torch.manual_seed(5)
        for seed in range(4):
            if freed is not None:
                freed.clipped_backward(closure_of(model, seed, drop=0.5), torch.inf)
            else:
                closure_of(model, seed, drop=0.5)()
            optimizer.step()
            optimizer.zero_grad()
        return [*model.parameters(), torch.rand(3)]

    assert all(map(torch.equal, run(False), run(True)))


def test_a_norm_is_summed_in_fp32_at_least():
    model, exact = small().bfloat16(), small()
    exact.load_state_dict(model.state_dict())
    released = release_gradients(model, galore(model), keep="nothing")
    _, norm = released.clipped_backward(closure_of(model, 0), 1e-3)
    closure_of(exact.bfloat16(), 0)()
    expected = torch.stack([p.grad.double().norm() for p in exact.parameters()]).norm()
    assert norm.dtype == torch.float32
    torch.testing.assert_close(norm.double(), expected, rtol=1e-6, atol=0)


def test_a_pass_that_fails_leaves_no_factor_behind():
    model = small()
    optimizer = galore(model)
    released = release_gradients(model, optimizer, keep="nothing")
    handle = model[1].register_full_backward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        released.clipped_backward(closure_of(model, 0), CLIP)
    handle.remove()
    assert not optimizer.state
    closure_of(model, 0)()
    assert nn.utils.get_total_norm([p.grad for p in model.parameters()]) > CLIP
    optimizer.step()
    assert {int(held["step"]) for held in optimizer.state.values()} == {1}


def test_what_is_refused():
    model = small()
    optimizer = galore(model)
    released = release_gradients(model, optimizer, keep="nothing")
    closure = closure_of(model, 0)
    with pytest.raises(ValueError, match="max_norm must be above 0, got 0"):
        released.clipped_backward(closure, 0.0)
    with pytest.raises(RuntimeError, match="no gradient came of the closure; it runs forward and backward"):
        released.clipped_backward(lambda: model(torch.ones(1, 24)).sum(), CLIP)
    with pytest.raises(RuntimeError, match="came again before"):
        released.clipped_backward(lambda: (closure(), closure()), CLIP)
    model[0].bias.data[0] = torch.nan
    with pytest.raises(RuntimeError, match="the norm of all gradients is nan, and nothing has moved"):
        released.clipped_backward(closure, CLIP, error_if_nonfinite=True)
    assert not optimizer.state
    model[0].bias.data[0] = 0
    closure()
    with pytest.raises(RuntimeError, match="one pass a step"):
        released.clipped_backward(closure, CLIP)
    released.remove()
    optimizer.zero_grad()
    with pytest.raises(ValueError, match="of coordinates clip_grad_norm_ works, got 'coordinates'"):
        release_gradients(model, optimizer).clipped_backward(closure, CLIP)
