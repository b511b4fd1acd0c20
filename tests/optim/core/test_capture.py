"""``capturable``: a captured step, replayed, is the step that would have been taken."""

import json
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from captured_cases import CASES, GAP, SHAPES, STEPS, give, made, set_lr, stepped
from catalogue import VARIANTS
from recorded_graph import captured, capturing
from torch import nn

from gracile import optim
from gracile.optim import full_state, load_full_state, state_bytes
from gracile.optim.distributed import FlatShard, ShardRange, UnsupportedLayout, Workspace


def replayed(held, optimizer, steps=STEPS, device=lambda tensor: tensor):
    """As a loop of training does it. Returns how many steps were replayed."""
    graph, left, count = None, 0, 0
    for step in range(steps):
        give(held, step, device)
        set_lr(optimizer, step)
        if left:
            graph = graph or captured(optimizer)
            graph.replay()
            left, count = left - 1, count + 1
        else:
            optimizer.step()
            left = optimizer.steps_until_refresh()
    return count


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", CASES)
def test_replays_are_the_steps_that_would_have_been_taken(name):
    (held, optimizer), (same, twin), (others, plain) = made(name, True), made(name, True), made(name, False)
    assert replayed(held, optimizer) >= (8 if "rank" in CASES[name][2] else 10)
    stepped(same, twin)
    stepped(others, plain)
    for p, q, r in zip(held, same, others, strict=True):
        assert torch.equal(p, q)
        assert all(torch.equal(optimizer.state[p][key], value) for key, value in twin.state[q].items())
        assert optimizer.state[p]["step"] == STEPS
        assert (p - r).norm() <= CASES[name][3] * r.norm()


def on_a_device(names):
    command = [sys.executable, str(Path(__file__).with_name("captured_steps.py")), *names]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


SOME = ["GaLoreAdamW", "SCALE"]


@pytest.mark.parametrize("names", [SOME, pytest.param([*CASES], marks=pytest.mark.thorough)], ids=["some", "all"])
def test_a_captured_step_waits_for_no_device_and_replays_as_on_the_cpu(names):
    for name, told in on_a_device(names).items():
        assert told["waits"] == {}, name
        assert told["replayed"] >= 8, name
        assert told["away"] <= (0.1 if name == "by chance" else CASES[name][3]), name


# ---- what cannot be captured ----------------------------------------------------------------------------------------

KEPT_OUT = {
    "APOLLOAdamW": ({"rank": 4}, 'a random projection is drawn anew in every step; with proj="svd" it can be True'),
    "DCTAdamW": ({"rank": 4, "update_proj_gap": 5}, "with update_proj_gap=1 it can be True"),
    "GaLorePlusAdamW": ({"rank": 4}, "with residual_fraction=0 it can be True"),
    "LDAdamW": ({"rank": 4}, "its step asks the host, or changes what there is to replay"),
}


@pytest.mark.parametrize("name", KEPT_OUT)
def test_what_cannot_be_captured_is_refused_with_the_way_out(name):
    keys, reason = KEPT_OUT[name]
    group = [{"params": [nn.Parameter(torch.zeros(8, 8))], **keys}]
    with pytest.raises(ValueError, match=rf"^capturable must be False for {name}, got True: .*{reason}$"):
        getattr(optim, name)(group, capturable=True)


CLASSES = sorted({v.cls for v in VARIANTS.values() if v.cls is not torch.optim.AdamW}, key=lambda cls: cls.__name__)


@pytest.mark.parametrize("cls", CLASSES)
def test_every_class_says_whether_its_step_can_be_captured(cls):
    refused = pytest.raises(ValueError, match=f"^capturable must be False for {cls.__name__}, got True: ")
    with nullcontext() if cls.captures else refused:
        keys = {"total_steps": 9} if cls is optim.CastAdamS else {}
        cls([nn.Parameter(torch.zeros(8, 8))], capturable=True, **keys)


def stepped_once(capturable=True):
    held, optimizer = made("GaLoreAdamW", capturable)
    stepped(held, optimizer, 1)
    return held, optimizer


def test_a_step_that_is_no_ordinary_one_is_not_captured():
    held, optimizer = made("GaLoreAdamW", True)
    give(held, 0)
    with capturing(), pytest.raises(RuntimeError, match=r"^the first step of a parameter, .*take a step outside"):
        optimizer.step()
    assert optimizer.steps_until_refresh() == 0
    stepped(held, optimizer, 2)
    assert optimizer.steps_until_refresh() == 2
    graph = captured(optimizer)
    for _ in range(2):
        graph.replay()
    assert optimizer.steps_until_refresh() == 0
    stepped(held, optimizer, 1)
    assert optimizer.steps_until_refresh() == 3
    stepped(held, optimizer, 3)
    with (
        capturing(),
        pytest.raises(RuntimeError, match=r"^parameter 0, of shape \(80, 72\), is due .*steps_until_refresh"),
    ):
        optimizer.step()
    optimizer.load_state_dict(optimizer.state_dict())
    with capturing(), pytest.raises(RuntimeError, match="or the first after a load"):
        optimizer.step()


def test_numbers_that_a_graph_would_keep_are_refused():
    _, plain = stepped_once(capturable=False)
    with capturing(), pytest.raises(RuntimeError, match=r"needs capturable=True in every group$"):
        plain.step()
    with pytest.raises(ValueError, match=r"^betas must be numbers where capturable=True, got the tensor 0\.5$"):
        optim.Lion([nn.Parameter(torch.zeros(2))], betas=(torch.tensor(0.5), 0.9), capturable=True)
    _, optimizer = stepped_once()
    optimizer.param_groups[1]["lr"] = torch.tensor(0.1, device="meta")
    with capturing(), pytest.raises(RuntimeError, match=r"^lr is a tensor on meta, and a graph would keep the number"):
        optimizer.step()


def test_parameters_that_are_split_are_refused():
    _, optimizer = made("GaLoreAdamW", True)
    weight = torch.zeros(8, requires_grad=True)
    part = FlatShard(weight, weight, ShardRange((16,), (0, 8, 16), 0, None), 3, Workspace())
    with pytest.raises(UnsupportedLayout, match=r"^capturable must be False where .* split .*, as parameter 3 is: "):
        optimizer.with_host_clock(weight, part, optimizer.param_groups[0], {})


def experts(capturable):
    generator = torch.Generator().manual_seed(0)
    held = [nn.Parameter(torch.randn(3, 24, 16, generator=generator)), nn.Parameter(torch.ones(5))]
    groups = [{"params": held[:1], "rank": 4, "update_proj_gap": GAP}, {"params": held[1:]}]
    return held, optim.GaLoreAdamW(groups, lr=torch.tensor(0.1) if capturable else 0.1, capturable=capturable)


def test_experts_in_one_tensor_count_their_steps_once():
    (held, optimizer), (others, plain) = experts(True), experts(False)
    assert replayed(held, optimizer) == 8
    stepped(others, plain)
    assert optimizer.state[held[0]]["step"] == STEPS
    assert all((p - q).norm() <= 2e-6 * q.norm() for p, q in zip(held, others, strict=True))


# ---- state ----------------------------------------------------------------------------------------------------------


WAYS = {
    "state_dict": lambda own, other: own.load_state_dict(other.state_dict()),
    "full_state": lambda own, other: load_full_state(own, full_state(other)),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("capturable", [True, False])
def test_state_is_loaded_both_ways(capturable, way):
    _, saved = stepped_once(not capturable)
    _, optimizer = made("GaLoreAdamW", capturable)
    held = [p for group in optimizer.param_groups for p in group["params"]]
    stepped(held, optimizer, 1)
    WAYS[way](optimizer, saved)
    assert all(group["capturable"] is capturable for group in optimizer.param_groups)
    for own, other in zip(optimizer.state.values(), saved.state.values(), strict=True):
        assert all(torch.equal(own[key], value) for key, value in other.items())
    if capturable:
        stepped(held, optimizer, 2)
        captured(optimizer).replay()
        assert {float(state["step"]) for state in optimizer.state.values()} == {4.0}


def test_a_checkpoint_does_not_say_how_steps_are_taken():
    _, optimizer = stepped_once()
    assert all("capturable" not in group for group in optimizer.state_dict()["param_groups"])


def test_state_takes_as_many_bytes():
    _, optimizer = stepped_once()
    matrices = [optim.GaLoreAdamW.state_bytes_for(shape, rank=4, capturable=True) for shape in SHAPES[:3]]
    others = [optim.GaLoreAdamW.state_bytes_for(shape, capturable=True) for shape in SHAPES[3:]]
    assert sum(matrices + others) == state_bytes(optimizer)
