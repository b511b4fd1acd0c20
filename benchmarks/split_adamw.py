"""``gracile pretrain`` with torch's AdamW, the target matrices at a tenth of the learning rate of everything else.

    python benchmarks/split_adamw.py quickstart --optimizer adamw --learning_rate 0.02 --output_dir runs/split

The low-rank classes scale the update of the targets (``scale``) and leave embeddings and the output layer at the full
rate; plain AdamW has one rate for all. This is the AdamW to compare them with.
"""

import sys

import torch

from gracile.optim import param_groups
from gracile.train import pretrain, trainer

FACTOR = 0.1


def build_optimizer(model, chosen, run):
    groups = param_groups(model, 1, chosen.target_modules, weight_decay=run.weight_decay)
    for group in groups:
        if group.pop("rank", None):
            group["lr"] = FACTOR * run.learning_rate
    betas = (run.adam_beta1, run.adam_beta2)
    return torch.optim.AdamW(groups, lr=run.learning_rate, betas=betas, eps=run.adam_epsilon, fused=True)


if __name__ == "__main__":
    trainer.build_optimizer = build_optimizer
    sys.exit(pretrain.main(sys.argv[1:]))
