"""Layers for inference: each computes what the masked dense layer does, and holds what the mask keeps, no more."""

import copy
import json
import pickle

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from gracile.models import build_llama, sparse_export
from gracile.models.convert import convert, merge
from gracile.models.inference import condensed as rows
from gracile.models.layers import BlockSparseLinear, CondensedLinear, CSRLinear, SemiStructuredLinear

SHAPES = [(96, 32), (32, 96), (64, 64)]
TOKENS = [1, 2, 15, 16, 33, 300]
CLOSE = {torch.float64: 1e-13, torch.float32: 1e-6, torch.bfloat16: 1e-2, torch.float16: 2e-3}
KINDS = {
    "condensed": (CondensedLinear, {}),
    "csr": (CSRLinear, {}),
    "blocks of 32": (BlockSparseLinear, {"block": 32}),
    "blocks of 8": (BlockSparseLinear, {"block": 8}),  # four in a group
}
every_kind = pytest.mark.parametrize("kind", KINDS)


def mask_of(kind, m, n):
    """As each is made for: k in a row, any, whole blocks; a row (of blocks) without any."""
    if kind == "condensed":
        mask = torch.zeros(m, n, dtype=torch.bool).scatter_(1, torch.rand(m, n).topk(n // 8, 1).indices, True)
        mask[m // 2] = False
        return mask
    if kind == "csr":
        mask = torch.rand(m, n) < 0.15
        mask[3], mask[5] = False, True
        return mask
    b = KINDS[kind][1]["block"]
    blocks = torch.rand(m // b, n // b) < 0.4
    blocks[0], blocks[-1, -1] = False, True
    return blocks.repeat_interleave(b, 0).repeat_interleave(b, 1)


def masked(kind, m, n, dtype=torch.float32, bias=True):
    """A linear layer that is zero outside of a mask, and at some places inside of it."""
    mask = mask_of(kind, m, n)
    linear = nn.Linear(n, m, bias, dtype=dtype)
    with torch.no_grad():
        linear.weight.mul_(mask & (torch.rand(m, n) > 0.1))
    return linear, mask


def made(kind, *arguments, **keys):
    linear, mask = masked(kind, *arguments, **keys)
    cls, options = KINDS[kind]
    return linear, mask, cls.from_linear(linear, mask=mask, **options)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture(params=["MKL", "no MKL"])
def kernels(request, monkeypatch):
    """What torch is built with is not everywhere the same."""
    if request.param == "no MKL":
        monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: False)


@every_kind
@pytest.mark.parametrize("dtype", CLOSE, ids=str)
@pytest.mark.parametrize(("m", "n"), SHAPES)
def test_computes_what_the_dense_layer_does(kind, m, n, dtype, kernels):
    linear, _, layer = made(kind, m, n, dtype=dtype)
    exact = copy.deepcopy(linear).double()
    for tokens in TOKENS:
        x = torch.randn(tokens, n, dtype=dtype)
        with torch.inference_mode():
            for _ in range(2):  # the second takes the shortest way
                y, expected = layer(x), exact(x.double())
                assert y.dtype == dtype
                assert y.is_contiguous()
                error = (y - expected).abs().max() / expected.abs().max()
                assert error < CLOSE[dtype], (tokens, float(error))


@every_kind
def test_pieces_make_the_same(kind, monkeypatch):
    """As large layers are computed: a few rows or blocks at a time."""
    _, _, layer = made(kind, 96, 64, dtype=torch.bfloat16)
    x = torch.randn(70, 64, dtype=torch.bfloat16)
    whole = [layer(x), layer(x[:1])]
    for module in ("condensed", "block_sparse"):
        monkeypatch.setattr(f"gracile.models.inference.{module}.PIECE", 64)
    assert torch.equal(layer(x), whole[0])
    assert torch.equal(layer(x[:1]), whole[1])


@every_kind
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(64,), (1, 64), (1, 1, 64), (2, 3, 64), (0, 64), (2, 0, 64)])
def test_any_number_of_tokens(kind, bias, shape):
    linear, _, layer = made(kind, 32, 64, bias=bias)
    x = torch.randn(shape)
    for _ in range(2):
        torch.testing.assert_close(layer(x), linear(x))
    across = torch.randn(64, 5).T
    torch.testing.assert_close(layer(across), linear(across))


@every_kind
def test_holds_what_the_mask_keeps_also_zeros(kind):
    linear, mask, layer = made(kind, 96, 64)
    assert (linear.weight[mask] == 0).any()
    if kind.startswith("blocks"):
        c = layer.columns.shape[1]
        of_row = mask.view(96 // layer.block, layer.block, 64 // layer.block, layer.block).any(3).any(1).sum(1)
        assert layer.values.numel() == int(((of_row + c - 1) // c).sum()) * c * layer.block**2
        assert c == 1 or layer.values.numel() > int(mask.sum()), "groups are filled up"
    else:
        assert layer.values.numel() == int(mask.sum())
        assert layer.columns.view(-1).tolist() == mask.nonzero()[:, 1].tolist()
    assert torch.equal(layer.dense(), linear.weight)
    plain = layer.merge()
    assert torch.equal(plain.weight, linear.weight)
    assert torch.equal(plain.bias, linear.bias)
    without = type(layer).from_linear(linear, **KINDS[kind][1])
    assert without.values.numel() <= layer.values.numel(), "without a mask, what is not zero"
    assert torch.equal(without.dense(), linear.weight)


@every_kind
def test_what_lies_outside_of_the_mask_is_left_out(kind):
    _, mask, _ = made(kind, 32, 64)
    full = nn.Linear(64, 32)
    layer = KINDS[kind][0].from_linear(full, mask=mask, **KINDS[kind][1])
    assert torch.equal(layer.dense(), full.weight * mask)


@every_kind
def test_an_empty_layer_gives_its_bias(kind, kernels):
    linear = nn.Linear(32, 64)
    with torch.no_grad():
        linear.weight.zero_()
    layer = KINDS[kind][0].from_linear(linear, **KINDS[kind][1])
    assert layer.values.numel() == 0
    for tokens in (1, 1, 3, 40):
        assert torch.equal(layer(torch.randn(tokens, 32)), linear.bias.expand(tokens, 64))
    assert torch.equal(layer.dense(), linear.weight)


@every_kind
def test_moves_saves_and_loads(kind, tmp_path):
    _, _, layer = made(kind, 96, 64)
    x = torch.randn(3, 64)
    with torch.inference_mode():
        before = layer(x)  # what a kernel takes is made, in inference mode
    assert all(name in ("values", "columns", "rows", "starts", "bias") for name in layer.state_dict())
    save_file(layer.state_dict(), tmp_path / "layer.safetensors")
    stored = load_file(tmp_path / "layer.safetensors")
    narrow = {name: t if t.is_floating_point() else sparse_export.narrowed(t) for name, t in stored.items()}
    for again in (
        type(layer).from_tensors(64, 96, narrow),
        copy.deepcopy(layer),
        pickle.loads(pickle.dumps(layer)),
    ):
        assert torch.equal(again(x), before)
    assert torch.equal(layer.double().float()(x), before)
    halved = layer.to(torch.bfloat16)
    assert halved.values.dtype == halved.bias.dtype == torch.bfloat16
    assert halved.columns.dtype in (torch.int32, torch.int64)
    torch.testing.assert_close(halved(x.bfloat16()).float(), before, rtol=0.02, atol=0.02)
    assert layer.to("meta").dense().shape == (96, 64)


@every_kind
def test_loaded_weights_are_computed_with(kind):
    """Nothing that was made of the old ones stays."""
    linear, mask, layer = made(kind, 32, 64)
    x = torch.randn(1, 64)
    layer(x)
    other = copy.deepcopy(linear)
    with torch.no_grad():
        other.weight.mul_(-2)
    state = KINDS[kind][0].from_linear(other, mask=mask, **KINDS[kind][1]).state_dict()
    for assign in (False, True):
        layer.load_state_dict(state, assign=assign)
        torch.testing.assert_close(layer(x), other(x))
        assert layer.load_state_dict(KINDS[kind][0].from_linear(linear, mask=mask, **KINDS[kind][1]).state_dict())
        torch.testing.assert_close(layer(x), linear(x))


@every_kind
@pytest.mark.parametrize("tokens", [1, 3, 40])
def test_a_gradient_reaches_the_input_alone(kind, tokens):
    linear, _, layer = made(kind, 32, 64)
    with torch.inference_mode():
        layer(torch.randn(1, 64))
    x = torch.randn(tokens, 64, requires_grad=True)
    (found,) = torch.autograd.grad(layer(x).square().sum(), x)
    (expected,) = torch.autograd.grad(linear(x).square().sum(), x)
    torch.testing.assert_close(found, expected)
    assert not any(p.requires_grad for p in layer.parameters())


@every_kind
@pytest.mark.parametrize("tokens", [1, 20])
def test_autocast(kind, tokens):
    linear, _, layer = made(kind, 32, 64)
    x = torch.randn(tokens, 64)
    layer(x[:1])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), linear(x), rtol=0.02, atol=0.02)


@every_kind
def test_bad_input_gets_one_line(kind):
    linear, mask, layer = made(kind, 32, 64)
    cls, options = KINDS[kind]
    for x in (torch.randn(2, 63), torch.randn(64, 2), torch.randn(1, 64).double()):
        for _ in range(2):
            with pytest.raises(ValueError, match=r"x must be \.\.\. x 64 in torch.float32, got"):
                layer(x)
            layer(torch.randn(1, 64))
    for wrong in (mask.float(), mask.T):
        with pytest.raises(ValueError, match=r"mask must be a bool tensor of shape \(32, 64\), got"):
            cls.from_linear(linear, mask=wrong, **options)
    with pytest.raises(TypeError, match="blok"):
        cls.from_linear(linear, mask=mask, blok=3)
    with pytest.raises(RuntimeError, match="is for inference"):
        layer.reset_parameters()


@pytest.mark.parametrize(("block", "message"), [(24, "must divide both sides of 32 x 64"), (0, "whole number >= 1")])
def test_blocks_that_do_not_fit(block, message):
    with pytest.raises(ValueError, match=message):
        BlockSparseLinear.from_linear(nn.Linear(64, 32), block=block)


# ---- condensed ------------------------------------------------------------------------------------------------------


def test_rows_of_about_one_length_are_filled_up():
    """4 x 10: three rows of 5 and one of 4 take 20 places for 19 values."""
    mask = torch.zeros(4, 10, dtype=torch.bool)
    for row, columns in enumerate(([0, 2, 4, 6, 8], [1, 3, 5, 7, 9], [5, 6, 7, 8, 9], [0, 1, 2, 3])):
        mask[row, columns] = True
    linear = nn.Linear(10, 4)
    layer = CondensedLinear.from_linear(linear, mask=mask)
    assert layer.values.shape == (4, 5)
    assert layer.columns[3].tolist() == [0, 1, 2, 3, 3]
    assert layer.values[3, 4] == 0
    assert torch.equal(layer.dense(), linear.weight * mask)
    dense = nn.Linear(10, 4)
    dense.load_state_dict({"weight": linear.weight * mask, "bias": linear.bias})
    for tokens in (1, 3, 20):
        x = torch.randn(tokens, 10)
        torch.testing.assert_close(layer(x), dense(x))


def test_uneven_rows_are_refused():
    """8 rows of 4 and one of 6: 54 places for 38 values."""
    mask = torch.zeros(9, 10, dtype=torch.bool)
    mask[:, :4], mask[8, :6] = True, True
    with pytest.raises(ValueError, match=r"at most 1.25 times as many values \(CSRLinear takes any\), got 1.42"):
        CondensedLinear.from_linear(nn.Linear(10, 9), mask=mask)


def test_a_row_whose_values_cancel_is_kept():
    """The authors' code takes rows whose sum is zero for empty ones."""
    linear = nn.Linear(4, 3, bias=False)
    with torch.no_grad():
        linear.weight.copy_(torch.tensor([[0, 1, -1, 0], [0, 0, 0, 0], [2, 0, 0, 3.0]]))
    layer = CondensedLinear.from_linear(linear)
    assert layer.rows.tolist() == [0, 2]
    assert layer(torch.tensor([[1.0, 2, 3, 4]])).tolist() == [[-1, 0, 14]]


# ---- 2:4 ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_two_of_four_are_packed(dtype):
    kept = torch.rand(48, 16, 4).topk(2, -1).indices
    mask = torch.zeros(48, 16, 4, dtype=torch.bool).scatter_(-1, kept, True).view(48, 64)
    mask[5], mask[6, :4] = False, torch.tensor([False, False, False, True])
    linear = nn.Linear(64, 48, dtype=dtype)
    layer = SemiStructuredLinear.from_linear(linear, mask=mask)
    assert layer.values.shape == (48, 32)
    assert layer.positions.dtype == torch.uint8
    assert layer.positions.nbytes * 8 == 2 * layer.values.numel(), "two bits a value"
    assert torch.equal(layer.dense(), linear.weight * mask)
    again = SemiStructuredLinear.from_tensors(64, 48, layer.state_dict())
    assert torch.equal(again.merge().weight, linear.weight * mask)


def test_two_of_four_needs_a_gpu_and_a_pattern():
    linear = nn.Linear(64, 32)
    with pytest.raises(ValueError, match="at most 2 of every 4 consecutive weights may be kept, got 4"):
        SemiStructuredLinear.from_linear(linear)
    mask = torch.tensor([True, False, False, True]).repeat(32, 16)
    layer = SemiStructuredLinear.from_linear(linear, mask=mask)
    with pytest.raises(ValueError, match=r"16-bit weights on a GPU of capability 8.0 or later, got 'torch.float32"):
        layer(torch.randn(3, 64))
    assert not SemiStructuredLinear.usable(torch.device("cpu"), torch.float16)
    assert not SemiStructuredLinear.usable(torch.device("cuda"), torch.float32)


@pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() < (8, 0), reason="sparse tensor cores compute"
)
def test_two_of_four_on_a_gpu():
    linear = nn.Linear(256, 128, dtype=torch.float16, device="cuda")
    mask = torch.tensor([True, False, False, True], device="cuda").repeat(128, 64)
    with torch.no_grad():
        linear.weight.mul_(mask)
    layer = SemiStructuredLinear.from_linear(linear, mask=mask)
    for tokens in (1, 64):
        x = torch.randn(tokens, 256, dtype=torch.float16, device="cuda")
        torch.testing.assert_close(layer(x), linear(x), rtol=1e-2, atol=1e-2)


# ---- models ---------------------------------------------------------------------------------------------------------

TINY = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 99}
IDS = torch.arange(12).view(1, 12)


def sparse_model(zeros=0.9, **overrides):
    """Attention and MLP weights with the same number of entries in each row."""
    model = build_llama("2m", **(TINY | overrides)).eval()
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and ("attn" in name or "mlp" in name):
            k = round((1 - zeros) * module.in_features)
            kept = torch.rand_like(module.weight).topk(k, 1).indices
            with torch.no_grad():
                module.weight.mul_(torch.zeros_like(module.weight).scatter_(1, kept, 1))
    return model


@torch.no_grad()
def logits(model):
    return model(IDS).logits


@pytest.mark.parametrize("form", ["dense", "condensed", "csr", "auto"])
@pytest.mark.parametrize("tied", [False, True])
def test_a_model_is_saved_and_loaded(form, tied, tmp_path):
    model = sparse_model(tie_word_embeddings=tied)
    before = logits(model)
    told = sparse_export.sparsify(model, form, tokens=(1, 5))
    assert len(told) == 14
    for name, layer in told.items():
        kind = type(model.get_submodule(name))
        assert kind is (nn.Linear if layer.form == "dense" else sparse_export.FORMS[layer.form])
        assert form in ("auto", layer.form)
        assert layer.zeros == pytest.approx(0.9, abs=0.01)
        assert list(layer.ms) == [1, 5]
        assert layer.ms[1].keys() == {"dense", "condensed", "csr"}
        assert form != "auto" or layer.form == min(layer.ms[1], key=layer.ms[1].get), "the fastest"
    torch.testing.assert_close(logits(model), before)
    sparse_export.save(model, tmp_path)
    loaded = sparse_export.load(tmp_path)
    assert not loaded.training
    assert torch.equal(logits(loaded), logits(model))
    assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) == tied
    assert loaded.generation_config.to_dict() == model.generation_config.to_dict()
    torch.testing.assert_close(logits(merge(loaded)), before)


@pytest.mark.parametrize(("dtype", "value"), [(torch.float32, 4), (torch.bfloat16, 2)])
@pytest.mark.parametrize(("form", "place"), [("condensed", 1), ("csr", 1)])
def test_files_shrink_with_what_is_left_out(form, place, dtype, value, tmp_path):
    """Places among at most 256 columns take one byte each."""
    sizes = {}
    for zeros in (0.5, 0.9):
        model = sparse_model(zeros).to(dtype)
        kept = sum(int(m.weight.count_nonzero()) for m in sparse_export.sparse_linears(model).values())
        rest = sum(p.numel() for p in model.parameters()) - sum(
            m.weight.numel() for m in sparse_export.sparse_linears(model).values()
        )
        sparse_export.sparsify(model, form)
        sizes[zeros] = sparse_export.save(model, tmp_path / str(zeros))
        starts = 0 if form == "condensed" else 2 * sum(m.out_features + 1 for m in _packed(model))
        header = 12000
        assert 0 <= sizes[zeros] - (kept * (value + place) + rest * value + starts) < header
    assert sizes[0.9] < sizes[0.5]


def _packed(model):
    return [m for m in model.modules() if isinstance(m, CSRLinear)]


@pytest.mark.parametrize(
    ("largest", "dtype"),
    [(255, torch.uint8), (256, torch.uint16), (65535, torch.uint16), (65536, torch.int32), (2**31, torch.int64)],
)
def test_places_take_the_smallest_whole_numbers(largest, dtype):
    places = torch.tensor([0, 7, largest])
    found = sparse_export.narrowed(places)
    assert found.dtype == dtype
    assert found.long().tolist() == places.tolist()


def test_the_block_is_found():
    weight = torch.zeros(128, 64)
    weight[32:64, :32] = 1
    assert sparse_export.block_of(weight) == 32
    weight[:16, 48:] = 1
    assert sparse_export.block_of(weight) == 16
    assert sparse_export.block_of(torch.zeros(40, 64)) is None, "nothing divides it"
    assert sparse_export.block_of(torch.ones(64, 64)) is None, "nothing is left out"
    whole = torch.zeros(256, 256)
    whole[128:, :128] = 1
    assert sparse_export.block_of(whole) == 128
    linear = nn.Linear(256, 256, bias=False)
    linear.weight = nn.Parameter(whole)
    assert sparse_export.candidates(linear)["blocks"].block == 128


def test_the_fastest_is_by_the_first_number_of_tokens(monkeypatch):
    """Told what was measured, auto takes the least."""
    measured = {1: {"dense": 3.0, "condensed": 2.0, "csr": 1.0}, 8: {"dense": 1.0, "condensed": 2.0, "csr": 3.0}}
    monkeypatch.setattr(sparse_export, "medians", lambda layers, number: dict.fromkeys(layers, measured[number]))
    for tokens, form in (((1, 8), "csr"), ((8, 1), "dense")):
        told = sparse_export.sparsify(sparse_model(), tokens=tokens)
        assert {layer.form for layer in told.values()} == {form}


def test_what_is_not_sparse_or_shared_stays():
    model = sparse_model(tie_word_embeddings=True)
    with torch.no_grad():
        model.lm_head.weight[10:] = 0  # sparse, but the embedding's
        model.model.layers[0].mlp.up_proj.weight.fill_(1)
    names = sparse_export.sparse_linears(model)
    assert len(names) == 13
    assert "lm_head" not in names
    assert "model.layers.0.mlp.up_proj" not in names


def test_convert_takes_them_too():
    model = sparse_model()
    before = logits(model)
    convert(model, CondensedLinear)
    assert isinstance(model.model.layers[1].mlp.down_proj, CondensedLinear)
    torch.testing.assert_close(logits(model), before)


@pytest.mark.parametrize(
    ("form", "tokens", "message"),
    [
        ("cs", (1,), "form must be one of auto, dense, condensed, csr, blocks, 2:4"),
        ("auto", (0,), "tokens must be whole numbers >= 1, got 0"),
        ("auto", (), "tokens must name a number"),
        ("2:4", (1,), "no layer can be held in the form '2:4' in torch.float32 on cpu"),
        ("blocks", (1,), "no layer can be held in the form 'blocks'"),
    ],
)
def test_bad_choices(form, tokens, message):
    with pytest.raises(ValueError, match=message):
        sparse_export.sparsify(sparse_model(), form, tokens)


def test_a_dense_model_has_nothing_to_leave_out():
    with pytest.raises(ValueError, match="no linear layer is at least 50% zeros"):
        sparse_export.sparsify(build_llama("2m", **TINY))


def test_folders_that_cannot_be_loaded(tmp_path):
    with pytest.raises(ValueError, match="is no exported model"):
        sparse_export.load(tmp_path)
    model = sparse_model()
    sparse_export.sparsify(model, "csr")
    sparse_export.save(model, tmp_path)
    layout = json.loads((tmp_path / "sparse.json").read_text())
    (tmp_path / "sparse.json").write_text(json.dumps(layout | {"version": 2}))
    with pytest.raises(ValueError, match="version must be 1, got 2"):
        sparse_export.load(tmp_path)
    layout["layers"].pop("model.layers.0.mlp.up_proj")
    (tmp_path / "sparse.json").write_text(json.dumps(layout))
    with pytest.raises(ValueError, match=r"up_proj.* is on one side only"):
        sparse_export.load(tmp_path)


def test_pieces_of_rows_are_all_rows(monkeypatch):
    """Each once and in order, whatever their lengths; a piece is at least a row."""
    starts = torch.tensor([0, 0, 5, 5, 900, 901, 1000])
    for piece, count in ((1, 6), (400, 3), (10**6, 1)):
        monkeypatch.setattr(rows, "PIECE", piece)
        found = list(rows._pieces(starts, 1000))
        assert len(found) == count
        assert [n for a, b, _, _ in found for n in range(a, b)] == list(range(6))
        assert all((first, last) == (starts[a], starts[b]) for a, b, first, last in found)
