"""SCALE on one dense matrix, slowly: the moment is a sum over the whole history, every slice is divided by itself.

Glentis et al. 2025, arXiv:2506.16659. The paper writes weights as inputs x outputs and divides columns: so does this,
of a matrix that is transposed where torch has it the other way round. An embedding is V x d in both.
"""

import math

import torch


def normalized_columns(X, norm, least):
    """Each column divided by its root mean square or its length, at least ``least``."""
    columns = []
    for column in X.T.tolist():
        size = math.sqrt(math.fsum(x * x for x in column) / (len(column) if norm == "rms" else 1))
        columns.append([x / max(size, least) for x in column])
    return torch.tensor(columns, dtype=torch.float64).T


def scale(weight, gradients, role, *, lr, beta=0.9, decay=0.0, norm="rms", least=1e-8):
    """The weight after every step, in fp64."""
    by_rows = role in ("linear", "head")
    W, history, trajectory = weight.double(), [], []
    for G in gradients:
        history.append(G.double())
        X = history[-1]
        if role == "head":
            X = sum((1 - beta) * beta ** (len(history) - 1 - s) * past for s, past in enumerate(history))
        U = normalized_columns(X.T, norm, least).T if by_rows else normalized_columns(X, norm, least)
        W = W * (1 - lr * decay) - lr * U
        trajectory.append(W)
    return torch.stack(trajectory)
