"""Sparse Wide, of Sparse-IFT: a wider, sparser MLP for the FLOPs of a dense one.  Thangarasa et al. 2023,
arXiv:2303.11525.

    gate, up: f x h and down: h x f, dense            3 h f weights
    f'        =  f / (1 - s), a multiple of 8         h, the width of the residual stream, stays
    gate, up: f' x h and down: h x f', of density f / f'

A hidden width between two scaled ones grows by sqrt(1 / d), d = 1 - s. LLaMA's MLP is scaled on one side only, which
takes all of 1 / d. The layers are ``nn.Linear``; what is sparse of them is an optimizer's.
"""

from __future__ import annotations

from typing import Any

from ..validation import is_real, require
from .layers.iso_flop import rounded_up
from .llama import llama_config


def wide(size: str, sparsity: float, **overrides: Any) -> tuple[dict[str, Any], float]:
    """How a LLaMA with a sparse, wide MLP is built and masked.

        overrides, sparsity = wide("60m", 0.75)
        model = build_llama("60m", **overrides)
        optimizer = RigLAdamW(param_groups(model, sparsity=sparsity, target_modules=["mlp"]))

    Args:
        size: of the dense model.
        sparsity: s, about: a multiple of 8 is not always at hand.
        overrides: fields of the dense model's configuration.

    Returns:
        ``overrides`` with the intermediate size, and the sparsity with which its MLP has the dense one's weights.

    Raises:
        ValueError: for a sparsity outside of [0, 1), or what ``llama_config`` refuses.
    """
    require(is_real(sparsity) and 0 <= sparsity < 1, "sparsity must be a number in [0, 1)", sparsity)
    width = llama_config(size, **overrides).intermediate_size
    wider = width if sparsity == 0 else rounded_up(width / (1 - sparsity))
    return {**overrides, "intermediate_size": wider}, 1 - width / wider
