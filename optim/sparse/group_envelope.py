"""The group sparse envelope E_k of J group norms, and its proximal map: pure functions of J numbers.

    E_k(v)   =  min over u in [0, 1]^J, sum u <= k, of  1/2 sum_j d_j v_j^2 / u_j          0 / 0 = 0
    u_j      =  min(1, tau sqrt(d_j) v_j)                                                  tau from sum u = k
    prox     :  v_j <- v_j u_j / (u_j + lam d_j)
    u_j      =  clip(tau sqrt(lam d_j) v_j - lam d_j, 0, 1)                                tau from sum u = k

It is half the square of the k-support norm of weighted groups: k = J gives 1/2 sum d v^2, k = 1 and d = 1 give
1/2 (sum v)^2. One proximal step shrinks every group, by 1 / (1 + lam d_j) at least, and need not leave k of them. Where
no more than k groups are other than zero, u = 1 for each.

Both sums are piecewise linear in tau and rise: their corners are sorted, and tau is found between two of them, on the
device. In fp64, whatever comes in.
"""

from __future__ import annotations

import torch
from torch import Tensor


def envelope(norms: Tensor, weights: Tensor, k: int) -> Tensor:
    """E_k of ``norms`` (J, >= 0) with ``weights`` d (J, > 0); fp64."""
    v, d = norms.double(), weights.double()
    slopes = d.sqrt() * v
    u = (_tau(slopes, torch.zeros_like(v), k) * slopes).clamp(max=1.0)
    return 0.5 * torch.where(v > 0, d * v.square() / u.where(v > 0, 1.0), 0.0).sum()


def proximal_factors(norms: Tensor, weights: Tensor, k: int, lam: float) -> Tensor:
    """What each of J groups of these ``norms`` is multiplied by in the proximal map of lam * E_k (J, fp64).

    Exactly 0 for groups that go, and for groups that are zero where more than k are not.
    """
    if lam == 0:
        return torch.ones_like(norms, dtype=torch.float64)
    v, c = norms.double(), lam * weights.double()
    slopes = c.sqrt() * v
    u = (_tau(slopes, c, k) * slopes - c).clamp(0.0, 1.0)
    return u / (u + c)


def _tau(slopes: Tensor, offsets: Tensor, k: int) -> Tensor:
    """tau with sum_j clip(tau slopes_j - offsets_j, 0, 1) = k; where that is too many, the first that makes all of them
    1 whose slope is above 0."""
    flat = slopes <= 0
    safe = slopes.where(~flat, 1.0)
    # a group's line begins at its first corner and ends, at 1, at its second
    corners = torch.cat([offsets / safe, (1 + offsets) / safe])
    gained = torch.cat([slopes, -slopes]).masked_fill(flat.repeat(2), 0.0)
    lifted = torch.cat([-offsets, 1 + offsets]).masked_fill(flat.repeat(2), 0.0)
    corners, order = corners.masked_fill(flat.repeat(2), 0.0).sort()
    slope, level = gained[order].cumsum(0), lifted[order].cumsum(0)
    reached = slope * corners + level >= k  # at each corner
    at = reached.byte().argmax()
    before = (at - 1).clamp(min=0)
    ends = corners.gather(0, torch.stack([before, at]))  # an index that is a tensor would stop the device
    rise, done = (values.gather(0, before.view(1)) for values in (slope, level))
    # rounding may put it outside of its piece; and with fewer than k groups the last corner makes all of them 1
    tau = ((k - done) / rise.clamp(min=torch.finfo(rise.dtype).tiny)).clamp(ends[0], ends[1])
    return torch.where(reached.any(), tau, corners[-1])
