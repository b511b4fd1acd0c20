"""Steps of every class on weights in 8 bits: what it makes of the same weights in fp32, written back as the oracle
does."""

import pytest
import torch
from catalogue import VARIANTS
from oracle import int8 as oracle
from torch import nn

from gracile.int8_weight import quantize
from gracile.optim.core import rounding

SHAPES = {"tall": (20, 12), "wide": (12, 20), "ragged": (4, 300), "long": (8, 1100)}
GROUP = 256
FULL = {name: v for name, v in VARIANTS.items() if v.quadratic and getattr(v.cls, "moves_int8_weights", False)}
REFUSE = {v.cls for v in VARIANTS.values() if v.quadratic and not v.cls.moves_int8_weights}


def noise_of(shape, position, step, seed=0):
    places = torch.arange(shape[0] * shape[1], dtype=torch.int32)
    return rounding.noise(places, rounding._words(f"{seed} {position} {step} weights")).view(shape)


def groups_of(parameters, ranked):
    """A group for each matrix, and one for an embedding, which is last."""
    *matrices, other = parameters
    return [*({"params": [p], **ranked} for p in matrices), {"params": [other]}]


def pair(variant, shapes, dtype=torch.float32, **keys):
    """Parameters in 8 bits and their optimizer, and the same in fp32."""
    generator = torch.Generator().manual_seed(0)
    held = [nn.Parameter(quantize((0.3 * torch.randn(s, generator=generator)).to(dtype), GROUP)) for s in shapes]
    wide = [nn.Parameter(p.detach().open()) for p in held]
    use = variant.quadratic
    return [
        (own, variant.cls(groups_of(own, use.matrices), **use.keys, **more)) for own, more in ((held, keys), (wide, {}))
    ]


@pytest.mark.parametrize("stochastic", [True, False], ids=["by chance", "to nearest"])
@pytest.mark.parametrize("variant", FULL.values(), ids=FULL.keys())
def test_a_step_is_that_of_the_opened_weights_written_back(variant, stochastic):
    shapes = [*SHAPES.values(), (5, 40)]
    (held, optimizer), (wide, twin) = pair(variant, shapes, stochastic_rounding=stochastic)
    generator = torch.Generator().manual_seed(1)
    for step in range(1, 4):
        before = [p.scales.clone() for p in held]
        for p, q in zip(held, wide, strict=True):
            q.data = p.detach().open()
            q.grad = torch.randn(q.shape, generator=generator)
            p.grad = q.grad.clone()
        optimizer.step()
        twin.step()
        for position, (p, q) in enumerate(zip(held, wide, strict=True)):
            noise = noise_of(q.shape, position, step) if stochastic else None
            codes, scales = oracle.written(before[position], q.detach(), GROUP, noise)
            assert torch.equal(p.scales, scales)
            assert torch.equal(p.codes, codes)


@pytest.mark.parametrize("cls", sorted(REFUSE, key=lambda cls: cls.__name__), ids=lambda cls: cls.__name__)
def test_other_classes_refuse_them_by_name(cls):
    use = next(v.quadratic for v in VARIANTS.values() if v.cls is cls and v.quadratic)
    with pytest.raises(ValueError, match=f"^{cls.__name__} does not move weights in 8 bits, got one of shape"):
        cls([{"params": [nn.Parameter(quantize(torch.randn(16, 16)))], **use.matrices}], **use.keys)
