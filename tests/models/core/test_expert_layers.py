"""Experts in one tensor as layers: mixtures of transformers converted, passed, copied, saved, trained and merged."""

import copy
import io
import pickle

import pytest
import torch
from helpers import same
from mixtures import MIXTURES, build_mixture
from torch import nn

from gracile.models.convert import convert, merge
from gracile.models.core.expert_layers import ExpertLayers
from gracile.models.layers import (
    CSRLinear,
    FactoredLinear,
    LowRankLinear,
    NMLinear,
    OrderedLowRankLinear,
    ParallelLinear,
    ReLoRALinear,
    ScaledLinear,
    SparseLowRankLinear,
    SpectralLinear,
)
from gracile.models.sparse_export import sparsify
from gracile.optim import GaLoreAdamW, ReLoRAAdamW, SLTrainAdamW, SSTAdamW, param_groups, state_bytes
from gracile.optim.memory import planned_state_by_kind

TOKENS = torch.arange(60).view(2, 30)
KEEPING = {  # layers that begin as what they replace
    "relora": (ReLoRALinear, {"rank": 4}),
    "cast": (ScaledLinear, {}),
    "sst": (SpectralLinear, {"rank": 4}),
    "maestro": (OrderedLowRankLinear, {}),
}
SLTRAIN = (SparseLowRankLinear, {"rank": 4, "density": 0.1})
by_kind = pytest.mark.parametrize("kind", MIXTURES)


def logits(model):
    return model(input_ids=TOKENS).logits


def loss(model):
    return model(input_ids=TOKENS, labels=TOKENS).loss


def shaken(model):
    torch.manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.02 * torch.randn_like(p))
    return model


def converted(kind, layer=SLTRAIN, target_modules=("experts",), **more):
    return convert(build_mixture(kind, **more), layer[0], target_modules, **layer[1])


def experts_in(model):
    return {name: layers for name, layers in model.named_modules() if isinstance(layers, ExpertLayers)}


@by_kind
@pytest.mark.parametrize("implementation", ["eager", "grouped_mm", "batched_mm"])
def test_converted_it_computes_the_same_and_merged_it_is_what_it_was(kind, implementation):
    plain = build_mixture(kind)
    before, classes = plain.state_dict(), [type(module) for module in plain.modules()]
    plain.config._experts_implementation = implementation
    expected = logits(plain)
    for name in KEEPING if implementation == "grouped_mm" else ("relora",):
        model = converted(kind, KEEPING[name])
        model.config._experts_implementation = implementation
        found = logits(model)
        gap = 0 if name in ("relora", "cast") else 1e-6
        torch.testing.assert_close(found, expected, rtol=0, atol=gap)
        trained = logits(shaken(model))
        assert merge(model) is model
        torch.testing.assert_close(logits(model), trained, rtol=1e-5, atol=1e-5)
        assert [type(module) for module in model.modules()] == classes
        assert {k: v.shape for k, v in model.state_dict().items()} == {k: v.shape for k, v in before.items()}
        assert list(model.state_dict()) == list(before)
        assert all(isinstance(p, nn.Parameter) and p.requires_grad for p in model.parameters())
        build_mixture(kind, seed=1).load_state_dict(model.state_dict())


@by_kind
def test_each_expert_is_a_matrix_of_outputs_by_inputs(kind):
    model = converted(kind, (LowRankLinear, {"rank": 2}), ["mlp.experts"])
    hidden = model.config.hidden_size
    for name, layers in experts_in(model).items():
        inner = model.get_submodule(name.rpartition(".")[0]).intermediate_dim if kind != "gpt_oss" else 48
        shape = (hidden, 2 * inner) if "gate_up" in name else (inner, hidden)
        assert [(layer.in_features, layer.out_features) for layer in layers] == [shape] * 4
        assert all(layer.bias is None for layer in layers)


@by_kind
@pytest.mark.parametrize("target_modules", [["attn", "mlp"], "all-linear", ["mlp.experts"], r".*\.experts\.down_proj"])
def test_patterns_choose_what_they_choose_for_param_groups(kind, target_modules):
    model = build_mixture(kind, device="meta")
    marked = param_groups(model, rank=2, target_modules=target_modules)
    owned = {id(p) for group in marked if group.get("rank") for p in group["params"]}
    chosen = {name.removesuffix(".weight") for name, p in model.named_parameters() if id(p) in owned}
    convert(model, NMLinear, target_modules)
    tensors = {name.removesuffix("_layers") for name in experts_in(model)}
    layers = {n for n, m in model.named_modules() if isinstance(m, FactoredLinear) and "_layers." not in n}
    assert tensors | layers == chosen
    again = param_groups(model, rank=2, target_modules=target_modules)  # by the same patterns, in their layers
    count = sum(len(group["params"]) for group in again if group.get("rank"))
    assert count == len(layers) + 4 * len(tensors)


# ---- passes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm", "batched_mm"])
@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_a_pass_makes_each_weight_once(implementation, checkpointed, training, monkeypatch):
    """Also where a loop over the experts reads the tensor for each of them."""
    model = converted("mixtral", target_modules=["mlp.experts"]).train(training)
    model.config._experts_implementation = implementation
    if checkpointed:
        model.gradient_checkpointing_enable()
    count = []
    weight = SparseLowRankLinear.trained_weight
    monkeypatch.setattr(SparseLowRankLinear, "trained_weight", lambda layer: count.append(layer) or weight(layer))
    found = loss(model)
    assert len(count) == len(set(count)) == 16, "four experts, two tensors, two layers"
    found.backward()
    assert len(count) == (32 if checkpointed and training else 16)
    kept = model.model.layers[0].mlp.experts.gate_up_proj
    assert kept is not model.model.layers[0].mlp.experts.gate_up_proj, "nothing stays between passes"


def test_checkpointed_the_gradients_are_the_same():
    gradients = []
    for checkpointed in (False, True):
        model = shaken(converted("gpt_oss")).train()
        if checkpointed:
            model.gradient_checkpointing_enable()
        loss(model).backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    assert same(*gradients)


class Loop(nn.Module):
    """Reads what it needs of its weight without gradients first."""

    is_transposed, num_experts = False, 3

    def __init__(self):
        super().__init__()
        self.first = nn.Parameter(torch.randn(2))
        self.weight = nn.Parameter(torch.randn(3, 8, 8))
        self.last = nn.Parameter(torch.randn(2))

    def forward(self, x):
        with torch.no_grad():
            count = len(self.weight)
        return sum(nn.functional.linear(x, self.weight[e]) for e in range(count))


def test_what_is_read_first_without_gradients_has_them():
    model = convert(nn.Sequential(Loop()), *SLTRAIN[:1], ["0"], rank=2)
    assert [name for name, _ in model.named_children()] == ["0"]
    assert set(experts_in(model)) == {"0.weight_layers"}
    model(torch.randn(5, 8)).sum().backward()
    assert all(p.grad is not None for p in model[0].weight_layers.parameters())
    assert [name for name, _ in merge(model).named_parameters()] == ["0.first", "0.weight", "0.last"]


def test_the_weight_is_as_wide_under_autocast():
    experts = converted("mixtral").model.layers[0].mlp.experts
    with torch.autocast("cpu", torch.bfloat16):
        found = experts.down_proj
    assert torch.equal(found, experts.down_proj)
    assert found.dtype == torch.float32


# ---- copies and state -----------------------------------------------------------------------------------------------


@by_kind
def test_it_is_copied_pickled_and_saved_like_other_models(kind):
    model = shaken(converted(kind))
    expected = logits(model)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(logits(other), expected)
        assert not {id(p) for p in other.parameters()} & {id(p) for p in model.parameters()}
        assert [type(module) for module in other.modules()] == [type(module) for module in model.modules()]
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    other = converted(kind, seed=1)
    assert not torch.equal(logits(other), expected)
    other.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(logits(other), expected)
    assert torch.equal(logits(merge(other)), logits(merge(model)))


def test_what_stands_for_experts_is_not_written_over():
    experts = converted("mixtral").model.layers[0].mlp.experts
    with pytest.raises(KeyError, match="gate_up_proj"):
        experts.gate_up_proj = nn.Parameter(torch.zeros(4, 96, 32))


def test_one_tensor_after_the_other():
    model = build_mixture("mixtral")
    names = list(model.state_dict())
    convert(model, ReLoRALinear, ["experts.down_proj"], rank=2)
    convert(model, ScaledLinear, ["experts.gate_up_proj"])
    assert {type(layers[0]) for layers in experts_in(model).values()} == {ReLoRALinear, ScaledLinear}
    assert torch.equal(logits(model), logits(build_mixture("mixtral")))
    assert list(merge(model).state_dict()) == names
    assert same(model.state_dict(), build_mixture("mixtral").state_dict())


def test_dtype_device_and_mode_stay():
    model = build_mixture("gpt_oss", device="meta").to(torch.bfloat16).eval()
    convert(model, *SLTRAIN[:1], ["experts"], **SLTRAIN[1])
    layers = [layer for those in experts_in(model).values() for layer in those]
    assert {(p.dtype, p.device.type) for layer in layers for p in layer.parameters()} == {(torch.bfloat16, "meta")}
    assert not any(module.training for module in model.modules())
    assert len({layer.name for layer in layers}) == len(layers), "each draws its own places"


# ---- training -------------------------------------------------------------------------------------------------------

TRAINED = {
    "sltrain": (SLTRAIN, SLTrainAdamW, {}),
    "sst": (KEEPING["sst"], SSTAdamW, {"swap_every": 2, "iterations": 2}),
    "relora": (KEEPING["relora"], ReLoRAAdamW, {"merge_every": 2}),
}


@pytest.mark.parametrize("method", TRAINED)
def test_optimizers_find_and_step_the_layers(method):
    layer, optimizer_class, keys = TRAINED[method]
    model = converted("qwen3_moe", layer, ["mlp.experts"])
    optimizer = optimizer_class(param_groups(model), lr=3e-3, **keys)
    assert len({id(part.layer) for part in optimizer._parts.values()}) == 16
    before, losses = copy.deepcopy(model.state_dict()), []
    for _ in range(5):
        losses.append(loss(model))
        losses[-1].backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses == sorted(losses, reverse=True)
    assert state_bytes(optimizer) == planned_state_by_kind(optimizer).total()
    moved = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    factors = {name for name in before if "_layers." in name and not name.endswith(("frozen", "support"))}
    assert factors <= moved
    torch.testing.assert_close(logits(model), logits(merge(model)), rtol=1e-5, atol=1e-5)


def test_masks_are_each_experts_own():
    """GaLore's subspaces, for one, are of the matrices of the layers, by the experts' name."""
    model = converted("mixtral", (NMLinear, {}), ["mlp.experts"])
    optimizer = GaLoreAdamW(param_groups(model, rank=2, target_modules=["experts.down_proj"]))
    loss(model).backward()
    optimizer.step()
    assert len(optimizer.param_groups[0]["params"]) == 8
    kept = merge(model).model.layers[0].mlp.experts.down_proj
    assert ((kept != 0).unflatten(-1, (-1, 4)).sum(-1) == 2).all()
    with pytest.raises(ValueError, match=r"nothing to leave out \(experts in one tensor stay dense\)"):
        sparsify(model)


# ---- what is refused ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("layer", "keys", "message"),
    [
        (
            ParallelLinear,
            {"sparsity": 0.5},
            "is not linear: no plain layer computes what it does; choose another layer",
        ),
        (ReLoRALinear, {"rank": 2, "dropout": 0.1}, "which a dense weight does not see: set dropout=0; choose another"),
        (CSRLinear, {}, "gives no gradients through a dense weight; choose another layer, or target_modules without"),
        (SpectralLinear, {"rank": 33}, "rank must be a whole number from 1 to 32 here, got 33"),
    ],
)
def test_a_layer_that_cannot_is_refused_by_name_and_nothing_has_changed(layer, keys, message):
    model = build_mixture("qwen3_moe")
    before = logits(model)
    with pytest.raises(ValueError, match=message):
        convert(model, layer, ["self_attn", "experts"], **keys)
    assert torch.equal(logits(model), before)
    assert not any(isinstance(module, FactoredLinear) for module in model.modules())


def test_experts_that_nobody_says_how_they_lie_are_refused():
    model = build_mixture("mixtral")
    for module in model.modules():
        vars(module).pop("is_transposed", None)
    with pytest.raises(
        ValueError, match=r"gate_up_proj: MixtralExperts does not say how its experts lie; set its is_tr"
    ):
        convert(model, LowRankLinear, ["mlp"], rank=2)
    for layer in model.model.layers:
        layer.mlp.experts.is_transposed = False
    assert len(experts_in(convert(model, LowRankLinear, ["mlp"], rank=2))) == 4


def test_split_or_quantized_experts_are_refused():
    split = build_mixture("mixtral")
    split.model.layers[0].mlp.experts.down_proj.ds_id = 0  # as DeepSpeed ZeRO 3 marks them
    with pytest.raises(ValueError, match=r"down_proj is split already \(DeepSpeed ZeRO 3\)"):
        convert(split, LowRankLinear, ["experts"], rank=2)
    quantized = nn.Sequential(Loop())
    quantized[0].weight = nn.Parameter(torch.zeros(3, 8, 8, dtype=torch.int8), requires_grad=False)
    with pytest.raises(ValueError, match="1 is quantized"):
        convert(quantized, LowRankLinear, ["0"], rank=2)
