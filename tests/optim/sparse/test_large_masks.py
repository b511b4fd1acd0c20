"""Large matrices with masks, whose weights are rounded by chance: the bits of small ones."""

import pytest
import torch
from torch import nn

from gracile import optim
from gracile.optim.distributed import blocked


@pytest.mark.parametrize("more", [{}, {"grown_step": "own"}, {"state_dtype": torch.bfloat16}], ids=str)
def test_a_small_mask_of_a_large_matrix(more, monkeypatch):
    def run():
        torch.manual_seed(0)
        p = nn.Parameter(torch.randn(30, 40).bfloat16())
        keys = {"grow": "random", "schedule": "constant", "update_every": 3, "weight_decay": 0.1, **more}
        optimizer = optim.SparseAdamW([{"params": [p], "sparsity": 0.9}], lr=0.01, stochastic_rounding=True, **keys)
        for step in range(8):
            p.grad = torch.randn(30, 40, generator=torch.Generator().manual_seed(step)).bfloat16()
            optimizer.step()
        return p

    small = run()
    monkeypatch.setattr(blocked, "LARGE", 200)  # of the matrix, and not of its mask
    monkeypatch.setattr(blocked, "BLOCK", 64)
    assert torch.equal(run(), small)
