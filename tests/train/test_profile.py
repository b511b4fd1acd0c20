"""``gracile profile``: real steps, measured by torch's profiler, against a plan that never allocated anything."""

import json
import time
from contextlib import nullcontext

import pytest
import torch
from torch import nn

from gracile.optim import GaLoreAdamW, release_gradients
from gracile.train.measurement import measure
from gracile.train.measurement.phase_timer import PhaseTimer
from gracile.train.profile import main
from gracile.train.watch import MemoryWatch


def told(capsys, *arguments):
    assert main([*arguments, "--json"]) == 0
    out = capsys.readouterr().out
    return json.loads(out[out.index("{\n") :])


@pytest.mark.parametrize("checkpointed", [False, True], ids=["plain", "checkpointed"])
@pytest.mark.parametrize(("size", "batch", "block"), [("2m", 8, 128), ("9m", 3, 200), ("60m", 1, 128)])
def test_the_plan_is_what_is_measured(size, batch, block, checkpointed, tiny, capsys):
    """Activations and what passes need for a moment within 10 percent, the rest to the byte."""
    layers = None if size == "2m" else {"num_hidden_layers": 2}
    sizes = {"model_overrides": layers, "block_size": block, "per_device_train_batch_size": batch}
    config = tiny(model=size, gradient_accumulation_steps=1, **sizes)
    found = told(capsys, config, "--steps", "1", "--gradient_checkpointing", str(checkpointed).lower())
    for kind, planned in found["planned"].items():
        measured = found["measured"][kind]
        if kind in ("activations", "temporary"):
            assert measured == pytest.approx(planned, rel=0.1) != 0, kind
        elif kind == "optimizer's step":
            assert measured == pytest.approx(planned, abs=64), "but for a number or two"
        else:
            assert measured == planned, kind
    at_peak = found["at_peak"]
    for kind, measured in at_peak["measured"].items():
        assert measured == pytest.approx(at_peak["planned"][kind], rel=0.1, abs=1e5), kind
    assert found["measured"]["weights"] > 0 < found["measured"]["moments"]


def test_mixed_precision_and_accumulated_gradients(tiny, capsys):
    config = tiny(gradient_accumulation_steps=3, bf16=True, optimizer="ldadamw", target_modules=["mlp"])
    found = told(capsys, config, "--steps", "1")
    assert found["measured"]["error buffers"] == found["planned"]["error buffers"] > 0
    for kind, planned in found["planned"].items():
        assert found["measured"][kind] == pytest.approx(planned, rel=0.1), kind


def test_evaluations_are_left_out_and_a_refresh_that_was_not_due_is_none(tiny, capsys):
    found = told(capsys, tiny(evaluate_at=[2, 3], update_proj_gap=50), "--steps", "1", "--eval_strategy", "steps")
    for kind, planned in found["planned"].items():
        assert found["measured"][kind] == pytest.approx(planned, rel=0.1), kind
    assert found["seconds"]["refresh"] == 0
    for kind, planned in found["at_peak"]["measured"].items():
        assert planned == pytest.approx(found["at_peak"]["planned"][kind], rel=0.1), kind


def test_time_is_split_and_nothing_is_left_behind(tiny, tmp_path, capsys):
    trace = tmp_path / "trace.json"
    assert main([tiny(update_proj_gap=2), "--steps", "4", "--trace", str(trace)]) == 0
    out = capsys.readouterr().out
    assert "a step, median of 4" in out
    shares = {
        line.split()[0]: float(line.split()[-1].rstrip("%"))
        for line in out.splitlines()
        if "ms" in line and "%" in line
    }
    assert set(shares) == {"forward", "backward", "optimizer", "data", "other"}
    assert sum(shares.values()) == pytest.approx(100, abs=0.5)
    (refresh,) = (line for line in out.splitlines() if line.split()[:1] == ["refresh"])
    assert refresh.endswith("in a step that has one")
    names = {event.get("name") for event in json.loads(trace.read_text())["traceEvents"]}
    assert measure.FORWARD in names
    assert sorted(path.name for path in tmp_path.iterdir()) == ["tiny.yaml", "trace.json"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--steps", "0"], "steps must be at least 1, got 0"),
        (["--trace", "nowhere/trace.json"], "trace: the folder of 'nowhere/trace.json' does not exist"),
        (["--trace", "/proc/trace.json"], "trace: '/proc/trace.json' cannot be written"),
        (["--trace", "trace.txt"], "trace must be a .json file, got 'trace.txt'"),
        (["--resume_from_checkpoint", "true"], "resume_from_checkpoint cannot be profiled"),
        (["--rnk", "4"], "unknown key 'rnk'"),
        (["--optimizer", "galor"], "unknown optimizer 'galor'"),
    ],
)
def test_bad_input_gets_one_line(arguments, message, capsys):
    assert main(["quickstart", *arguments]) == 2
    err = capsys.readouterr().err
    assert err.startswith("gracile profile: ")
    assert err.count("\n") == 1
    assert message in err


@pytest.mark.skipif(torch.cuda.is_available(), reason="a snapshot is taken on a GPU")
def test_a_snapshot_needs_a_gpu(tmp_path, capsys):
    assert main(["quickstart", "--snapshot", str(tmp_path / "memory.pickle")]) == 2
    assert "snapshot needs a GPU" in capsys.readouterr().err


# ---- parts ----------------------------------------------------------------------------------------------------------


def test_a_phase_inside_another_is_taken_from_it():
    timer = PhaseTimer()
    timer.step_has_ended()
    for refreshes in (True, False):
        with timer.phase("optimizer"):
            time.sleep(0.01)
            with timer.listener("find") if refreshes else nullcontext():
                time.sleep(0.02)
            with timer.listener("update"), timer.listener("after"):
                pass
        time.sleep(0.005)
        timer.step_has_ended()
    first, second = timer.steps
    assert 0.02 <= first["refresh"] < first["refresh"] + first["optimizer"]
    assert first["optimizer"] >= 0.01
    assert first["other"] >= 0.005
    assert second["optimizer"] >= 0.03, "nothing was due"
    assert timer.medians()["refresh"] == first["refresh"]
    assert timer.medians()["forward"] == 0


@pytest.mark.parametrize("cls", [torch.optim.AdamW, GaLoreAdamW])
def test_the_steps_of_an_optimizer_are_timed_and_so_are_its_refreshes(cls):
    layer = nn.Linear(8, 8)
    optimizer = cls([{"params": [layer.weight], **({"rank": 2, "update_proj_gap": 2} if cls is GaLoreAdamW else {})}])
    timer = PhaseTimer()
    timer.listen_to(optimizer)
    timer.step_has_ended()
    for _ in range(3):
        layer(torch.ones(1, 8)).sum().backward()
        optimizer.step()
        timer.step_has_ended()
    assert all(step["optimizer"] > 0 for step in timer.steps)
    assert [step["refresh"] > 0 for step in timer.steps] == [cls is GaLoreAdamW, False, cls is GaLoreAdamW]


@pytest.mark.parametrize("keep", ["nothing", "coordinates"])
def test_what_an_optimizer_does_in_a_backward_pass_is_its_time_and_not_the_pass(keep, monkeypatch):
    layer = nn.Linear(8, 8)
    optimizer = GaLoreAdamW([{"params": [layer.weight], "rank": 2, "update_proj_gap": 2}])
    release_gradients(layer, optimizer, keep=keep, passes=1)
    slow = {"nothing": "move", "coordinates": "reduction_of"}[keep]
    plain = getattr(optimizer, slow)
    monkeypatch.setattr(optimizer, slow, lambda *given: (time.sleep(0.03), plain(*given))[1])
    timer = PhaseTimer()
    timer.listen_to(optimizer)
    timer.step_has_ended()
    for _ in range(3):
        timer.timed("backward", layer(torch.ones(1, 8)).sum().backward)()
        in_the_pass = timer._now["optimizer"]
        optimizer.step()
        optimizer.zero_grad()
        assert in_the_pass >= 0.03
        timer.step_has_ended()
    assert min(step["backward"] for step in timer.steps) < 0.03
    assert [step["refresh"] > 0 for step in timer.steps] == [True, False, True]


def test_gradients_that_are_freed_are_counted_while_they_are_there():
    """By hand, also in a second pass, which is added to coordinates."""
    model = nn.Sequential(nn.Linear(100, 300, bias=False), nn.ReLU(), nn.Linear(300, 50, bias=False))
    optimizer = GaLoreAdamW([{"params": [p], "rank": 4, "update_proj_gap": 50} for p in model.parameters()])
    sizes = [4 * p.numel() for p in model.parameters()]
    reduced = 2 * 4 * (300 * 4 + 300 * 4)  # coordinates, and four columns of the rest
    for keep, most in (("nothing", max(sizes)), ("coordinates", reduced + sizes[0])):
        released = release_gradients(model, optimizer, keep=keep)
        with MemoryWatch(model, optimizer) as memory:
            for _ in range(3):
                for _ in range(2 if keep == "coordinates" else 1):
                    model(torch.ones(8, 100)).sum().backward()
                optimizer.step()
                optimizer.zero_grad()
        assert memory.now["gradients"] == most
        assert optimizer.phase_listener is None
        released.remove()


def test_what_a_profiled_pass_made():
    """By hand: two layers without biases, 8 rows."""
    model = nn.Sequential(nn.Linear(100, 300, bias=False), nn.ReLU(), nn.Linear(300, 1, bias=False))
    rows = torch.ones(8, 100)
    gradients = measure.Gradients(model)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        with torch.profiler.record_function(measure.FORWARD):
            loss = model(rows).sum()
        loss.backward()
        with torch.no_grad():
            scratch = torch.ones(5000) * 2
            del scratch
    gradients.close()
    assert gradients.bytes == 4 * (100 * 300 + 300)
    done = measure.passed(profiler, torch.device("cpu"), gradients.addresses)
    assert done.activations == pytest.approx(4 * (8 * 300 + 8 + 1), abs=256), "ReLU keeps what it gives on"
    assert done.at_peak.gradients == pytest.approx(gradients.bytes, abs=256)
    assert measure.stepped(profiler, torch.device("cpu")) == pytest.approx(2 * 4 * 5000, abs=256)


def test_views_share_a_storage():
    whole = torch.zeros(100)
    assert measure.storage_bytes([whole, whole[:10], whole.view(10, 10), torch.zeros(5)]) == 4 * 105
