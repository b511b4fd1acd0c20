"""JaggedCosineLR at its corners, and after a resumption."""

import math

import pytest
import torch

from gracile.optim import JaggedCosineLR


def rates(steps=1000, **keys):
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=2.0)
    scheduler = JaggedCosineLR(optimizer, **keys)
    seen = []
    for _ in range(steps):
        seen.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return seen


KEYS = {"total_steps": 1000, "warmup_steps": 100, "restart_every": 250, "restart_warmup_steps": 50, "min_ratio": 0.1}


def cosine(t):
    return 2.0 * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * (t - 100) / 900)))


def test_its_corners():
    seen = rates(1001, **KEYS)
    assert seen[0] == 0
    assert seen[50] == pytest.approx(1.0)
    for t in (100, 249, 300, 499, 550, 999):
        assert seen[t] == pytest.approx(cosine(t))
    assert seen[1000] == 0  # a restart again, were there more steps
    for restart in (250, 500, 750):
        assert seen[restart] == 0
        assert seen[restart + 25] == pytest.approx(cosine(restart + 50) / 2)
        assert seen[restart + 50] == pytest.approx(cosine(restart + 50))


def test_without_restarts_it_is_a_cosine():
    seen = rates(900, **{**KEYS, "restart_every": 1000, "restart_warmup_steps": 0})
    assert seen[100:] == pytest.approx([cosine(t) for t in range(100, 900)])


def test_it_goes_on():
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=2.0)
    scheduler = JaggedCosineLR(optimizer, **KEYS)
    for _ in range(260):
        optimizer.step()
        scheduler.step()
    again = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=2.0)
    resumed = JaggedCosineLR(again, **KEYS)
    again.load_state_dict(optimizer.state_dict())
    resumed.load_state_dict(scheduler.state_dict())
    for _ in range(50):
        for one, other in ((optimizer, scheduler), (again, resumed)):
            one.step()
            other.step()
        assert again.param_groups[0]["lr"] == optimizer.param_groups[0]["lr"]


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"total_steps": 0}, "total_steps must be a whole number >= 1, got 0"),
        ({"restart_every": 0}, "restart_every must be a whole number >= 1, got 0"),
        ({"warmup_steps": 251}, "warmup_steps must be a whole number from 0 to 250 here, got 251"),
        ({"warmup_steps": 1.5}, "warmup_steps must be a whole number from 0 to 250 here, got 1.5"),
        ({"restart_warmup_steps": 250}, "restart_warmup_steps must be below restart_every=250, got 250"),
        ({"min_ratio": 2}, "min_ratio must be a number in .0, 1., got 2"),
    ],
)
def test_bad_values_are_refused(changed, message):
    with pytest.raises(ValueError, match=message):
        rates(1, **{**KEYS, **changed})
