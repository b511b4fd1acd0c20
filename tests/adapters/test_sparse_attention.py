"""SparseLoRA's attention: LoRA where nothing is left out, the chosen channels' own gradients where something is, under
grouped queries too."""

import types

import pytest
import torch
from adapted import far, ids, llama, logits
from peft import LoraConfig, get_peft_model
from sparsely import labels, lora, step
from torch import nn
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    PhiConfig,
    PhiForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from gracile.adapters import SorsaConfig, SparseLora
from gracile.adapters.sparse_attention import _partners

SIDES = ["q_proj", "k_proj", "v_proj", "o_proj"]
WIDE = {"q_proj": 64, "k_proj": 32, "v_proj": 32, "o_proj": 64}  # channels; four heads of 16 with two of k and v
SMALL = {
    "vocab_size": 64, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64,
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip


def other(kind, config):
    torch.manual_seed(0)
    model = kind(config)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith("bias"):
                p.normal_(std=0.1)
    return get_peft_model(model, LoraConfig(r=4, target_modules=SIDES, init_lora_weights=False)).train()


def with_biases(targets):
    return other(Qwen2ForCausalLM, Qwen2Config(**SMALL))


def interleaved(targets):
    return other(CohereForCausalLM, CohereConfig(**SMALL))


MODELS = {"llama": lora, "biases of qwen2": with_biases, "cohere": interleaved}


def masked(model, kept, with_labels):
    """Dense matrices, of which the channels that were not chosen are zero for tokens without labels: of what q, k and v
    put out, and of what o is given."""

    def masks(name, width):
        on = torch.zeros(width)
        on[kept[name]] = 1
        return torch.where(with_labels[..., None], torch.ones(width), on)

    for name, module in model.named_modules():
        if name in kept and name.endswith("o_proj"):
            module.register_forward_pre_hook(
                lambda module, args, name=name: (args[0] * masks(name, args[0].shape[-1]),)
            )
        elif name in kept:
            module.register_forward_hook(lambda module, args, y, name=name: y * masks(name, y.shape[-1]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_with_all_channels_it_is_lora(dtype):
    out, grads = step(lora(SIDES, dtype=dtype))
    model = lora(SIDES, dtype=dtype)
    SparseLora(model, 0.0, attention=0.0)
    found, own = step(model)
    assert torch.equal(found.logits, out.logits)
    assert all(torch.equal(own[name], grads[name]) for name in grads)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(("share", "first"), [(0.25, 4), (0.9, 4), (0.5, 0)])
def test_the_gradient_is_that_of_the_channels_that_were_chosen(name, share, first):
    model = MODELS[name](SIDES)
    sparse = SparseLora(model, 0.0, attention=share)
    x = ids()
    said = labels(x, first) if first else x  # all have labels: all is dense
    out = model(input_ids=x, labels=said)
    out.loss.backward()
    for key, kept in sparse.kept.items():
        assert len(kept) == pytest.approx((1 - share) * WIDE[key.rpartition(".")[2]], abs=2)
        assert torch.equal(kept, kept.unique())
    assert bool(sparse.kept) is bool(first)
    reference = MODELS[name](SIDES)
    masked(reference, sparse.kept, said != -100)
    expected = reference(input_ids=x, labels=said)
    expected.loss.backward()
    assert far(out.logits, expected.logits) < 1e-5
    for (key, p), q in zip(model.named_parameters(), reference.parameters(), strict=True):
        assert (p.grad is None) is (q.grad is None), key
        assert p.grad is None or far(p.grad, q.grad) < 1e-5, key
    if first:
        assert far(out.logits, MODELS[name](SIDES)(input_ids=x).logits) > 1e-3


def test_lora_on_some_of_the_matrices_and_all_tokens_sparse():
    found = []
    for sparsely in (True, False):
        model = lora(["q_proj", "o_proj"])
        if sparsely:
            sparse = SparseLora(model, 0.0, attention=0.5)
        else:
            masked(model, sparse.kept, torch.zeros(2, 12, dtype=torch.bool))
        y = model(input_ids=ids()).logits
        y.square().mean().backward()
        found.append([y, *(p.grad for p in model.parameters() if p.grad is not None)])
    assert all(far(a, b) < 1e-5 for a, b in zip(*found, strict=True))


def kept_in(sparse, name="base_model.model.model.layers.0.self_attn"):
    return {side: sparse.kept[f"{name}.{side}"] for side in SIDES}


def test_pairs_stay_together_and_groups_have_the_same():
    for name, distance in (("llama", 8), ("cohere", 1)):
        model = MODELS[name](SIDES)
        sparse = SparseLora(model, 0.0, attention=0.5)
        step(model)
        kept = {side: set(found.tolist()) for side, found in kept_in(sparse).items()}
        for channel in kept["k_proj"]:
            low = channel % 16 < 8 if distance == 8 else channel % 2 == 0
            assert channel + distance * (1 if low else -1) in kept["k_proj"]
        for few, many in (("k_proj", "q_proj"), ("v_proj", "o_proj")):
            expected = {(2 * (c // 16) + j) * 16 + c % 16 for c in kept[few] for j in range(2)}
            assert kept[many] == expected
        assert 0 < len(kept["k_proj"]) < 32


def test_a_predictor_of_full_rank_finds_the_largest_channels():
    model = lora(SIDES)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.zero_()
    sparse = SparseLora(model, 0.0, attention=0.75, rank=64)
    attention, seen = model.get_submodule("base_model.model.model.layers.0.self_attn"), []
    attention.register_forward_pre_hook(
        lambda _, args, keywords: seen.append(keywords["hidden_states"]), with_kwargs=True
    )
    x = ids()
    model(input_ids=x, labels=labels(x))
    h = seen[0].detach()[labels(x) == -100]
    q, k, v = (nn.functional.linear(h, getattr(attention, side).weight) for side in SIDES[:3])
    scores = {}
    for head in range(2):
        for low in range(8):
            of_k = k[:, [head * 16 + low, head * 16 + low + 8]].norm()
            of_q = q[:, [(2 * head + j) * 16 + low + more for j in range(2) for more in (0, 8)]].norm()
            scores[head * 16 + low] = float(of_k * of_q)
    best = sorted(scores, key=scores.get)[-4:]
    assert sorted(best + [c + 8 for c in best]) == kept_in(sparse)["k_proj"].tolist()
    assert torch.equal(kept_in(sparse)["v_proj"], v.norm(dim=0).topk(8).indices.sort().values)


def test_evaluation_steps_removal_and_checkpointing():
    expected, model = logits(lora(SIDES)), lora(SIDES)
    sparse = SparseLora(model, 0.0, attention={"layers.1.self_attn": 0.8}, start_step=1)
    model.train()
    step(model)
    assert not sparse.kept
    sparse.steps = 1
    _, grads = step(model)
    assert {name.rpartition(".")[0] for name in sparse.kept} == {"base_model.model.model.layers.1.self_attn"}
    assert far(logits(model), expected) == 0, "evaluation is dense"
    again = lora(SIDES)
    again.enable_input_require_grads()
    again.gradient_checkpointing_enable()
    SparseLora(again, 0.0, attention={"layers.1.self_attn": 0.8})
    _, checkpointed = step(again.train())
    assert all(far(grads[name], checkpointed[name]) < 1e-6 for name in grads)
    sparse.remove()
    sparse.kept.clear()
    step(model.train())
    assert not sparse.kept
    assert not any("forward" in vars(module) for module in model.modules())


def test_both_parts_together():
    model = lora([*SIDES, "gate_proj", "up_proj", "down_proj"])
    sparse = SparseLora(model, 0.5, attention=0.5)
    _, grads = step(model)
    assert len(sparse.kept) == 2 * (1 + 4)
    assert all(torch.isfinite(grad).all() for grad in grads.values())


def test_what_is_refused():
    with pytest.raises(ValueError, match=r"attention must be a number in \[0, 1\), got 1"):
        SparseLora(lora(), 0.0, attention=1)
    with pytest.raises(ValueError, match=r"attention must name attentions of the model, got 'layers.7.self_attn'"):
        SparseLora(lora(), 0.0, attention={"layers.7.self_attn": 0.5})
    model = other(Qwen3ForCausalLM, Qwen3Config(**SMALL, head_dim=16))
    with pytest.raises(ValueError, match="attention must not norm its heads"):
        SparseLora(model, 0.5, attention=0.5)
    assert not any("forward" in vars(module) for module in model.modules()), "nothing is left half done"
    dora = lora(SIDES, use_dora=True)
    with pytest.raises(ValueError, match=r"plain LoRA, and base_model.*layers.0.self_attn.q_proj has a variant"):
        SparseLora(dora, 0.0, attention=0.5)
    sorsa = get_peft_model(llama(), SorsaConfig(r=4, target_modules=["gate_proj"]))
    with pytest.raises(ValueError, match="model must have peft's LoRA and no other adapter"):
        SparseLora(sorsa, 0.5)
    phi = get_peft_model(PhiForCausalLM(PhiConfig(**SMALL)), LoraConfig(r=4, target_modules=["q_proj"]))
    with pytest.raises(ValueError, match="model must have attentions with q_proj, k_proj, v_proj and o_proj"):
        SparseLora(phi, 0.0, attention=0.5)
    partial = types.SimpleNamespace(rope_parameters={"partial_rotary_factor": 0.5})
    attention = llama().model.layers[0].self_attn
    attention.config = partial
    with pytest.raises(ValueError, match="attention must rotate all channels of its heads in pairs"):
        _partners(attention, "self_attn", 16)
