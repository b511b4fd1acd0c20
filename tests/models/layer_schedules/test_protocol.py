"""Every schedule of the registry can be driven through the one protocol."""

import inspect

import pytest
import torch
from torch import nn

from gracile.models.convert import convert
from gracile.models.layer_schedules.protocol import LayerSchedule
from gracile.registry import LAYERS

SCHEDULED = [entry for entry in LAYERS.values() if entry.schedule is not None]
METHODS = ("begin", "end", "loss", "metrics")


@pytest.mark.parametrize("entry", SCHEDULED, ids=lambda entry: entry.name)
@pytest.mark.parametrize("method", METHODS)
def test_a_schedule_has_the_methods_of_the_protocol(entry, method):
    ours, asked = (inspect.signature(getattr(cls, method)) for cls in (entry.schedule, LayerSchedule))
    assert list(ours.parameters) == list(asked.parameters)


@pytest.mark.parametrize("entry", SCHEDULED, ids=lambda entry: entry.name)
def test_a_run_is_driven_through_it(entry):
    model = convert(nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16)), entry.cls, ["0", "1"])
    schedule = entry.schedule(model)
    for step in range(4):
        schedule.begin(step, 4)
        loss = model(torch.ones(2, 16)).sum()
        extra = schedule.loss()
        loss = loss if extra is None else loss + extra
        loss.backward()
        schedule.end(step + 1, 4)
        assert all(isinstance(value, float) for value in schedule.metrics().values())
    assert loss.isfinite()
