"""CAST's AdamS in fp64 on one screen: groups and steps as the paper's loop has them."""

import torch


def mask_of(W, n, m):
    """The n largest |w| of every m consecutive of a row; of equals the first."""
    P = torch.zeros_like(W)
    for r, row in enumerate(W.tolist()):
        for g in range(0, len(row), m):
            for c in sorted(range(g, g + m), key=lambda c: (-abs(row[c]), c))[:n]:
                P[r, c] = 1.0
    return P


def adams(W, gradients, lrs, *, n, m, lam, mask_every, betas=(0.9, 0.999), eps=1e-8):
    """W after each step, the mask of each, and last the finalised one. ``gradients``: functions of W."""
    W, (b1, b2), T = W.clone().double(), betas, len(gradients)
    mu, v = torch.zeros_like(W), torch.zeros_like(W)
    weights, masks = [], []
    for t, (gradient, lr) in enumerate(zip(gradients, lrs, strict=True)):
        if t % mask_every == 0:
            P = mask_of(W, n, m)
        a = t / T
        mu = b1 * mu + (1 - b1) * gradient(W)
        seen = P * mu + (1 - P) * ((1 - a) * mu + a * lam * torch.sign(W))
        v = b2 * v + (1 - b2) * seen**2
        W = W - lr * (seen / (1 - b1 ** (t + 1))) / ((v / (1 - b2 ** (t + 1))).sqrt() + eps)
        weights.append(W)
        masks.append(P)
    return weights, masks, W * mask_of(W, n, m)
