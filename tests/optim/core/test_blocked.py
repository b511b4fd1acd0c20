"""A large matrix that is moved in blocks goes where it goes at once."""

import pytest
import torch
from captured_cases import CASES, made, stepped
from catalogue import VARIANTS
from torch import nn

from gracile.optim.distributed import FullMatrix, ProjectionSide, Workspace, blocked, stack_of

SHAPES = [(24, 16), (16, 24), (32, 16)]
FIRST = {variant.cls: name for name, variant in reversed(VARIANTS.items()) if variant.quadratic}.values()
PLANNED = [
    name if name in FIRST else pytest.param(name, marks=pytest.mark.thorough)
    for name, variant in VARIANTS.items()
    if variant.quadratic
]
WITH_TENSORS = [
    pytest.param(name, by_chance, marks=[] if name in {"FiraAdamW", "SCALE"} else pytest.mark.thorough)
    for name in CASES
    for by_chance in (False, True)
    if name != "by chance" and (name, by_chance) != ("Fira corrected", True)  # whose residual bf16 rounds again
]
STEPS = 4


def in_blocks_of(elements, patch):
    for limit in ("LARGE", "LARGE_TWICE", "BLOCK"):
        patch.setattr(blocked, limit, elements)


def moved(variant, dtype, by_chance, small=None):
    """Matrices after some steps; with ``small``, in blocks of so many elements."""
    with pytest.MonkeyPatch.context() as patch:
        if small is not None:
            in_blocks_of(small, patch)
        draw = torch.Generator().manual_seed(0)
        held = [nn.Parameter(torch.randn(shape, generator=draw).to(dtype)) for shape in SHAPES]
        use = variant.quadratic
        keys = dict(use.matrices or {})
        keys |= {"rank": 4} if keys.get("rank", 1) > 1 else {}
        keys |= {"residual_warmup": 2} if keys.get("residual_fraction") else {}
        optimizer = variant.cls([{"params": held, **keys}], **use.keys, stochastic_rounding=by_chance)
        for _ in range(STEPS):
            for p in held:
                p.grad = torch.randn(p.shape, generator=draw).to(dtype)
            optimizer.step()
    return [p.detach() for p in held]


@pytest.mark.parametrize("name", PLANNED)
def test_in_blocks_as_at_once(name):
    variant = VARIANTS[name]
    for one, other in zip(moved(variant, torch.float32, False), moved(variant, torch.float32, False, 100), strict=True):
        assert torch.allclose(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", PLANNED)
def test_rounded_by_chance_in_blocks_as_at_once(name):
    """Places draw their noise wherever a block begins: but for weights at which fp32 differs in its last bits."""
    variant = VARIANTS[name]
    whole, in_blocks = (moved(variant, torch.bfloat16, True, small) for small in (None, 100))
    for one, other in zip(whole, in_blocks, strict=True):
        assert torch.isfinite(other).all()
        assert (one != other).float().mean() <= 0.02


@pytest.mark.parametrize(("name", "by_chance"), WITH_TENSORS)
def test_a_block_takes_its_numbers_as_tensors_too(name, by_chance, monkeypatch):
    """As a graph that is replayed has them: learning rate, decay, corrections, and the words of the noise."""

    def after(capturable):
        held, optimizer = made(name, capturable)
        for group in optimizer.param_groups:
            group["stochastic_rounding"] = by_chance
        for p in held:
            p.data = p.data.to(torch.bfloat16 if by_chance else p.dtype)
        stepped(held, optimizer)
        return [p.detach() for p in held]

    whole = after(capturable=True)
    in_blocks_of(1000, monkeypatch)
    for one, other, numbers in zip(whole, after(capturable=True), after(capturable=False), strict=True):
        if by_chance:
            assert (one != other).float().mean() <= 0.02  # fp32 differs in its last bits
        else:
            assert (other - numbers).norm() <= CASES[name][3] * numbers.norm()


def test_a_stack_is_moved_at_once_however_large_its_matrices_are():
    """Blocks of one would be cut from the dimension that counts them."""
    p = nn.Parameter(torch.empty(4096, 2560, device="meta"))
    matrices = [FullMatrix(p, i, Workspace(), ProjectionSide.of(p.shape, 4, "std")) for i in range(2)]
    assert matrices[0].in_blocks()
    assert not matrices[0].in_blocks(twice=True)
    assert not stack_of(matrices).in_blocks()
