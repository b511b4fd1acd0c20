"""DeepSpeed's flat tensors, built here as it builds them: where parameters are found, and that weights are compared."""

import pytest
import torch
from torch import nn

from gracile.optim.distributed import ParamRef, ProcessGroup, UnsupportedLayout
from gracile.optim.distributed.deepspeed import zero_ranges
from gracile.optim.distributed.process_group import FakeGroup

SHAPES = [(3, 5), (7,), (4, 4)]  # 38 elements: over three processes, parts are short and end inside of parameters
SIZE = 3


class Engine:
    """What is read of ZeRO 3's optimizer."""

    def __init__(self, parameters, flat):
        self.fp32_partitioned_groups_flat, self.fp16_groups = [flat], [parameters]
        self.sub_group_process_groups = [None]


@pytest.fixture(params=range(SIZE))
def index(request, monkeypatch):
    monkeypatch.setattr(ProcessGroup, "for_tensors_on", classmethod(lambda *_: FakeGroup(request.param, SIZE)))
    return request.param


def values():
    draw = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=draw) for shape in SHAPES]


def refs_of(parameters):
    return [ParamRef(parameters, i, i, shape) for i, shape in enumerate(SHAPES)]


def zero3(index):
    """Each parameter in parts of equal length, which the padded flat tensor has one after the other."""
    parameters, flat = [], []
    for whole in values():
        part = -(-whole.numel() // SIZE)
        own = torch.nn.functional.pad(whole.flatten(), (0, part * SIZE - whole.numel()))[index * part :][:part]
        p = nn.Parameter(torch.empty(0))
        p.ds_id, p.ds_numel, p.ds_tensor, p.partition_numel = 0, whole.numel(), own.clone(), lambda part=part: part
        parameters.append(p)
        flat.append(own)
    flat = torch.cat(flat)
    for p in parameters:
        p._z3_optimizer = Engine(parameters, flat)
    return parameters, flat


def zero1(index):
    """Parameters are views into a buffer, which is cut into parts of equal length. They lie there in another order."""
    part = 14  # 42 elements with the padding
    buffer, parameters, begin = torch.zeros(part * SIZE), {}, 0
    for number in (2, 0, 1):
        whole = values()[number]
        view = buffer[begin : begin + whole.numel()].view(whole.shape).copy_(whole)
        begin += whole.numel()
        parameters[number] = nn.Parameter(view)
        parameters[number]._dp_group = None
    return [parameters[number] for number in range(3)], buffer[index * part : (index + 1) * part].clone()


@pytest.mark.parametrize("stage", [zero3, zero1])
def test_each_process_finds_its_parts(stage, index):
    parameters, flat = stage(index)
    found = zero_ranges(flat, refs_of(parameters))
    assert {ref.position for ref, _ in found} == {0, 1, 2}
    for ref, held in found:
        whole = values()[ref.position].flatten()
        assert held.bounds[0] == 0
        assert held.bounds[-1] == len(whole)
        assert torch.equal(held.of(flat), whole[held.start : held.stop])


@pytest.mark.parametrize("stage", [zero3, zero1])
def test_weights_that_lie_elsewhere_are_refused(stage, index):
    parameters, flat = stage(index)
    flat.copy_(flat.flip(0))
    with pytest.raises(UnsupportedLayout, match="flat partition does not hold the parameter of shape"):
        zero_ranges(flat, refs_of(parameters))
