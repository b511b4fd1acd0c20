"""Stochastic rounding over processes. ``rounded_parts.py`` runs in them."""

import pytest
import torch


@pytest.mark.thorough
def test_parts_and_replicas_draw_the_noise_of_one_process(pool):
    """To the bit; of GaLore's products, sums over rows cut otherwise may round otherwise."""
    one = pool.call(1, "rounded_parts:measure")
    two = pool.call(2, "rounded_parts:measure")
    for name, told in one.items():
        for way in ("split", "replica"):
            apart = [
                float((torch.tensor(a).sub(torch.tensor(b)) != 0).double().mean())
                for a, b in zip(two[name][way], told["replica"], strict=True)
            ]
            assert max(apart) <= (0.05 if name == "GaLoreAdamW" else 0), (name, way, apart)
