"""Dynamic sparse training, dense and in fp64: masked AdamW on whole matrices, masks from brute-force sorts.

Masks are bool and of a weight's shape. An update is ``change(number, W, M, G, fraction, t) -> (kept, mask)``.
"""

import math

import torch


def best(scores, allowed, count):
    """The ``count`` largest of the ``scores`` that are ``allowed``, ties to the lowest place."""
    values, free = scores.flatten().tolist(), allowed.flatten().tolist()
    order = sorted((i for i in range(len(values)) if free[i]), key=lambda i: (-values[i], i))
    found = torch.zeros(len(values), dtype=torch.bool)
    found[order[:count]] = True
    return found.view(scores.shape)


def rigl(W, M, G, fraction):
    """The smallest |W| of the mask go, the largest |G| outside of what is kept come."""
    n = math.floor(fraction * int(M.sum()))
    kept = best(W.abs(), M, int(M.sum()) - n)
    return kept, kept | best(G.abs(), ~kept, n)


def srigl(W, M, G, fraction, budget, gamma):
    """RigL with k weights in each row that stays."""
    rows, columns = W.shape
    n = math.floor(fraction * int(M.sum()))
    left = int(M.sum()) - n
    salient = (best(W.abs(), M, left) | best(G.abs(), torch.ones_like(M), n)).sum(1)
    least = 0 if gamma == 0 else gamma if gamma >= 1 else max(1, math.floor(gamma * (budget // rows)))
    ranked = sorted(salient.tolist(), reverse=True)
    active = salient >= min(least, ranked[min(budget // columns, rows - 1)])
    k = budget // int(active.sum())
    kept = best(W.abs(), M & active[:, None], left)
    mask = torch.zeros_like(M)
    for i in range(rows):
        kept[i] = best(W[i].abs(), kept[i], k)
        mask[i] = kept[i]
        if active[i]:
            mask[i] |= best(G[i].abs(), ~kept[i], k - int(kept[i].sum()))
    return kept, mask


def blocks(W, M, G, fraction, budget, side):
    """The blocks of smallest norm go, so that with those of largest gradient norm ``budget`` stay."""

    def norms(X):
        return X.unfold(0, side, side).unfold(1, side, side).square().sum((2, 3)).sqrt()

    there = norms(M.double()) > 0
    stay = min(int(there.sum()), budget)
    stay -= math.floor(fraction * stay)
    kept = best(norms(W), there, stay)
    mask = kept | best(norms(G), ~kept, budget - stay)
    return tuple(X.repeat_interleave(side, 0).repeat_interleave(side, 1) for X in (kept, mask))


def cosine(first, t, begin, end):
    return first / 2 * (1 + math.cos(math.pi * (t - begin) / (end - begin)))


class Sparse:
    """Weights (fp64) on masks. ``again``: what is dropped and grown in one update starts from zero."""

    def __init__(self, weights, masks, change, *, lr, betas, eps, decay, every, fraction, end, begin=0, again=False):
        self.masks = [M.clone() for M in masks]
        self.weights = [W.double() * M for W, M in zip(weights, masks, strict=True)]
        self.moments = [[torch.zeros_like(W), torch.zeros_like(W)] for W in self.weights]
        self.change, self.again, self.t = change, again, 0
        self.lr, self.betas, self.eps, self.decay = lr, betas, eps, decay
        self.every, self.fraction, self.begin, self.end = every, fraction, begin, end

    def step(self, gradients, last=False):
        """``last``: the masks change, whatever the time."""
        self.t += 1
        due = self.begin < self.t < self.end and self.t % self.every == 0
        for number, G in enumerate(gradients):
            self.move(number, G.double())
            if due or last:
                self.update(number, G.double())

    def move(self, number, G):
        W, M, (first, second) = self.weights[number], self.masks[number], self.moments[number]
        (b1, b2), t = self.betas, self.t
        first.copy_((b1 * first + (1 - b1) * G) * M)
        second.copy_((b2 * second + (1 - b2) * G * G) * M)
        W *= 1 - self.lr * self.decay
        W -= self.lr * (first / (1 - b1**t)) / ((second / (1 - b2**t)).sqrt() + self.eps)
        W *= M

    def update(self, number, G):
        W, M = self.weights[number], self.masks[number]
        kept, mask = self.change(number, W, M, G, cosine(self.fraction, self.t, self.begin, self.end), self.t)
        old = kept if self.again else M & mask
        for tensor in (W, *self.moments[number]):
            tensor *= old
        self.masks[number] = mask
