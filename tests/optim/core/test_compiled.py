"""``torch.compile(optimizer.step)``: a graph for each kind of batch, compiled once."""

import pytest
import torch
from captured_cases import CASES, give, made
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch._dynamo.utils import counters

from gracile import optim
from gracile.optim.core import batches, optimizer
from gracile.optim.distributed import blocked
from gracile.optim.low_rank import optimizer as low_rank

STEPS = 6
NOT_TRACED = {"GaLoreAdamW8bit", "Q-GaLore", "by chance"}
TRACED = [name for name in CASES if name not in NOT_TRACED]
ALWAYS = {"GaLoreAdamW"}


def some(names):
    return [name if name in ALWAYS else pytest.param(name, marks=pytest.mark.thorough) for name in names]


@pytest.fixture(autouse=True)
def _nothing_compiled():
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def compiled_and_not(name, backend="eager", capturable=False):
    """Steps of both with a schedule and another decay in each; how many graphs there were after each."""
    (held, optimizer), (others, twin) = made(name, capturable), made(name, False)
    counter, graphs = CompileCounterWithBackend(backend), []
    rated = [] if optimizer.defaults["lr"] is None else [optimizer, twin]
    schedules = [torch.optim.lr_scheduler.LambdaLR(one, lambda t: t / STEPS) for one in rated]  # from zero
    step = torch.compile(optimizer.step, backend=counter)
    for t in range(STEPS):
        for group in (*optimizer.param_groups, *twin.param_groups):
            if group["weight_decay"]:
                group["weight_decay"] = 0.1 + 0.01 * t
        give(held, t)
        give(others, t)
        step()
        twin.step()
        for schedule in schedules:
            schedule.step()
        graphs.append(counters["stats"]["unique_graphs"])
    return held, others, graphs


def assert_close(held, others, far=1e-6):
    for p, q in zip(held, others, strict=True):
        assert (p - q).norm() <= far * q.norm()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", some(TRACED))
def test_each_kind_of_batch_is_one_graph_that_is_compiled_once(name):
    held, others, graphs = compiled_and_not(name)
    assert graphs == [4] * STEPS  # one a shape, whole: there is a refresh between, and a break would make more
    assert_close(held, others)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", some(["GaLoreAdamW", "GaLoreLion", "FiraAdamW", "SCALE"]))
def test_so_is_a_stack_and_what_moves_together(name, monkeypatch):
    for module in (batches, optimizer, low_rank):
        monkeypatch.setattr(module, "launches_cost", lambda device: True)
    held, others, graphs = compiled_and_not(name)
    assert graphs == [3] * STEPS  # two alike matrices, the wide one, all others
    assert_close(held, others)


@pytest.mark.thorough
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("backend", ["eager", "inductor"])
def test_a_stack_that_is_no_stack_where_its_subspace_is_found(backend, monkeypatch):
    for module in (batches, optimizer, low_rank):
        monkeypatch.setattr(module, "launches_cost", lambda device: True)
    held, others, graphs = compiled_and_not("GradNormLoRPAdamW", backend)
    assert graphs == [3, *[4] * (STEPS - 1)]
    assert_close(held, others)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", some(["GaLoreAdamW", "FiraAdamW", "GradNormLoRPAdamW", "APOLLOAdamW svd", "SCALE"]))
def test_a_graph_moves_at_once_what_is_moved_in_blocks(name, monkeypatch):
    for limit in ("LARGE", "LARGE_TWICE", "BLOCK"):
        monkeypatch.setattr(blocked, limit, 1000)
    held, others, graphs = compiled_and_not(name)
    assert graphs == [4] * STEPS
    assert_close(held, others)


@pytest.mark.thorough
@pytest.mark.filterwarnings("ignore")
def test_it_compiles_with_capturable_too():
    held, others, graphs = compiled_and_not("GaLoreAdamW", capturable=True)
    assert graphs == [4] * STEPS
    assert_close(held, others)


@pytest.mark.thorough
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["GaLoreAdamW", "FiraAdamW"])
def test_code_that_is_generated_computes_the_same(name):
    held, others, graphs = compiled_and_not(name, backend="inductor")
    assert graphs == [4] * STEPS
    assert_close(held, others)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", sorted(NOT_TRACED))
def test_what_no_graph_can_hold_is_stepped_as_ever(name):
    held, others, graphs = compiled_and_not(name)
    assert graphs == [0] * STEPS
    assert all(torch.equal(p, q) for p, q in zip(held, others, strict=True))


def test_nothing_is_compiled_where_it_was_not_asked_for():
    held, one = made("GaLoreAdamW", False)
    give(held, 0)
    torch.compile(one.step, backend="eager")()
    assert counters["stats"].pop("unique_graphs") == 4
    one.step()
    assert counters["stats"]["unique_graphs"] == 0


def test_more_kinds_of_batches_than_torch_compiles_of_a_function():
    held = [nn.Parameter(torch.ones(3 + size)) for size in range(12)]
    one = optim.Lion(held, lr=0.1)
    give(held, 0)
    torch.compile(one.step, backend="eager")()
    assert counters["stats"]["unique_graphs"] == 12
