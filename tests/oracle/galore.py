"""GaLore on one dense matrix, slowly: every moment is a sum over the whole history, nothing is updated in place.

    M_t = (1 - b1) * sum over s <= t of b1^(t - s) R_s            V_t likewise, of R_s * R_s
    R_s = G_s P or P^T G_s, with the P that was current at step s: moments keep the coordinates they were made in

Zhao et al. 2024, arXiv:2403.03507, with eps, bias correction and decay where the authors' code has them.
"""

import math

import torch


def adam_direction(history, betas, eps):
    """The bias-corrected Adam direction after the gradients in ``history``, the newest last."""
    beta1, beta2 = betas
    t = len(history)
    first = sum((1 - beta1) * beta1 ** (t - 1 - s) * R for s, R in enumerate(history))
    second = sum((1 - beta2) * beta2 ** (t - 1 - s) * R**2 for s, R in enumerate(history))
    return first / (second.sqrt() + eps) * math.sqrt(1 - beta2**t) / (1 - beta1**t)


def galore(weight, gradients, *, rank, right, gap, scale, lr, betas=(0.9, 0.999), eps=1e-6, decay=0.0):
    """The weight (m x n) after every step. ``right``: P is n x r, made of right singular vectors; else m x r."""
    W, history, trajectory = weight.clone(), [], []
    for t, G in enumerate(gradients):
        if t % gap == 0:
            U, _, Vh = torch.linalg.svd(G, full_matrices=False)
            P = Vh.mT[:, :rank] if right else U[:, :rank]
        history.append(G @ P if right else P.mT @ G)
        N = adam_direction(history, betas, eps)
        W = (1 - lr * decay) * (W - lr * scale * (N @ P.mT if right else P @ N))
        trajectory.append(W)
    return trajectory


def adam_in_rotated_basis(weight, gradients, rotation, *, lr, betas=(0.9, 0.999), eps=1e-6):
    """Adam on X = W Q for a square orthogonal Q (n x n), told in W = X Q^T after every step. Nothing is dropped."""
    X, history, trajectory = weight @ rotation, [], []
    for G in gradients:
        history.append(G @ rotation)
        X = X - lr * adam_direction(history, betas, eps)
        trajectory.append(X @ rotation.mT)
    return trajectory
