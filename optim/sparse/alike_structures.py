"""What ``Structure.change`` chooses, of matrices that are alike together: by the same orders, reading nothing back."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ...fp64 import has_fp64
from ..core import batches
from .alike_masks import Alike, NewWeights, Wanted, alike, handed_over, taken
from .masks import Change, Masked
from .top_k import first_of, first_of_rows, keys_of, ranked


class Chosen(NamedTuple):
    """Of B matrices: weights that are kept, if they are in the new masks, all weights of these (B x mn, bool), and how
    many that is, on the device (B) where it is not known; ``most`` is what they are at most, together."""

    kept: Tensor
    there: Tensor
    counts: list[int] | Tensor
    most: int


def unstructured(batch: Alike) -> Chosen:
    kept = first_of(ranked(batch.drop_keys(), batch.last_first), *batch.counts("keep"))
    free = batch.grow_keys().masked_fill_(kept, -1)
    there = first_of(ranked(free, batch.last_first), *batch.counts("grow")).logical_or_(kept)
    counts = [own.keep + own.grow for own in batch.wanted]
    return Chosen(kept, there, counts, sum(counts))


def constant_fan_in(batch: Alike) -> Chosen:
    m, n = batch.shape
    keys, promise = batch.drop_keys(), batch.grow_keys()
    order = ranked(keys, batch.last_first)
    kept = first_of(order, *batch.counts("keep"))
    active = torch.ones(batch.count, m, dtype=torch.bool, device=kept.device)
    if batch.group["gamma_sal"] > 0:
        chosen = first_of(ranked(promise, batch.last_first), *batch.counts("grow"))
        salient = chosen.logical_or_(kept).view(batch.count, m, n).sum(2)
        # so many rows stay that none of them needs more weights than there are columns
        last = salient.sort(1, descending=True).values.gather(1, batch.column("last"))
        active = salient >= torch.minimum(last, batch.column("least"))
        order.view(batch.count, m, n).masked_fill_(active.logical_not()[:, :, None], -1)
        kept = first_of(order, *batch.counts("keep"))  # where too few are left, ablated rows' too: they want none
    del order
    fan_in = batch.column("budget") // active.sum(1, keepdim=True)
    wanted = active * fan_in
    # what is kept comes before what is free; a row's own order without ties
    both = torch.where(kept, keys, promise)
    del keys, promise
    both = both.long().add_(kept, alpha=2**31).view(-1, n)
    columns = torch.arange(n - 1, -1, -1, device=both.device)
    there = first_of_rows(ranked(both, columns, bits=n.bit_length()), wanted.view(-1, 1)).view(batch.count, -1)
    return Chosen(kept, there, wanted.sum(1), sum(own.budget for own in batch.wanted))


def blocks(batch: Alike) -> Chosen:
    (m, n), side = batch.shape, int(batch.group["block_size"])
    down, across = m // side, n // side

    def sums(values: Tensor) -> Tensor:
        return values.view(batch.count, down, side, across, side).sum((2, 4)).view(batch.count, -1)

    def keys(scores: Tensor | None, purpose: str) -> Tensor:
        if scores is None:
            return batch.drawn(purpose, down * across)
        # a copy where a device has fp64, which squares in place
        squares = scores.double().square_() if has_fp64(scores.device) else scores.float().square()
        return keys_of(sums(squares).float())

    def weights(chosen: Tensor) -> Tensor:
        by_row = chosen.view(batch.count, down, 1, across, 1).expand(-1, -1, side, -1, side)
        return by_row.reshape(batch.count, -1)

    worth = batch.drop_scores()
    worth = keys(None if worth is None else worth.masked_fill_(batch.there.logical_not(), 0), "drop")
    last_first = torch.arange(down * across - 1, -1, -1, device=worth.device)
    held = worth.masked_fill_(sums(batch.there) == 0, -1)
    kept = first_of(ranked(held, last_first), *batch.counts("keep"))
    free = keys(batch.grow_scores(), "grow").masked_fill_(kept, -1)
    grown = first_of(ranked(free, last_first), *batch.counts("grow"))
    counts = [(own.keep + own.grow) * side**2 for own in batch.wanted]
    return Chosen(weights(kept), weights(grown.logical_or_(kept)), counts, sum(counts))


TOGETHER: dict[str, Callable[[Alike], Chosen]] = {
    "unstructured": unstructured,
    "constant_fan_in": constant_fan_in,
    "block": blocks,
}
PENDING = 2  # workspaces of new weights of which only the device knows how many they are


def changed_together(wanted: Sequence[Wanted]) -> list[tuple[Masked, Change]]:
    """Masks changed in batches: parameters have gone over to theirs; of experts, the places are told."""
    found: list[tuple[Masked, Change]] = []
    waiting: list[NewWeights] = []
    for batch in alike(wanted):
        chosen = TOGETHER[batch.group["structure"]](batch)
        waiting.append(taken(batch, chosen.kept, chosen.there, chosen.counts, chosen.most))
        if isinstance(chosen.counts, list) or sum(len(new.places) for new in waiting) > PENDING * batches.AT_ONCE:
            found += handed_over(waiting)
            waiting.clear()
    return found + handed_over(waiting)
