"""Steps of every class on weights in 8 bits: what it makes of the same weights in fp32, written back as the oracle
does."""

import pytest
import torch
from catalogue import VARIANTS
from oracle import int8 as oracle
from torch import nn

from gracile import int8_weight
from gracile.int8_weight import quantize
from gracile.models.int8 import quantize_weights
from gracile.optim import GaLoreAdamW, GaLoreAdamW8bit, param_groups, release_gradients
from gracile.optim.core import rounding
from gracile.optim.distributed import blocked, pieces

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
            apart = p.codes.int().sub(codes.int()).abs()
            assert apart.sum() <= 1  # of 8800, where fp32 divides to the other side of an integer


@pytest.mark.parametrize("cls", sorted(REFUSE, key=lambda cls: cls.__name__), ids=lambda cls: cls.__name__)
def test_other_classes_refuse_them_by_name(cls):
    use = next(v.quadratic for v in VARIANTS.values() if v.cls is cls and v.quadratic)
    with pytest.raises(ValueError, match=f"^{cls.__name__} does not move weights in 8 bits, got one of shape"):
        cls([{"params": [nn.Parameter(quantize(torch.randn(16, 16)))], **use.matrices}], **use.keys)


NAMES = ["GaLoreAdamW", "GaLoreAdamW8bit Q-GaLore", "APOLLOAdamW", "APOLLOAdamW Mini", "FiraAdamW", "SCALE", "Lion"]


def moved(variant, held, optimizer, steps=4, begin=0):
    for step in range(begin, begin + steps):
        generator = torch.Generator().manual_seed(step)
        for p in held:
            p.grad = torch.randn(p.shape, generator=generator, dtype=torch.float32).to(p.dtype)
        optimizer.step()
    return held


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", NAMES)
def test_in_blocks_and_pieces_as_at_once(name, dtype, monkeypatch):
    """Never is an fp32 copy made of all of a large matrix: see the largest that is."""
    shapes = [(64, 48), (48, 64), (40, 24)]
    (held, optimizer), _ = pair(VARIANTS[name], shapes, dtype, stochastic_rounding=True)
    moved(VARIANTS[name], held, optimizer)
    opened, sizes = int8_weight.opened, []

    def seen(codes, *args):
        sizes.append(codes.numel())
        return opened(codes, *args)

    monkeypatch.setattr(int8_weight, "opened", seen)
    monkeypatch.setattr(pieces, "ON_CPU", 800)
    for limit in ("LARGE", "LARGE_TWICE", "BLOCK"):
        monkeypatch.setattr(blocked, limit, 800)
    (other, optimizer), _ = pair(VARIANTS[name], shapes, dtype, stochastic_rounding=True)
    sizes.clear()
    moved(VARIANTS[name], other, optimizer)
    assert max(sizes) <= 800
    for p, q in zip(held, other, strict=True):  # but for weights at which fp32 differs in its last bits
        assert (p.codes != q.codes).float().mean() <= 0.01
        assert (p.scales != q.scales).float().mean() <= 0.01


@pytest.mark.parametrize("name", NAMES)
def test_a_resumed_run_goes_on_to_the_bit(name):
    (held, optimizer), _ = pair(VARIANTS[name], SHAPES.values(), torch.bfloat16, stochastic_rounding=True)
    moved(VARIANTS[name], held, optimizer, 5)
    (other, resumed), _ = pair(VARIANTS[name], SHAPES.values(), torch.bfloat16, stochastic_rounding=True)
    resumed.load_state_dict(optimizer.state_dict())
    with torch.no_grad():
        for p, q in zip(held, other, strict=True):
            q.codes.copy_(p.codes)
            q.scales.copy_(p.scales)
    moved(VARIANTS[name], held, optimizer, 5, begin=5)
    moved(VARIANTS[name], other, resumed, 5, begin=5)
    for p, q in zip(held, other, strict=True):
        assert torch.equal(p.codes, q.codes)
        assert torch.equal(p.scales, q.scales)


@pytest.mark.parametrize("keep", ["nothing", "coordinates"])
@pytest.mark.parametrize("cls", [GaLoreAdamW, GaLoreAdamW8bit])
def test_freed_gradients_as_kept_ones(cls, keep):
    found = []
    for released in (False, True):
        torch.manual_seed(0)
        model = quantize_weights(nn.Sequential(nn.Embedding(9, 24), nn.Linear(24, 16), nn.Linear(16, 9, bias=False)))
        groups = param_groups(model, rank=4, target_modules="all-linear", update_proj_gap=2)
        optimizer = cls(groups, lr=0.02, stochastic_rounding=True)
        if released:
            release_gradients(model, optimizer, keep=keep, passes=1)
        for step in range(5):
            model(torch.arange(9).roll(step)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        found.append(model.state_dict())
    for key, value in found[0].items():
        assert torch.equal(found[1][key], value), key


def test_rows_that_do_not_move_and_steps_without_a_gradient():
    (held, optimizer), _ = pair(VARIANTS["GaLoreAdamW"], [(20, 12), (9, 40)], stochastic_rounding=True)
    before = [p.detach().clone() for p in held]
    for p in held:
        p.grad = torch.zeros(p.shape)
    held[1].grad[3] = 1.0
    for group in optimizer.param_groups:
        group["weight_decay"] = 0.0
    optimizer.step()
    still = torch.arange(9) != 3
    assert torch.equal(held[0].codes, before[0].codes)
    assert torch.equal(held[1].codes[still], before[1].codes[still])
    assert (held[1].codes[3] != before[1].codes[3]).any()


def test_a_gradient_that_is_not_finite_is_seen():
    (held, optimizer), _ = pair(VARIANTS["GaLoreAdamW"], [(20, 12), (9, 300)], stochastic_rounding=True)
    for p in held:
        p.grad = torch.zeros(p.shape)
    held[1].grad[4, 280] = torch.inf
    optimizer.step()
    lost = held[1].open().isnan()
    assert lost[4, 256:].all()
    assert lost.sum() == 44
