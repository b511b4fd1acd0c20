"""Every way of splitting a parameter is what one process is, in the last digits of fp64: bounds inside of rows, lines
that are exchanged, sums, and states that move to another layout. Processes are threads."""

import pytest
import torch
from threads import Meeting, give_gradients, split, weights_of
from torch import nn

from gracile import optim
from gracile.optim.distributed import FlatShard, ShardRange, Workspace, as_one_buffer, by_rows, each_alone
from gracile.optim.full_state import full_state, load_full_state

SIZE, STEPS = 3, 5
SHAPES = [(8, 7), (4, 11), (6, 6)]  # three processes divide neither the columns nor the rows
BLOCKS = [(32, 48), (16, 32)]
RANK = {"rank": 3, "update_proj_gap": 2}
SCALED = {"relative_step": False, "scale_parameter": True, "lr": 0.1}
MASKED = {"update_every": 2, "t_end": 20}
CASES = {  # class, its keys, those of matrices, their shapes
    "GaLoreAdamW": (optim.GaLoreAdamW, {}, RANK, SHAPES),
    "GaLoreAdamW svd": (optim.GaLoreAdamW, {}, {**RANK, "subspace_method": "svd"}, SHAPES),
    "GaLoreAdamW upwards": (optim.GaLoreAdamW, {"maximize": True}, RANK, SHAPES),
    "GaLoreAdamW in parts": (optim.GaLoreAdamW, {}, {**RANK, "shard_basis": True}, SHAPES),
    "GaLoreAdafactor": (optim.GaLoreAdafactor, SCALED, RANK, SHAPES),
    "GaLorePlusAdamW": (optim.GaLorePlusAdamW, {}, {**RANK, "residual_warmup": 2, "residual_fraction": 0.1}, SHAPES),
    "GaLorePlusAdamW heads": (optim.GaLorePlusAdamW, {}, {**RANK, "num_heads": 2}, SHAPES),
    "FiraAdamW": (optim.FiraAdamW, {}, RANK, SHAPES),
    "APOLLOAdamW Mini": (optim.APOLLOAdamW, {}, {**RANK, "rank": 1, "scale_type": "tensor"}, SHAPES),
    "DCTAdamW": (optim.DCTAdamW, {}, {**RANK, "error_feedback": "fp32"}, SHAPES),
    "GradNormLoRPAdamW": (optim.GradNormLoRPAdamW, {}, RANK, SHAPES),
    "LDAdamW": (optim.LDAdamW, {}, {"rank": 3, "shard_basis": True}, SHAPES),
    "RigLAdamW": (optim.RigLAdamW, MASKED, {"sparsity": 0.5}, SHAPES),
    "RigLAdamW upwards": (optim.RigLAdamW, {**MASKED, "maximize": True}, {"sparsity": 0.5}, SHAPES),
    "RigLAdamW with ages": (
        optim.RigLAdamW,
        {**MASKED, "grown_step": "own", "grown_warmup": 2},
        {"sparsity": 0.5},
        SHAPES,
    ),
    "SRigLAdamW": (optim.SRigLAdamW, MASKED, {"sparsity": 0.5}, SHAPES),
    "BlockSparseAdamW": (optim.BlockSparseAdamW, {**MASKED, "block_size": 16}, {"sparsity": 0.5}, BLOCKS),
    "SRSTEAdamW": (optim.SRSTEAdamW, {"n": None}, {"n": 1, "m": 3}, [(8, 9), (6, 12)]),
    "WGSEFAdamW": (optim.WGSEFAdamW, {"finish_at": 4}, {"keep": 0.5, "groups": "blocks", "block_size": 4}, SHAPES),
}
CUTS = {"ZeRO 1 and 2": as_one_buffer, "ZeRO 3": each_alone, "FSDP2": by_rows}


def built(case):
    cls, keys, matrix_keys, shapes = case
    draw = torch.Generator().manual_seed(0)
    matrices, others = ([nn.Parameter(torch.randn(shape, generator=draw, dtype=torch.float64)) for shape in all_of]
                        for all_of in (shapes, [(7,), (1,)]))  # fmt: skip
    return cls([{"params": matrices, **matrix_keys}, {"params": others}], **keys)


def drawn(step, position, shape):
    draw = torch.Generator().manual_seed(100 * step + position)
    return torch.randn(shape, generator=draw, dtype=torch.float64)


def alike(step, position, shape):
    return drawn(step, position, shape).sign()


def late(step, position, shape):
    """Some matrices have a gradient from the second step on, or from the fourth."""
    return drawn(step, position, shape) * (step >= 2 * position - 1)


def advance(optimizer, steps, gradient=drawn):
    for step in steps:

        def gradient_of(position, shape, step=step):
            return gradient(step, position, shape)

        give_gradients(optimizer, gradient_of)
        optimizer.step()


def assert_one_run(case, found, gradient=drawn):
    alone = built(case)
    begun = weights_of(alone)
    advance(alone, range(STEPS), gradient)
    near = 1e-5 if case[0] in (optim.DCTAdamW, optim.APOLLOAdamW) else 1e-9  # those have a basis in fp32
    for position, weight in weights_of(alone).items():
        off = torch.linalg.vector_norm(weight - found[position])
        assert off <= near * torch.linalg.vector_norm(weight - begun[position]), position


by_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES)
by_cut = pytest.mark.parametrize("cut", CUTS.values(), ids=CUTS)


@by_cut
@by_case
def test_parts_move_as_the_whole_does(case, cut):
    def work(processes):
        optimizer = built(case)
        split(optimizer, cut, processes)
        advance(optimizer, range(STEPS))
        return weights_of(optimizer)

    assert_one_run(case, Meeting(SIZE).run(work)[0])


@by_cut
@pytest.mark.parametrize("name", ["RigLAdamW", "SRigLAdamW"])
def test_of_gradients_that_are_alike_the_same_are_chosen(name, cut):
    def work(processes):
        optimizer = built(CASES[name])
        split(optimizer, cut, processes)
        advance(optimizer, range(STEPS), alike)
        return weights_of(optimizer)

    assert_one_run(CASES[name], Meeting(SIZE).run(work)[0], alike)


@by_cut
@by_case
def test_a_state_moves_to_other_parts(case, cut):
    """Of weights and of moments: those that it is loaded into were never trained."""
    assert_moved(case, cut)


@by_cut
@pytest.mark.parametrize("name", ["GaLoreAdamW", "GaLoreAdafactor", "GaLorePlusAdamW"])
def test_so_does_that_of_matrices_without_a_gradient_until_then(name, cut):
    """What is due for a subspace is the same on all processes, and after the move."""
    cls, keys, matrix_keys, shapes = CASES[name]
    assert_moved((cls, keys, {**matrix_keys, "update_proj_gap": 50}, shapes), cut, late)


def assert_moved(case, cut, gradient=drawn):
    cuts = list(CUTS.values())
    after = cuts[(cuts.index(cut) + 1) % len(cuts)]

    def first(processes):
        optimizer = built(case)
        split(optimizer, cut, processes)
        advance(optimizer, range(3), gradient)
        return full_state(optimizer)

    saved, *others = Meeting(SIZE).run(first)
    assert not any(others), "process 0 has it"

    def second(processes):
        optimizer = built(case)
        split(optimizer, after, processes)
        load_full_state(optimizer, saved)
        advance(optimizer, range(3, STEPS), gradient)
        return weights_of(optimizer)

    assert_one_run(case, Meeting(2).run(second)[0], gradient)


@pytest.mark.parametrize("bounds", [(0, 12, 23, 35), (0, 1, 3, 35), (0, 17, 17, 35)])
def test_columns_of_a_flat_part_are_those_of_the_matrix(bounds):
    W = torch.randn(7, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    norms = torch.linalg.vector_norm(W, dim=0)

    def work(processes):
        held = ShardRange((7, 5), bounds, 0, processes)
        own = W.flatten()[held.start : held.stop].clone()
        shard = FlatShard(own, own, held, 0, Workspace())
        squares = processes.all_reduce_(shard.column_squares())
        shard.divide_columns(squares.sqrt())
        return squares, shard.gather_whole(own)

    for squares, divided in Meeting(SIZE).run(work):
        torch.testing.assert_close(squares, norms.square())
        torch.testing.assert_close(divided, W / norms)
