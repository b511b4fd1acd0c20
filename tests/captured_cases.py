"""Optimizers whose ordinary step is arithmetic of tensors and numbers alone, which a CUDA graph replays
(test_capture.py) and torch.compile makes a graph of (test_compiled.py): two alike matrices, a wide one, vectors, and a
plain matrix."""

from __future__ import annotations

import math

import torch
from torch import nn

from gracile import optim

GAP, STEPS = 4, 11
SHAPES = [(80, 72), (80, 72), (72, 96), (30,), (30,), (20, 8)]
BF16 = torch.bfloat16
RANKED = {"rank": 4, "update_proj_gap": GAP}
# Constructor's keys, those of groups of matrices, and how far replays may be from steps of capturable=False.
CLOSE, CODES = 2e-6, 1e-2
CASES = {
    "GaLoreAdamW": (optim.GaLoreAdamW, {"weight_decay": 0.1}, RANKED, CLOSE),
    "GaLoreAdamW svd": (optim.GaLoreAdamW, {}, {**RANKED, "subspace_method": "svd"}, CLOSE),
    "GaLoreAdamW8bit": (optim.GaLoreAdamW8bit, {}, {"rank": 64, "update_proj_gap": GAP}, CODES),
    "Q-GaLore": (
        optim.GaLoreAdamW8bit,
        {},
        {**RANKED, "rank": 64, "quant": True, "cos_threshold": 0.4, "queue_size": 1},
        CODES,
    ),
    "GaLoreLion": (optim.GaLoreLion, {"weight_decay": 0.1}, RANKED, CLOSE),
    "GaLoreAdafactor": (
        optim.GaLoreAdafactor,
        {"relative_step": False, "beta1": 0.9, "weight_decay": 0.1},
        RANKED,
        CLOSE,
    ),
    "GaLoreAdafactor relative": (optim.GaLoreAdafactor, {"lr": None, "warmup_init": True}, RANKED, CLOSE),
    "GaLorePlusAdamW": (optim.GaLorePlusAdamW, {}, {**RANKED, "residual_fraction": 0}, CLOSE),
    "FiraAdamW": (optim.FiraAdamW, {"weight_decay": 0.1}, RANKED, CLOSE),
    "Fira corrected": (optim.FiraAdamW, {}, {**RANKED, "limit_after_bias_correction": True}, CLOSE),
    "GradNormLoRPAdamW": (optim.GradNormLoRPAdamW, {"weight_decay": 0.1}, RANKED, CLOSE),
    "APOLLOAdamW svd": (optim.APOLLOAdamW, {}, {**RANKED, "proj": "svd"}, CLOSE),
    "DCTAdamW": (optim.DCTAdamW, {}, {"rank": 4, "rotate_subspace": True, "error_feedback": "fp32"}, CLOSE),
    "Lion": (optim.Lion, {"weight_decay": 0.1}, {}, CLOSE),
    "SCALE": (optim.SCALE, {"weight_decay": 0.1}, {"role": "head"}, CLOSE),
    "by chance": (optim.GaLoreAdamW, {"stochastic_rounding": True, "state_dtype": BF16}, RANKED, math.inf),
}


def made(name, capturable, device=lambda tensor: tensor):
    cls, keys, own, _ = CASES[name]
    generator = torch.Generator().manual_seed(0)
    dtype = BF16 if name == "by chance" else torch.float32
    held = [nn.Parameter(device(0.3 * torch.randn(s, generator=generator).to(dtype))) for s in SHAPES]
    lr = device(torch.tensor(0.1)) if capturable else 0.1
    groups = [{"params": held[:3], **own}, {"params": held[3:]}]
    return held, cls(groups, **{"lr": lr, **keys}, capturable=capturable)


def give(held, step, device=lambda tensor: tensor):
    generator = torch.Generator().manual_seed(100 + step)
    for p in held:
        G = device(torch.randn(p.shape, generator=generator).to(p.dtype))
        if p.grad is None:
            p.grad = G
        else:
            p.grad.copy_(G)


def set_lr(optimizer, step):
    for group in optimizer.param_groups:
        if isinstance(group["lr"], torch.Tensor):
            group["lr"].fill_(0.1 / (1 + step))
        elif group["lr"] is not None:
            group["lr"] = 0.1 / (1 + step)


def stepped(held, optimizer, steps=STEPS, device=lambda tensor: tensor):
    for step in range(steps):
        give(held, step, device)
        set_lr(optimizer, step)
        optimizer.step()
