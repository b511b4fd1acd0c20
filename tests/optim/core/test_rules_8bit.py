"""Moments that are codes, moved by the kernel of bitsandbytes on a device that has it, and by a rule over numbers
elsewhere: the same codes, and the same weights but for rounding."""

from types import SimpleNamespace

import pytest
import torch
from pretend_device import on_device, pretend
from torch import nn

from gracile.models.convert import convert
from gracile.models.layers import SparseLowRankLinear
from gracile.optim import GaLoreAdamW8bit, SLTrainAdamW8bit, param_groups
from gracile.optim.core.rules_8bit import MOST, is_for_codes, is_moved_in_place

bitsandbytes = pytest.importorskip("bitsandbytes")
KERNEL, READ = "bitsandbytes::optimizer_update_8bit_blockwise", "bitsandbytes::dequantize_blockwise"
SHAPES = [(192, 128), (192, 128), (128, 300), (64, 40)]  # the third has no whole blocks, the last no codes
PLAIN_SHAPES = [(300, 20), (7, 11)]


def stepped(dtype, there, steps=4, **keys):
    """Weights and state after some steps, and what was launched."""
    torch.manual_seed(0)
    weights = [torch.randn(shape).to(dtype) for shape in SHAPES + PLAIN_SHAPES]
    gradients = [[torch.randn_like(W) for W in weights] for _ in range(steps)]
    with pretend() as record:
        held = [nn.Parameter(on_device(W) if there else W.clone()) for W in weights]
        groups = [{"params": held[: len(SHAPES)], "rank": 32, "update_proj_gap": 2}, {"params": held[len(SHAPES) :]}]
        optimizer = GaLoreAdamW8bit(groups, lr=0.01, weight_decay=0.1, **keys)
        for given in gradients:
            for p, grad in zip(held, given, strict=True):
                p.grad = on_device(grad) if there else grad.clone()
            optimizer.step()
    plain = [getattr(p.data, "held", p.data) for p in held]
    state = [{key: getattr(value, "held", value) for key, value in optimizer.state[p].items()} for p in held]
    return weights, plain, state, record.kernels


@pytest.mark.parametrize("maximize", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_kernel_moves_what_the_rule_moves(dtype, maximize):
    start, weights, state, kernels = stepped(dtype, there=True, maximize=maximize)
    _, expected, expected_state, none = stepped(dtype, there=False, maximize=maximize)
    # a stack of two matrices, one with other blocks, a plain parameter; in a refresh of negated gradients no stack
    assert kernels[KERNEL] == 4 * 3 + 2 * maximize
    assert not kernels[READ]
    assert not none[KERNEL]
    most = 2e-5 if dtype == torch.float32 else 0.1  # a direction is rounded to bf16 with its correction, or without it
    for W, own, other in zip(start, weights, expected, strict=True):
        moved, expected_move = (own - W).float(), (other - W).float()
        assert (moved - expected_move).norm() < most * expected_move.norm()
    for own, other in zip(state, expected_state, strict=True):
        assert own.keys() == other.keys()
        for key in own.keys() & {"exp_avg", "exp_avg_sq"}:
            assert own[key].dtype == other[key].dtype
            far = (own[key].float() - other[key].float()).abs() > 1  # neighbours, where bases differ by rounding
            assert far.float().mean() < 0.01


@pytest.mark.filterwarnings("ignore:.*no group of matrices")
def test_it_is_the_step_of_bitsandbytes():
    """Codes, scales and weights of plain parameters, to the bit: weight decay apart, which comes before the step."""
    torch.manual_seed(0)
    W = torch.randn(130, 64)
    theirs = nn.Parameter(W.clone())
    reference = bitsandbytes.optim.AdamW8bit([theirs], lr=0.01, weight_decay=0.0)
    gradients = [torch.randn_like(W) for _ in range(5)]
    with pretend() as record:
        own = nn.Parameter(on_device(W))
        optimizer = GaLoreAdamW8bit([own], lr=0.01, weight_decay=0.0)
        for grad in gradients:
            own.grad = on_device(grad)
            optimizer.step()
    for grad in gradients:
        theirs.grad = grad
        reference.step()
    assert record.kernels[KERNEL] == 5
    assert record.launches == 5 + record.kernels["zeros"] + record.kernels["zero_"] + record.kernels["fill_"]
    assert torch.equal(own.data.held, theirs.data)
    assert torch.equal(optimizer.state[own]["exp_avg"].held, reference.state[theirs]["state1"])
    assert torch.equal(optimizer.state[own]["exp_avg_sq_absmax"].held, reference.state[theirs]["absmax2"])


def test_factored_layers_with_codes():
    torch.manual_seed(0)
    model = convert(nn.Sequential(nn.Linear(256, 128)), SparseLowRankLinear, ["0"], rank=32)
    with pretend() as record:
        for name, p in list(model[0]._parameters.items()):
            if p is not None:
                model[0]._parameters[name] = nn.Parameter(on_device(p), requires_grad=p.requires_grad)
        optimizer = SLTrainAdamW8bit(param_groups(model))
        for p in model.parameters():
            p.grad = on_device(torch.randn(p.shape))
        optimizer.step()
    large = [p for p in model.parameters() if p.numel() >= 4096]
    assert record.kernels[KERNEL] == len(large) == 2
    assert not record.kernels[READ]


def test_where_the_kernel_is_not_for():
    codes = {"exp_avg": torch.zeros(512, dtype=torch.uint8), "exp_avg_sq": torch.zeros(512, dtype=torch.uint8)}
    numbers = {key: value.float() for key, value in codes.items()}
    whole = SimpleNamespace(device=torch.device("cuda"), split=False)
    assert is_for_codes(whole, codes)
    assert not is_for_codes(whole, numbers)
    assert not is_for_codes(SimpleNamespace(device=torch.device("cuda"), split=True), codes)
    assert not is_for_codes(SimpleNamespace(device=torch.device("cpu"), split=False), codes)
    assert not is_for_codes(SimpleNamespace(device=torch.device("mps"), split=False), codes)


def test_weights_that_the_kernel_takes_as_they_lie():
    W = torch.zeros(4, 6)
    assert is_moved_in_place(W, W.clone())
    assert not is_moved_in_place(W, W.bfloat16())
    assert not is_moved_in_place(W, torch.zeros(6, 4).t())
    assert not is_moved_in_place(*[torch.empty(MOST + 1, device="meta")] * 2)
