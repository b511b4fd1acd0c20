"""The bytes of state by what they are for, planned and held; parts of it as engines would split it."""

import pytest
import torch
from torch import nn

from gracile.optim import DCTAdamW, GaLoreAdamW, GaLorePlusAdamW, LDAdamW, Lion
from gracile.optim.distributed import as_one_buffer, by_rows, each_alone
from gracile.optim.memory import dtype_of_moments, planned_state, planned_state_by_kind, state_by_kind, state_bytes

CUTS = {"ZeRO 1 and 2": as_one_buffer, "ZeRO 3": each_alone, "FSDP2": by_rows}


def model():
    """Tall, wide and square matrices, none of them even, and a vector."""
    return nn.ModuleList([nn.Linear(37, 53), nn.Linear(60, 13, bias=False), nn.Linear(30, 30, bias=False)])


def groups_of(module, rank=7):
    matrices = [p for p in module.parameters() if p.dim() == 2]
    return [{"params": matrices, "rank": rank}, {"params": [p for p in module.parameters() if p.dim() != 2]}]


KINDS = {
    GaLoreAdamW: ({}, {"projectors": {"basis"}, "moments": {"step", "exp_avg", "exp_avg_sq"}}),
    GaLorePlusAdamW: (
        {},
        {
            "projectors": {"basis"},
            "indices": {"residual_places"},
            "moments": {"step", "exp_avg", "exp_avg_sq", "residual_exp_avg", "residual_exp_avg_sq"},
        },
    ),
    DCTAdamW: (
        {"error_feedback": "8bit"},
        {
            "error buffers": {"error", "error_scale", "error_minimum"},
            "indices": {"indices"},
            "moments": {"step", "exp_avg", "exp_avg_sq"},
        },
    ),
}


@pytest.mark.parametrize("cls", KINDS, ids=lambda cls: cls.__name__)
def test_the_kinds_of_a_matrix_are_as_declared(cls):
    keys, wanted = KINDS[cls]
    optimizer = cls([{"params": [nn.Parameter(torch.empty(37, 53, device="meta"))], "rank": 7}], **keys)
    (held,) = optimizer.held_by_position().values()
    found = {kind: {own.name for own in held if own.kind == kind} for kind in {own.kind for own in held}}
    assert found == wanted


@pytest.mark.parametrize(
    ("cls", "keys"),
    [(GaLoreAdamW, {}), (GaLorePlusAdamW, {}), (LDAdamW, {}), (DCTAdamW, {"error_feedback": "8bit"})],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_planned_kinds_are_those_of_a_step(cls, keys):
    real = model()
    optimizer = cls(groups_of(real), **keys)
    for p in real.parameters():
        p.grad = torch.randn_like(p)
    optimizer.step()
    with torch.device("meta"):
        planned = planned_state_by_kind(cls(groups_of(model()), **keys))
    assert planned == state_by_kind(optimizer)
    assert planned.total() == state_bytes(optimizer)
    assert len(planned) > 1


def test_the_dtype_of_moments_is_that_of_most_numbers():
    with torch.device("meta"):
        narrow = model().to(torch.bfloat16)
    assert dtype_of_moments(planned_state(torch.optim.AdamW(narrow.parameters()))) == torch.bfloat16  # clocks are fp32
    assert dtype_of_moments(planned_state(GaLoreAdamW(groups_of(narrow)))) == torch.float32  # P is bf16
    in_bf16 = GaLoreAdamW(groups_of(narrow), state_dtype=torch.bfloat16)
    assert dtype_of_moments(planned_state(in_bf16)) == torch.bfloat16
    assert dtype_of_moments(planned_state(torch.optim.SGD(narrow.parameters()))) is None


def test_frozen_parameters_have_no_state():
    with torch.device("meta"):
        empty = model()
    whole = planned_state_by_kind(Lion(empty.parameters())).total()
    empty[0].weight.requires_grad_(False)
    assert planned_state_by_kind(Lion(empty.parameters())).total() == whole - 4 * (37 * 53 + 1)
    assert (
        planned_state_by_kind(torch.optim.AdamW(empty.parameters())).total() == 2 * (whole - 4 * (37 * 53 + 1)) - 3 * 4
    )


@pytest.mark.parametrize("cut", CUTS.values(), ids=CUTS)
@pytest.mark.parametrize("size", [1, 2, 3, 16])
def test_the_parts_of_all_processes_are_the_whole(cut, size):
    """Of moments in a parameter's own coordinates: nothing is lost or held twice, and no part is much the fullest."""
    with torch.device("meta"):
        optimizer = Lion(model().parameters())
    elements = sum(p.numel() for group in optimizer.param_groups for p in group["params"])
    clocks = 4 * sum(len(group["params"]) for group in optimizer.param_groups)
    parts = [planned_state_by_kind(optimizer, cut, rank, size).total() - clocks for rank in range(size)]
    assert sum(parts) == 4 * elements
    assert max(parts) <= 4 * elements / size + 4 * 61 * 4  # uneven by a row of each, at most


@pytest.mark.parametrize("cut", CUTS.values(), ids=CUTS)
def test_rows_that_are_cut_keep_their_coordinates_on_both_sides(cut):
    """A basis is on every process, or in parts."""
    with torch.device("meta"):
        matrix = nn.Parameter(torch.empty(101, 40))
    for shared, held in ((False, [40 * 4] * 3), (True, [14 * 4, 14 * 4, 12 * 4])):
        optimizer = GaLoreAdamW([{"params": [matrix], "rank": 4, "shard_basis": shared}])
        plans = [planned_state_by_kind(optimizer, cut, rank, 3) for rank in range(3)]
        assert [plan["projectors"] for plan in plans] == [4 * elements for elements in held]
        rows = [(plan["moments"] - 4) // (2 * 4 * 4) for plan in plans]
        cut_rows = 0 if cut is by_rows else 2
        assert sum(rows) == 101 + cut_rows


def test_torch_optimizers_are_planned_in_the_parts_of_an_engine():
    with torch.device("meta"):
        empty = model()
    numel = sum(p.numel() for p in empty.parameters())
    optimizer = torch.optim.AdamW(empty.parameters(), fused=True)
    assert planned_state_by_kind(optimizer)["moments"] == 2 * 4 * numel + 4 * 4
    halves = [planned_state_by_kind(optimizer, as_one_buffer, rank, 2, torch.float32).total() for rank in range(2)]
    padded = -(-numel // 4) * 4
    assert padded > numel
    assert sum(halves) == 2 * 4 * padded + 2 * 4  # one flat tensor, one clock
    assert not optimizer.state
    assert optimizer.param_groups[0]["fused"]
