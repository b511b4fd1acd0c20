"""``MemoryWatch`` around a plain loop, and ``MemoryCallback`` in a Trainer that knows nothing of gracile."""

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn
from transformers import Trainer, TrainingArguments

from gracile.models import build_llama
from gracile.optim import GaLoreAdamW, param_groups, state_bytes
from gracile.train.watch import MemoryCallback, MemoryWatch

MIB = 2**20


def scalars(folder):
    events = EventAccumulator(str(folder)).Reload()
    return {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def step(model, optimizer):
    optimizer.zero_grad()
    sum((p**2).sum() for p in model.parameters()).backward()
    optimizer.step()


@pytest.mark.parametrize("every", [1, 2])
def test_a_plain_loop(tmp_path, every):
    model = nn.Linear(64, 40)
    optimizer = GaLoreAdamW([{"params": [model.weight], "rank": 4}, {"params": [model.bias]}])
    with MemoryWatch(model, optimizer, tmp_path, every=every) as memory:
        for _ in range(4):
            step(model, optimizer)
    weights = 4 * (64 * 40 + 40)
    assert (memory.now["weights"], memory.now["gradients"]) == (weights, weights)
    assert memory.now["projectors"] == 4 * 4 * 40
    assert memory.now["moments"] + memory.now["projectors"] == state_bytes(optimizer)
    assert memory.most == memory.now
    assert memory.now["peak"] > 10**7
    told = scalars(tmp_path)
    assert set(told) == {f"memory/{kind}" for kind in ("weights", "gradients", "moments", "projectors", "peak")}
    assert [number for number, _ in told["memory/moments"]] == list(range(every, 5, every))
    assert told["memory/gradients"][-1][1] == pytest.approx(weights / MIB)


def test_it_ends_with_its_block_also_when_that_fails(tmp_path):
    model = nn.Linear(4, 4)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    memory = MemoryWatch(model, optimizer)

    def fail():
        with memory:
            step(model, optimizer)
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    step(model, optimizer)
    assert memory.step == 1
    assert "moments" not in memory.now
    assert memory.now["gradients"] == 80
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("every", [0, 1.5, "x"])
def test_steps_between_looks_must_be_a_count(every):
    with pytest.raises(ValueError, match="every must be a whole number >= 1, got"):
        MemoryWatch(nn.Linear(2, 2), torch.optim.SGD([torch.zeros(1)]), every=every)
    with pytest.raises(ValueError, match="every must be a whole number >= 1, got"):
        MemoryCallback(every=every)


def test_one_watch_is_not_entered_twice():
    model = nn.Linear(2, 2)
    memory = MemoryWatch(model, torch.optim.SGD(model.parameters()))
    with memory, pytest.raises(RuntimeError, match="at work already"):
        memory.__enter__()
    with memory:
        step(model, memory.optimizer)
    assert memory.step == 1


def test_state_in_lists_and_sparse_gradients():
    model = nn.Embedding(50, 4, sparse=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with MemoryWatch(model, optimizer) as memory:
        model(torch.tensor([1, 2, 3])).sum().backward()
        optimizer.step()
    assert memory.now["gradients"] == 3 * 4 * 4 + 3 * 8
    model = nn.Linear(30, 10)
    optimizer = torch.optim.LBFGS(model.parameters(), max_iter=3)

    def closure():
        optimizer.zero_grad()
        loss = (model(torch.ones(1, 30)) ** 2).sum() + (model.weight**4).sum()
        loss.backward()
        return loss

    with MemoryWatch(model, optimizer) as memory:
        optimizer.step(closure)
    pairs = len(next(iter(optimizer.state.values()))["old_dirs"])
    assert memory.now["moments"] >= (2 * pairs + 2) * 4 * 310


def test_a_trainer(tmp_path):
    model = build_llama("2m", hidden_size=32, intermediate_size=88, num_hidden_layers=1, vocab_size=100)
    optimizer = GaLoreAdamW(param_groups(model, rank=4), lr=1e-3)
    data = [{"input_ids": torch.arange(16), "labels": torch.arange(16)}] * 32
    keys = {"max_steps": 5, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "use_cpu": True}
    run = TrainingArguments(str(tmp_path), report_to="none", save_strategy="no", disable_tqdm=True, **keys)
    callback = MemoryCallback(every=2)
    Trainer(model, run, train_dataset=data, optimizers=(optimizer, None), callbacks=[callback]).train()
    elements = sum(p.numel() for p in model.parameters())
    assert callback.watch.most["gradients"] == 4 * elements
    assert callback.watch.most["moments"] + callback.watch.most["projectors"] == state_bytes(optimizer)
    assert [number for number, _ in scalars(tmp_path / "runs" / "memory")["memory/weights"]] == [2, 4]
