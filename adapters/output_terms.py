"""Terms of a loss on what a model puts out, for any adapter or script: logits in, a number out, smaller is better but
for entropy and the leading share."""

from __future__ import annotations

import torch
from torch import Tensor

ROWS = 256  # of which singular values are found at most


def rows_of(logits: Tensor, labels: Tensor | None) -> Tensor:
    """The logits that labels are for, in fp32: of tokens (examples x tokens x vocabulary) those that a label follows,
    of classes (examples x classes), or without labels, all; rows x vocabulary or classes."""
    if logits.dim() > 2 and labels is not None:  # each token's logits are for the next one
        logits = logits[:, :-1][labels[:, 1:] != -100]
    return logits.flatten(0, -2).float()


def token_consistency(logits: Tensor, base: Tensor) -> Tensor:
    """KL(p0 || p), the mean over tokens, 0 of none; ``logits`` and ``base`` tokens x vocabulary."""
    p, p0 = logits.log_softmax(-1), base.log_softmax(-1)
    return torch.nn.functional.kl_div(p, p0, reduction="sum", log_target=True) / torch.sym_max(len(p), 1)


def token_entropy(logits: Tensor) -> Tensor:
    """H(p), the mean over tokens, 0 of none."""
    logs = logits.log_softmax(-1)
    return -(logs.exp() * logs).sum() / torch.sym_max(len(logs), 1)


def class_consistency(logits: Tensor, base: Tensor) -> Tensor:
    """The mean square between logits and the base's (examples x classes), each of length one."""
    normalize = torch.nn.functional.normalize
    return (normalize(logits, dim=-1) - normalize(base, dim=-1)).square().mean()


def class_diversity(logits: Tensor) -> Tensor:
    """The squares of the covariances between classes, over their number; 0 of one example."""
    if len(logits) < 2:
        return logits.new_zeros(())
    centred = logits - logits.mean(0)
    covariance = centred.mT @ centred / (len(logits) - 1)
    return (covariance.square().sum() - covariance.diagonal().square().sum()) / logits.shape[1]


def leading_share(rows: Tensor, k: int) -> Tensor:
    """The k largest singular values over all of them, of at most 256 rows, taken at equal distances."""
    rows = rows[:: -(-len(rows) // ROWS)] if len(rows) > ROWS else rows
    S = torch.linalg.svdvals(rows)
    return S[:k].sum() / S.sum().clamp_min(torch.finfo(S.dtype).tiny)
