"""torch.distributed.checkpoint in one process: every class, in every form that torch has, into objects that have made
no step. Over processes: tests/distributed/test_checkpoint_forms.py.

Not among the forms: full and flattened at once, which torch saves and then does not load, AdamW's neither.
"""

from inspect import signature

import pytest
import torch
import torch.distributed.checkpoint as dcp
from catalogue import VARIANTS, one_of_each_state
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict

from gracile import optim
from gracile.models.convert import convert
from gracile.optim.sparse.layer_budgets import BY_SHAPE

SAVED, END = 7, 9  # refreshes and other masks at 4 and 8
SHAPES = ((12, 20), (20, 12), (8, 1100))  # the last has moments that 8 bits are for
OTHERS = ((64, 65), (20,))
FORMS = {
    "nested": StateDictOptions(),
    "flattened": StateDictOptions(flatten_optimizer_state_dict=True),
    "full": StateDictOptions(full_state_dict=True, cpu_offload=True),
}

# One of each class, and of each kind of state that is of shapes or keys of its own.
KEYS = {
    "SparseAdamW to a sparsity": ("SparseAdamW", {"initial_sparsity": 0.1, "sparsity": 0.7, "distribution": "erk"}),
    "RigLAdamW grown": ("RigLAdamW", {"grown_step": "own", "grown_warmup": 3}),
    "RigLAdamW by weight": ("RigLAdamW", {"distribution": "lamp"}),
    "SRigLAdamW ablated": ("SRigLAdamW", {"gamma_sal": 0.9, "sparsity": 0.6}),
    "SETAdamW in bf16": ("SETAdamW", {"state_dtype": torch.bfloat16}),
    "Lion upwards": ("Lion", {"maximize": True}),
}
CASES = [
    *{variant.cls: name for name, variant in reversed(VARIANTS.items())}.values(),
    "GaLoreAdamW8bit Q-GaLore",
    "DCTAdamW fed back in 8 bits",
    "APOLLOAdamW svd",
    *KEYS,
]
STATES = {*one_of_each_state(CASES[: -len(KEYS)]), *KEYS}
# Flattened asks for most: sizes of tensors and names of all that is held.
PAIRS = [
    pytest.param(name, form, marks=() if form == "flattened" or name in STATES else pytest.mark.thorough)
    for name in CASES
    for form in FORMS
]


class Matrices(nn.Module):
    def __init__(self):
        super().__init__()
        self.matrices = nn.ParameterList([0.3 * torch.randn(shape) for shape in SHAPES])
        self.others = nn.ParameterList([0.3 * torch.randn(shape) for shape in OTHERS])


def started(name, seed=0):
    """A model and its optimizer."""
    torch.manual_seed(seed)
    name, keys = KEYS.get(name, (name, {}))
    variant = VARIANTS[name]
    if variant.layer:
        return layered(variant, keys)
    model = Matrices()
    use = variant.quadratic or variant.cells._replace(matrices={"rank": 4, "proj": "svd", "update_proj_gap": 4})
    marks = use.matrices | keys if use.matrices else keys
    groups = [{"params": [p], **fitting(marks, p.shape)} for p in model.matrices]
    return model, variant.cls([*groups, {"params": list(model.others)}], **use.keys)


def fitting(marks, shape):
    return {"n": None} if "m" in marks and shape[1] % marks["m"] else marks


def layered(variant, keys):
    model = nn.Sequential(nn.Linear(24, 36), nn.Tanh(), nn.Linear(36, 12))
    ranked = {"rank": 4} if "rank" in signature(variant.layer.cls).parameters else {}
    convert(model, variant.layer.cls, ["0", "2"], **ranked, **variant.layer.keys)
    marks = variant.cells.matrices
    groups = optim.param_groups(model, None, "all-linear", **marks) if marks else optim.param_groups(model)
    return model, variant.cls(groups, **{"lr": 0.01, **variant.cells.keys, **keys})


def train(model, optimizer, first, last):
    """Gradients depend on the step's number alone, and have a part that stays."""
    for t in range(first, last):
        staying, noise = torch.Generator().manual_seed(7), torch.Generator().manual_seed(1000 + t)
        for p in model.parameters():
            if p.requires_grad:
                p.grad = 2 * torch.randn(p.shape, generator=staying) + torch.randn(p.shape, generator=noise)
        optimizer.step()
        optimizer.zero_grad()


def assert_same(one, other):
    """Weights, buffers and state to the bit, the state's strides too; groups."""
    (model, optimizer), (twin, its) = one, other
    for name, value in model.state_dict().items():
        assert torch.equal(value, twin.state_dict()[name]), name
    for (name, p), q in zip(model.named_parameters(), twin.parameters(), strict=True):
        ours, theirs = optimizer.state.get(p, {}), its.state.get(q, {})
        assert ours.keys() == theirs.keys(), name
        for key, value in ours.items():
            torch.testing.assert_close(theirs[key], value, rtol=0, atol=0, equal_nan=True, check_stride=True)
    for a, b in zip(optimizer.param_groups, its.param_groups, strict=True):
        assert plain(a) == plain(b)


def plain(group):
    return {k: list(v) if isinstance(v, tuple) else v for k, v in group.items() if k not in ("params", "param_names")}


def go_over(one, other, form, folder):
    """What one run is, into another."""
    options = FORMS[form]
    model, state = get_state_dict(*one, options=options)
    if form == "full":
        torch.save((model, state), folder / "full.pt")
        model, state = torch.load(folder / "full.pt", weights_only=True)
    else:
        writer = dcp.FileSystemWriter(folder, sync_files=False)
        dcp.save({"model": model, "optimizer": state}, storage_writer=writer)
        model, state = get_state_dict(*other, options=options)
        found = {"model": model, "optimizer": state}
        dcp.load(found, checkpoint_id=folder)
        model, state = found["model"], found["optimizer"]
    set_state_dict(*other, model_state_dict=model, optim_state_dict=state, options=options)


@pytest.mark.parametrize(("name", "form"), PAIRS)
def test_a_fresh_optimizer_takes_a_run_over_and_goes_on_to_the_bit(name, form, tmp_path):
    undisturbed, fresh = started(name), started(name, seed=1)
    train(*undisturbed, 0, SAVED)
    go_over(undisturbed, fresh, form, tmp_path)
    assert_same(undisturbed, fresh)
    train(*undisturbed, SAVED, END)
    train(*fresh, SAVED, END)
    assert_same(undisturbed, fresh)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", ["GaLoreAdamW8bit", "BlockSparseAdamW", "CastAdamS"])
def test_so_does_one_that_has_trained(name, form, tmp_path):
    undisturbed, other = started(name), started(name, seed=1)
    train(*undisturbed, 0, SAVED)
    train(*other, 0, 2)
    go_over(undisturbed, other, form, tmp_path)
    train(*undisturbed, SAVED, END)
    train(*other, SAVED, END)
    assert_same(undisturbed, other)


@pytest.mark.parametrize("name", [name for name in CASES if name != "AdamW"])
def test_the_step_that_makes_state_leaves_no_trace(name):
    """Also where weights come after it: a load that was broken off, or of the model alone. torch's own count it."""
    asked, untouched, source = started(name), started(name), started(name, seed=1)
    train(*source, 0, 1)
    before, random = [p.detach().clone() for p in asked[0].parameters()], torch.get_rng_state()
    rates = [group["lr"] for group in asked[1].param_groups]
    get_state_dict(*asked)
    assert torch.equal(torch.get_rng_state(), random)
    assert [group["lr"] for group in asked[1].param_groups] == rates
    assert all(p.grad is None and torch.equal(p, was) for p, was in zip(asked[0].parameters(), before, strict=True))
    for model, _ in (asked, untouched):
        model.load_state_dict(source[0].state_dict())
    train(*asked, 0, 2)
    train(*untouched, 0, 2)
    assert_same(untouched, asked)


def test_named_parameters_go_along(tmp_path):
    torch.manual_seed(0)
    models = nn.Linear(12, 8), nn.Linear(12, 8)
    runs = [(model, optim.Lion(model.named_parameters(), lr=0.1)) for model in models]
    train(*runs[0], 0, 2)
    go_over(*runs, "flattened", tmp_path)
    assert_same(*runs)


def test_what_is_saved_of_a_matrix_lies_where_it_is():
    """torch.distributed.checkpoint wants a full state on one device, but for single numbers; the meta device stands for
    a GPU here."""
    run = started("GaLoreAdamW8bit Q-GaLore")
    train(*run, 0, 2)
    target = started("GaLoreAdamW8bit Q-GaLore")[1]
    for group in target.param_groups:
        group["params"] = [nn.Parameter(p.detach().to("meta")) for p in group["params"]]
        target.register(group)
    target.load_state_dict(run[1].state_dict())
    states = target.state_dict()["state"].values()
    assert {value.device.type for state in states for value in state.values() if value.dim()} == {"meta"}
    assert {key for state in states for key, value in state.items() if value.device.type == "cpu"} > {"step"}


@pytest.mark.parametrize("distribution", BY_SHAPE)
def test_a_saved_mask_has_room_for_every_mask_of_a_ramp(distribution):
    """Shares are rounded together: those of a matrix do not fall with their sum."""
    keys = {"sparsity": 0.77, "initial_sparsity": 0.03, "t_end": 97, "update_every": 1}
    held = [nn.Parameter(torch.randn(m, n)) for m, n in ((7, 5), (5, 7), (3, 11), (13, 2), (9, 9), (4, 23))]
    optimizer = optim.SparseAdamW(held, distribution=distribution, **keys)
    (group,) = optimizer.param_groups
    most = {i: max(sum(optimizer.counts_at(group, step)[i]) for step in range(98)) for i in range(len(held))}
    for p in held:
        p.grad = torch.ones_like(p)
    optimizer.step()
    rooms = {i: len(state["indices"]) for i, state in optimizer.state_dict()["state"].items()}
    assert all(most[i] <= rooms[i] <= most[i] + 1 for i in most)


# ---- keys that came later -------------------------------------------------------------------------------------------


def test_a_group_holds_a_later_key_where_it_says_something():
    W = nn.Parameter(torch.zeros(3, 3))
    optimizer = optim.Lion([W])
    (group,) = optimizer.param_groups
    assert group["maximize"] is False
    assert "maximize" not in group
    group["maximize"] = True
    assert optimizer.state_dict()["param_groups"][0]["maximize"] is True
    group["maximize"] = False
    assert "maximize" not in optimizer.state_dict()["param_groups"][0]
    with pytest.raises(KeyError, match="maximise"):
        group["maximise"]
