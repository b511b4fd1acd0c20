"""Small mixtures of experts, as transformers builds them: the experts of a layer lie in tensors (E, m, n), those of
gpt-oss transposed."""

import torch
import transformers

SMALL = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "moe_intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "num_experts_per_tok": 2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts")
MIXTURES = {
    "mixtral": {},
    "qwen3_moe": {"decoder_sparse_step": 1, "mlp_only_layers": []},
    "deepseek_v3": {
        "num_key_value_heads": 4,
        "n_group": 1,
        "topk_group": 1,
        "first_k_dense_replace": 1,
        "q_lora_rank": 16,
        "kv_lora_rank": 16,
        "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 8,
        "v_head_dim": 8,
    },
    "gpt_oss": {
        "num_local_experts": 4,
        "sliding_window": 16,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
    },
}


def mixture_config(kind, experts=4, **more):
    known = transformers.AutoConfig.for_model(kind)
    keys = {key: value for key, value in SMALL.items() if hasattr(known, key)} | MIXTURES[kind] | more
    keys |= {key: experts for key in EXPERTS if hasattr(known, key)}
    if kind == "deepseek_v3":
        keys.pop("head_dim", None)  # which it makes of its own parts
    return transformers.AutoConfig.for_model(kind, **keys)


def build_mixture(kind, seed=0, device="cpu", **more):
    torch.manual_seed(seed)
    with torch.device(device):
        return transformers.AutoModelForCausalLM.from_config(mixture_config(kind, **more))
