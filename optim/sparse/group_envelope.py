"""The group sparse envelope E_k of J group norms, and its proximal map: pure functions of J numbers, of each matrix's
where there are several (... x J).

    E_k(v)   =  min over u in [0, 1]^J, sum u <= k, of  1/2 sum_j d_j v_j^2 / u_j          0 / 0 = 0
    u_j      =  min(1, tau sqrt(d_j) v_j)                                                  tau from sum u = k
    prox     :  v_j <- v_j u_j / (u_j + lam d_j)
    u_j      =  clip(tau sqrt(lam d_j) v_j - lam d_j, 0, 1)                                tau from sum u = k

It is half the square of the k-support norm of weighted groups: k = J gives 1/2 sum d v^2, k = 1 and d = 1 give
1/2 (sum v)^2. One proximal step shrinks every group, by 1 / (1 + lam d_j) at least, and need not leave k of them. Where
no more than k groups are other than zero, u = 1 for each.

Both sums are piecewise linear in tau and rise: their corners are sorted, and tau is found between two of them, on the
device. In fp64, whatever comes in: on the CPU, and told in fp32, where the device has none.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...fp64 import has_fp64


def envelope(norms: Tensor, weights: Tensor, k: int) -> Tensor:
    """E_k of ``norms`` (... x J, >= 0) with ``weights`` d (J, > 0); fp64."""
    if not has_fp64(norms.device):
        return envelope(norms.cpu(), weights.cpu(), k).float().to(norms.device)
    v, d = norms.double(), weights.double()
    slopes = d.sqrt() * v
    u = (_tau(slopes, torch.zeros_like(v), k) * slopes).clamp(max=1.0)
    return 0.5 * torch.where(v > 0, d * v.square() / u.where(v > 0, 1.0), 0.0).sum(-1)


def proximal_factors(norms: Tensor, weights: Tensor, k: int, lam: float) -> Tensor:
    """What each of J groups of these ``norms`` is multiplied by in the proximal map of lam * E_k (... x J, fp64).

    Exactly 0 for groups that go, and for groups that are zero where more than k are not.
    """
    if not has_fp64(norms.device):
        return proximal_factors(norms.cpu(), weights.cpu(), k, lam).float().to(norms.device)
    if lam == 0:
        return torch.ones_like(norms, dtype=torch.float64)
    v, c = norms.double(), lam * weights.double()
    slopes = c.sqrt() * v
    u = (_tau(slopes, c, k) * slopes - c).clamp(0.0, 1.0)
    return u / (u + c)


def _tau(slopes: Tensor, offsets: Tensor, k: int) -> Tensor:
    """tau with sum_j clip(tau slopes_j - offsets_j, 0, 1) = k; where that is too many, the first that makes all of them
    1 whose slope is above 0."""
    offsets = offsets.expand_as(slopes)
    flat = slopes <= 0
    safe = slopes.where(~flat, 1.0)
    # a group's line begins at its first corner and ends, at 1, at its second
    twice = torch.cat([flat, flat], -1)
    corners = torch.cat([offsets / safe, (1 + offsets) / safe], -1)
    gained = torch.cat([slopes, -slopes], -1).masked_fill(twice, 0.0)
    lifted = torch.cat([-offsets, 1 + offsets], -1).masked_fill(twice, 0.0)
    corners, order = corners.masked_fill(twice, 0.0).sort(-1)
    slope, level = gained.gather(-1, order).cumsum(-1), lifted.gather(-1, order).cumsum(-1)
    reached = slope * corners + level >= k  # at each corner
    at = reached.byte().argmax(-1, keepdim=True)
    before = (at - 1).clamp(min=0)
    lowest, highest = corners.gather(-1, before), corners.gather(-1, at)
    rise, done = slope.gather(-1, before), level.gather(-1, before)
    # rounding may put it outside of its piece; and with fewer than k groups the last corner makes all of them 1
    tau = ((k - done) / rise.clamp(min=torch.finfo(rise.dtype).tiny)).clamp(lowest, highest)
    return torch.where(reached.any(-1, keepdim=True), tau, corners[..., -1:])
