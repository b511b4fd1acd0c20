"""Time of a forward and backward pass of an MLP, an attention and a whole layer of a LLaMA-1B with LoRA, with some of
their channels beside all of them.

    python benchmarks/sparse_lora.py

Medians of ``ROUNDS`` rounds, in which the ways take turns; 1024 tokens without labels, LoRA of rank 16 on all matrices;
32 heads of q, and 8 of k and v. What predicts the channels is counted in.
"""

from __future__ import annotations

import statistics
import time
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaDecoderLayer, LlamaMLP, LlamaRotaryEmbedding

from gracile.adapters import SparseLora

H, F, HEADS, KV_HEADS, TOKENS, ROUNDS = 2048, 5461, 32, 8, 1024, 7
SPARSITIES = (0.0, 0.5, 0.75, 0.9, 0.99)
CONFIG = LlamaConfig(
    hidden_size=H, intermediate_size=F, num_attention_heads=HEADS, num_key_value_heads=KV_HEADS, num_hidden_layers=1
)
CONFIG._attn_implementation = "sdpa"


class Block(nn.Module):
    """A part of a layer, called with its input alone."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.rotary = LlamaRotaryEmbedding(CONFIG)
        parts = {"MLP": lambda: LlamaMLP(CONFIG), "attention": lambda: LlamaAttention(CONFIG, 0)}
        self.part = parts.get(kind, lambda: LlamaDecoderLayer(CONFIG, 0))()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if isinstance(self.part, LlamaMLP):
            out: torch.Tensor = self.part(x)
            return out
        places = self.rotary(x, torch.arange(x.shape[1])[None])
        found = self.part(hidden_states=x, position_embeddings=places)
        return found[0] if isinstance(found, tuple) else found


def adapted(kind: str) -> nn.Module:
    torch.manual_seed(0)
    block: Any = Block(kind)
    return get_peft_model(block, LoraConfig(r=16, target_modules="all-linear", init_lora_weights=False)).train()


def seconds(model: nn.Module, x: torch.Tensor) -> float:
    begin = time.perf_counter()
    model(x).square().mean().backward()
    return time.perf_counter() - begin


def main() -> None:
    x = torch.randn(1, TOKENS, H, requires_grad=True)
    print("| part | channels left out | a pass, ms | of dense LoRA's |\n|---|---|---|---|")
    for kind in ("MLP", "attention", "layer"):
        models = {sparsity: adapted(kind) for sparsity in SPARSITIES}
        for sparsity, model in models.items():
            SparseLora(model, 0.0 if kind == "attention" else sparsity, attention=0.0 if kind == "MLP" else sparsity)
        taken: dict[float, list[float]] = {sparsity: [] for sparsity in SPARSITIES}
        for turn in range(ROUNDS + 1):
            for sparsity, model in models.items():
                found = seconds(model, x)
                if turn:
                    taken[sparsity].append(found)
        dense = statistics.median(taken[0.0])
        for sparsity, times in taken.items():
            middle = statistics.median(times)
            print(f"| {kind} | {sparsity:g} | {1000 * middle:.0f} | {middle / dense:.2f} |", flush=True)


if __name__ == "__main__":
    main()
