"""SaRA: the weights of the smallest size are trained, and chosen anew half way; Hu et al. 2024 (arXiv:2409.06633).

    M     =  |W| < theta                                     theta 2e-3, or the share q of all matrices' weights
    W[M] <-  AdamW(G[M] + lambda_r (U V^T)[M])               one random matrix a step, the others without (nuclear.py)
    every T_p steps:   M = |W| < theta again; what grew beyond it is frozen as it is, moments begin anew

Departures from the authors' code (sjtuplayer/SaRA): the first forward pass after a choice sees W itself, where theirs
sees |W| in the places of M; matrices are chosen from, not biases and norms; parameters stay parameters, in
``state_dict``, DDP and autocast; decay is towards what a weight was, not towards zero; sizes are compared in fp32,
whatever the weights' dtype; the nuclear norm is that of the change, as the name of the method says, and not of W in M,
unless it is asked for. The whole gradient of a matrix is made, where theirs keeps that of M alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from ..optim.distributed import FullShard, all_reduce_shares_, held_shard, spans
from ..optim.groups import param_groups
from ..optim.sparse.selected import Below, Selection
from ..optim.sparse.top_k import keys_at_once, keys_of
from ..target_modules import ALL_LINEAR
from ..validation import Check, number, one_of, require, whole
from .method import Groups, Method, masked_group, train_only

DIGITS = ((20, 11), (10, 10), (0, 10))  # of an fp32's bits without the sign: where each begins, and how many it has


@dataclass(frozen=True)
class SaRA(Method):
    """The weights below a size, for ``SparseAdamW``.

    Args:
        threshold: what |w| is below; the authors take 2e-3 for weights of their models' size. None with a share.
        share: of the weights of all target matrices, in place of a threshold: the least one with so many below it.
        target_modules: which matrices, as for ``gracile.optim.param_groups``.
        reselect_every: steps after which weights are chosen anew by the same threshold, and moments begin anew; the
            authors take half of the run. None keeps the first choice.
        decay_to: what trained weights decay to: what they were at the ``start``, or ``zero``.

    Raises:
        ValueError: for a value out of range, or not one of threshold and share.

    Example:
        >>> from torch import nn
        >>> from gracile.selections import SaRA
        >>> (group,) = SaRA(threshold=2e-3, reselect_every=2500).groups(nn.Linear(64, 64))
        >>> len(group["params"]), group["outside"], group["decay_to"]
        (1, 'frozen', 'start')
    """

    threshold: float | None = None
    share: float | None = None
    target_modules: str | Sequence[str] = ALL_LINEAR
    reselect_every: int | None = None
    decay_to: str = "start"

    checks: ClassVar[Mapping[str, Check]] = {
        "threshold": number("> 0", optional=True),
        "share": number("in (0, 1]", optional=True),
        "reselect_every": whole(1, optional=True),
        "decay_to": one_of("zero", "start"),
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        given = (self.threshold, self.share)
        require((given[0] is None) != (given[1] is None), "give one of threshold and share", given)

    def groups(self, model: nn.Module) -> Groups:
        """One group, of the target matrices with a weight below the threshold; everything else of ``model`` is frozen.
        Collective, where the model is split.

        Raises:
            ValueError: for patterns that match no matrix, or a threshold that no weight is below.
        """
        made = param_groups(model, density=1.0, target_modules=self.target_modules)
        targets = [p for group in made if group["density"] is not None for p in group["params"]]
        small = self._small(targets)
        selected: dict[Tensor, Selection] = {p: small for p in targets if small.count(p) > 0}
        require(bool(selected), "threshold must be above the smallest weight of the target matrices", self.threshold)
        train_only(model, selected)
        return [masked_group(selected, reselect_every=self.reselect_every, decay_to=self.decay_to)]

    def _small(self, targets: Sequence[Tensor]) -> Below:
        if self.threshold is not None:
            return Below(self.threshold)
        assert self.share is not None
        # of a model without memory the share alone counts
        return Below(1.0 if targets[0].is_meta else threshold_of(targets, self.share), self.share)


def threshold_of(weights: Sequence[Tensor], share: float) -> float:
    """The least number (fp32) that a share of all weights together is smaller than in size.

    At least ``round(share * N)`` of N are; more where sizes tie. Collective, where weights are split.

    Args:
        weights: parameters, of any shapes.
        share: in (0, 1].

    Example:
        >>> import torch
        >>> from gracile.selections import threshold_of
        >>> weights = torch.arange(-8.0, 8.0)
        >>> theta = threshold_of([weights], share=0.25)
        >>> 2.0 < theta < 2.001, int((weights.abs() < theta).sum())
        (True, 5)
    """
    shards = [held_shard(p) for p in weights]
    above, wanted = 0, None
    for begin, bits in DIGITS:
        counts = torch.stack([_digit_counts(shard, begin, bits, above) for shard in shards]).sum(0).tolist()
        if wanted is None:
            wanted = max(1, round(share * sum(counts)))
        digit = 0
        while wanted > counts[digit]:
            wanted -= counts[digit]
            digit += 1
        above = (above << bits) | digit
    return float(torch.tensor(above + 1, dtype=torch.int32).view(torch.float32))


def _digit_counts(shard: FullShard, begin: int, bits: int, above: int) -> Tensor:
    """How many weights, over all processes, have each value of a digit, of those whose bits before it are ``above``."""
    flat = shard.parameter.reshape(-1)
    counts = torch.zeros(2**bits, dtype=torch.int64, device=flat.device)
    for part in spans(len(flat), keys_at_once(flat.device)):
        keys = keys_of(flat[part].float()) >> begin
        keys = keys[(keys >> bits) == above]
        counts += torch.bincount(keys & (2**bits - 1), minlength=2**bits)
    all_reduce_shares_([(shard, counts)])
    return counts.cpu()
