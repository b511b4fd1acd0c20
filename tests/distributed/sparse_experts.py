"""Cells of a net with two layers of experts, each of them one tensor (E x m x n), as cells.py measures its own."""

import cells
import torch
from catalogue import VARIANTS
from torch import nn

COUNT, WIDTH = 5, 12  # experts, and their inputs: no number of ranks divides the first


class Layer(nn.Module):
    """Tokens of a sequence go to the experts in turn."""

    def __init__(self, wide, narrow, transposed):
        super().__init__()
        W = torch.randn(COUNT, wide, narrow) / narrow**0.5
        self.weight, self.transposed = nn.Parameter(W.mT.contiguous() if transposed else W), transposed

    def forward(self, h):
        weight = self.weight if self.transposed else self.weight.mT
        return torch.stack([h[:, i] @ weight[i % COUNT] for i in range(h.shape[1])], dim=1)


class Net(nn.Module):
    def __init__(self, transposed):
        super().__init__()
        self.embed = nn.Embedding(37, WIDTH)
        self.tall = Layer(21, WIDTH, transposed)
        self.square = Layer(9, 21, transposed)
        self.head = nn.Linear(9, 37)
        self.frozen = nn.Parameter(torch.ones(5), requires_grad=False)

    def forward(self, x, y):
        h = torch.tanh(self.square(torch.tanh(self.tall(self.embed(x)))))
        return nn.functional.cross_entropy(self.head(h).flatten(0, 1).float(), y.flatten())


def build(cell, seed=0):
    torch.manual_seed(seed)
    return Net(cell.get("transposed", False))


def make_optimizer(net, cell, together=True):
    variant = VARIANTS[cell["optimizer"]]
    keys, marks = variant.cells
    own = [{**marks}, {**marks}]
    if "sparsity" in marks:
        own[1]["sparsity"] = 0.5
    if "block_size" in marks:
        own = [{**group, "block_size": 3} for group in own]
    if cell.get("transposed"):
        own = [{**group, "transposed_experts": True} for group in own]
    groups = [{"params": [net.tall.weight], **own[0]}, {"params": [net.square.weight], **own[1]}]
    groups.append({"params": [*net.embed.parameters(), *net.head.parameters()], **dict.fromkeys(marks.keys() & {"n"})})
    return variant.cls(groups, **{"lr": 0.01, "weight_decay": 0.1, **keys})


def measure(tasks):
    cells.build, cells.make_optimizer = build, make_optimizer
    return cells.measure(tasks)
