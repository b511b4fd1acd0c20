"""Time of a forward and backward pass of a LLaMA-1B's MLP with LoRA, with some of its channels beside all of them.

    python benchmarks/sparse_lora.py

Medians of ``ROUNDS`` rounds, in which the ways take turns; 1024 tokens without labels, LoRA of rank 16 on all three
matrices. What predicts the channels is counted in.
"""

from __future__ import annotations

import statistics
import time

import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaMLP

from gracile.adapters import SparseLora

H, F, TOKENS, ROUNDS = 2048, 5461, 1024, 7
SPARSITIES = (0.0, 0.5, 0.75, 0.9, 0.99)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mlp = LlamaMLP(LlamaConfig(hidden_size=H, intermediate_size=F))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.mlp(x)
        return out


def adapted() -> nn.Module:
    torch.manual_seed(0)
    config = LoraConfig(r=16, target_modules=["gate_proj", "up_proj", "down_proj"], init_lora_weights=False)
    return get_peft_model(Block(), config).train()


def seconds(model: nn.Module, x: torch.Tensor) -> float:
    begin = time.perf_counter()
    model(x).square().mean().backward()
    return time.perf_counter() - begin


def main() -> None:
    models = {}
    for sparsity in SPARSITIES:
        models[sparsity] = adapted()
        if sparsity:
            SparseLora(models[sparsity], sparsity)
    x = torch.randn(1, TOKENS, H, requires_grad=True)
    taken: dict[float, list[float]] = {sparsity: [] for sparsity in SPARSITIES}
    for turn in range(ROUNDS + 1):
        for sparsity, model in models.items():
            found = seconds(model, x)
            if turn:
                taken[sparsity].append(found)
    dense = statistics.median(taken[0.0])
    print("| channels left out | a pass, ms | of dense LoRA's |\n|---|---|---|")
    for sparsity, times in taken.items():
        middle = statistics.median(times)
        print(f"| {sparsity:g} | {1000 * middle:.0f} | {middle / dense:.2f} |")


if __name__ == "__main__":
    main()
