"""Products of bf16 matrices in fp32, by blocks, where a CPU has no bf16: right, small, and nowhere else."""

import subprocess
import sys
from importlib.util import module_from_spec, spec_from_file_location
from types import SimpleNamespace

import pytest
import torch
from captured_cases import give, made
from catalogue import VARIANTS
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from gracile import optim
from gracile.optim.distributed import FullMatrix, LowRankUpdate, ProjectionSide, Workspace, products
from gracile.optim.low_rank.basis import Basis
from gracile.optim.low_rank.optimizer import LowRankOptimizer
from gracile.train.measurement import fake_step
from gracile.train.measurement.fake_pass import Ledger

MULTIPLIED = {"mm", "bmm", "addmm", "addmm_", "baddbmm", "baddbmm_"}
SHAPES = [
    ((21, 19), (19, 13)),
    ((8, 40), (40, 8)),
    ((3, 21, 19), (3, 19, 13)),
    ((10, 3, 4), (10, 4, 2)),
    ((5, 0), (0, 4)),
]
FIRST = {
    variant.cls: name for name, variant in reversed(VARIANTS.items()) if issubclass(variant.cls, LowRankOptimizer)
}.values()


class Seen(TorchDispatchMode):
    """The names of operators, those that multiplied bf16, and the most elements of what was made in fp32."""

    def __init__(self):
        super().__init__()
        self.names, self.narrow, self.largest = [], [], 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        name = function.__name__.split(".")[0]
        self.names.append(name)
        if name in MULTIPLIED and args[-1].dtype in products.NARROW:
            self.narrow.append(name)
        if isinstance(made, torch.Tensor) and made.dtype == torch.float32:
            self.largest = max(self.largest, made.untyped_storage().nbytes() // 4)
        return made


@pytest.fixture
def in_fp32(monkeypatch):
    """A CPU without bf16; small blocks where a number of elements is asked for."""
    monkeypatch.setattr(products, "IN_FP32", True)
    return lambda size: monkeypatch.setattr(products, "BLOCK", size)


def whole_numbers(shape, dtype=torch.bfloat16):
    return torch.randint(-4, 5, shape).to(dtype)


@pytest.mark.parametrize("dtype", products.NARROW)
@pytest.mark.parametrize("stack", [(), (2,)])
def test_no_further_from_fp64_than_torch(dtype, stack, monkeypatch, in_fp32):
    torch.manual_seed(0)
    W, G, P = (torch.randn(*stack, *shape).to(dtype) for shape in [(120, 96), (120, 50), (50, 96)])
    exact = {"product": G.double() @ P.double(), "sum": W.double() + 0.3 * (G.double() @ P.double())}
    in_fp32(32)
    found = {}
    for on in (True, False):
        monkeypatch.setattr(products, "IN_FP32", on)
        found[on] = {"product": products.matmul(G, P), "sum": products.addmm_(W.clone(), G, P, 0.3)}
        assert torch.equal(products.addmm(W, G, P, 0.3), found[on]["sum"])
    for what, value in exact.items():
        ours, theirs = ((found[on][what].double() - value).norm() for on in (True, False))
        assert ours <= 1.001 * theirs, what
        rounded = torch.finfo(dtype).eps / 2
        assert ((found[True][what].double() - value).abs() <= rounded * value.abs() + 1e-5).all()


@pytest.mark.parametrize(("first", "second"), SHAPES)
def test_blocks_that_do_not_fit_are_one_product(first, second, in_fp32):
    """Of whole numbers, which fp32 holds: to the bit. Of views that lie the other way, and into ones, too."""
    in_fp32(8)
    torch.manual_seed(0)
    left, right = whole_numbers(first), whole_numbers(second)
    dense = whole_numbers((*first[:-1], second[-1]))
    product = left.double() @ right.double()
    across = torch.empty_like(dense.mT).mT
    for one, other in [(left, right), (left.mT.contiguous().mT, right.mT.contiguous().mT)]:
        assert torch.equal(products.matmul(one, other), product.bfloat16())
        assert products.matmul(one, other, out=across) is across
        assert torch.equal(across, product.bfloat16())
        total = (dense.double() + 0.5 * product).bfloat16()
        assert torch.equal(products.addmm(dense, one, other, 0.5), total)
        held = dense.clone()
        assert products.addmm(held, one, other, 0.5, out=held) is held
        assert torch.equal(held, total)


@pytest.mark.parametrize("stack", [(), (3,), (30,)])
def test_nothing_wider_is_larger_than_a_block(stack, in_fp32):
    in_fp32(16)
    G, P = whole_numbers((*stack, 70, 50)), whole_numbers((*stack, 50, 40))
    with Seen() as seen:
        products.addmm_(products.matmul(G, P), G, P, 2.0)
    assert 0 < seen.largest <= 16 * 16
    assert not seen.narrow
    assert len(seen.names) > 100

    small = whole_numbers((30, 4, 4))
    with Seen() as seen:
        products.matmul(small, small)
    assert seen.names.count("baddbmm_") == 2, "sixteen matrices and fourteen"


def test_all_else_is_torch_s(monkeypatch, in_fp32):
    """fp32 and fp64, another device, another place, and what torch refuses."""
    wide, meta = torch.randn(9, 9), torch.empty(9, 9, dtype=torch.bfloat16, device="meta")
    for matrix in (wide, wide.double(), meta):
        with Seen() as seen:
            products.matmul(matrix, matrix)
            products.addmm(matrix, matrix, matrix, 2.0)
            products.addmm_(matrix, matrix, matrix, 2.0)
        assert seen.names == ["mm", "addmm", "addmm_"]
    with pytest.raises(RuntimeError, match="same dtype"):
        products.matmul(wide.bfloat16(), wide.half())
    monkeypatch.setattr(products, "IN_FP32", False)
    narrow = wide.bfloat16()
    with Seen() as seen:
        products.matmul(narrow, narrow)
        products.addmm(narrow, narrow, narrow, 2.0)
        products.addmm_(narrow, narrow, narrow, 2.0)
    assert seen.names == seen.narrow == ["mm", "addmm", "addmm_"]


def test_torch_is_asked_once_as_it_is_read(monkeypatch):
    for ops, has in [
        (SimpleNamespace(_is_mkldnn_bf16_supported=lambda: True), True),
        (SimpleNamespace(_is_mkldnn_bf16_supported=lambda: False), False),
        (SimpleNamespace(), False),
    ]:
        monkeypatch.setattr(torch.ops, "mkldnn", ops)
        assert products._has_kernels() is has
        once = spec_from_file_location(f"{products.__name__}_again", products.__file__)
        once.loader.exec_module(again := module_from_spec(once))
        assert again.IN_FP32 is not has


@pytest.mark.thorough
@pytest.mark.skipif("AVX512" not in torch.backends.cpu.get_cpu_capability(), reason="of a CPU that has bf16")
def test_a_cpu_without_avx512_is_found_out(monkeypatch):
    told = "from gracile.optim.distributed import products; print(products.IN_FP32)"
    for most, found in [("AVX2", "True"), ("AVX512_CORE", "False")]:
        monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", most)
        ran = subprocess.run([sys.executable, "-c", told], capture_output=True, text=True, check=True)
        assert ran.stdout.strip() == found


@pytest.mark.parametrize("shape", [(60, 40), (40, 60)])
def test_a_basis_and_a_weight_have_no_other_products(shape, in_fp32):
    torch.manual_seed(0)
    side = ProjectionSide.of(shape, 8, "std")
    G, W = torch.randn(shape).bfloat16(), torch.randn(shape).bfloat16()
    basis = Basis(torch.linalg.qr(torch.randn(side.basis_shape))[0].bfloat16(), side)
    shard = FullMatrix(nn.Parameter(W.clone()), 0, Workspace(), side)
    with torch.no_grad(), Seen() as seen:
        kept = basis.reduce(G, torch.randn(side.basis_shape[0], 4))
        update = 3.0 * basis.lift(kept.coordinates)
        shard.write(update, 0.1, 0.0, False)
        parts = [update.product(), update.dense(), update.added_to(W), update.add_to_(G.clone())]
        (torch.tensor(2.0) * LowRankUpdate(update.left, update.right)).add_to_(W.clone())
    assert not seen.narrow
    assert seen.largest
    assert all(part.dtype == torch.bfloat16 for part in parts)


@pytest.mark.parametrize("name", FIRST)
def test_no_class_multiplies_in_bf16(name, in_fp32, monkeypatch):
    """And where its products are in fp32 it goes where it goes, to the rounding of weights."""
    variant, held = VARIANTS[name], {}
    for on in (True, False):
        monkeypatch.setattr(products, "IN_FP32", on)
        torch.manual_seed(0)
        held[on] = [nn.Parameter(torch.randn(shape).bfloat16()) for shape in [(24, 16), (16, 24)]]
        keys = dict(variant.quadratic.matrices or {})
        keys |= {"rank": 4} if keys.get("rank", 1) > 1 else {}
        optimizer = variant.cls([{"params": held[on], **keys}], **variant.quadratic.keys)
        with Seen() as seen:
            for _ in range(2):
                for p in held[on]:
                    p.grad = torch.randn(p.shape).bfloat16()
                optimizer.step()
        assert not (on and seen.narrow)
        assert on or seen.narrow or variant.cls is optim.APOLLOAdamW  # whose directions are fp32
    for p, q in zip(held[True], held[False], strict=True):
        assert (p - q).norm() <= 0.02 * q.norm()


@pytest.mark.filterwarnings("ignore")
def test_a_compiled_step_has_them_too(in_fp32):
    (held, optimizer), (others, twin) = made("GaLoreAdamW", False), made("GaLoreAdamW", False)
    for own, one in [(held, optimizer), (others, twin)]:
        for p in own:
            p.data = p.data.bfloat16()
        step = torch.compile(one.step, backend="eager") if one is optimizer else one.step
        for t in range(3):
            for p in own:
                p.grad = None
            give(own, t)
            step()
    torch._dynamo.reset()
    for p, q in zip(held, others, strict=True):
        assert (p - q).norm() <= 0.01 * q.norm()


def test_a_plan_for_this_cpu_counts_the_blocks(monkeypatch, in_fp32):
    """Of an ordinary step, as a real one takes them; a plan for a GPU has none. Nothing is multiplied for it."""
    monkeypatch.setattr(fake_step, "STEPS", (1,))
    planned = {}
    for on in (True, False):
        monkeypatch.setattr(products, "IN_FP32", on)
        for device in ("cpu", "meta"):
            (_, optimizer) = galore("meta")
            planned[on, device] = fake_step.step_bytes(optimizer, device=device)
    assert planned[True, "meta"] == planned[False, "meta"]
    assert planned[True, "cpu"] > 1.5 * planned[False, "cpu"]

    monkeypatch.setattr(products, "IN_FP32", True)
    p, optimizer = galore("cpu")
    for _ in range(2):
        p.grad = torch.randn_like(p)
        ledger = Ledger([p, p.grad, *(value for own in optimizer.state.values() for value in own.values())])
        with ledger:
            optimizer.step()
    assert planned[True, "cpu"] == pytest.approx(ledger.at_peak.bytes, rel=0.1)


def galore(device):
    p = nn.Parameter(torch.ones(192, 128, dtype=torch.bfloat16, device=device))
    return p, optim.GaLoreAdamW([{"params": [p], "rank": 16}], lr=0.1)


def test_tensors_without_memory_choose_as_others_do(in_fp32):
    with FakeTensorMode(), Seen() as seen:
        G = torch.empty(2048, 1024, dtype=torch.bfloat16)
        assert products.matmul(G, G.mT[:, :8]).shape == (2048, 8)
    assert seen.names.count("addmm_") == 2
    assert not seen.narrow
