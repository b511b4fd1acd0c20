"""What the optimizer remembers: its form, its size, and that it survives every way of saving it."""

import copy
import pickle
import re

import pytest
import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

from gracile.optim import GaLoreAdamW, GaLoreAdamW8bit, state_bytes
from gracile.optim.memory import adamw_state_bytes

SHAPES = {"tall": (20, 12), "wide": (12, 20), "square": (16, 16)}
RANK, GAP = 4, 5

by_shape = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
by_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])


# ---- helpers --------------------------------------------------------------------------------------------------------


def parameters(shape=(20, 12), dtype=torch.float32):
    """A matrix to project, a plain matrix and a vector."""
    generator = torch.Generator().manual_seed(0)
    sizes = (shape, (7, 9), (20,))
    return [nn.Parameter((0.02 * torch.randn(s, generator=generator)).to(dtype)) for s in sizes]


def clones(originals):
    return [nn.Parameter(p.detach().clone()) for p in originals]


def optimizer_for(matrix, plain, vector, **keys):
    ranked = {"params": [matrix], "rank": RANK, "update_proj_gap": GAP, "scale": 0.5, "weight_decay": 0.1} | keys
    return GaLoreAdamW([ranked, {"params": [plain, vector]}], lr=0.01)


def held_by(optimizer):
    return [p for group in optimizer.param_groups for p in group["params"]]


def advance(optimizer, first, last):
    """Steps ``first`` to ``last - 1``, each with a gradient that only depends on its number."""
    for t in range(first, last):
        generator = torch.Generator().manual_seed(1000 + t)
        for p in held_by(optimizer):
            p.grad = torch.randn(p.shape, generator=generator).to(p.dtype)
        optimizer.step()


def tensors_of(optimizer):
    """Weights and state as one list, in a fixed order."""
    held = held_by(optimizer)
    return [p.detach() for p in held] + [v for p in held for _, v in sorted(optimizer.state.get(p, {}).items())]


def assert_identical(left, right):
    """Every weight and every tensor of the state, to the bit and in dtype."""
    pairs = list(zip(tensors_of(left), tensors_of(right), strict=True))
    assert len(pairs) > 3
    for a, b in pairs:
        assert a.dtype == b.dtype
        assert torch.equal(a, b)


def snapshot(optimizer):
    """A deep copy of all that a refused load must leave alone."""
    return (
        [p.detach().clone() for p in held_by(optimizer)],
        [{k: v.clone() for k, v in optimizer.state[p].items()} for p in held_by(optimizer)],
        [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups],
    )


def assert_unchanged(optimizer, before):
    weights, states, groups = before
    assert all(torch.equal(p, w) for p, w in zip(held_by(optimizer), weights, strict=True))
    for p, state in zip(held_by(optimizer), states, strict=True):
        assert optimizer.state[p].keys() == state.keys()
        assert all(torch.equal(optimizer.state[p][k], v) for k, v in state.items())
    assert [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups] == groups


def through_a_file(state_dict, path):
    torch.save(state_dict, path)
    return torch.load(path, weights_only=True)


# ---- its form -------------------------------------------------------------------------------------------------------


@by_shape
def test_state_holds_tensors_only_under_flat_word_keys(shape):
    optimizer = optimizer_for(*parameters(shape))
    advance(optimizer, 0, 2)
    matrix, plain, vector = (optimizer.state[p] for p in held_by(optimizer))
    assert set(matrix) == {"step", "basis", "exp_avg", "exp_avg_sq"}
    assert set(plain) == set(vector) == {"step", "exp_avg", "exp_avg_sq"}
    for state in (matrix, plain, vector):
        assert all(type(value) is torch.Tensor for value in state.values())
        assert all(re.fullmatch("[a-z_]+", key) for key in state)
        assert not any(value.requires_grad for value in state.values())


def test_no_tensor_of_the_state_is_a_view_into_something_larger():
    """Saving a view saves all of its storage."""
    optimizer = optimizer_for(*parameters())
    advance(optimizer, 0, 2)
    for state in optimizer.state.values():
        for value in state.values():
            assert value.untyped_storage().nbytes() == value.numel() * value.element_size()


def test_state_is_born_for_unused_parameters_and_not_for_frozen_ones():
    """So that all processes of a run save the same keys."""
    matrix, unused, frozen = parameters()
    frozen.requires_grad_(False)
    optimizer = optimizer_for(matrix, unused, frozen)
    assert not optimizer.state
    matrix.grad = torch.ones_like(matrix)
    optimizer.step()
    assert set(optimizer.state[unused]) == {"step", "exp_avg", "exp_avg_sq"}
    assert optimizer.state[unused]["step"] == 0
    assert frozen not in optimizer.state
    assert set(optimizer.state_dict()["state"]) == {0, 1}


def test_an_unused_matrix_has_an_orthonormal_subspace_from_the_start():
    matrix, plain, vector = parameters()
    optimizer = optimizer_for(matrix, plain, vector)
    plain.grad = torch.ones_like(plain)
    optimizer.step()
    P = optimizer.state[matrix]["basis"]
    assert torch.equal(P.t() @ P, torch.eye(RANK))


def test_state_made_by_a_step_of_zeros_is_that_of_no_step():
    """torch.distributed.checkpoint asks for state before the first step, and makes it so."""
    net = nn.Linear(20, 12)
    groups = [{"params": [net.weight], "rank": RANK, "update_proj_gap": GAP}, {"params": [net.bias]}]
    optimizer = GaLoreAdamW(groups, lr=0.01)
    untouched = copy.deepcopy(net)
    state = get_optimizer_state_dict(net, optimizer)["state"]
    assert set(state["weight"]) == {"step", "basis", "exp_avg", "exp_avg_sq"}
    assert all(held["step"] == 0 for held in state.values())
    advance(optimizer, 0, 3)
    other = GaLoreAdamW([{**g, "params": [p]} for g, p in zip(groups, untouched.parameters(), strict=True)], lr=0.01)
    advance(other, 0, 3)
    assert_identical(optimizer, other)


def test_a_step_without_learning_rate_counts_where_there_are_gradients():
    """Warmup begins at zero."""
    optimizer = optimizer_for(*parameters())
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    advance(optimizer, 0, 1)
    assert all(state["step"] == 1 and state["exp_avg"].any() for state in optimizer.state.values())


def test_a_parameter_unfrozen_later_gets_its_state_then():
    matrix, plain, vector = parameters()
    matrix.requires_grad_(False)
    optimizer = optimizer_for(matrix, plain, vector)
    plain.grad = torch.ones_like(plain)
    optimizer.step()
    assert matrix not in optimizer.state
    matrix.requires_grad_(True)
    advance(optimizer, 0, 1)
    assert optimizer.state[matrix]["step"] == 1
    assert optimizer.state[plain]["step"] == 2


# ---- its size -------------------------------------------------------------------------------------------------------


@by_shape
def test_bytes_are_those_of_the_formula(shape):
    """r * short for the basis, 2 * r * long for the moments, all fp32, and a counter of 4 bytes."""
    matrix = parameters(shape)[0]
    optimizer = GaLoreAdamW([matrix], rank=RANK)
    matrix.grad = torch.ones_like(matrix)
    optimizer.step()
    expected = 4 * (RANK * min(shape) + 2 * RANK * max(shape)) + 4
    assert state_bytes(optimizer) == expected
    assert expected < adamw_state_bytes([matrix]) / 2


@by_shape
@pytest.mark.parametrize(("state_dtype", "size"), [(None, 4), (torch.bfloat16, 2)])
def test_bytes_of_a_bf16_matrix(shape, state_dtype, size):
    """The basis has the dtype of the parameter, the moments their own."""
    matrix = parameters(shape, torch.bfloat16)[0]
    optimizer = GaLoreAdamW([matrix], rank=RANK, state_dtype=state_dtype)
    matrix.grad = torch.ones_like(matrix)
    optimizer.step()
    assert state_bytes(optimizer) == 2 * RANK * min(shape) + size * 2 * RANK * max(shape) + 4


def test_reverse_std_pays_for_the_longer_side():
    matrix = parameters((20, 12))[0]
    optimizer = GaLoreAdamW([matrix], rank=RANK, proj_type="reverse_std")
    matrix.grad = torch.ones_like(matrix)
    optimizer.step()
    assert state_bytes(optimizer) == 4 * (RANK * 20 + 2 * RANK * 12) + 4


def test_a_group_without_a_rank_pays_what_adamw_pays():
    ours = parameters()
    optimizer = GaLoreAdamW(ours)
    advance(optimizer, 0, 1)
    assert state_bytes(optimizer) == adamw_state_bytes(ours)


@by_dtype
def test_the_bytes_told_for_adamw_are_those_of_torch_adamw(dtype):
    held = parameters(dtype=dtype)
    optimizer = torch.optim.AdamW(held)
    assert state_bytes(optimizer) == 0
    advance(optimizer, 0, 1)
    assert adamw_state_bytes(held) == state_bytes(optimizer) > 0


# ---- saving and loading ---------------------------------------------------------------------------------------------


@by_shape
@by_dtype
@pytest.mark.parametrize("state_dtype", [None, torch.bfloat16], ids=["default", "bf16-moments"])
def test_training_continues_to_the_bit_after_a_file(shape, dtype, state_dtype, tmp_path):
    """Saved at step 7, between the refreshes at 5 and 10; continued over the one at 10."""
    undisturbed = optimizer_for(*parameters(shape, dtype), state_dtype=state_dtype)
    advance(undisturbed, 0, 7)
    saved = through_a_file(undisturbed.state_dict(), tmp_path / "optimizer.pt")
    resumed = optimizer_for(*clones(held_by(undisturbed)), state_dtype=state_dtype)
    resumed.load_state_dict(saved)
    assert_identical(resumed, undisturbed)
    for t in range(7, 13):
        advance(undisturbed, t, t + 1)
        advance(resumed, t, t + 1)
        assert_identical(resumed, undisturbed)


def test_the_file_holds_every_tensor_and_number(tmp_path):
    optimizer = optimizer_for(*parameters())
    advance(optimizer, 0, 7)
    state_dict = optimizer.state_dict()
    loaded = through_a_file(state_dict, tmp_path / "optimizer.pt")
    assert loaded["param_groups"] == state_dict["param_groups"]
    assert loaded["state"].keys() == {0, 1, 2}
    for number, state in state_dict["state"].items():
        assert loaded["state"][number].keys() == state.keys()
        assert all(torch.equal(loaded["state"][number][k], v) for k, v in state.items())


def test_loading_keeps_every_dtype():
    """torch would cast the fp32 moments of a bf16 parameter to bf16."""
    source = optimizer_for(*parameters(dtype=torch.bfloat16))
    advance(source, 0, 3)
    target = optimizer_for(*clones(held_by(source)))
    target.load_state_dict(source.state_dict())
    state = target.state[held_by(target)[0]]
    assert {k: v.dtype for k, v in state.items()} == {
        "step": torch.float32,
        "basis": torch.bfloat16,
        "exp_avg": torch.float32,
        "exp_avg_sq": torch.float32,
    }
    assert_identical(target, source)


def test_the_loaded_optimizer_and_the_dict_share_nothing():
    source = optimizer_for(*parameters())
    advance(source, 0, 7)
    saved = copy.deepcopy(source.state_dict())
    kept = copy.deepcopy(saved)
    target = optimizer_for(*clones(held_by(source)))
    target.load_state_dict(saved)
    advance(target, 7, 12)
    target.param_groups[0]["lr"] = 5.0
    assert saved["param_groups"] == kept["param_groups"]
    for number, state in kept["state"].items():
        assert saved["state"][number].keys() == state.keys()
        assert all(torch.equal(saved["state"][number][k], v) for k, v in state.items())


def test_a_state_that_is_assigned_is_not_copied_and_goes_on_to_the_bit():
    source = optimizer_for(*parameters())
    advance(source, 0, 7)
    saved = copy.deepcopy(source.state_dict())
    big = torch.zeros(2, *saved["state"][0]["exp_avg"].shape)
    big[1] = saved["state"][0]["exp_avg"]
    saved["state"][0]["exp_avg"] = big[1]  # of which only a part would be used
    places = {(i, key): value.data_ptr() for i, state in saved["state"].items() for key, value in state.items()}
    target = optimizer_for(*clones(held_by(source)))
    target.load_state_dict(saved, assign=True)
    held = [target.state[p] for p in held_by(target)]
    shared = {place for place, at in places.items() if held[place[0]][place[1]].data_ptr() == at}
    assert places.keys() - shared == {(0, "exp_avg")}
    advance(source, 7, 12)
    advance(target, 7, 12)
    assert_identical(target, source)


def test_two_optimizers_loaded_from_one_dict_go_their_own_ways():
    source = optimizer_for(*parameters())
    advance(source, 0, 7)
    state_dict = source.state_dict()
    first, second = (optimizer_for(*clones(held_by(source))) for _ in range(2))
    first.load_state_dict(state_dict)
    second.load_state_dict(state_dict)
    advance(first, 7, 12)
    assert_identical(second, source)
    advance(second, 7, 12)
    assert_identical(second, first)


def test_loading_replaces_what_was_there_before():
    source, target = optimizer_for(*parameters()), optimizer_for(*parameters())
    advance(target, 0, 3)
    target.load_state_dict(source.state_dict())  # of an optimizer that never stepped
    assert not target.state
    advance(source, 0, 3)
    advance(target, 0, 3)
    target.load_state_dict(source.state_dict())
    assert held_by(target)[0] is not held_by(source)[0]
    assert torch.equal(target.state[held_by(target)[0]]["basis"], source.state[held_by(source)[0]]["basis"])


def test_the_saved_groups_count_also_their_rank():
    """As with torch: what was saved wins over what the constructor said."""
    source = optimizer_for(*parameters(), rank=4, scale=2.0)
    advance(source, 0, 7)
    target = optimizer_for(*clones(held_by(source)))
    target.load_state_dict(source.state_dict())
    assert target.param_groups[0]["rank"] == 4
    assert target.param_groups[0]["scale"] == 2.0
    advance(source, 7, 12)
    advance(target, 7, 12)
    assert_identical(target, source)


def test_a_rank_that_is_loaded_decides_what_is_held_in_8_bits():
    """Also in an optimizer that has stepped: 4 x 100 numbers are kept in fp32, 64 x 100 are not."""
    pytest.importorskip("bitsandbytes")
    W = nn.Parameter(0.02 * torch.randn(100, 70, generator=torch.Generator().manual_seed(0)))
    source = GaLoreAdamW8bit([W], rank=64)
    advance(source, 0, 2)
    target = GaLoreAdamW8bit(clones([W]), rank=4)
    advance(target, 0, 1)
    with torch.no_grad():
        held_by(target)[0].copy_(W)
    target.load_state_dict(source.state_dict())
    advance(source, 2, 4)
    advance(target, 2, 4)
    assert_identical(target, source)


def test_counters_stay_on_the_host_when_they_are_loaded():
    """Reading one would stop the device; the meta device stands for it here."""
    source = optimizer_for(*parameters())
    advance(source, 0, 2)
    target = optimizer_for(*(nn.Parameter(p.detach().to("meta")) for p in held_by(source)))
    target.load_state_dict(source.state_dict())
    for state in target.state.values():
        assert {key for key, value in state.items() if value.device.type == "cpu"} == {"step"}


def without(key):
    def change(state_dict):
        del state_dict["state"][0][key]

    return change


def resized(key, *shape):
    def change(state_dict):
        state_dict["state"][0][key] = torch.zeros(shape)

    return change


def extra_key(state_dict):
    state_dict["state"][0]["outside_norm"] = torch.zeros(())


def object_for_tensor(state_dict):
    state_dict["state"][0]["exp_avg"] = 7


def other_rank(state_dict):
    state_dict["param_groups"][0]["rank"] = RANK + 1


def other_side(state_dict):
    state_dict["param_groups"][0]["proj_type"] = "reverse_std"


def no_rank(state_dict):
    state_dict["param_groups"][0]["rank"] = None


def wrong_plain_moment(state_dict):
    state_dict["state"][2]["exp_avg"] = torch.zeros(21)


def swapped(state_dict):
    state = state_dict["state"]
    state[0], state[1] = state[1], state[0]


BAD_STATES = {
    "no basis": without("basis"),
    "no step": without("step"),
    "no second moment": without("exp_avg_sq"),
    "basis too wide": resized("basis", 12, RANK + 1),
    "basis on the other side": resized("basis", 20, RANK),
    "moments of the other side": resized("exp_avg", RANK, 12),
    "moments of full size": resized("exp_avg_sq", 20, 12),
    "step with a shape": resized("step", 1),
    "unknown key": extra_key,
    "a number where a tensor belongs": object_for_tensor,
    "a rank that does not fit": other_rank,
    "a side that does not fit": other_side,
    "projected state without a rank": no_rank,
    "a vector of another length": wrong_plain_moment,
    "states of two parameters exchanged": swapped,
}


@pytest.mark.parametrize("damage", BAD_STATES.values(), ids=BAD_STATES.keys())
def test_state_that_does_not_fit_is_refused_before_anything_changes(damage):
    source, target = optimizer_for(*parameters()), optimizer_for(*parameters())
    advance(source, 0, 7)
    advance(target, 0, 3)
    target.param_groups[0]["lr"] = 0.123
    saved = copy.deepcopy(source.state_dict())
    damage(saved)
    before = snapshot(target)
    with pytest.raises(ValueError, match=r"the saved state of parameter \d does not fit GaLoreAdamW"):
        target.load_state_dict(saved)
    assert_unchanged(target, before)
    target.load_state_dict(source.state_dict())  # and nothing is left behind that would refuse or damage a good one
    assert torch.equal(target.state[held_by(target)[0]]["basis"], source.state[held_by(source)[0]]["basis"])


def test_the_refusal_names_parameter_and_shapes():
    source, target = optimizer_for(*parameters()), optimizer_for(*parameters())
    advance(source, 0, 1)
    saved = copy.deepcopy(source.state_dict())
    saved["state"][0]["basis"] = torch.zeros(5, 5)
    with pytest.raises(ValueError, match=r"parameter 0 .* shape \(20, 12\).*'basis': \(5, 5\).*'basis': \(12, 4\)"):
        target.load_state_dict(saved)


@pytest.mark.parametrize("count", [1, 3])
def test_another_number_of_groups_is_refused(count):
    matrix, plain, vector = parameters()
    source = GaLoreAdamW([{"params": [p]} for p in (matrix, plain, vector)][:count])
    advance(source, 0, 1)
    target = optimizer_for(*parameters())
    advance(target, 0, 2)
    before = snapshot(target)
    with pytest.raises(ValueError, match="parameter group"):
        target.load_state_dict(source.state_dict())
    assert_unchanged(target, before)


@pytest.mark.parametrize("key", ["state_dtype", "scale", "update_proj_gap", "proj_type"])
def test_a_key_that_was_not_saved_keeps_its_present_value(key):
    source = optimizer_for(*parameters())
    advance(source, 0, 3)
    saved = copy.deepcopy(source.state_dict())
    for group in saved["param_groups"]:
        del group[key]
    target = optimizer_for(*clones(held_by(source)))
    present = [group[key] for group in target.param_groups]
    target.load_state_dict(saved)
    assert [group[key] for group in target.param_groups] == present
    advance(target, 3, 5)


def test_the_state_of_torch_adamw_is_refused_and_the_rank_stays():
    W = torch.nn.Parameter(torch.randn(12, 8))
    dense = torch.optim.AdamW([W])
    W.grad = torch.randn(12, 8)
    dense.step()
    optimizer = GaLoreAdamW([{"params": [W], "rank": 2}])
    with pytest.raises(ValueError, match="does not fit GaLoreAdamW"):
        optimizer.load_state_dict(dense.state_dict())
    assert optimizer.param_groups[0]["rank"] == 2
    assert not optimizer.state


@pytest.mark.parametrize(("key", "value"), [("rank", -3), ("lr", "x"), ("proj_type", "up")])
def test_saved_groups_with_bad_values_are_refused(key, value):
    target = optimizer_for(*parameters())
    saved = copy.deepcopy(target.state_dict())
    saved["param_groups"][0][key] = value
    with pytest.raises(ValueError, match=key):
        target.load_state_dict(saved)
    assert target.param_groups[0][key] != value


def test_an_optimizer_pickled_before_a_key_existed_gets_the_default():
    source = optimizer_for(*parameters())
    del source.param_groups[0]["scale"]
    assert copy.deepcopy(source).param_groups[0]["scale"] == 0.25


# ---- hooks ----------------------------------------------------------------------------------------------------------


def test_hooks_of_the_user_see_the_state_and_run_once_a_load():
    source = optimizer_for(*parameters())
    advance(source, 0, 7)
    target = optimizer_for(*clones(held_by(source)))
    seen = []

    def before(optimizer, state_dict):
        seen.append(("before", optimizer is target, state_dict["state"][0]["basis"].shape))

    def after(optimizer):
        state = optimizer.state[held_by(optimizer)[0]]
        seen.append(("after", optimizer is target, state["basis"].shape, state["step"].item()))

    target.register_load_state_dict_pre_hook(before)
    target.register_load_state_dict_post_hook(after)
    target.register_load_state_dict_post_hook(after, prepend=True)
    for _ in range(2):
        target.load_state_dict(source.state_dict())
    once = [("before", True, (12, RANK)), ("after", True, (12, RANK), 7.0), ("after", True, (12, RANK), 7.0)]
    assert seen == once * 2
    advance(target, 7, 9)
    advance(source, 7, 9)
    assert_identical(target, source)


def test_a_hook_may_replace_the_state_that_is_loaded():
    source = optimizer_for(*parameters())
    advance(source, 0, 7)
    target = optimizer_for(*parameters())

    def rewind(_, state_dict):
        replaced = copy.deepcopy(state_dict)
        for state in replaced["state"].values():
            state["step"].fill_(3)
        return replaced

    target.register_load_state_dict_pre_hook(rewind)
    target.load_state_dict(source.state_dict())
    assert [target.state[p]["step"] for p in held_by(target)] == [3, 3, 3]
    assert [source.state[p]["step"] for p in held_by(source)] == [7, 7, 7]


def test_a_hook_may_change_the_state_that_was_loaded():
    source = optimizer_for(*parameters())
    advance(source, 0, 7)
    target = optimizer_for(*parameters())
    target.register_load_state_dict_post_hook(lambda o: o.state[held_by(o)[0]]["exp_avg"].zero_())
    target.load_state_dict(source.state_dict())
    assert not target.state[held_by(target)[0]]["exp_avg"].any()
    assert source.state[held_by(source)[0]]["exp_avg"].any()


# ---- copies ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "duplicate", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))], ids=["deepcopy", "pickle"]
)
@by_dtype
def test_a_copy_of_the_optimizer_continues_identically(duplicate, dtype):
    original = optimizer_for(*parameters(dtype=dtype))
    advance(original, 0, 7)
    twin = duplicate(original)
    assert held_by(twin)[0] is not held_by(original)[0]
    assert_identical(twin, original)
    advance(twin, 7, 12)
    assert not torch.equal(held_by(twin)[0], held_by(original)[0])
    advance(original, 7, 12)
    assert_identical(twin, original)


def test_a_copy_still_warns_and_loads():
    original = optimizer_for(*parameters())
    advance(original, 0, 5)
    twin = pickle.loads(pickle.dumps(original))
    twin.load_state_dict(original.state_dict())
    matrix = held_by(twin)[0]
    matrix.grad = torch.full_like(matrix, float("nan"))
    with pytest.warns(UserWarning, match="not finite"):
        twin.step()
