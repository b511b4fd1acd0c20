"""``gracile pretrain`` with layers that store less, under DeepSpeed: the run of one process, saved, resumed, merged."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from gracile.train.pretrain import main
from tests.train.test_layers import RUNS, settings

CONFIGS = Path(__file__).parents[2] / "configs" / "deepspeed"
SEVERAL = str(Path(__file__).with_name("pretrain_several.py"))
# Maestro's penalty needs whole factors; dropout of ReLoRA would be drawn by each process for itself
FIRST = ("sltrain", "sst", "relora", "maestro", "cast")
ON = {
    "zero2": list(FIRST),
    "zero2, others": [layer for layer in RUNS if layer not in FIRST],
    "zero3": ["sltrain", "sst", "relora", "nm", "cast"],
}


def written(tiny, tmp_path, layer, start):
    """The file of a run that everything happens in."""
    # Of SST smaller ones: at 0.003 a singular value is clamped to zero at step 5, and at the next decomposition
    # rounding decides over the sign of one vector of that pair: noise of 6e-8 on the first weights moves one by 5e-3.
    rate = 0.001 if layer == "sst" else 0.003
    changes = {"model": start, "model_overrides": None, "max_steps": 8, "learning_rate": rate}
    if layer == "relora":
        changes["layer_args"] = {"alpha": 8.0}
    text = Path(tiny(**settings(layer, **changes))).read_text()
    path = tmp_path / f"{layer}.yaml"
    path.write_text(text)
    return str(path)


@pytest.fixture(params=["zero2", *(pytest.param(name, marks=pytest.mark.thorough) for name in list(ON)[1:])])
def launched(request, tiny, tmp_path, pool):
    """Each layer's run in one process, in two, and in two again from the fifth step on."""
    start = str(tmp_path / "start")
    assert main([tiny(max_steps=1, output_dir=start, optimizer="adamw")]) == 0
    arguments = []
    stage = request.param.split(",")[0]
    for layer in ON[request.param]:
        config = written(tiny, tmp_path, layer, start)
        assert main([config, "--output_dir", str(tmp_path / f"{layer} alone")]) == 0
        command = [config, "--gradient_accumulation_steps", "1", "--deepspeed", str(CONFIGS / f"{stage}.json")]
        again = ["--resume_from_checkpoint", str(tmp_path / f"{layer} split" / "checkpoint-5")]
        arguments += [[*command, "--output_dir", str(tmp_path / f"{layer} split")]]
        arguments += [[*command, *again, "--output_dir", str(tmp_path / f"{layer} again")]]
    (tmp_path / "todo.json").write_text(json.dumps(arguments))
    done = pool.run(2, SEVERAL, str(tmp_path / "todo.json"), timeout=600)
    assert done.returncode == 0, done.stdout[-3000:]
    return ON[request.param], tmp_path


def test_split_over_two_processes_layers_train_as_in_one_and_go_on(launched):
    layers, folder = launched
    for layer in layers:
        alone, split, again = (
            load_file(folder / f"{layer} {how}" / "model.safetensors") for how in ("alone", "split", "again")
        )
        model = AutoModelForCausalLM.from_pretrained(folder / f"{layer} split")
        assert {name for name, _ in model.named_parameters()} == alone.keys() == split.keys(), layer
        for key, value in alone.items():
            gap = torch.linalg.vector_norm(value - split[key])
            assert gap <= 1e-4 * torch.linalg.vector_norm(value), (layer, key)
            assert torch.equal(split[key], again[key]), (layer, key)
        told, anew = (
            json.loads((folder / f"{layer} {how}" / "metrics.json").read_text()) for how in ("split", "again")
        )
        assert told["validation_loss"] == anew["validation_loss"], layer
