"""Targets mean the same for ranks, masks and conversions, in the families that transformers ships."""

import warnings

import pytest
import torch
import transformers
from mixtures import MIXTURES, build_mixture
from torch import nn

from gracile.models.convert import convert
from gracile.models.layers import FactoredLinear, LowRankLinear
from gracile.optim import param_groups
from gracile.target_modules import DEFAULT_TARGETS, FAMILIES

SIZES = {
    "hidden_size": 32, "d_model": 32, "n_embd": 32, "dim": 32, "intermediate_size": 64, "ffn_dim": 64, "d_ff": 64,
    "hidden_dim": 64, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "num_hidden_layers": 2, "num_layers": 2,
    "n_layer": 2, "n_layers": 2, "encoder_layers": 2, "decoder_layers": 2, "num_attention_heads": 4, "num_heads": 4,
    "n_head": 4, "n_heads": 4, "encoder_attention_heads": 4, "decoder_attention_heads": 4, "num_key_value_heads": 4,
    "vocab_size": 64, "d_kv": 8, "word_embed_proj_dim": 32, "max_position_embeddings": 64, "pad_token_id": 0,
    "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1, "num_experts": 4, "num_local_experts": 4,
    "moe_intermediate_size": 16, "head_dim": 8, "state_size": 4, "time_step_rank": 4, "conv_kernel": 2,
    "n_positions": 64, "n_ctx": 64,
}  # fmt: skip
# A family's class, and the share of its parameters, but for embeddings and the output, that the default must hold.
MODELS = {
    "llama": ("LlamaForCausalLM", 0.98),
    "qwen2": ("Qwen2ForCausalLM", 0.98),
    "qwen3": ("Qwen3ForCausalLM", 0.98),
    "mistral": ("MistralForCausalLM", 0.98),
    "gemma": ("GemmaForCausalLM", 0.98),
    "phi": ("PhiForCausalLM", 0.9),
    "gpt2": ("GPT2LMHeadModel", 0.9),
    "gptj": ("GPTJForCausalLM", 0.9),
    "gpt_neox": ("GPTNeoXForCausalLM", 0.9),
    "bloom": ("BloomForCausalLM", 0.9),
    "falcon": ("FalconForCausalLM", 0.9),
    "opt": ("OPTForCausalLM", 0.9),
    "mpt": ("MptForCausalLM", 0.9),
    "mamba": ("MambaForCausalLM", 0.8),
    "t5": ("T5ForConditionalGeneration", 0.9),
    "bert": ("BertForMaskedLM", 0.8),
    "distilbert": ("DistilBertForMaskedLM", 0.8),
    "bart": ("BartForConditionalGeneration", 0.9),
    "whisper": ("WhisperForConditionalGeneration", 0.75),
}


def build(kind, **more):
    config = transformers.AutoConfig.for_model(kind)
    known = {key: value for key, value in SIZES.items() if hasattr(config, key)} | more
    known.pop("head_dim" if kind == "falcon" else "", None)  # which finds it itself
    config = transformers.AutoConfig.for_model(kind, **known)
    with torch.device("meta"):
        return getattr(transformers, MODELS[kind][0] if kind in MODELS else more["cls"])(config)


def ranked(model, *targets, **keys):
    names = {id(p): name for name, p in model.named_parameters()}
    groups = param_groups(model, 4, *targets, **keys)
    return {names[id(p)] for group in groups if group.get("rank") for p in group["params"]}


@pytest.mark.parametrize("kind", MODELS)
def test_the_default_holds_the_matrices_of_a_block_in_every_family(kind):
    """And converts the same ones."""
    model = build(kind)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        chosen = ranked(model)
    aside = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    output = model.get_output_embeddings()
    aside |= {id(output.weight)} if output is not None else set()
    inside = {name: p.numel() for name, p in model.named_parameters() if id(p) not in aside}
    share = sum(inside[name] for name in chosen) / sum(inside.values())
    assert share >= MODELS[kind][1], sorted(inside.keys() - chosen)
    assert not any("embed" in name or "lm_head" in name for name in chosen)
    convert(model, LowRankLinear, rank=4)
    factored = {f"{name}.weight" for name, m in model.named_modules() if isinstance(m, FactoredLinear)}
    assert factored == chosen


def test_published_lists_work_as_they_are():
    """SLTrain's and ReLoRA's scripts name parts that a LLaMA does not have."""
    model = build("llama")
    published = ["attn", "attention", "mlp"]
    assert ranked(model, published) == ranked(model, list(DEFAULT_TARGETS))
    convert(model, LowRankLinear, published, rank=4)
    with pytest.raises(ValueError, match=r"'attention' matches no trainable linear layer; .*'all-linear' takes every"):
        param_groups(build("llama"), 4, ["attention"])


def test_all_linear_is_the_same_for_ranks_and_conversions():
    model = build("opt")
    chosen = ranked(model, "all-linear")
    convert(model, LowRankLinear, "all-linear", rank=4)
    factored = {f"{name}.weight" for name, m in model.named_modules() if isinstance(m, FactoredLinear)}
    assert factored == chosen
    assert isinstance(model.get_output_embeddings(), nn.Linear)


@pytest.mark.parametrize("targets", ["all-linear", ["q_proj"], r".*q_proj"])
def test_frozen_and_quantized_matrices_are_the_reason(targets):
    model = build("llama").requires_grad_(False)
    with pytest.raises(ValueError, match=r"no .*trainable linear.*: \d+ are frozen"):
        param_groups(model, 4, targets)
    for module in model.modules():
        if isinstance(module, nn.Linear):
            module.weight = nn.Parameter(torch.zeros(8, 1, dtype=torch.uint8), requires_grad=False)
    with pytest.raises(ValueError, match=r"no .*trainable linear.*: \d+ are quantized"):
        param_groups(model, 4, targets)
    with pytest.raises(ValueError, match=r"no .*trainable linear.*: \d+ are quantized"):
        convert(model, LowRankLinear, targets, rank=4)


def test_a_part_of_a_block_that_is_frozen_is_not_passed_over():
    model = build("llama")
    model.model.layers.requires_grad_(False)
    model.model.layers[0].mlp.requires_grad_(True)
    with pytest.raises(ValueError, match="'attn' matches no trainable linear layer: 8 are frozen"):
        param_groups(model, 4)


class Mixture(nn.Module):
    """A block with a router, as transformers' mixtures have one, and experts in one tensor."""

    def __init__(self):
        super().__init__()
        self.self_attn = nn.Linear(16, 16)
        self.mlp = nn.ModuleDict({"gate": nn.Linear(16, 4, bias=False), "shared": nn.Linear(16, 16)})
        self.mlp.register_parameter("experts", nn.Parameter(torch.zeros(4, 16, 32)))


def test_a_router_is_a_target_where_it_is_named():
    model = Mixture()
    assert ranked(model) == {"self_attn.weight", "mlp.shared.weight", "mlp.experts"}
    assert ranked(model, "all-linear") == ranked(model)
    with pytest.warns(
        UserWarning, match=r"leaves out 87% of the parameters, such as mlp.experts \(4, 16, 32\): .*'all-l"
    ):
        assert "mlp.gate.weight" in ranked(model, ["attn", "mlp.gate"])


@pytest.mark.parametrize("kind", MIXTURES)
def test_experts_in_one_tensor_are_targets_like_other_matrices(kind):
    model = build_mixture(kind, device="meta")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        held = ranked(model)
    assert {name.split(".")[-1] for name in held if "mlp.experts" in name} == {"gate_up_proj", "down_proj"}
    assert not any(name.split(".")[-2] in ("gate", "router") for name in held)
    ends = ("embed_tokens.weight", "lm_head.weight")
    matrices = {n: p.numel() for n, p in model.named_parameters() if p.dim() > 1 and not n.endswith((*ends, "bias"))}
    assert sum(matrices[name] for name in held) >= 0.95 * sum(matrices.values())
    assert {name for name in ranked(model, ["mlp"]) if ".experts." in name} == {n for n in held if ".experts." in n}
    undecayed = {id(p) for p in param_groups(model, 4, weight_decay=0.1)[-1]["params"]}
    assert all((id(p) in undecayed) == (p.dim() < 2 or name.endswith("bias")) for name, p in model.named_parameters())


def test_a_convolution_is_no_mixture():
    model = nn.ModuleDict({"mlp": nn.Linear(8, 8), "conv": nn.Conv1d(4, 4, 3)})
    assert ranked(model, "all-linear") == {"mlp.weight"}


def test_where_nothing_is_left_out_nothing_is_said():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for kind in ("llama", "gpt2", "bert"):
            ranked(build(kind))


def test_who_names_one_part_of_a_block_means_to_leave_out_the_other():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert all("mlp" in name for name in ranked(build("llama"), ["mlp"]))
        assert all("attn" in name for name in ranked(build("llama"), ["attn"]))
    with pytest.warns(UserWarning, match=r"leaves out .*mlp.gate_proj"):
        ranked(build("llama"), ["mlp.up_proj"])
    with pytest.warns(UserWarning, match=r"leaves out .* mlp.experts \(4, 16, 32\)"):
        ranked(Mixture(), ["mlp.shared"])


def test_every_family_of_the_table_is_tried_or_named_like_one_that_is():
    alike = {frozenset(patterns) for kind, patterns in FAMILIES.items() if kind in MODELS}
    rest = {kind for kind, patterns in FAMILIES.items() if frozenset(patterns) not in alike}
    assert rest == {"wav2vec2", "hubert"}
