"""Every optimizer in the loops people have: schedulers, autocast, gradient scaling and clipping, averages, copies."""

import copy
import pickle
import runpy
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn.utils import clip_grad_norm_
from torch.optim.lr_scheduler import LambdaLR
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from gracile.optim import param_groups

METHODS = runpy.run_path(str(Path(__file__).with_name("test_every_class.py")))["METHODS"]  # the tests are no package

by_method = pytest.mark.parametrize("method", METHODS.values(), ids=METHODS.keys())


# ---- helpers --------------------------------------------------------------------------------------------------------


def model_for(dtype=torch.float32):
    """Three matrices, wide, tall and square, their biases and a norm."""
    generator = torch.Generator().manual_seed(0)
    model = nn.Sequential(
        nn.Linear(24, 12), nn.LayerNorm(12), nn.Tanh(), nn.Linear(12, 20), nn.Tanh(), nn.Linear(20, 20)
    )
    for p in model.parameters():
        p.data.normal_(std=0.3, generator=generator)
    return model.to(dtype)


def optimizer_for(method, model, **keys):
    return method.cls(param_groups(model, target_modules=r"\d", **method.ranked), **method.keys | keys)


def both(method, **keys):
    model = model_for()
    return model, optimizer_for(method, model, **keys)


def batch(t, dtype=torch.float32):
    generator = torch.Generator().manual_seed(100 + t)
    return torch.randn(16, 24, generator=generator, dtype=dtype), torch.randn(16, 20, generator=generator, dtype=dtype)


def loss_of(model, t):
    inputs, targets = batch(t, next(model.parameters()).dtype)
    return nn.functional.mse_loss(model(inputs), targets)


def give_gradients(model, t):
    model.zero_grad()
    loss_of(model, t).backward()


def train(model, optimizer, first, last, scheduler=None):
    """Steps ``first`` to ``last - 1``; subspaces are refreshed at 0, 4 and 8."""
    for t in range(first, last):
        give_gradients(model, t)
        optimizer.step()
        if scheduler:
            scheduler.step()


def tensors_of(model, optimizer):
    held = [p for group in optimizer.param_groups for p in group["params"]]
    states = {f"{i}.{k}": v.clone() for i, p in enumerate(held) for k, v in optimizer.state[p].items()}
    return states | {name: p.detach().clone() for name, p in model.named_parameters()}


def assert_same(one, other, **tolerance):
    """Weights and states as ``tensors_of`` lists them, to the bit unless a tolerance is given."""
    assert one.keys() == other.keys()
    for key in one:
        torch.testing.assert_close(one[key], other[key], equal_nan=True, msg=key, **tolerance or {"rtol": 0, "atol": 0})


def weights_of(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


# ---- schedulers -----------------------------------------------------------------------------------------------------


def scheduled(method):
    model, optimizer = both(method)
    return model, optimizer, LambdaLR(optimizer, lambda t: max(0.0, 1 - t / 9))


@by_method
def test_a_scheduler_sets_the_learning_rate_and_at_zero_nothing_moves(method):
    model, optimizer, scheduler = scheduled(method)
    for t in range(9):
        assert {group["lr"] for group in optimizer.param_groups} == {method.keys["lr"] * (1 - t / 9)}
        before = weights_of(model)
        train(model, optimizer, t, t + 1, scheduler)
        assert all(not torch.equal(p, before[name]) for name, p in model.named_parameters())
    before = weights_of(model)
    train(model, optimizer, 9, 11, scheduler)
    if "beta1" not in method.keys:  # Adafactor's moment averages whole steps, their learning rates too
        assert_same(before, weights_of(model), rtol=1e-6, atol=1e-7)


@by_method
def test_a_scheduled_run_resumes_to_the_bit(method):
    model, optimizer, scheduler = scheduled(method)
    train(model, optimizer, 0, 5, scheduler)
    saved = copy.deepcopy([model.state_dict(), optimizer.state_dict(), scheduler.state_dict()])
    train(model, optimizer, 5, 9, scheduler)
    resumed = scheduled(method)
    for part, state in zip(resumed, saved, strict=True):
        part.load_state_dict(state)
    train(*resumed[:2], 5, 9, resumed[2])
    assert_same(tensors_of(model, optimizer), tensors_of(*resumed[:2]))
    assert [group["lr"] for group in optimizer.param_groups] == [group["lr"] for group in resumed[1].param_groups]


# ---- mixed precision ------------------------------------------------------------------------------------------------


@by_method
def test_a_step_inside_autocast_is_the_step_outside(method):
    runs = []
    for inside in (True, False):
        model, optimizer = both(method)
        for t in range(6):
            model.zero_grad()
            with torch.autocast("cpu", dtype=torch.bfloat16):
                loss = loss_of(model, t)
                loss.backward()
                if inside:
                    optimizer.step()
            if not inside:
                optimizer.step()
        runs.append(tensors_of(model, optimizer))
    assert_same(*runs)


@by_method
def test_a_gradient_scaler_skips_a_step_with_an_overflow_and_changes_no_other(method):
    """Scales are powers of two, so that unscaled gradients are the plain ones."""
    model, optimizer = both(method)
    plain_model, plain = both(method)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    for t in range(7):
        model.zero_grad()
        scaler.scale(loss_of(model, t)).backward()
        if t in (0, 4):
            before = tensors_of(model, optimizer) if t else weights_of(model)
            model[3].weight.grad[1, 2] = float("inf")
            scaler.step(optimizer)
            assert_same(tensors_of(model, optimizer), before)
        else:
            scaler.step(optimizer)
            train(plain_model, plain, t, t + 1)
        scaler.update()
    assert scaler.get_scale() == 2.0**8
    assert_same(tensors_of(model, optimizer), tensors_of(plain_model, plain))


# ---- gradients ------------------------------------------------------------------------------------------------------


@by_method
def test_clipped_gradients_are_what_a_step_sees(method):
    """Against gradients scaled by hand; every second one is above the bound."""
    (model, optimizer), (other, by_hand) = both(method), both(method)
    for t in range(7):
        for one in (model, other):
            one.zero_grad()
            (loss_of(one, t) * (1 + 9 * (t % 2))).backward()
        norm = sum(p.grad.square().sum() for p in other.parameters()).sqrt()
        assert (norm > 3.0) == (t % 2 == 1)
        clip_grad_norm_(model.parameters(), 3.0)
        optimizer.step()
        for p, q in zip(other.parameters(), model.parameters(), strict=True):
            p.grad.mul_(torch.clamp(3.0 / (norm + 1e-6), max=1.0))
            torch.testing.assert_close(p.grad, q.grad)
            p.grad.copy_(q.grad)  # the last bit flips signs in Lion
        by_hand.step()
    assert_same(tensors_of(model, optimizer), tensors_of(other, by_hand))


@by_method
def test_four_micro_batches_make_the_step_of_one_batch(method):
    """In fp64, where the order of a sum flips no sign of Lion's and no code of four bits."""
    whole, parts = model_for(torch.float64), model_for(torch.float64)
    one, other = optimizer_for(method, whole), optimizer_for(method, parts)
    start = weights_of(whole)
    for t in range(6):
        give_gradients(whole, t)
        one.step()
        parts.zero_grad()
        for inputs, targets in zip(*(x.chunk(4) for x in batch(t, torch.float64)), strict=True):
            (nn.functional.mse_loss(parts(inputs), targets) / 4).backward()
        other.step()
    assert_same(weights_of(whole), weights_of(parts), rtol=0, atol=1e-5)
    assert all((p - start[name]).abs().max() > 1e-2 for name, p in whole.named_parameters())


@by_method
def test_a_closure_is_called_with_gradients_on_and_its_loss_comes_back(method):
    (model, optimizer), (other, plain) = both(method), both(method)
    for t in range(6):

        def closure(t=t):
            give_gradients(model, t)
            return loss_of(model, t).detach()

        with torch.no_grad():
            told = loss_of(other, t)
            assert torch.equal(optimizer.step(closure), told)
        train(other, plain, t, t + 1)
    assert_same(tensors_of(model, optimizer), tensors_of(other, plain))


# ---- beside the optimizer -------------------------------------------------------------------------------------------


@by_method
def test_an_average_of_the_weights_follows_them_and_leaves_them_alone(method):
    (model, optimizer), (other, plain) = both(method), both(method)
    averaged = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.75))
    expected = None
    for t in range(6):
        train(model, optimizer, t, t + 1)
        averaged.update_parameters(model)
        train(other, plain, t, t + 1)
        now = weights_of(other)
        expected = {k: 0.75 * expected[k] + 0.25 * now[k] for k in now} if expected else now
    assert_same(tensors_of(model, optimizer), tensors_of(other, plain))
    assert_same(weights_of(averaged.module), expected, rtol=1e-5, atol=1e-6)


@by_method
@pytest.mark.parametrize(
    "duplicate", [copy.deepcopy, lambda both: pickle.loads(pickle.dumps(both))], ids=["copy", "pickle"]
)
def test_a_copy_of_model_and_optimizer_goes_on_as_the_original_does(method, duplicate):
    model, optimizer = both(method)
    train(model, optimizer, 0, 6)
    twin, twin_optimizer = duplicate((model, optimizer))
    halted = tensors_of(model, optimizer)
    assert_same(tensors_of(twin, twin_optimizer), halted)
    train(twin, twin_optimizer, 6, 10)
    assert_same(tensors_of(model, optimizer), halted)
    train(model, optimizer, 6, 10)
    assert_same(tensors_of(model, optimizer), tensors_of(twin, twin_optimizer))


@by_method
def test_a_group_added_later_starts_afresh_and_the_others_do_not_notice(method):
    """The new matrix goes the way of one that was there, at the same place, in an optimizer that begins then."""
    (model, optimizer), (other, plain), (third, fresh) = both(method), both(method), both(method)
    third.requires_grad_(False)
    added, alone = (nn.Parameter(torch.linspace(-0.5, 0.5, 240).view(20, 12).sin()) for _ in range(2))
    late = method.ranked | {"lr": 0.05}
    fresh.add_param_group({"params": [alone], **late})
    train(model, optimizer, 0, 3)
    train(other, plain, 0, 3)
    optimizer.add_param_group({"params": [added], **late})
    for t in range(3, 9):
        give_gradients(model, t)
        added.grad, alone.grad = (torch.randn(20, 12, generator=torch.Generator().manual_seed(t)) for _ in range(2))
        optimizer.step()
        fresh.step()
        train(other, plain, t, t + 1)
    assert_same(weights_of(model), weights_of(other))
    assert torch.equal(added, alone)
    assert_same(optimizer.state[added], fresh.state[alone])
    assert optimizer.state[added]["step"] == 6


# ---- torch.compile --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def compiled():
    """One model for all: compiling takes seconds, new weights do not."""
    model = model_for()
    return model, torch.compile(model, backend="aot_eager")


@by_method
def test_a_compiled_model_trains_as_the_plain_one(method, compiled):
    source, fast = compiled
    source.load_state_dict(model_for().state_dict())
    optimizer = optimizer_for(method, source)
    model, plain = both(method)
    for t in range(6):
        train(model, plain, t, t + 1)
        source.zero_grad()
        loss_of(fast, t).backward()
        optimizer.step()
    assert_same(weights_of(source), weights_of(model), rtol=0, atol=1e-5)
