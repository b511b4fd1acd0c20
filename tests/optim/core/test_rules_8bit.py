"""Moments that are codes, moved by the kernel of bitsandbytes on a device that has it, and by a rule over numbers
elsewhere: the same codes, and the same weights but for rounding. Here the CPU is such a device: its kernel is there."""

from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from gracile.models.convert import convert
from gracile.models.layers import SparseLowRankLinear
from gracile.optim import GaLoreAdamW8bit, SLTrainAdamW8bit, param_groups
from gracile.optim.core import batches, rules_8bit
from gracile.optim.core import optimizer as stepping
from gracile.optim.core.rules_8bit import MOST, is_for_codes, is_moved_in_place
from gracile.optim.low_rank import optimizer as low_rank

bitsandbytes = pytest.importorskip("bitsandbytes")
SHAPES = [(192, 128), (192, 128), (128, 300), (64, 40)]  # the third has no whole blocks, the last no codes
PLAIN_SHAPES = [(300, 20), (7, 11)]


@pytest.fixture
def called(monkeypatch):
    """How often the kernel moved codes, and how often these were read."""
    calls = Counter()

    def counted(name):
        run = getattr(bitsandbytes.functional, name)

        def counting(*args, **kwargs):
            calls[name] += 1
            return run(*args, **kwargs)

        return counting

    for name in ("optimizer_update_8bit_blockwise", "dequantize_blockwise"):
        monkeypatch.setattr(bitsandbytes.functional, name, counted(name))
    return calls


@pytest.fixture
def with_kernel(monkeypatch):
    monkeypatch.setattr(rules_8bit, "WITH_KERNEL", {"cpu"})
    for module in (batches, stepping, low_rank):
        monkeypatch.setattr(module, "launches_cost", lambda device: True)


def stepped(dtype, steps=4, **keys):
    """First weights, last ones, and state."""
    torch.manual_seed(0)
    weights = [torch.randn(shape).to(dtype) for shape in SHAPES + PLAIN_SHAPES]
    held = [nn.Parameter(W.clone()) for W in weights]
    groups = [{"params": held[: len(SHAPES)], "rank": 32, "update_proj_gap": 2}, {"params": held[len(SHAPES) :]}]
    optimizer = GaLoreAdamW8bit(groups, lr=0.01, weight_decay=0.1, **keys)
    for _ in range(steps):
        for p in held:
            p.grad = torch.randn(p.shape).to(dtype)
        optimizer.step()
    return weights, [p.detach() for p in held], [optimizer.state[p] for p in held]


@pytest.mark.parametrize("maximize", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_kernel_moves_what_the_rule_moves(dtype, maximize, called, request):
    _, expected, expected_state = stepped(dtype, maximize=maximize)
    assert not called["optimizer_update_8bit_blockwise"]
    called.clear()
    request.getfixturevalue("with_kernel")
    start, weights, state = stepped(dtype, maximize=maximize)
    # a stack of two matrices, one with other blocks, a plain parameter; in a refresh of negated gradients no stack
    assert called == {"optimizer_update_8bit_blockwise": 4 * 3 + 2 * maximize}
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
def test_it_is_the_step_of_bitsandbytes(with_kernel, called):
    """Codes, scales and weights of plain parameters, to the bit; but decay, which comes before the step there."""
    torch.manual_seed(0)
    own, theirs = (nn.Parameter(torch.randn(130, 64)) for _ in range(2))
    own.data.copy_(theirs.data)
    reference = bitsandbytes.optim.AdamW8bit([theirs], lr=0.01, weight_decay=0.0)
    optimizer = GaLoreAdamW8bit([own], lr=0.01, weight_decay=0.0)
    for _ in range(5):
        own.grad = torch.randn_like(own)
        theirs.grad = own.grad.clone()
        optimizer.step()
        reference.step()
    assert called == {"optimizer_update_8bit_blockwise": 2 * 5}
    state, expected = optimizer.state[own], reference.state[theirs]
    assert torch.equal(own, theirs)
    assert torch.equal(state["exp_avg"], expected["state1"])
    assert torch.equal(state["exp_avg_sq_absmax"], expected["absmax2"])


def test_factored_layers_with_codes(with_kernel, called):
    model = convert(nn.Sequential(nn.Linear(256, 128)), SparseLowRankLinear, ["0"], rank=32)
    optimizer = SLTrainAdamW8bit(param_groups(model))
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    optimizer.step()
    large = [p for p in model.parameters() if p.numel() >= 4096]
    assert called == {"optimizer_update_8bit_blockwise": len(large)}


def test_a_step_for_a_graph_is_moved_by_the_rule(with_kernel, called):
    """The kernel takes Python's numbers, which a graph would keep."""
    stepped(torch.float32, capturable=True)
    assert not called["optimizer_update_8bit_blockwise"]
    assert called["dequantize_blockwise"]


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
