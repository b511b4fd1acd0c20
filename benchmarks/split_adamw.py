"""``gracile pretrain`` with the target matrices, or what layers make of them, at a part of the learning rate.

    python benchmarks/split_adamw.py quickstart --optimizer adamw --learning_rate 0.02 --output_dir runs/split
    TARGETS=0.2 python benchmarks/split_adamw.py quickstart --layer sst --optimizer sst_adamw --output_dir runs/sst

The low-rank classes scale the update of the targets (``scale``) and leave embeddings and the output layer at the full
rate; plain AdamW, and the optimizers of layers, have one rate for all. This is what to compare them with: a tenth for
the targets, or what the variable says.
"""

import os

from gracile.layer_registry import parts_among
from gracile.optim import param_groups
from gracile.registry import OPTIMIZERS
from gracile.train import pretrain
from gracile.train.build import optimizer as optimizers
from gracile.train.engines.process_exit import leave
from gracile.train.run import trainer

FACTOR = float(os.environ.get("TARGETS", "0.1"))


def targets_of(model, chosen):
    """Ids of the parameters that get the smaller rate."""
    factors = parts_among(model.parameters())
    if factors:
        return {number for number, part in factors.items() if part.name != "bias"}
    return {id(p) for p in param_groups(model, 1, chosen.target_modules)[0]["params"]}


def build_optimizer(model, chosen, run):
    if "sparsity" in OPTIMIZERS[chosen.optimizer].accepts():  # which has a group for its targets
        optimizer = optimizers.build_optimizer(model, chosen, run)
        for group in optimizer.param_groups:
            group["lr"] *= FACTOR if group["sparsity"] is not None else 1
        return optimizer
    targets = targets_of(model, chosen)
    groups = []
    for group in param_groups(model, weight_decay=run.weight_decay):
        for part, rate in ((True, FACTOR * run.learning_rate), (False, run.learning_rate)):
            params = [p for p in group["params"] if (id(p) in targets) is part]
            if params:
                groups.append({**group, "params": params, "lr": rate})
    entry = OPTIMIZERS[chosen.optimizer]
    return entry.cls(groups, **{**optimizers.run_keys(entry, run), **(chosen.optimizer_args or {})})


if __name__ == "__main__":
    trainer.build_optimizer = build_optimizer
    leave(pretrain.main())
