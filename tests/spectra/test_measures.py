"""Measures of a pair of matrices, against what was planted, torch's SVD, and peft's own search for intruders."""

import math
import re

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora.intruders import reduce_intruder_dimension
from torch import nn

from gracile.spectra import LowRankUpdate, Measures, compare, principal_angles, ranks_of
from gracile.spectra.decomposition import gram, leading, spectrum
from gracile.spectra.measures import overlap
from gracile.spectra.update import DenseUpdate

SHAPES = [(48, 48), (40, 64), (64, 40)]  # square, wide, tall
SPECTRUM = 0.9 ** torch.arange(40, dtype=torch.float64)


def orthonormal(m, k, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(m, k, generator=generator, dtype=torch.float64)).Q


def matrix(m, n, seed=0):
    """With well separated singular values, in fp64, and its factors."""
    s = min(m, n)
    U, V = orthonormal(m, s, seed), orthonormal(n, s, seed + 1)
    values = 0.9 ** torch.arange(s, dtype=torch.float64)
    return U @ torch.diag(values) @ V.mT, U, values, V


def flat(measures):
    return {key: value for key, value in measures._asdict().items() if key != "similarity"}


def close(one, other, tolerance):
    for key, value in flat(one).items():
        assert value == pytest.approx(getattr(other, key), rel=tolerance, abs=tolerance), key
    assert one.similarity == pytest.approx(other.similarity, abs=tolerance)


# ---- what a change is -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_change_is_zero(shape, dtype):
    W = matrix(*shape)[0].to(dtype)
    found = compare(W, W.clone())
    assert found.similarity == pytest.approx([1] * 10, abs=1e-6)
    values = flat(found)
    assert (values.pop("unchanged"), values.pop("subspace")) == (1, min(shape) // 2)
    for key, value in values.items():
        assert value == pytest.approx(0, abs=1e-7), key
    nothing = LowRankUpdate(torch.zeros(shape[0], 2), torch.randn(2, shape[1]))
    close(compare(W, nothing), found, 1e-6)


@pytest.mark.parametrize("shape", SHAPES)
def test_a_spike_in_a_new_direction_is_an_intruder(shape):
    m, n = shape
    W, U, _, V = matrix(m, n)
    u = U @ torch.full((min(m, n),), min(m, n) ** -0.5, dtype=torch.float64)  # as like to each as to any
    v = V @ torch.full((min(m, n),), min(m, n) ** -0.5, dtype=torch.float64)
    found = compare(W, W + 5 * torch.outer(u, v))
    assert found.intruders == 1
    assert found.intruder_share == pytest.approx(0.1)
    assert found.similarity[0] < 0.4
    singular = torch.linalg.svdvals(W + 5 * torch.outer(u, v))[:10].square()
    assert found.intruder_energy == pytest.approx(float(singular[0] / singular.sum()), rel=1e-4)
    assert found.effective_rank == pytest.approx(1, abs=1e-3)
    assert found.stable_rank == pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize("shape", SHAPES)
def test_a_spike_in_a_direction_of_the_base_is_none(shape):
    W, U, _, V = matrix(*shape)
    found = compare(W, W + 5 * torch.outer(U[:, 3], V[:, 3]))
    assert found.intruders == 0
    assert found.similarity == pytest.approx([1] * 10, abs=1e-5)
    assert found.control == 1, "the same update in a random direction is one"
    assert found.left_inside == pytest.approx(1, abs=1e-5)
    assert found.right_inside == pytest.approx(1, abs=1e-5)


def test_intruders_are_sought_among_all_vectors_of_the_base():
    """Of the middle of W0's spectrum: its top alone would call it new (a mistake of implementations)."""
    W, U, _, V = matrix(64, 64)
    assert compare(W, W + 5 * torch.outer(U[:, 50], V[:, 50]), subspace=8).intruders == 0


def test_it_is_left_vectors_that_intrude():
    W, U, _, V = matrix(48, 48)
    new = orthonormal(48, 1, seed=9)[:, 0]
    assert compare(W, W + 5 * torch.outer(new, V[:, 0])).intruders >= 1
    assert compare(W, W + 5 * torch.outer(U[:, 0], new)).intruders == 0


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("c", [0.5, 1.25, -1.0])
def test_a_multiple_of_the_base(shape, c):
    W = matrix(*shape)[0]
    found = compare(W, c * W)
    assert found.drift == pytest.approx(abs(abs(c) - 1), abs=1e-6)
    assert found.relative_norm == pytest.approx(abs(c - 1), abs=1e-6)
    assert found.left_angle_max == pytest.approx(0, abs=1e-3)
    assert found.right_angle_max == pytest.approx(0, abs=1e-3)
    assert found.intruders == 0
    assert found.unchanged == 0


@pytest.mark.parametrize("degrees", [1e-4, 0.5, 30.0, 60.0])
@pytest.mark.parametrize("shape", SHAPES)
def test_a_rotation_is_recovered(shape, degrees):
    """The first left vector turned towards the last one, which lies outside of the leading four."""
    W, U, values, V = matrix(*shape)
    angle = math.radians(degrees)
    turned = U.clone()
    turned[:, 0] = math.cos(angle) * U[:, 0] + math.sin(angle) * U[:, -1]
    turned[:, -1] = math.cos(angle) * U[:, -1] - math.sin(angle) * U[:, 0]
    found = compare(W, turned @ torch.diag(values) @ V.mT, subspace=4)
    assert found.left_angle_max == pytest.approx(degrees, rel=1e-3, abs=3e-5)
    assert found.left_angle_mean == pytest.approx(degrees / 4, rel=1e-3, abs=3e-5)
    assert found.right_angle_max == pytest.approx(0, abs=1e-3)
    assert found.drift == pytest.approx(0, abs=1e-6)


def test_small_angles_are_told():
    """By cosines in fp64 alone nothing below 1e-6 degrees could be."""
    angle = torch.tensor(1e-9, dtype=torch.float64)
    U1 = torch.stack([angle.cos(), angle.sin(), 0 * angle])[:, None]
    assert float(principal_angles(torch.eye(3)[:, :1], U1)) == pytest.approx(math.degrees(1e-9), rel=1e-6)


def test_ranks():
    assert ranks_of(torch.zeros(3)) == (0, 0)
    assert ranks_of(torch.tensor([3.0, 3, 3, 3])) == pytest.approx((4, 4))
    stable, effective = ranks_of(torch.tensor([2.0, 1]))
    assert stable == pytest.approx(1.25)
    assert effective == pytest.approx(math.exp(-(0.8 * math.log(0.8) + 0.2 * math.log(0.2))))


# ---- masks ----------------------------------------------------------------------------------------------------------


def test_a_random_mask_overlaps_by_chance():
    torch.manual_seed(0)
    W = matrix(128, 160)[0]
    changed = torch.rand(128, 160) < 0.2
    found = compare(W, torch.where(changed, 2 * W, W))
    assert found.unchanged == pytest.approx(1 - float(changed.float().mean()))
    for name in ("principal", "low"):
        assert getattr(found, f"{name}_overlap") == pytest.approx(0.3, abs=0.03)
        assert getattr(found, f"{name}_enrichment") == pytest.approx(getattr(found, f"{name}_overlap") / 0.3, rel=1e-3)


def test_masks_that_were_planted():
    torch.manual_seed(0)
    W = torch.randn(64, 64)
    order = W.abs().flatten().argsort()
    low = torch.zeros(64 * 64, dtype=torch.bool)
    low[order[: int(0.3 * 64 * 64)]] = True
    found = compare(W, torch.where(low.view(64, 64), 2 * W, W))
    assert found.low_overlap == pytest.approx(1)
    assert found.low_enrichment == pytest.approx(1 / 0.3, rel=1e-3)
    assert found.principal_enrichment < 0.5


def test_a_mask_has_its_size_whatever_ties_there_are():
    found = overlap(torch.ones(10, 10, dtype=torch.bool), torch.zeros(10, 10), 0.3)
    assert found == pytest.approx((0.3, 1.0))


def test_what_bf16_does_not_see_is_unchanged():
    torch.manual_seed(0)
    W = torch.randn(32, 32).bfloat16().float()
    assert compare(W, W * (1 + 2**-10)).unchanged == 1
    assert compare(W, W * (1 + 2**-6)).unchanged == 0
    moved = W.clone()
    moved[:4] *= 1.5
    assert compare(W, moved).unchanged == 1 - 4 / 32


# ---- the ways to compute --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("scale", [1e-3, 0.05, 1.0])
def test_factors_give_what_the_product_gives(shape, scale):
    torch.manual_seed(1)
    W = matrix(*shape)[0].float()
    update = LowRankUpdate(scale * torch.randn(shape[0], 3), torch.randn(3, shape[1]) / shape[1] ** 0.5)
    close(compare(W, update), compare(W, W + update.B @ update.A), 1e-3)


def test_factors_give_what_the_product_gives_in_krylov_spaces():
    """Of a size at which leading vectors are iterated for."""
    torch.manual_seed(1)
    Q = torch.linalg.qr(torch.randn(480, 440)).Q
    W = Q * torch.arange(1, 441) ** -0.5
    update = LowRankUpdate(0.1 * torch.randn(480, 3), torch.randn(3, 440) / 21)
    one, other = compare(W, update, subspace=8), compare(W, W + update.B @ update.A, subspace=8)
    assert one.intruders > 0
    close(one, other, 1e-3)


def test_krylov_spaces_find_leading_vectors(monkeypatch):
    torch.manual_seed(0)
    W = torch.linalg.qr(torch.randn(400, 300, dtype=torch.float64)).Q.mT * torch.arange(1, 401) ** -0.7
    U = torch.linalg.svd(W, full_matrices=False).U
    whole = []
    monkeypatch.setattr(torch.linalg, "eigh", counted(torch.linalg.eigh, whole))
    found = leading(gram(W), 4)
    assert max(whole) < 300, "not from all eigenvectors"
    assert (found.mT @ U[:, :4]).abs().diag().tolist() == pytest.approx([1] * 4, abs=1e-9)


def counted(eigh, sizes):
    def call(G):
        sizes.append(len(G))
        return eigh(G)

    return call


def test_leading_vectors_that_iteration_does_not_part_are_found_all_the_same():
    torch.manual_seed(0)
    G = torch.eye(300, dtype=torch.float64) + torch.diag(1e-9 * torch.arange(300, dtype=torch.float64))
    found = leading(G, 4)
    assert found.abs().argmax(dim=0).tolist() == [299, 298, 297, 296]


@pytest.mark.parametrize("shape", [(30, 30), (30, 50)])
def test_values_are_those_of_an_svd(shape):
    W = torch.randn(*shape, generator=torch.Generator().manual_seed(0))
    U, S, _ = torch.linalg.svd(W.double(), full_matrices=False)
    found = spectrum(gram(W))
    assert found.values.tolist() == pytest.approx(S.tolist(), rel=1e-6)
    assert (found.vectors.mT @ U).abs().diag().tolist() == pytest.approx([1] * 30, abs=1e-6)


@pytest.mark.parametrize("update", ["dense", "factors"])
def test_the_control_has_the_updates_values_in_other_directions(update):
    torch.manual_seed(0)
    B, A = torch.randn(20, 2), torch.randn(2, 30)
    D = DenseUpdate(B @ A) if update == "dense" else LowRankUpdate(B, A)
    other = D.shuffled(torch.Generator().manual_seed(0))
    values = torch.linalg.svdvals((B @ A).double())[:2]
    assert other.singular_values()[:2].tolist() == pytest.approx(values.tolist(), rel=1e-5)
    U, control = (torch.linalg.svd(d.rows(0, 20)).U[:, :1] for d in (D, other))
    assert abs(float(U.mT @ control)) < 0.6


# ---- peft -----------------------------------------------------------------------------------------------------------


def test_intruders_are_those_that_peft_finds():
    torch.manual_seed(0)
    layers = {f"layer{i}": nn.Linear(n, m, bias=False) for i, (m, n) in enumerate([*SHAPES, (96, 33)])}
    model = get_peft_model(nn.ModuleDict(layers), LoraConfig(r=4, lora_alpha=8, target_modules=list(layers)))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.15)
    theirs, ours = [], []
    reduce_intruder_dimension(model, top_k=10, threshold_epsilon=0.5, logging_sink=theirs.append)
    counts = [int(found[1]) if (found := re.search(r"Intruders: (\d+)", line)) else 0 for line in theirs[:-1]]
    for module in (m for m in model.modules() if hasattr(m, "lora_A")):
        factors = LowRankUpdate(2 * module.lora_B["default"].weight.detach(), module.lora_A["default"].weight.detach())
        ours.append(compare(module.get_base_layer().weight.detach(), factors))
    assert len(counts) == len(SHAPES) + 1
    assert [found.intruders for found in ours] == counts
    assert sum(counts) >= 4


# ---- what is awkward ------------------------------------------------------------------------------------------------


def finite(measures):
    return all(math.isfinite(value) for value in [*flat(measures).values(), *measures.similarity])


@pytest.mark.parametrize("shape", SHAPES)
def test_a_base_of_low_rank(shape):
    """Vectors of its null space are arbitrary: a change along one is new, and angles are of what has a direction."""
    torch.manual_seed(0)
    m, n = shape
    W = (torch.randn(m, 4) @ torch.randn(4, n)).float()
    found = compare(W, 2 * W)
    assert finite(found)
    assert (found.intruders, found.subspace, len(found.similarity)) == (0, 4, 4)
    assert found.left_angle_max == pytest.approx(0, abs=1e-3)
    U = torch.linalg.svd(W).U
    new = torch.outer(U[:, 10], torch.randn(n))
    assert compare(W, W + 50 * new).intruders == 1


def test_zeros():
    zeros, W = torch.zeros(8, 12), matrix(8, 12)[0]
    found = compare(zeros, zeros)
    assert finite(found)
    assert (found.drift, found.intruders, found.unchanged, found.subspace) == (0, 0, 1, 0)
    assert compare(zeros, W).intruders == 8
    assert compare(zeros, W).drift == math.inf
    assert finite(compare(W, zeros))


def test_bf16_is_compared_in_more():
    W = matrix(40, 64)[0].bfloat16()
    torch.manual_seed(0)
    update = 0.01 * torch.randn(40, 64)
    low, high = compare(W, (W + update).bfloat16()), compare(W.double(), (W + update).bfloat16().double())
    assert low == high


@pytest.mark.parametrize("shape", [(1, 5), (5, 1), (2, 2)])
def test_tiny_matrices(shape):
    torch.manual_seed(0)
    assert finite(compare(torch.randn(shape), torch.randn(shape)))


@pytest.mark.parametrize(
    ("W0", "W1", "keys", "message"),
    [
        (torch.ones(3), torch.ones(3), {}, r"W0 must be a matrix, got \(3,\)"),
        (torch.ones(3, 4), torch.ones(4, 3), {}, r"W1 must be 3 x 4 as W0 is, got \(4, 3\)"),
        (torch.ones(3, 4), LowRankUpdate(torch.ones(3, 1), torch.ones(1, 3)), {}, r"W1 must be 3 x 4 as W0 is"),
        (torch.ones(3, 4), LowRankUpdate(torch.ones(3, 2), torch.ones(1, 4)), {}, r"B must have as many columns as A"),
        (torch.full((3, 4), math.nan), torch.ones(3, 4), {}, "W0 holds infinite or NaN weights"),
        (torch.ones(3, 4), torch.full((3, 4), math.inf), {}, "W1 holds infinite or NaN weights"),
        (torch.ones(3, 4), torch.ones(3, 4), {"k": 0}, "k must be a whole number >= 1, got 0"),
        (torch.ones(3, 4), torch.ones(3, 4), {"epsilon": 0}, r"epsilon must be a number in \(0, 1\], got 0"),
        (torch.ones(3, 4), torch.ones(3, 4), {"subspace": 1.5}, "subspace must be a whole number >= 1, got 1.5"),
        (torch.ones(3, 4), torch.ones(3, 4), {"alpha": 1.0}, r"alpha must be a number in \(0, 1\), got 1.0"),
    ],
)
def test_bad_input_is_refused(W0, W1, keys, message):
    with pytest.raises(ValueError, match=message):
        compare(W0, W1, **keys)


def test_every_measure_is_described():
    described = set(re.findall(r"(\w+)(?:, (\w+))?: ", Measures.__doc__))
    assert set(Measures._fields) <= {name for pair in described for name in pair}
