"""A method outside of the package: a rate of rows as a rule of gradients, and rows switched off every 2 steps."""

from dataclasses import dataclass
from enum import Enum

import torch

from gracile import adapters


class Own(str, Enum):
    ROWS = "ROWS"


@dataclass
class RowsConfig(adapters.AdapterConfig):
    floor: float = 0.1
    every: int = 2


@adapters.register(Own.ROWS, RowsConfig)
class RowsLayer(adapters.LowRankLayer):
    prefix, trained, kept = "rows_", ("A", "B"), ("mask",)

    def start(self, weight, config, r):
        m, n = weight.shape
        return {
            "A": torch.randn(r, n, generator=self.generator(config)),
            "B": torch.zeros(m, r),
            "mask": torch.ones(m, 1),
        }

    def factors(self, config, A, B, mask):
        rate = 1 / (B.detach().norm(dim=1, keepdim=True) + config.floor).sqrt()
        return adapters.scaled_gradient(B, rate * mask) * mask, A

    def on_step(self, step, adapter):
        if step % self.settings[adapter].every == 0:
            rows = self.rows_B[adapter].detach().norm(dim=1)
            self.rows_mask[adapter].copy_((rows >= rows.median()).float()[:, None])
