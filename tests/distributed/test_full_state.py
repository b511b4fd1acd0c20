"""A run that stops on four processes and goes on on two, in another layout, is the run of one process."""

import pytest
import torch
from torch import nn

from gracile.optim import GaLoreAdamW, LDAdamW, full_state, load_full_state

BEFORE, STEPS = 4, 8  # refreshes at 5, and at 3 and 6

SPLIT = " with a split basis"
# optimizer, layout on four processes, layout on two
EXPERTS = " of experts"
MOVES = [
    ("Lion", "zero1", "zero3"),
    ("GaLoreAdamW", "zero2", "fsdp2"),
    ("GaLoreAdamW8bit Q-GaLore", "zero3", "ddp"),
    ("GaLoreAdafactor", "fsdp2", "zero1"),
    ("GaLorePlusAdamW", "ddp", "zero3"),
    ("FiraAdamW", "zero3", "zero2"),
    ("GradNormLoRPAdamW", "zero3", "zero1"),
    ("DCTAdamW fed back", "zero1", "zero2"),
    ("APOLLOAdamW", "fsdp2", "zero3"),
    ("LDAdamW", "zero3", "fsdp2"),
    ("GaLoreAdamW with a split basis", "zero3", "zero1"),
    ("SLTrainAdamW8bit", "zero1", "fsdp2"),
    ("SSTAdamW", "zero3", "zero1"),
    ("ReLoRAAdamW", "fsdp2", "zero3"),
    ("RigLAdamW", "zero3", "fsdp2"),
    ("SRigLAdamW", "fsdp2", "zero1"),
    ("GaLoreAdamW of experts", "zero2", "fsdp2"),
    ("LDAdamW of experts", "fsdp2", "zero3"),
    ("GaLoreAdamW8bit Q-GaLore of experts", "zero3", "ddp"),
    ("GaLoreAdafactor of experts", "ddp", "zero1"),
]
THOROUGH = [
    ("SETAdamW", "zero1", "zero3"),
    ("SRigLAdamW", "zero2", "zero3"),
    ("BlockSparseAdamW", "zero3", "zero2"),
    ("SparseAdamW", "ddp", "zero1"),
    ("SparseAdamW", "zero2", "ddp"),
    ("SCALE", "zero1", "fsdp2"),
]


def named(optimizer):
    return optimizer.removesuffix(SPLIT).removesuffix(EXPERTS)


@pytest.fixture(scope="module")
def moved(pool, tmp_path_factory):
    return moved_once(pool, tmp_path_factory.mktemp("moved"), MOVES)


@pytest.fixture(scope="module")
def moved_thoroughly(pool, tmp_path_factory):
    return moved_once(pool, tmp_path_factory.mktemp("thorough"), THOROUGH)


def moved_once(pool, folder, moves):
    """What came of each move: all of them in two jobs."""
    first, second = [], []
    for number, (optimizer, before, after) in enumerate(moves):
        side = "left" if number % 2 else "std"
        cell = {"optimizer": named(optimizer), "proj_type": side, "watched": False}
        cell |= {"experts": 4, "rank": 3} if optimizer.endswith(EXPERTS) else {}
        cell["keys"] = {"shard_basis": True} if optimizer.endswith(SPLIT) else {}
        state = str(folder / f"{number}.pt")
        first.append({**cell, "layout": before, "steps": [0, BEFORE], "save": state})
        second.append({**cell, "layout": after, "steps": [BEFORE, STEPS], "load": state})
    pool.call(4, "cells:measure", first, timeout=600)
    return pool.call(2, "cells:measure", second, timeout=600)


@pytest.mark.parametrize("number", range(len(MOVES)), ids=[" ".join(move) for move in MOVES])
def test_a_run_moves_to_fewer_processes_and_another_layout(moved, number):
    """Moved between two refreshes, and compared after the next one."""
    assert_moved(moved[number], MOVES[number])


@pytest.mark.thorough
@pytest.mark.parametrize("number", range(len(THOROUGH)), ids=[" ".join(move) for move in THOROUGH])
def test_so_does_one_with_masks(moved_thoroughly, number):
    assert_moved(moved_thoroughly[number], THOROUGH[number])


def assert_moved(told, move):
    assert (told["optimizer"], told["layout"]) == (named(move[0]), move[2])
    assert told["difference"] <= 1e-5, told
    assert told["of_movement"] <= 1e-4, told


def test_in_one_process_it_is_a_copy_and_refuses_what_does_not_fit():
    def made(cls, *shape):
        W = nn.Parameter(torch.full(shape, 0.1))
        optimizer = cls([W], rank=3)
        for t in range(3):
            W.grad = torch.randn(shape, generator=torch.Generator().manual_seed(t))
            optimizer.step()
        return W, optimizer

    W, one = made(GaLoreAdamW, 9, 7)
    V, other = made(GaLoreAdamW, 9, 7)
    other.state[V]["exp_avg"].zero_()
    saved = full_state(one)
    load_full_state(other, saved)
    assert all(torch.equal(value, other.state[V][key]) for key, value in one.state[W].items())
    other.state[V]["exp_avg"].zero_()
    one.state[W]["exp_avg"].zero_()
    assert saved["parameters"][0]["exp_avg"].any()
    with pytest.raises(ValueError, match=r"full state is of 'GaLoreAdamW'.* expected 'LDAdamW'"):
        load_full_state(made(LDAdamW, 9, 7)[1], saved)
    with pytest.raises(ValueError, match=r"'basis' of parameter 0 has shape \(7, 3\).* shape \(5, 4\)"):
        load_full_state(made(GaLoreAdamW, 5, 4)[1], saved)
