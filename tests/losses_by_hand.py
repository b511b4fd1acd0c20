"""Losses of a step that are written out, with the terms of adapters."""

import torch
from adapted import attached, ids, llama
from torch.nn import functional as F

from gracile import adapters

KEYS = {
    "sorsa": {"gamma": 3.0},
    "alignguard": {"l_a": 2.0, "l_t": 1.0, "l_c": 1.0},
    "balora": {"consistency": 2.0, "diversity": 0.5, "leading": 0.7},
}


def moved(name):
    model = attached(name, **KEYS[name])
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(0.1 * torch.randn(p.shape, generator=generator))
    return model.train()


def batch():
    """Four rows, of which each has more labels than the one before."""
    x = ids(4)
    labels = x.clone()
    for row, first in enumerate((9, 7, 4, 1)):
        labels[row, :first] = -100
    return x, labels


def of_sorsa(layer):
    U, V = layer.sorsa_U["default"], layer.sorsa_V["default"]
    return 3.0 / 2 * sum((gram - torch.eye(4)).norm() ** 2 for gram in (U.T @ U, V @ V.T))


def of_alignguard(layer):
    A, B, scale = layer.alignguard_A["default"], layer.alignguard_B["default"], layer.scale("default")
    one, other = scale * B[:, :4] @ A[:4], scale * B[:, 4:] @ A[4:]
    weight = layer.base_layer.weight
    active = torch.sigmoid((weight + one + other).abs() - weight.abs().median())
    overlap = ((1 + active) * (one * other).abs()).sum()
    angle = (one * other).sum() ** 2 / (one.norm() * other.norm()) ** 2
    fisher = (layer.alignguard_F["default"] * one**2).sum()
    return 2.0 * fisher + other.norm() ** 2 + 0.5 * overlap + 0.5 * angle


def of_logits(logits, base):
    p, p0 = logits.softmax(-1), base.softmax(-1)
    S = torch.linalg.svd(logits, full_matrices=False).S
    divergence = (p0 * (p0.log() - p.log())).sum(-1).mean()
    return 2.0 * divergence + 0.5 * (p * p.log()).sum(-1).mean() - 0.7 * S[:3].sum() / S.sum()


def by_hand(name, count, smoothing=0.0):
    """Of the whole step: the mean over its labels, and the terms once; what is not a mean of tokens is weighed by the
    labels of each pass."""
    model, plain, (x, labels) = moved(name), llama(), batch()
    total, loss = int((labels[:, 1:] != -100).sum()), 0.0
    for part, said in zip(x.chunk(count), labels.chunk(count), strict=True):
        valid = said[:, 1:] != -100
        logits = model(input_ids=part).logits[:, :-1][valid]
        loss = loss + F.cross_entropy(logits, said[:, 1:][valid], reduction="sum", label_smoothing=smoothing) / total
        if name == "balora":
            with torch.no_grad():
                base = plain(input_ids=part).logits[:, :-1][valid]
            loss = loss + of_logits(logits, base) * len(logits) / total
    if name != "balora":
        layers = list(adapters.adapter_layers(model))
        loss = loss + sum(map(of_sorsa if name == "sorsa" else of_alignguard, layers)) / len(layers)
    loss.backward()
    return grads_of(model)


def grads_of(model):
    return {key: p.grad.clone() for key, p in model.named_parameters() if p.grad is not None}


def cross_entropy(outputs, labels, num_items_in_batch=None):
    logits, said = outputs.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
    return F.cross_entropy(logits, said, reduction="sum") / num_items_in_batch
