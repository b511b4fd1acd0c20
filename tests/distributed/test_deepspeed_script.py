"""A training script for DeepSpeed that knows nothing of gracile, with one line changed.

In each stage it runs whole, is killed, and goes on; in the thorough part under DeepSpeed's launcher too.
"""

import json
import os
import re
import runpy
import signal
import subprocess
import sys
import threading
import time
from functools import partial
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from pool import free_port
from torch import nn
from torch.utils.data import DataLoader, DistributedSampler

SCRIPT = Path(__file__).parent / "scripts" / "deepspeed_engine.py"
CONFIGS = Path(__file__).parents[2] / "configs" / "deepspeed"
MARK = "# the line to change"
BATCH, STEPS, SAVE_STEPS, LR = 8, 20, 6, 0.01

RANKED = "g.param_groups(model, rank=8, update_proj_gap=5, scale=0.5)"
# For each stage of ZeRO what stands in place of torch.optim.AdamW.
LINES = {
    1: "import gracile.optim as g; optimizer = g.LDAdamW(g.param_groups(model, rank=8), lr=args.lr)",
    2: f"import gracile.optim as g; optimizer = g.FiraAdamW({RANKED}, lr=args.lr)",
    3: f"import gracile.optim as g; optimizer = g.GaLoreAdamW({RANKED}, lr=args.lr)",
}

by_stage = pytest.mark.parametrize("stage", LINES)


def rewritten(line, folder):
    """A copy of the script whose marked line is ``line``; nothing else differs."""
    source = SCRIPT.read_text(encoding="utf-8").splitlines()
    (number,) = (i for i, text in enumerate(source) if text.endswith(MARK))
    assert source[number].strip().startswith("optimizer = torch.optim.AdamW(")
    indent = source[number][: -len(source[number].lstrip())]
    changed = [*source[:number], indent + line, *source[number + 1 :]]
    assert [i for i, pair in enumerate(zip(source, changed, strict=True)) if len(set(pair)) == 2] == [number]
    path = folder / SCRIPT.name
    path.write_text("\n".join(changed) + "\n", encoding="utf-8")
    return path


def configured(stage, folder):
    """The package's configuration; what it leaves to the Trainer is DeepSpeed's default, which clips to 1.0."""
    settings = json.loads((CONFIGS / f"zero{stage}.json").read_text())
    settings = {key: value for key, value in settings.items() if "auto" not in json.dumps(value)}
    path = folder / "deepspeed.json"
    path.write_text(json.dumps({**settings, "train_batch_size": BATCH}))
    return path


def command(script, config, output_dir):
    arguments = [str(script), "--deepspeed_config", str(config), "--output_dir", str(output_dir)]
    return [*arguments, "--steps", str(STEPS), "--save_steps", str(SAVE_STEPS), "--lr", str(LR)]


def told_by(text):
    """The losses that the script printed, by step."""
    entries = [json.loads(told) for told in re.findall(r'\{"step": [^}]*\}', text)]
    return {entry["step"]: entry["loss"] for entry in entries}


def run_in_pool(pool, *arguments, kill_after=None):
    """The losses of the script in processes of the pool, which are killed after ``kill_after`` steps."""
    job = pool.start(2, *arguments)
    while kill_after is not None and kill_after not in told_by(job.output()):
        assert not job.ended(), job.output()[-3000:]
        time.sleep(0.02)
    if kill_after is not None:
        job.kill()
    assert job.wait(300) == (0 if kill_after is None else -signal.SIGKILL), job.output()[-3000:]
    return told_by(job.output())


def launch(*arguments, kill_after=None):
    """The same under DeepSpeed's launcher, which is killed with all of its processes."""
    launcher = [str(Path(sys.executable).with_name("deepspeed")), "--num_accelerators", "2"]
    losses, log = {}, []
    process = subprocess.Popen(
        [*launcher, "--master_port", str(free_port()), *arguments],
        env={**os.environ, "DS_ACCELERATOR": "cpu"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    limit = threading.Timer(400, os.killpg, (process.pid, signal.SIGKILL))
    limit.start()
    try:
        for text in process.stdout:
            log.append(text)
            losses |= told_by(text)
            if kill_after in losses:
                os.killpg(process.pid, signal.SIGKILL)
                break
        code = process.wait()
    finally:
        limit.cancel()
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    expected = 0 if kill_after is None else -signal.SIGKILL
    assert code == expected, "".join(log)[-3000:]
    return losses


def train(stage, folder, pool, launched=False):
    """An undisturbed run, one that is killed some steps after a checkpoint, and what goes on from there."""
    script, config = rewritten(LINES[stage], folder), configured(stage, folder)
    whole, broken = folder / "whole", folder / "broken"
    start = launch if launched else partial(run_in_pool, pool)
    told = {"whole": run_in_pool(pool, *command(script, config, whole))}
    told["killed"] = start(*command(script, config, broken), kill_after=SAVE_STEPS + 2)
    assert not (broken / "model.bin").exists(), "the run ended before it was killed"
    told["resumed"] = start(*command(script, config, broken), "--resume")
    for run, output_dir in (("whole", whole), ("resumed", broken)):
        told[f"{run} weights"] = torch.load(output_dir / "model.bin", weights_only=True)
    return told


@pytest.fixture(scope="module")
def runs(tmp_path_factory, pool):
    told = {stage: train(stage, tmp_path_factory.mktemp(f"zero{stage}"), pool) for stage in LINES}
    return told.__getitem__


def alone(line):
    """The losses and weights of the same training in one process, written without DeepSpeed."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "deepspeed", ModuleType("deepspeed"))  # imported by the script, not used here
        names = runpy.run_path(str(SCRIPT), run_name="script")
    torch.manual_seed(names["SEED"])
    space = {"model": names["GPT"](), "args": SimpleNamespace(lr=LR), "torch": torch}
    exec(line, space)
    model, optimizer = space["model"], space["optimizer"]
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, names["warmup"])
    dataset, losses, epoch = names["SourceText"](), {}, 0
    while True:
        sampler = DistributedSampler(dataset, num_replicas=1, rank=0, shuffle=True, seed=names["SEED"])
        sampler.set_epoch(epoch)
        for batch in DataLoader(dataset, batch_size=BATCH, sampler=sampler):
            loss = model(batch)
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
            losses[len(losses) + 1] = loss.item()
            if len(losses) == STEPS:
                return losses, model.state_dict()
        epoch += 1


@by_stage
def test_the_script_trains_as_one_process_without_deepspeed_does(runs, stage):
    told = runs(stage)
    losses, weights = alone(LINES[stage])
    assert list(told["whole"]) == list(range(1, STEPS + 1))
    assert told["whole"] == pytest.approx(losses, rel=1e-4)
    assert sum(list(losses.values())[-5:]) < 0.65 * sum(list(losses.values())[:5])
    for name, value in weights.items():
        gap = torch.linalg.vector_norm(told["whole weights"][name] - value)
        assert gap <= 1e-4 * torch.linalg.vector_norm(value), name


@by_stage
def test_killed_after_a_checkpoint_it_resumes_to_the_same_bits(runs, stage):
    """With SIGKILL to all its processes."""
    assert_goes_on_to_the_same_bits(runs(stage))


@pytest.mark.thorough  # test_resume_elsewhere.py has a run of the package's own that is killed under it
def test_so_it_does_under_the_launcher(tmp_path, pool):
    assert_goes_on_to_the_same_bits(train(3, tmp_path, pool, launched=True))


def assert_goes_on_to_the_same_bits(told):
    whole, killed, resumed = (told[run] for run in ("whole", "killed", "resumed"))
    begin = min(resumed)
    assert 1 < begin <= STEPS  # after the newest checkpoint
    assert begin % SAVE_STEPS == 1
    assert killed == {step: whole[step] for step in killed}
    assert resumed == {step: whole[step] for step in range(begin, STEPS + 1)}
    assert told["whole weights"].keys() == told["resumed weights"].keys()
    assert all(torch.equal(value, told["resumed weights"][name]) for name, value in told["whole weights"].items())


def test_the_line_that_is_changed_matters(runs):
    """The losses of the script as it was are others."""
    losses, _ = alone("optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr)")
    for stage in LINES:
        assert losses != pytest.approx(runs(stage)["whole"], rel=1e-3)
