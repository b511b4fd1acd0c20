"""Adapters of experts in one tensor (E, m, n): each expert as a matrix of its own, in either layout."""

import pytest
import torch
from adapted import CASES, far, ids
from mixtures import build_mixture
from peft import PeftModel, get_peft_model
from torch import nn

from gracile import adapters
from gracile.adapters.experts import ExpertsLayer

PARAMETERS = ["experts.gate_up_proj", "experts.down_proj"]
TAKES = ["allora", "balora", "loraxs", "sorsa", "spp", "svfit"]


def logits(model):
    with torch.no_grad():
        return model.eval()(input_ids=ids()).logits


def config(name, **keys):
    case = CASES[name]
    given = {**case.keys, "task_type": "CAUSAL_LM", "target_modules": [], "target_parameters": PARAMETERS, **keys}
    return case.config(**given)


def moved(name, kind, **keys):
    model = get_peft_model(build_mixture(kind), config(name, **keys))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(0.1 * torch.randn(p.shape, generator=generator))
    return model


def experts_in(model):
    return [layer for layer in adapters.adapter_layers(model) if isinstance(layer, ExpertsLayer)]


@pytest.mark.parametrize("kind", ["mixtral", "gpt_oss"])
@pytest.mark.parametrize("name", TAKES)
def test_each_expert_is_a_matrix_of_its_own(name, kind):
    model, before = moved(name, kind), logits(build_mixture(kind))
    layers = experts_in(model)
    assert len(layers) == 4
    assert far(logits(model), before) > 1e-3
    for layer in layers:
        stored = layer.parameter.mT if kind == "gpt_oss" else layer.parameter
        assert (layer.out_features, layer.in_features) == stored.shape[1:]
        for e, weight in enumerate(stored):
            own = CASES[name].config(**{**CASES[name].keys, "target_modules": ["0"]})
            linear = nn.Linear(layer.in_features, layer.out_features, bias=False)
            linear.weight = nn.Parameter(weight.detach().clone())
            alone = next(adapters.adapter_layers(get_peft_model(nn.Sequential(linear), own)))
            with torch.no_grad():
                for key, value in layer.tensors("default").items():
                    alone.tensors("default")[key].copy_(value[e])
            assert far(layer.whole_delta("default")[e], alone.get_delta_weight("default")) < 1e-5
    found = logits(model)
    with model.disable_adapter():
        assert torch.equal(logits(model), before)
    merged = model.merge_and_unload()
    assert far(logits(merged), found) < 1e-4
    assert sorted(merged.state_dict()) == sorted(build_mixture(kind).state_dict())


@pytest.mark.parametrize("name", TAKES)
def test_begin_train_save_and_load(name, tmp_path):
    base = build_mixture("mixtral")
    before = logits(base)
    model = get_peft_model(base, config(name, target_modules=["q_proj"]))
    assert far(logits(model), before) < 1e-4
    model.train()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=3e-2)
    for step in range(3):
        x = ids(seed=step)
        model(input_ids=x, labels=x).loss.backward()
        assert all(p.grad is not None for p in trained)
        optimizer.step()
        optimizer.zero_grad()
    assert far(logits(model), before) > 1e-3
    model.save_pretrained(tmp_path / "own")
    assert far(logits(PeftModel.from_pretrained(build_mixture("mixtral"), tmp_path / "own")), logits(model)) == 0
    if not CASES[name].is_low_rank:
        return
    adapters.to_lora(model, tmp_path / "lora")
    assert far(logits(PeftModel.from_pretrained(build_mixture("mixtral"), tmp_path / "lora")), logits(model)) < 1e-4


def test_two_adapters_and_the_base_to_the_bit():
    model = moved("sorsa", "mixtral")
    first, weights = logits(model), {key: value.clone() for key, value in model.state_dict().items()}
    model.add_adapter("second", config("sorsa", r=2))
    model.set_adapter("second")
    assert far(logits(model), logits(build_mixture("mixtral"))) < 1e-4
    model.set_adapter("default")
    assert torch.equal(logits(model), first)
    model.merge_adapter()
    assert far(logits(model), first) < 1e-4
    model.unmerge_adapter()
    now = model.state_dict()
    assert all(torch.equal(now[key], value) for key, value in weights.items())


def test_the_penalty_is_the_mean_over_experts_too():
    model = moved("sorsa", "mixtral", gamma=1.0)
    assert adapters.penalty(model) > 0.01
    model.train()(input_ids=ids(), labels=ids()).loss.backward()


def test_what_is_refused():
    for name in ("dsee", "masktuning", "pst", "soka"):
        with pytest.raises(ValueError, match=r"target_parameters: \w+ has no adapters of experts"):
            get_peft_model(build_mixture("mixtral"), config(name))
    with pytest.raises(ValueError, match=r"target_parameters must name experts \(E, m, n\), got .*q_proj.weight"):
        get_peft_model(build_mixture("mixtral"), config("loraxs", target_parameters=["q_proj.weight"]))
