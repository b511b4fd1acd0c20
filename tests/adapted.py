"""A small model, and every method with what is known of it: a new method is a case here."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from gracile import adapters
from gracile.adapters.methods.soka import divided

TARGETS = ["q_proj", "v_proj", "down_proj"]
SHAPES = {"q_proj": (64, 64), "v_proj": (32, 64), "down_proj": (64, 128)}  # m x n, in each of two blocks
BLOCKS = 2


@dataclass(frozen=True)
class Case:
    """A method.

    Attributes:
        config: its configuration's class.
        keys: of the configuration, beside targets.
        trained: the trained numbers of an m x n matrix.
        projection: short names of what is not saved without ``save_projection``.
        starts_exactly: whether the function is unchanged at first.
        is_low_rank: whether ``to_lora`` writes it; with its rank there, where that is not ``r``.
        of_base: whether what is not saved follows from the base.
        in_common: trained numbers that all matrices share.
        lr: of the tests' training.
    """

    config: type[adapters.AdapterConfig]
    keys: Mapping[str, Any]
    trained: Callable[[int, int], int]
    projection: tuple[str, ...] = ()
    starts_exactly: bool = True
    is_low_rank: bool = True
    lora_rank: int | None = None
    of_base: bool = True
    in_common: int = 0
    lr: float = 3e-2


def _kronecker(m: int, n: int) -> int:
    (m1, m2), (n1, n2) = divided(m), divided(n)
    return 4 * (m1 * n1 + m2 * n2 + 1)


FULL: Any = {"is_low_rank": False}
CASES = {
    "alignguard": Case(
        adapters.AlignGuardConfig, {"r": 4, "k": 4, "pairs": 2}, lambda m, n: 8 * (m + n), ("Q", "F"), lora_rank=8
    ),
    "allora": Case(adapters.ALLoraConfig, {"r": 4}, lambda m, n: 4 * (m + n)),
    "balora": Case(adapters.BALoraConfig, {"r": 4, "alpha": 8}, lambda m, n: 4 * (m + n), ("A0", "B0"), lora_rank=8),
    "dsee": Case(adapters.DSEEConfig, {"r": 4, "entries": 10}, lambda m, n: 4 * (m + n) + 10, ("places",), **FULL),
    "intrinsicdimension": Case(
        adapters.IntrinsicDimensionConfig,
        {"d": 200},
        lambda m, n: 1,
        ("G", "B", "order"),
        in_common=200,
        of_base=False,
        **FULL,
    ),
    "masktuning": Case(adapters.MaskTuningConfig, {}, lambda m, n: m * n, lr=2.5e-3, **FULL),
    "pst": Case(
        adapters.PSTConfig,
        {"r": 4, "total_steps": 4, "sparsity": 0.3},
        lambda m, n: 9 * (m + n),
        **FULL,
    ),
    "soka": Case(adapters.SokaConfig, {"r": 4, "alpha": 8}, _kronecker, ("L0", "V0"), **FULL),
    "spp": Case(adapters.SPPConfig, {"r": 8}, lambda m, n: 8 * n + m, **FULL),
    "loraxs": Case(adapters.LoraXSConfig, {"r": 4, "alpha": 8}, lambda m, n: 16, ("A", "B")),
    "lorasb": Case(adapters.LoraSBConfig, {"r": 4, "lr": 1e-3}, lambda m, n: 16, ("A", "B"), starts_exactly=False),
    "sorsa": Case(
        adapters.SorsaConfig,
        {"r": 4, "alpha": 8, "gamma": 0.1},
        lambda m, n: 4 * (m + n + 1),
        ("L0", "V0"),
        lora_rank=8,
    ),
    "svfit": Case(adapters.SVFitConfig, {"r": 8}, lambda m, n: 8, ("U", "V", "S")),
}


def llama(seed: int = 0, dtype: torch.dtype = torch.float32) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=64, hidden_size=64, intermediate_size=128, num_hidden_layers=BLOCKS, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, tie_word_embeddings=False,
        bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    return LlamaForCausalLM(config).to(dtype).eval()


def ids(batch: int = 2, length: int = 12, seed: int = 3) -> torch.Tensor:
    return torch.randint(3, 64, (batch, length), generator=torch.Generator().manual_seed(seed))


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=ids()).logits.float()


def config_of(name: str, base: LlamaForCausalLM | None = None, **keys: Any) -> adapters.AdapterConfig:
    """The configuration of a case; calibrated on ``base`` where the method asks for it."""
    case = CASES[name]
    config = case.config(**{"target_modules": TARGETS, "task_type": "CAUSAL_LM", **case.keys, **keys})
    if hasattr(config, "statistic"):
        base = llama() if base is None else base
        adapters.calibrate(base, config, [{"input_ids": ids(seed=i), "labels": ids(seed=i)} for i in range(2)])
    return config


def attached(name: str, base: LlamaForCausalLM | None = None, adapter: str = "default", **keys: Any) -> PeftModel:
    base = llama() if base is None else base
    return get_peft_model(base, config_of(name, base, **keys), adapter_name=adapter)


def train(model: torch.nn.Module, steps: int = 3, lr: float = 3e-2) -> torch.nn.Module:
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr)
    for step in range(steps):
        x = ids(seed=step)
        model(input_ids=x, labels=x).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


def trained(name: str, base: LlamaForCausalLM | None = None, adapter: str = "default", **keys: Any) -> PeftModel:
    torch.manual_seed(5)
    model: PeftModel = train(attached(name, base, adapter, **keys), lr=CASES[name].lr)
    return model


def far(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).detach().abs().max())
