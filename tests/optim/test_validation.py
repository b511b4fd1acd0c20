"""What is refused: with which error, when, and with a message that names the field and the value."""

import re
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from gracile.optim import GaLoreAdamW
from gracile.optim.distributed import UnsupportedLayout

NAN, INF = float("nan"), float("inf")
KEYS = (
    "betas, capturable, eps, lr, maximize, proj_type, rank, refreshes_at_once, rounding_seed, scale, shard_basis, "
    "state_dtype, stochastic_rounding, subspace_method, update_proj_gap, weight_decay"
)

# (field, value, what the message asks for)
BAD_VALUES = [
    *[("rank", value, "rank must be a whole number >= 1 or None") for value in (0, -1, 2.5, 2.0, True, "8", NAN)],
    *[("update_proj_gap", value, "update_proj_gap must be a whole number >= 1") for value in (0, -5, 1.5, True, None)],
    *[("scale", value, "scale must be a finite number") for value in (NAN, INF, -INF, "1", None, True)],
    *[("lr", value, "lr must be a number >= 0") for value in (-1e-3, NAN, INF, "0.1", None, torch.ones(2))],
    *[("weight_decay", value, "weight_decay must be a number >= 0") for value in (-0.1, NAN, INF, None)],
    *[("eps", value, "eps must be a number >= 0") for value in (-1e-8, NAN, INF, None)],
    *[
        ("betas", value, "betas must be two numbers in [0, 1)")
        for value in ((1.0, 0.999), (0.9, 1.0), (-0.1, 0.9), (0.9,), (0.9, 0.99, 0.999), 0.9, (NAN, 0.9), ("a", "b"))
    ],
    *[
        ("proj_type", value, "proj_type must be one of std, reverse_std, left, right")
        for value in ("full", "Std", "", None, 1)
    ],
    *[
        ("state_dtype", value, "state_dtype must be a floating point torch.dtype or None")
        for value in (torch.int8, torch.int64, torch.bool, torch.complex64, "bfloat16", float)
    ],
]
by_bad_value = pytest.mark.parametrize(("field", "value", "expectation"), BAD_VALUES, ids=str)


def matrix(*shape, dtype=torch.float32):
    return nn.Parameter(torch.full(shape or (24, 40), 0.02, dtype=dtype))


def refused(field, value, expectation):
    """The whole message: what holds for the field, and what was given."""
    return "^" + re.escape(f"{expectation}, got {value!r}") + "$"


def described(optimizer):
    return [dict(group, params=[id(p) for p in group["params"]]) for group in optimizer.param_groups]


# ---- values ---------------------------------------------------------------------------------------------------------


@by_bad_value
def test_a_bad_value_of_the_constructor(field, value, expectation):
    with pytest.raises(ValueError, match=refused(field, value, expectation)):
        GaLoreAdamW([matrix()], **{field: value})


@by_bad_value
def test_a_bad_value_of_a_group(field, value, expectation):
    """In the second of two groups: every group is looked at."""
    groups = [{"params": [matrix()], "rank": 4}, {"params": [matrix()], "rank": 4, field: value}]
    with pytest.raises(ValueError, match=refused(field, value, expectation)):
        GaLoreAdamW(groups)


@by_bad_value
def test_a_bad_value_of_a_late_group_leaves_the_optimizer_unchanged(field, value, expectation):
    optimizer = GaLoreAdamW([matrix()], rank=4)
    before = described(optimizer)
    with pytest.raises(ValueError, match=refused(field, value, expectation)):
        optimizer.add_param_group({"params": [matrix()], "rank": 4, field: value})
    assert described(optimizer) == before


@pytest.mark.parametrize(
    "keys",
    [
        {"lr": 0},
        {"lr": 1, "betas": [0.0, 0.5]},
        {"betas": (0, 0), "eps": 0},
        {"rank": 1, "update_proj_gap": 1, "scale": -1},
        {"rank": 10**9, "scale": 0, "state_dtype": torch.float64},
        {"rank": None, "state_dtype": torch.float16},
    ],
    ids=str,
)
def test_values_at_the_edge_are_taken_and_step(keys):
    p = matrix()
    optimizer = GaLoreAdamW([p], **keys)
    p.grad = torch.randn(24, 40, generator=torch.Generator().manual_seed(0)) + 1
    optimizer.step()
    assert p.isfinite().all()


# ---- keys -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "value", "hint"),
    [
        ("update_proj_gpa", 200, "did you mean 'update_proj_gap'?"),
        ("proj_typ", "std", "did you mean 'proj_type'?"),
        ("ranks", 8, "did you mean 'rank'?"),
        ("weight_decy", 0.1, "did you mean 'weight_decay'?"),
        ("momentum", 0.9, f"a key of SCALE; known: {KEYS}"),
        ("sparsity", None, f"a key of BlockSparseAdamW; known: {KEYS}"),
    ],
)
def test_an_unknown_group_key_is_named_with_the_nearest_known_one(key, value, hint):
    message = "^" + re.escape(f"unknown parameter group key {key!r} = {value!r}; {hint}") + "$"
    optimizer = GaLoreAdamW([matrix()])
    before = described(optimizer)
    group = {"params": [matrix()], key: value}
    with pytest.raises(ValueError, match=message):
        GaLoreAdamW([group])
    with pytest.raises(ValueError, match=message):
        optimizer.add_param_group(group)
    assert described(optimizer) == before


def test_an_unknown_constructor_argument_is_refused_by_python():
    with pytest.raises(TypeError, match="update_proj_gpa"):
        GaLoreAdamW([matrix()], update_proj_gpa=200)


def test_keys_that_schedulers_and_people_put_into_groups_are_taken():
    optimizer = GaLoreAdamW([{"params": [matrix()], "rank": 4, "name": "attention", "initial_lr": 0.1}])
    torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: 0.5, last_epoch=1)
    assert optimizer.param_groups[0]["name"] == "attention"


def test_the_group_that_was_passed_in_is_not_changed():
    p = matrix()
    group = {"params": p, "rank": 4}
    optimizer = GaLoreAdamW([matrix()])
    optimizer.add_param_group(group)
    assert group == {"params": p, "rank": 4}
    assert optimizer.param_groups[1]["scale"] == 0.25


# ---- parameters -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(), (24,), (2, 2, 24, 40), (4, 3, 3, 3)])
def test_a_rank_needs_matrices(shape):
    message = re.escape(f"rank=4 needs matrices, or experts (E, m, n), got a parameter of shape {shape}")
    odd = nn.Parameter(torch.zeros(shape))
    with pytest.raises(ValueError, match=message):
        GaLoreAdamW([matrix(), odd], rank=4)
    with pytest.raises(ValueError, match=message):
        GaLoreAdamW([{"params": [matrix(), odd], "rank": 4}])
    GaLoreAdamW([odd])  # without a rank every shape is welcome


def test_a_late_group_with_a_vector_leaves_the_optimizer_unchanged():
    optimizer = GaLoreAdamW([matrix()], rank=4)
    before = described(optimizer)
    with pytest.raises(
        ValueError, match=r"rank=4 needs matrices, or experts \(E, m, n\), got a parameter of shape \(24,\)"
    ):
        optimizer.add_param_group({"params": [matrix(24)]})
    assert described(optimizer) == before


def test_named_parameters_are_looked_at_too():
    with pytest.raises(
        ValueError, match=r"rank=4 needs matrices, or experts \(E, m, n\), got a parameter of shape \(40,\)"
    ):
        GaLoreAdamW(nn.Linear(24, 40).named_parameters(), rank=4)


def test_a_parameter_twice_in_a_group():
    p = matrix()
    with pytest.raises(ValueError, match=r"^params must hold each parameter once, got 3$"):
        GaLoreAdamW([p, matrix(), p], rank=4)


def test_a_parameter_in_two_groups():
    p = matrix()
    with pytest.raises(ValueError, match="some parameters appear in more than one parameter group"):
        GaLoreAdamW([{"params": [p], "rank": 4}, {"params": [p]}])
    optimizer = GaLoreAdamW([p], rank=4)
    before = described(optimizer)
    with pytest.raises(ValueError, match="some parameters appear in more than one parameter group"):
        optimizer.add_param_group({"params": [matrix(), p]})
    assert described(optimizer) == before


@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8, torch.bool, torch.complex64])
def test_a_parameter_that_is_not_a_real_number(dtype):
    odd = nn.Parameter(torch.zeros(24, 40, dtype=dtype), requires_grad=False)
    with pytest.raises(ValueError, match=f"^parameters must be real floating point tensors, got {dtype}$"):
        GaLoreAdamW([matrix(), odd])


@pytest.mark.parametrize(
    ("params", "error", "message"),
    [
        ([], ValueError, "empty parameter list"),
        (["weight"], TypeError, "can only optimize Tensors"),
        ([{"params": [3]}], TypeError, "can only optimize Tensors"),
        ([{"params": {matrix()}}], TypeError, "ordered collections"),
        (matrix(), TypeError, "iterable of Tensors or dicts"),
        ([matrix() * 2], ValueError, "non-leaf"),
    ],
    ids=["empty", "string", "number", "set", "tensor", "non-leaf"],
)
def test_what_torch_refuses_is_still_refused_by_torch(params, error, message):
    with pytest.raises(error, match=message):
        GaLoreAdamW(params, rank=4)


# ---- layouts and gradients, at the step -----------------------------------------------------------------------------


def beside_a_sound_matrix(odd, **keys):
    """An optimizer of a sound matrix with a gradient and, behind it, the odd one."""
    sound = matrix()
    sound.grad = torch.ones_like(sound)
    return GaLoreAdamW([{"params": [sound], "rank": 4}, {"params": [odd], **keys}], weight_decay=0.1)


def assert_step_is_refused(optimizer, error, message):
    """Before any weight moves, those of the sound matrix included."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    before = [p.detach().clone() for p in parameters]
    with pytest.raises(error, match=message):
        optimizer.step()
    assert all(torch.equal(p, weight) for p, weight in zip(parameters, before, strict=True))


def test_a_tensor_distributed_over_two_dimensions():
    odd = matrix()
    odd.grad = torch.ones_like(odd)
    optimizer = beside_a_sound_matrix(odd, rank=4)
    odd.device_mesh, odd.placements = SimpleNamespace(ndim=2), ("Shard(0)", "Shard(1)")
    assert issubclass(UnsupportedLayout, RuntimeError)
    message = r"a DTensor placed as \('Shard\(0\)', 'Shard\(1\)'\) on a mesh of 2 dimension.*no tensor parallelism"
    assert_step_is_refused(optimizer, UnsupportedLayout, message)


def test_a_replicated_distributed_tensor():
    """Each process would update a share of it, and the replicas would part."""
    odd = matrix()
    odd.grad = torch.ones_like(odd)
    optimizer = beside_a_sound_matrix(odd, rank=4)
    odd.device_mesh = SimpleNamespace(ndim=1)
    odd.placements = (SimpleNamespace(is_shard=lambda dim: False, is_replicate=lambda: True),)
    assert_step_is_refused(optimizer, UnsupportedLayout, "a DTensor placed as .* on a mesh of 1 dimension")


def test_a_matrix_flattened_after_construction():
    """As an engine that is not DeepSpeed may do: its fragment would be projected as if it were the matrix."""
    odd = matrix()
    optimizer = beside_a_sound_matrix(odd, rank=4)
    odd.data = odd.data.flatten()[:100]
    odd.grad = torch.ones_like(odd)
    assert_step_is_refused(optimizer, UnsupportedLayout, r"shape \(24, 40\) .*shape \(100,\).*DeepSpeed")


def test_a_matrix_that_zero_init_left_empty():
    """zero.Init keeps the shape beside the parameter: taken at construction, refused at a step without its engine."""
    odd = nn.Parameter(torch.empty(0))
    odd.ds_shape = torch.Size((24, 40))
    odd.grad = torch.empty(0)
    assert_step_is_refused(beside_a_sound_matrix(odd, rank=4), UnsupportedLayout, r"shape \(24, 40\) .*DeepSpeed")


def test_a_vector_of_zero_init_is_no_matrix():
    odd = nn.Parameter(torch.empty(0))
    odd.ds_shape = torch.Size((24,))
    with pytest.raises(
        ValueError, match=r"rank=4 needs matrices, or experts \(E, m, n\), got a parameter of shape \(24,\)"
    ):
        GaLoreAdamW([odd], rank=4)


def test_a_flattened_parameter_without_a_rank_is_stepped():
    p = matrix()
    optimizer = GaLoreAdamW([p])
    p.data = p.data.flatten()
    p.grad = torch.ones_like(p)
    optimizer.step()
    assert optimizer.state[p]["exp_avg"].shape == (960,)


@pytest.mark.parametrize("keys", [{}, {"rank": 4}], ids=["plain", "projected"])
def test_sparse_gradients_are_refused(keys):
    odd = matrix()
    odd.grad = torch.ones_like(odd).to_sparse()
    optimizer = beside_a_sound_matrix(odd, **keys)
    assert_step_is_refused(optimizer, RuntimeError, r"GaLoreAdamW needs dense gradients.*sparse=False")


def test_a_sparse_embedding_is_refused():
    embedding = nn.Embedding(16, 12, sparse=True)
    embedding(torch.tensor([3])).sum().backward()
    with pytest.raises(RuntimeError, match="dense gradients"):
        GaLoreAdamW(embedding.parameters()).step()


def test_bad_defaults_are_refused_even_where_every_group_overrides_them():
    group = {"params": [torch.nn.Parameter(torch.randn(4, 4))], "lr": 1e-3, "rank": 2}
    for keys in ({"lr": -1.0}, {"rank": 0}):
        with pytest.raises(ValueError, match=next(iter(keys))):
            GaLoreAdamW([dict(group)], **keys)
