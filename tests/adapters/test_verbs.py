"""Every verb of peft on every method."""

import copy
import pickle
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from adapted import BLOCKS, CASES, SHAPES, attached, config_of, far, ids, llama, logits, train, trained
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftConfig, PeftModel, get_peft_model
from peft.tuners.lora import save_as_lora
from safetensors.torch import load_file

from gracile import adapters

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
each = pytest.mark.parametrize("name", CASES)
FIRST = next(iter(CASES))
some = pytest.mark.parametrize(
    "name", [FIRST, *(pytest.param(n, marks=pytest.mark.thorough) for n in CASES if n != FIRST)]
)


def test_every_method_has_a_case():
    own = {name for name, config in adapters.METHODS.items() if config.__module__.startswith("gracile.")}
    assert set(CASES) == own


@each
def test_the_start_and_what_is_trained(name, capsys):
    base = llama()
    before = logits(base)
    weights = {key: value.clone() for key, value in base.state_dict().items()}
    model = attached(name, base)
    case = CASES[name]
    moved = far(logits(model), before)
    assert moved <= 1e-5 if case.starts_exactly else 1e-5 < moved < 0.5
    trained_numbers = case.in_common + BLOCKS * sum(case.trained(m, n) for m, n in SHAPES.values())
    assert model.get_nb_trainable_parameters()[0] == trained_numbers
    status = model.get_model_status()
    assert status.enabled
    assert status.available_adapters == ["default"]
    assert status.num_adapter_layers == BLOCKS * len(SHAPES)
    train(model, lr=case.lr)
    assert far(logits(model), before) > 1e-3
    for layer in adapters.adapter_layers(model):
        assert torch.equal(layer.base_layer.weight, weights[f"{layer.name}.weight"]), "a base weight is never rewritten"
    with model.disable_adapter():
        assert torch.equal(logits(model), before)


@each
@pytest.mark.parametrize("saved", [True, False])
def test_save_and_load(name, saved, tmp_path):
    base = llama()
    model = trained(name, base, save_projection=saved)
    model.save_pretrained(tmp_path)
    held = {key.rpartition(".")[2] for key in load_file(tmp_path / "adapter_model.safetensors")}
    projection = {name + "_" + short for short in CASES[name].projection}
    assert (projection <= held) is saved or not projection
    for low in (True, False):
        if not saved and hasattr(model.peft_config["default"], "statistic"):
            continue
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message="Found missing adapter keys")
            again = PeftModel.from_pretrained(llama(), tmp_path, low_cpu_mem_usage=low)
        assert far(logits(again), logits(model)) <= (0 if saved else 1e-6)
        assert not any(p.requires_grad for p in again.parameters())
        more = PeftModel.from_pretrained(llama(), tmp_path, is_trainable=True, low_cpu_mem_usage=low)
        assert more.get_nb_trainable_parameters()[0] == model.get_nb_trainable_parameters()[0]
        assert far(logits(more), logits(model)) <= (0 if saved else 1e-6)
    assert type(PeftConfig.from_pretrained(tmp_path)) is type(model.peft_config["default"])


@each
def test_another_base_is_refused_where_factors_were_not_saved(name, tmp_path):
    if not (CASES[name].projection and CASES[name].of_base):
        pytest.skip("the method has no factors of the base")
    model = trained(name, save_projection=False)
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"another base weight|come from gradients"):
        logits(PeftModel.from_pretrained(llama(seed=1), tmp_path))


def run(code):
    """In a new process, which knows the package and the cases if it imports them."""
    paths = [str(Path(adapters.__file__).parents[2]), str(Path(__file__).parents[1])]
    start = f"import sys; sys.path[:0] = {paths!r}\n"
    return subprocess.run([sys.executable, "-c", start + code], capture_output=True, text=True, check=False)


@some
def test_in_a_new_process(name, tmp_path):
    model = trained(name)
    model.save_pretrained(tmp_path)
    torch.save(logits(model), tmp_path / "logits.pt")
    load = f"""
from peft import PeftModel
from transformers import LlamaConfig, LlamaForCausalLM
base = LlamaForCausalLM(LlamaConfig(**{llama().config.to_diff_dict()!r}))
m = PeftModel.from_pretrained(base, {str(tmp_path)!r})
"""
    with_it = run(f"""
import torch
from adapted import llama, logits
from peft import PeftModel
m = PeftModel.from_pretrained(llama(), {str(tmp_path)!r})
print('equal', torch.equal(logits(m), torch.load({str(tmp_path / "logits.pt")!r})))
""")
    assert "equal True" in with_it.stdout, with_it.stderr[-500:]
    without = run(load)
    assert without.returncode
    assert f"KeyError: '{name.upper()}'" in without.stderr


@some
def test_from_a_hub_and_by_the_auto_class(name, tmp_path):
    llama().save_pretrained(tmp_path / "base")
    base = type(llama()).from_pretrained(tmp_path / "base")
    model = trained(name, base)
    snapshot = tmp_path / "cache" / "models--someone--adapter" / "snapshots" / ("0" * 40)
    model.save_pretrained(snapshot)
    (snapshot.parent.parent / "refs").mkdir()
    (snapshot.parent.parent / "refs" / "main").write_text("0" * 40)
    hub = PeftModel.from_pretrained(llama(), "someone/adapter", cache_dir=str(tmp_path / "cache"))
    assert torch.equal(logits(hub), logits(model))
    auto = AutoPeftModelForCausalLM.from_pretrained(str(snapshot))
    assert torch.equal(logits(auto), logits(model))


@each
def test_several_adapters(name, tmp_path):
    before = logits(llama())
    model = trained(name)
    first = logits(model)
    other = {"r": 2} if "r" in CASES[name].keys else {}
    model.add_adapter("second", config_of(name, **other))
    model.set_adapter("second")
    train(model, lr=CASES[name].lr)
    second = logits(model)
    model.save_pretrained(tmp_path)
    model.load_adapter(tmp_path / "second", "third")
    model.set_adapter("third")
    assert torch.equal(logits(model), second)
    with model.disable_adapter():
        assert torch.equal(logits(model), before)
    model.set_adapter("default")
    assert torch.equal(logits(model), first)
    model.base_model.set_adapter(["default", "second"])
    layer = next(adapters.adapter_layers(model))
    x = torch.randn(3, layer.in_features)
    changes = (x @ layer.get_delta_weight(adapter).mT for adapter in ("default", "second"))
    assert far(layer(x), layer.base_layer(x) + sum(changes)) < 1e-5
    together = logits(model)
    weights = {key: value.clone() for key, value in model.state_dict().items()}
    model.merge_adapter()
    assert far(logits(model), together) < 1e-5
    model.unmerge_adapter()
    assert all(torch.equal(value, weights[key]) for key, value in model.state_dict().items()), "undone to the bit"
    model.set_adapter("third")
    model.delete_adapter("second")
    assert sorted(model.peft_config) == ["default", "third"]
    assert not any(".second" in key for key in model.state_dict())


@each
@pytest.mark.parametrize("safe", [True, False])
def test_merging_and_unloading(name, safe):
    model = trained(name)
    found = logits(model)
    merged = model.merge_and_unload(safe_merge=safe)
    assert far(logits(merged), found) < 1e-5
    assert type(merged).__name__ == "LlamaForCausalLM"
    assert not merged._forward_hooks
    assert sorted(merged.state_dict()) == sorted(llama().state_dict())
    assert torch.equal(logits(trained(name).unload()), logits(llama()))


@each
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_base_in_half_precision(name, dtype, tmp_path):
    model = attached(name, llama(dtype=dtype))
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    held = [t for layer in adapters.adapter_layers(model) for t in layer.tensors("default").values()]
    assert {t.dtype for t in held if t.is_floating_point()} == {torch.float32}, "orthonormal in bf16 is a hundredth off"
    train(model, 2, lr=CASES[name].lr)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(PeftModel.from_pretrained(llama(dtype=dtype), tmp_path)), logits(model))


@some
@pytest.mark.parametrize("task", ["CAUSAL_LM", None])
def test_compiled_in_one_graph(name, task):
    plain, model = (attached(name, task_type=task).train() for _ in range(2))
    torch.compiler.reset()  # of one forward torch compiles eight models, and then no more
    compiled = torch.compile(model.get_base_model(), backend="aot_eager", fullgraph=True)
    x = ids()
    loss, other = plain(input_ids=x, labels=x).loss, compiled(input_ids=x, labels=x).loss
    loss.backward(), other.backward()
    assert abs(loss.item() - other.item()) < 1e-5
    for p, q in zip(plain.parameters(), model.parameters(), strict=True):
        if p.requires_grad:
            assert far(p.grad, q.grad) < 1e-5


@each
def test_checkpointing_copies_and_modules_to_save(name, tmp_path):
    model = attached(name, modules_to_save=["lm_head"])
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable()
    train(model, lr=CASES[name].lr)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(PeftModel.from_pretrained(llama(), tmp_path)), logits(model))
    assert torch.equal(logits(copy.deepcopy(model)), logits(model))
    plain = trained(name)  # enable_input_require_grads leaves a hook that no pickle takes
    assert torch.equal(logits(pickle.loads(pickle.dumps(plain))), logits(plain))


@some
def test_the_verbs_of_transformers(name, tmp_path):
    model = trained(name)
    model.save_pretrained(tmp_path)
    plain = llama()
    plain.load_adapter(str(tmp_path))
    assert torch.equal(logits(plain), logits(model))
    plain.disable_adapters()
    assert torch.equal(logits(plain), logits(llama()))
    plain.enable_adapters()
    plain.delete_adapter("default")
    assert torch.equal(logits(plain), logits(llama()))
    fresh = llama()
    fresh.add_adapter(config_of(name))
    fresh.train()(input_ids=ids(), labels=ids()).loss.backward()


@each
def test_a_base_in_four_bits(name, tmp_path, monkeypatch):
    bnb = pytest.importorskip("bitsandbytes")
    from transformers import BitsAndBytesConfig

    # its kernel for CPUs with AVX512-BF16 rounds activations to bf16: a last bit of fp32 may become 6e-4
    monkeypatch.setattr(bnb.nn.modules, "has_avx512bf16", lambda: False)
    llama().save_pretrained(tmp_path / "base")

    def four():
        config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
        return type(llama()).from_pretrained(tmp_path / "base", quantization_config=config, device_map="cpu").eval()

    before = logits(four())
    model = attached(name, four())
    layer = next(adapters.adapter_layers(model))
    assert isinstance(layer.base_layer, bnb.nn.Linear4bit)
    assert not CASES[name].starts_exactly or far(logits(model), before) < 1e-4
    train(model, lr=CASES[name].lr)
    found = logits(model)
    assert far(found, before) > 1e-3
    model.save_pretrained(tmp_path / "adapter")
    assert far(logits(PeftModel.from_pretrained(four(), tmp_path / "adapter")), found) < 1e-5
    merged = model.merge_and_unload()  # rounded to 4 bits again, as with peft's LoRA
    rounding = (before - logits(llama())).abs().mean()
    assert (logits(merged) - found).abs().mean() < 5 * rounding


@each
def test_what_there_is_no_way_to_is_refused(name):
    with pytest.raises(ValueError, match="not compatible with the `PeftMixedModel`"):
        get_peft_model(llama(), config_of(name), mixed=True)
    model = attached(name)
    with pytest.raises(ValueError, match="Cannot combine adapters with different peft types"):
        model.add_adapter("other", LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(NotImplementedError, match="to_lora"):
        model(input_ids=ids(), adapter_names=["default", "__base__"])
    with pytest.raises(ValueError, match=r"model.embed_tokens is a Embedding; leave it out of target_modules"):
        get_peft_model(llama(), CASES[name].config(**CASES[name].keys, target_modules=["embed_tokens"]))


@each
def test_written_as_lora(name, tmp_path):
    case, model = CASES[name], trained(name, modules_to_save=["lm_head"])
    if not case.is_low_rank:
        with pytest.raises(ValueError, match="full rank"):
            adapters.to_lora(model, tmp_path)
        assert not list(tmp_path.iterdir())
        return
    found = logits(model)
    lora = adapters.to_lora(model, tmp_path / "exact")
    assert lora.r == (case.lora_rank or case.keys["r"])
    assert far(logits(PeftModel.from_pretrained(llama(), tmp_path / "exact")), found) < 1e-5
    # what only LoRA has: weighted sums, one batch through several adapters
    plain = trained(name)
    adapters.to_lora(plain, tmp_path / "plain")
    save_as_lora(tmp_path / "decomposed", plain, rank=lora.r)  # peft's own, by an SVD of each change
    both = PeftModel.from_pretrained(llama(), tmp_path / "plain", adapter_name="a")
    both.load_adapter(tmp_path / "decomposed", "b")
    both.add_weighted_adapter(["a", "b"], [0.5, 0.5], "average", combination_type="cat")
    both.set_adapter("average")
    assert far(logits(both), logits(plain)) < 1e-4
    with torch.no_grad():
        mixed = both(input_ids=ids(), adapter_names=["a", "__base__"]).logits
    assert far(mixed[0], logits(plain)[0]) < 1e-5
    assert far(mixed[1], logits(llama())[1]) < 1e-5


@some
def test_a_lora_that_was_written_needs_no_gracile(name, tmp_path):
    if not CASES[name].is_low_rank:
        pytest.skip("its change is of full rank")
    model = trained(name)
    adapters.to_lora(model, tmp_path / "lora")
    base = llama()
    base.save_pretrained(tmp_path / "base")
    told = run(f"""
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM
base = AutoModelForCausalLM.from_pretrained({str(tmp_path / "base")!r})
model = PeftModel.from_pretrained(base, {str(tmp_path / "lora")!r}).eval()
assert not any(name.startswith('gracile') for name in sys.modules)
torch.save(model(input_ids=torch.tensor({ids().tolist()!r})).logits, {str(tmp_path / "logits.pt")!r})
""")
    assert told.returncode == 0, told.stderr[-500:]
    assert far(torch.load(tmp_path / "logits.pt"), logits(model)) < 1e-5


@some
def test_the_trainer(name, tmp_path):
    from transformers import Trainer, TrainingArguments

    data = [{"input_ids": ids(1, seed=i)[0], "labels": ids(1, seed=i)[0]} for i in range(16)]

    def run(accumulate, steps, folder, resume=None):
        arguments = TrainingArguments(
            str(tmp_path / folder), per_device_train_batch_size=4 // accumulate, gradient_accumulation_steps=accumulate,
            max_steps=steps, learning_rate=1e-2, lr_scheduler_type="constant", save_steps=2, logging_steps=1,
            report_to=[], use_cpu=True, seed=0, max_grad_norm=1.0, disable_tqdm=True,
        )  # fmt: skip
        trainer = Trainer(attached(name), arguments, train_dataset=data, callbacks=[adapters.StepCallback()])
        trainer.train(resume_from_checkpoint=resume)
        return trainer

    whole, parts = run(1, 4, "whole"), run(4, 4, "parts")
    assert whole.model.base_model.steps == parts.model.base_model.steps == 4, "an event a step, not a pass"
    assert far(logits(whole.model), logits(parts.model)) < 5e-4, "a term of the loss counts once a step too"
    files = {path.name for path in (tmp_path / "whole" / "checkpoint-2").iterdir()}
    assert "adapter_model.safetensors" in files
    assert "model.safetensors" not in files
    resumed = run(1, 4, "whole", resume=str(tmp_path / "whole" / "checkpoint-2"))
    assert far(logits(resumed.model), logits(whole.model)) < 1e-6
    assert resumed.model.base_model.steps == 4
