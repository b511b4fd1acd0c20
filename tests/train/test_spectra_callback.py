"""``SpectraCallback`` in a Trainer that knows nothing of gracile: full fine-tuning, LoRA, and what is refused."""

import pytest
import torch
from peft import IA3Config, LoraConfig, get_peft_model
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn
from transformers import Trainer, TrainerControl, TrainerState, TrainingArguments

from gracile.models import build_llama
from gracile.spectra import LowRankUpdate, compare
from gracile.train.spectra_callback import SCALARS, SpectraCallback
from gracile.train.spectra_rows import seed_of

SMALL = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 40}
Q = "model.layers.0.self_attn.q_proj"
ROWS = [{"input_ids": torch.arange(8) + i, "labels": torch.arange(8) + i} for i in range(16)]


def scalars(folder):
    events = EventAccumulator(str(folder)).Reload()
    return {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def small():
    torch.manual_seed(0)
    return build_llama("2m", **SMALL)


def arguments(tmp_path, **keys):
    keys = {"max_steps": 4, "learning_rate": 0.02, "per_device_train_batch_size": 4, "save_strategy": "no"} | keys
    return TrainingArguments(str(tmp_path / "out"), report_to="none", use_cpu=True, disable_tqdm=True, **keys)


def trained(model, tmp_path, callback, **keys):
    Trainer(model, arguments(tmp_path, **keys), train_dataset=ROWS, callbacks=[callback]).train()
    return scalars(tmp_path / "out" / "runs" / "spectra")


def begin(callback, model, tmp_path, step=0):
    state = TrainerState(global_step=step, is_world_process_zero=True)
    callback.on_train_begin(arguments(tmp_path), state, TrainerControl(), model=model)


def test_full_fine_tuning(tmp_path):
    model = small()
    before = model.get_submodule(Q).weight.detach().clone()
    spectra = SpectraCallback(every=2, k=4, subspace=8)
    told = trained(model, tmp_path, spectra)
    assert {f"spectra/{measure}" for measure in SCALARS} < told.keys()
    assert [step for step, _ in told["spectra/drift"]] == [2, 4]
    assert told["spectra/relative_norm"][1][1] > told["spectra/relative_norm"][0][1] > 0
    assert {f"spectra_drift/layer_{i}" for i in range(2)} < told.keys()
    by_name = {one.place.name: one for one in spectra.found}
    assert len(by_name) == 14, "the matrices of the blocks"
    after = model.get_submodule(Q).weight.detach()
    expected = compare(before, after, k=4, subspace=8, seed=seed_of(f"{Q}.weight"))
    assert by_name[f"{Q}.weight"].measures == expected
    mean = sum(one.measures.drift for one in spectra.found) / 14
    assert told["spectra/drift"][-1][1] == pytest.approx(mean, rel=1e-5)


def test_lora(tmp_path):
    model = get_peft_model(small(), LoraConfig(r=2, lora_alpha=6, target_modules=["q_proj", "down_proj"]))
    spectra = SpectraCallback(every=4, log_dir=tmp_path / "log")
    Trainer(model, arguments(tmp_path), train_dataset=ROWS, callbacks=[spectra]).train()
    assert [one.place.kind for one in spectra.found] == ["self_attn.q_proj", "mlp.down_proj"] * 2
    assert "spectra/effective_rank" in scalars(tmp_path / "log")
    layer = model.get_submodule(f"base_model.model.{Q}")
    update = LowRankUpdate(3 * layer.lora_B["default"].weight.detach(), layer.lora_A["default"].weight.detach())
    name = f"{Q}.weight"
    assert spectra.found[0].place.name == name, "as `gracile spectra` calls it"
    assert spectra.found[0].measures == compare(layer.base_layer.weight.detach(), update, seed=seed_of(name))
    assert 0 < spectra.found[0].measures.effective_rank <= 2


def test_the_weights_at_the_start_are_kept_in_their_dtype_and_let_go(tmp_path):
    model = small().bfloat16()
    spectra = SpectraCallback(target_modules=["q_proj"])
    begin(spectra, model, tmp_path)
    held = [one.before for one in spectra._watched]
    assert [(tensor.dtype, tensor.device.type) for tensor in held] == [(torch.bfloat16, "cpu")] * 2
    assert held[0].data_ptr() != model.get_submodule(Q).weight.data_ptr()
    spectra.on_train_end(None, None, None)
    assert spectra._watched == []


def test_other_processes_write_nothing(tmp_path):
    spectra = SpectraCallback()
    state = TrainerState(is_world_process_zero=False)
    spectra.on_train_begin(arguments(tmp_path), state, TrainerControl(), model=small())
    state.global_step = 100
    spectra.on_step_end(arguments(tmp_path), state, TrainerControl())
    assert not (tmp_path / "out" / "runs").exists()
    assert spectra.found == []


def test_a_resumed_run(tmp_path):
    """Of LoRA the base is still there; of the other the first weights are not."""
    begin(SpectraCallback(), get_peft_model(small(), LoraConfig(target_modules=["q_proj"])), tmp_path, step=3)
    with pytest.raises(ValueError, match="training goes on at step 3, and the weights that it began with are not here"):
        begin(SpectraCallback(), small(), tmp_path, step=3)


def split_by_zero3(model):
    model.get_submodule(Q).weight.ds_id = 0


def split_by_fsdp(model):
    from torch.distributed.tensor import DTensor

    weight = torch.Tensor._make_subclass(type("DTensor", (nn.Parameter,), {}), model.get_submodule(Q).weight.detach())
    assert type(weight).__name__ == DTensor.__name__
    model.get_submodule(Q)._parameters["weight"] = weight


def quantized(model):
    packed = nn.Parameter(torch.ones(32, 32, dtype=torch.uint8), requires_grad=False)
    model.get_submodule(Q)._parameters["weight"] = packed


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (
            split_by_zero3,
            "the weights are split under DeepSpeed ZeRO 3 .*; compare saved folders with `gracile spectra`",
        ),
        (split_by_fsdp, "the weights are split under FSDP .*; compare saved folders"),
        (quantized, "q_proj is quantized"),
    ],
)
def test_weights_that_cannot_be_read_are_refused(harm, message, tmp_path):
    model = small()
    harm(model)
    with pytest.raises(ValueError, match=message):
        begin(SpectraCallback(), model, tmp_path)


def test_adapters_that_are_no_plain_lora_are_refused(tmp_path):
    ia3 = IA3Config(target_modules=["q_proj", "down_proj"], feedforward_modules=["down_proj"])
    with pytest.raises(ValueError, match="q_proj is an adapter of peft, and no LoRA"):
        begin(SpectraCallback(), get_peft_model(small(), ia3), tmp_path)
    dora = LoraConfig(target_modules=["q_proj"], use_dora=True)
    with pytest.raises(ValueError, match="q_proj is no plain LoRA that is not merged"):
        begin(SpectraCallback(), get_peft_model(small(), dora), tmp_path)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"every": 0}, "every must be a whole number >= 1, got 0"),
        ({"k": 0}, "k must be a whole number >= 1, got 0"),
        ({"epsilon": 2}, r"epsilon must be a number in \(0, 1\], got 2"),
        ({"subspace": 0}, "subspace must be a whole number >= 1, got 0"),
    ],
)
def test_bad_arguments_are_refused(keys, message):
    with pytest.raises(ValueError, match=message):
        SpectraCallback(**keys)


def test_a_pattern_that_matches_nothing_is_refused(tmp_path):
    with pytest.raises(ValueError, match="q_prj"):
        begin(SpectraCallback(target_modules=["q_prj"]), small(), tmp_path)
