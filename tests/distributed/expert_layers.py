"""Mixtures whose experts are layers, under FSDP2 and DeepSpeed, beside one process that sees the same tokens."""

from functools import partial

from cells import start
from mixtures import build_mixture
from split_mixtures import distance

from gracile.models.convert import convert
from gracile.models.layers import NMLinear, OrderedLowRankLinear, ReLoRALinear, SparseLowRankLinear, SpectralLinear
from gracile.optim import ReLoRAAdamW, SLTrainAdamW, SRSTEAdamW, SSTAdamW, param_groups

# A layer and its keys, an optimizer and its keys, and those of the experts' group.
METHODS = {
    "sltrain": (SparseLowRankLinear, {"rank": 4, "density": 0.1}, SLTrainAdamW, {}, {}),
    "sst": (SpectralLinear, {"rank": 4}, SSTAdamW, {"swap_every": 3}, {}),
    "relora": (ReLoRALinear, {"rank": 4}, ReLoRAAdamW, {"merge_every": 3}, {}),
    "nm": (NMLinear, {}, SRSTEAdamW, {}, {"n": 2, "m": 4, "target_modules": ["experts"]}),
    "maestro": (OrderedLowRankLinear, {"rank": 8}, SRSTEAdamW, {}, {"n": 2, "m": 4, "target_modules": ["q_proj"]}),
}


def build(kind, method, checkpointed):
    layer, keys, *_ = METHODS[method]
    depth = 2 if kind == "deepseek_v3" else 1  # whose first layer has no experts
    model = build_mixture(kind, num_hidden_layers=depth)
    convert(model, layer, r".*mlp\.experts\..*", **keys).train()
    if checkpointed:
        model.gradient_checkpointing_enable()
    return model


def optimizer_for(method, model):
    _, _, optimizer, keys, marks = METHODS[method]
    return optimizer(param_groups(model, **marks), lr=3e-3, **keys)


def measure(cells):
    """Of each (mixture, method, layout) the largest distance of a parameter from that of one process."""
    start()
    return [
        distance(partial(build, kind, method, "checkpointed" in more), partial(optimizer_for, method), layout)
        for kind, method, layout, *more in cells
    ]
