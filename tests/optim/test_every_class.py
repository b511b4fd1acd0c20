"""What every optimizer of the package promises: descent, its state, resumption, refusals, memory."""

import re
import weakref
from inspect import signature
from typing import NamedTuple

import pytest
import torch
from catalogue import VARIANTS
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from gracile.models import build_llama
from gracile.optim import param_groups, state_bytes
from gracile.optim.distributed import products


class Method(NamedTuple):
    """A class, its constructor's keys and the keys of a group of matrices. The refreshes fall on steps 0, 4, 8, ..."""

    cls: type[torch.optim.Optimizer]
    keys: dict
    ranked: dict


METHODS = {name: Method(variant.cls, *variant.quadratic) for name, variant in VARIANTS.items() if variant.quadratic}
CLASSES = {method.cls: method for method in reversed(METHODS.values())}  # the first of each class

# The last has 4400 coordinates at rank 4: 8-bit moments begin at 4096.
SHAPES = {"tall": (20, 12), "wide": (12, 20), "square": (16, 16), "row": (1, 24), "column": (24, 1), "long": (8, 1100)}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}

by_method = pytest.mark.parametrize("method", METHODS.values(), ids=METHODS.keys())
by_class = pytest.mark.parametrize("method", CLASSES.values(), ids=[cls.__name__ for cls in CLASSES])
by_dtype = pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES.keys())


# ---- helpers --------------------------------------------------------------------------------------------------------


def parameters(*shapes, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [nn.Parameter((0.3 * torch.randn(shape, generator=generator)).to(dtype)) for shape in shapes]


def optimizer_for(method, matrices, others=(), ranked=None, **keys):
    """A group for each matrix, with a rank where the class knows one, and a group for the others."""
    own = method.ranked | (ranked or {} if "rank" in method.ranked else {})
    one_head = own | ({"num_heads": 1} if "num_heads" in own else {})
    groups = [{"params": [p], **(one_head if p.shape[0] == 1 else keys_for(own, p.shape))} for p in matrices]
    return method.cls(groups + ([{"params": others}] if others else []), **method.keys | keys)


def keys_for(ranked, shape):
    """Rows that m does not divide have no pattern, a row of one weight keeps it, and vectors have no mask."""
    if "distribution" in ranked and len(shape) < 2:
        return {}
    if "gamma_sal" in ranked and shape[1] == 1:
        return ranked | {"sparsity": 0.0}
    return {"n": None} if "m" in ranked and len(shape) == 2 and shape[1] % ranked["m"] else ranked


def mixed(method, dtype=torch.float32):
    """An optimizer of three matrices, a matrix without a rank and a vector."""
    held = parameters(*(SHAPES[name] for name in ("tall", "wide", "long")), (64, 64), (20,), dtype=dtype)
    return optimizer_for(method, held[:3], held[3:])


def held_by(optimizer):
    return [p for group in optimizer.param_groups for p in group["params"]]


def give_gradients(held, t):
    """They depend on the step's number alone, and have a part that stays: subspaces overlap."""
    staying, noise = torch.Generator().manual_seed(7), torch.Generator().manual_seed(1000 + t)
    for p in held:
        G = 2 * torch.randn(p.shape, generator=staying) + torch.randn(p.shape, generator=noise)
        p.grad = G.to(p.dtype)


def advance(optimizer, first, last):
    """Steps ``first`` to ``last - 1``."""
    for t in range(first, last):
        give_gradients(held_by(optimizer), t)
        optimizer.step()


def assert_identical(one, other):
    """Every weight and every tensor of the state, to the bit and in dtype; NaN (an overlap not yet told) is itself."""
    for a, b in zip(held_by(one), held_by(other), strict=True):
        assert torch.equal(a, b)
        assert one.state[a].keys() == other.state[b].keys()
        for key, value in one.state[a].items():
            torch.testing.assert_close(other.state[b][key], value, rtol=0, atol=0, equal_nan=True)


# ---- the table ------------------------------------------------------------------------------------------------------


def test_a_method_has_a_rank_where_its_class_does():
    """That every class is here is seen by tests/test_catalogue.py."""
    assert all(("rank" in method.ranked) == ("rank" in signature(method.cls).parameters) for method in METHODS.values())


# ---- descent --------------------------------------------------------------------------------------------------------


@by_method
@pytest.mark.parametrize(
    ("ranks", "names", "dtype"),
    [
        ({}, ("tall", "wide", "square", "row", "column"), torch.float32),
        ({}, ("tall", "row"), torch.bfloat16),
        ({"rank": 64}, ("tall", "wide"), torch.float32),
    ],
    ids=["low rank", "low rank, bf16", "a rank above the short side"],
)
def test_a_quadratic_goes_down(method, ranks, names, dtype):
    """|W - T|^2 to less than half in 40 steps, finite at every one; a vector goes along."""
    shapes = [*(SHAPES[name] for name in names), (20,)]
    held = parameters(*shapes, dtype=dtype)
    targets = [p.detach() for p in parameters(*shapes, dtype=dtype, seed=1)]
    optimizer = optimizer_for(method, held[:-1], held[-1:], ranked=ranks)
    trajectory = []
    for _ in range(40):
        for p, target in zip(held, targets, strict=True):
            p.grad = p.detach() - target
        trajectory.append([p.grad.float().square().sum().item() for p in held])
        optimizer.step()
    losses = torch.tensor(trajectory)
    assert torch.isfinite(losses).all()
    assert (losses[-1] < 0.5 * losses[0]).all()


# ---- the form and size of the state ---------------------------------------------------------------------------------


@by_method
def test_state_holds_whole_tensors_under_flat_word_keys(method):
    """Saving a view would save all of its storage."""
    optimizer = mixed(method)
    advance(optimizer, 0, 5)
    for p in held_by(optimizer):
        assert "step" in optimizer.state[p]
        for key, value in optimizer.state[p].items():
            assert re.fullmatch("[a-z_]+", key)
            assert type(value) is torch.Tensor
            assert not value.requires_grad
            assert value.untyped_storage().nbytes() == value.numel() * value.element_size(), key


@by_method
@by_dtype
def test_bytes_told_in_advance_are_those_of_a_step(method, dtype):
    """For what is no matrix, a rank does not count."""
    for shape in [*SHAPES.values(), (30,), (5000,), ()]:
        held = parameters(shape, dtype=dtype)
        optimizer = optimizer_for(method, held) if len(shape) == 2 else method.cls(held, **method.keys)
        advance(optimizer, 0, 1)
        heads = {"num_heads": 1} if shape == SHAPES["row"] and "num_heads" in method.ranked else {}
        told = method.cls.state_bytes_for(shape, dtype, **method.keys | keys_for(method.ranked, shape) | heads)
        assert told == state_bytes(optimizer) > 0, shape


# ---- saving and loading ---------------------------------------------------------------------------------------------


@by_method
@pytest.mark.parametrize(
    ("at", "dtype"),
    [(2, torch.float32), (6, torch.bfloat16), (8, torch.float32)],
    ids=["in a warm-up", "between refreshes, bf16", "at a refresh"],
)
def test_a_run_resumed_from_a_file_keeps_every_bit(method, at, dtype, tmp_path):
    undisturbed = mixed(method, dtype)
    advance(undisturbed, 0, at)
    torch.save([undisturbed.state_dict(), [p.detach() for p in held_by(undisturbed)]], tmp_path / "run.pt")
    saved, weights = torch.load(tmp_path / "run.pt", weights_only=True)
    resumed = mixed(method, dtype)
    for p, weight in zip(held_by(resumed), weights, strict=True):
        p.data.copy_(weight)
    resumed.load_state_dict(saved)
    assert_identical(resumed, undisturbed)  # dtypes too: torch would cast to the parameter's
    advance(undisturbed, at, 10)
    advance(resumed, at, 10)
    assert_identical(resumed, undisturbed)


# ---- refusals -------------------------------------------------------------------------------------------------------


@by_class
@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("weight_decy", 0.5, ["'weight_decay'"]),
        ("rank", 0, []),
        ("scale", float("nan"), []),
        ("weight_decay", -0.5, [">= 0"]),
    ],
)
def test_a_bad_key_or_value_is_refused_at_construction(method, key, value, words):
    """In a group and, where the constructor has the key, there. Lion has neither rank nor scale: unknown keys."""
    ways = [lambda: method.cls([{"params": parameters((20, 12)), key: value}], **method.keys)]
    if key in optimizer_for(method, parameters((20, 12))).defaults:
        ways.append(lambda: method.cls(parameters((20, 12)), **method.keys | {key: value}))
    for construct in ways:
        with pytest.raises(ValueError) as error:
            construct()
        assert all(word in str(error.value) for word in [key, str(value), *words])


@by_class
def test_an_unknown_argument_is_refused_by_python(method):
    with pytest.raises(TypeError, match="learning_rate"):
        method.cls(parameters((20, 12)), learning_rate=0.1)


# ---- which parameters move ------------------------------------------------------------------------------------------


@by_method
def test_frozen_parameters_have_no_state_and_unused_ones_have_some_and_neither_moves(method):
    shapes = [(20, 12), (20, 12), (20, 12), (20,), (20,), (20,)]
    held = parameters(*shapes)
    optimizer = optimizer_for(method, held[:3], held[3:], weight_decay=0.1)
    used, unused, frozen = held[0::3], held[1::3], held[2::3]
    for p in frozen:
        p.requires_grad_(False)
    before = [p.detach().clone() for p in held]
    for t in range(5):
        give_gradients(used, t)
        optimizer.step()
    moved = [not torch.equal(p, start) for p, start in zip(held, before, strict=True)]
    assert moved == [True, False, False] * 2
    assert all(p not in optimizer.state for p in frozen)
    for p, q in zip(used, unused, strict=True):
        assert optimizer.state[p].keys() == optimizer.state[q].keys()
        assert (optimizer.state[p]["step"], optimizer.state[q]["step"]) == (5, 0)


@by_method
def test_a_llama_with_tied_embeddings_and_grouped_heads_trains(method):
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "vocab_size": 48}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    model = build_llama("2m", tie_word_embeddings=True, **sizes, **heads)
    assert model.model.layers[0].self_attn.k_proj.weight.shape == (16, 32)
    own = {"num_heads": {"q_proj": 4, "k_proj": 2, "v_proj": 2}} if "num_heads" in method.ranked else {}
    groups = param_groups(model, **method.ranked | own)
    owned = [id(p) for group in groups for p in group["params"]]
    assert sorted(owned) == sorted({id(p) for p in model.parameters()})
    optimizer = method.cls(groups, **method.keys | {"lr": 0.005})
    embedding = model.lm_head.weight
    assert embedding is model.model.embed_tokens.weight
    tokens = torch.randint(0, 48, (2, 12), generator=torch.Generator().manual_seed(1))
    losses = []
    for _ in range(4):
        optimizer.zero_grad()
        loss = model(input_ids=tokens, labels=tokens).loss
        losses.append(loss.item())
        loss.backward()
        if len(losses) < 4:
            optimizer.step()
    assert losses == sorted(losses, reverse=True)
    assert optimizer.state[embedding]["step"] == 3


# ---- what a step leaves alone and what it costs ---------------------------------------------------------------------


@by_method
@by_dtype
def test_a_step_does_not_touch_the_gradients(method, dtype):
    optimizer = mixed(method, dtype)
    for t in range(6):
        give_gradients(held_by(optimizer), t)
        before = [(p.grad, p.grad.clone()) for p in held_by(optimizer)]
        optimizer.step()
        for p, (given, copy) in zip(held_by(optimizer), before, strict=True):
            assert p.grad is given
            assert torch.equal(given, copy)


class Allocated(TorchDispatchMode):
    """The peak of the bytes of storages that were born under it and still live."""

    def __init__(self):
        super().__init__()
        self.living, self.peak = {}, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        known = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        out = function(*args, **kwargs or {})
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in known | self.living.keys():
                    self.living[storage._cdata] = storage.nbytes()
                    weakref.finalize(storage, self.living.pop, storage._cdata)
        self.peak = max(self.peak, sum(self.living.values()))
        return out


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize(("width", "in_fp32"), [("fp32", False), ("bf16", False), ("bf16", True)])
def test_a_step_needs_the_memory_of_one_of_its_matrices(name, width, in_fp32, monkeypatch):
    """Of one fp32 matrix, not of all three, between refreshes; half a one is a bf16 copy, the rest coordinates. So also
    where a CPU has products of bf16 made in fp32, whose blocks are small beside the matrix."""
    monkeypatch.setattr(products, "IN_FP32", in_fp32)
    monkeypatch.setattr(products, "BLOCK", 64)
    m, n = 256, 192
    optimizer = optimizer_for(METHODS[name], parameters(*[(m, n)] * 3, dtype=DTYPES[width]))
    advance(optimizer, 0, 5)
    give_gradients(held_by(optimizer), 5)
    with Allocated() as allocated:
        optimizer.step()
    assert 0.4 < allocated.peak / (4 * m * n) < 1.7


class HostReads(TorchDispatchMode):
    """How often a step reads a value of one of ``tensors`` or of one computed from them."""

    READS = (torch.ops.aten._local_scalar_dense, torch.ops.aten.nonzero, torch.ops.aten.equal)

    def __init__(self, tensors):
        super().__init__()
        self.count, self.followed = 0, {id(t): t for t in tensors}  # held, so that an id stays its own

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **kwargs or {})
        if any(id(leaf) in self.followed for leaf in tree_leaves((args, kwargs))):
            self.count += function.overloadpacket in self.READS
            self.followed |= {id(t): t for t in tree_leaves(out) if isinstance(t, torch.Tensor)}
        return out


def reads_of_a_step(method, matrices, t):
    """By the host, at step t, of anything that would live on a device."""
    optimizer = optimizer_for(method, parameters(*[(20, 12)] * matrices))
    advance(optimizer, 0, t)
    held = held_by(optimizer)
    give_gradients(held, t)
    owners = [(p, group) for group in optimizer.param_groups for p in group["params"]]
    state = [v for p, group in owners for k, v in optimizer.state[p].items() if k not in optimizer.host_keys(p, group)]
    with HostReads([*held, *(p.grad for p in held), *state]) as reads:
        optimizer.step()
    return reads.count


@by_method
def test_between_refreshes_the_host_reads_no_tensor_of_a_matrix(method):
    assert reads_of_a_step(method, matrices=2, t=5) == reads_of_a_step(method, matrices=6, t=5)


def test_at_a_refresh_the_host_reads_one_value_for_all_matrices():
    method = METHODS["GaLoreAdamW"]
    assert [reads_of_a_step(method, matrices, t=4) for matrices in (2, 6)] == [1, 1]
