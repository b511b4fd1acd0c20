"""Declared state is the state: its tensors, how they are split, and their way to another layout and back."""

import pytest
import torch
from torch import nn

from gracile import optim
from gracile.optim.distributed import as_one_buffer, by_rows, each_alone
from gracile.optim.state.spec import Coordinates, Placement, from_portable, held_tensors, to_portable

RANK = {"rank": 4, "update_proj_gap": 3}
CASES = {
    "GaLoreAdamW": (optim.GaLoreAdamW, {}, RANK),
    "GaLoreAdamW8bit": (optim.GaLoreAdamW8bit, {}, {"rank": 64, "update_proj_gap": 3}),
    "Q-GaLore": (optim.GaLoreAdamW8bit, {}, RANK | {"quant": True, "cos_threshold": 0.4}),
    "GaLoreAdafactor": (optim.GaLoreAdafactor, {"beta1": 0.9}, RANK),
    "GaLorePlusAdamW": (optim.GaLorePlusAdamW, {}, RANK | {"residual_fraction": 0.1}),
    "FiraAdamW": (optim.FiraAdamW, {}, RANK),
    "APOLLOAdamW": (optim.APOLLOAdamW, {}, RANK),
    "APOLLOAdamW-svd": (optim.APOLLOAdamW, {}, RANK | {"proj": "svd"}),
    "DCTAdamW-fp32": (optim.DCTAdamW, {}, {"rank": 4, "error_feedback": "fp32"}),
    "DCTAdamW-4bit": (optim.DCTAdamW, {}, {"rank": 4, "error_feedback": "4bit"}),
    "GradNormLoRPAdamW": (optim.GradNormLoRPAdamW, {}, RANK),
    "LDAdamW": (optim.LDAdamW, {}, {"rank": 4}),
    "Lion": (optim.Lion, {}, {}),
    "SCALE": (optim.SCALE, {}, {"role": "head"}),
    "RigLAdamW": (optim.RigLAdamW, {"t_end": 10}, {"sparsity": 0.5}),
    "SparseAdamW-momentum": (optim.SparseAdamW, {"grow": "momentum", "t_end": 10}, {"sparsity": 0.5}),
    "CastAdamS": (optim.CastAdamS, {"n": None, "total_steps": 9}, {"n": 2, "m": 4}),
    "HyperSparseAdamW": (optim.HyperSparseAdamW, {}, {"sparsity": 0.5}),
    "WGSEFAdamW": (optim.WGSEFAdamW, {}, {"keep": 0.5}),
}
SHAPES = [(72, 24), (24, 72), (80, 80)]
CUTS = {"ZeRO 1 and 2": as_one_buffer, "ZeRO 3": each_alone, "FSDP2": by_rows}

by_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


def optimizer_for(case, device="cpu"):
    cls, keys, matrix_keys = case
    generator = torch.Generator().manual_seed(0)
    matrices = [nn.Parameter(torch.randn(shape, generator=generator).to(device)) for shape in SHAPES]
    vector = nn.Parameter(torch.randn(72, generator=generator).to(device))
    return cls([{"params": matrices, **matrix_keys}, {"params": [vector]}], **keys)


def stepped(case, steps=2):
    optimizer, generator = optimizer_for(case), torch.Generator().manual_seed(1)
    for _ in range(steps):
        for group in optimizer.param_groups:
            for p in group["params"]:
                p.grad = torch.randn(p.shape, generator=generator)
        optimizer.step()
    return optimizer


@by_case
def test_the_tensors_held_are_those_declared(case):
    """In name, shape, dtype and device; packed ones have as many weights as their mask."""
    optimizer = stepped(case)
    for _, shard, group, state in optimizer.held_parameters():
        declared = {held.name: held for held in held_tensors(optimizer.specs(shard, group), shard)}
        assert list(state) == list(declared)
        weights = len(state["indices"]) if "indices" in state and "sparsity" in group else None
        for key, value in state.items():
            packed = weights is not None and key in ("indices", "exp_avg", "exp_avg_sq") and value.dim() == 1
            assert tuple(value.shape) == ((weights,) if packed and group["sparsity"] else declared[key].shape), key
            assert value.dtype == declared[key].dtype, key


@by_case
def test_to_its_portable_form_and_back_it_is_the_same(case):
    optimizer = stepped(case)
    for _, shard, group, state in optimizer.held_parameters():
        specs = optimizer.specs(shard, group)
        portable = to_portable(specs, shard, state)
        assert {key: tuple(value.shape) for key, value in portable.items()} == {s.name: s.shape for s in specs}
        back = from_portable(specs, shard, portable)
        assert back.keys() == state.keys()
        for key, value in back.items():
            if (
                value.dtype == torch.uint8 and f"{key}_absmax" in state
            ):  # codes of what codes stand for: one off at most
                assert (value.int() - state[key].int()).abs().max() <= 1
            elif key.endswith("_absmax"):  # the largest code stands for a little less than its scale
                torch.testing.assert_close(value, state[key], rtol=1e-2, atol=0)
            else:
                torch.testing.assert_close(value, state[key], rtol=0, atol=0, equal_nan=True)
            assert value.stride() == state[key].stride(), key


@by_case
@pytest.mark.parametrize("cut", CUTS.values(), ids=CUTS)
def test_the_parts_of_all_processes_are_the_whole(case, cut):
    """In the dimension that a placement says, and in no other; a row that is cut is held by both sides."""
    size = 3
    optimizer = optimizer_for(case, "meta")
    for group in optimizer.param_groups:
        refs = optimizer.registry.of_group(group)
        by_ref = {ref.position: [] for ref in refs}
        for index in range(size):
            for ref, held in cut(refs, index, size):
                flat = torch.empty(held.numel, device="meta")
                by_ref[ref.position].append(optimizer.shard_on(flat, flat, held, ref, group))
        for shards in by_ref.values():
            for specs in zip(*(optimizer.specs(shard, group) for shard in shards), strict=True):
                shapes = [spec.local_shape(shard) for spec, shard in zip(specs, shards, strict=True)]
                whole, axis = specs[0].shape, specs[0].split_axis(shards[0])
                assert all(spec == specs[0] for spec in specs), "a declaration knows no process"
                if axis is None:
                    assert shapes == [whole] * size
                elif specs[0].placement is Placement.ELEMENTS:
                    assert sum(shape[0] for shape in shapes) == torch.Size(whole).numel()
                else:
                    along = sum(shape[axis] for shape in shapes)
                    most = 0 if cut is by_rows or axis == 1 or specs[0].placement is Placement.BASIS else size - 1
                    assert whole[axis] <= along <= whole[axis] + most
                    rest = whole[:axis] + whole[axis + 1 :]
                    assert all(shape[:axis] + shape[axis + 1 :] == rest for shape in shapes)


def test_left_columns_are_stored_one_after_the_other():
    """As LAPACK leaves them: BLAS then takes the authors' path."""
    optimizer = stepped(CASES["GaLoreAdamW"], 1)
    tall, wide, _ = (optimizer.state[p]["basis"] for p in optimizer.param_groups[0]["params"])
    assert tall.stride() == (4, 1)
    assert wide.stride() == (1, 24)


def test_sums_over_lines_and_across_them():
    right, left = (Coordinates((6, 4), Placement.LINES, axis) for axis in (0, 1))
    assert right.sum_over(-1, "x", torch.float32).placement is Placement.LINES
    assert right.sum_over(-2, "x", torch.float32).placement is Placement.REPLICATED
    assert left.sum_over(-1, "x", torch.float32).placement is Placement.REPLICATED
    across = left.sum_over(-2, "x", torch.float32)
    assert (across.shape, across.placement, across.axis) == ((4,), Placement.LINES, 0)
