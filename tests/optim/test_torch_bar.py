"""What torch asks of its own optimizers (test/test_optim.py over common_optimizers), asked of every class here.

Not asked: complex and sparse gradients, which are refused; ``foreach``, ``fused`` and ``differentiable`` against the
plain loop, for there is no other; several GPUs in one process. Asked elsewhere: bad values (test_validation.py),
``capturable`` (core/test_capture.py), resumption, dtypes that survive loading, pickles (test_every_class.py,
test_drop_in.py).
"""

import copy
import io
import warnings

import pytest
import torch
import torch._dynamo.testing
from catalogue import VARIANTS
from torch import nn

from gracile import optim
from gracile.models.convert import convert
from gracile.optim import param_groups
from tests.optim.test_every_class import CLASSES, METHODS, Method, give_gradients, held_by, mixed

CLASSES = {cls.__name__: method for cls, method in CLASSES.items()}
CLASSES |= {name: METHODS[name] for name in ("GaLoreAdamW svd", "APOLLOAdamW svd") if name in METHODS}
by_class = pytest.mark.parametrize("method", CLASSES.values(), ids=CLASSES.keys())
FACTORED = {
    name: VARIANTS[name] for name in ("SLTrainAdamW", "SLTrainAdamW8bit", "SSTAdamW", "ReLoRAAdamW")
}  # of layers


def with_keys(method, **keys):
    return Method(method.cls, {**method.keys, **keys}, method.ranked)


def train(optimizer, steps, sign=1):
    for t in range(steps):
        give_gradients(held_by(optimizer), t)
        for p in held_by(optimizer):
            p.grad.mul_(sign)
        optimizer.step()
    return [p.detach().clone() for p in held_by(optimizer)]


def assert_equal(one, other):
    for a, b in zip(one, other, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


def layered(name, **keys):
    """A model of such layers and its optimizer, with gradients to give."""
    variant = VARIANTS[name]
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(24, 16), nn.Tanh(), nn.Linear(16, 12))
    convert(model, variant.layer.cls, ["0", "2"], **{"rank": 4, **variant.layer.keys})
    return variant.cls(param_groups(model), **{**variant.cells.keys, **keys})


# ---- maximize -------------------------------------------------------------------------------------------------------


@by_class
def test_to_maximize_is_to_minimize_the_opposite(method):
    """To the bit, gradients are left as they were, and the key is saved."""
    up, down = mixed(with_keys(method, maximize=True)), mixed(method)
    start = [p.detach().clone() for p in held_by(down)]
    ends = train(up, 6), train(down, 6, sign=-1)
    assert_equal(*ends)
    assert all(not torch.equal(a, b) for a, b in zip(start, ends[0], strict=True))
    assert all(torch.equal(p.grad, -q.grad) for p, q in zip(held_by(up), held_by(down), strict=True))
    other = mixed(method)
    other.load_state_dict(up.state_dict())
    assert all(group["maximize"] for group in other.param_groups)


@pytest.mark.parametrize("name", FACTORED)
def test_so_it_is_for_layers(name):
    assert_equal(train(layered(name, maximize=True), 4), train(layered(name), 4, sign=-1))


def test_a_checkpoint_of_adamw_goes_on_in_its_direction():
    """A group without a rank is AdamW: its state fits, and maximize is honoured."""
    one, other = (nn.Parameter(torch.linspace(-1, 1, 12).view(4, 3)) for _ in range(2))
    theirs, ours = torch.optim.AdamW([one], lr=0.1, maximize=True), optim.SETAdamW([other], lr=0.1)
    for t in range(4):
        if t == 2:
            with torch.no_grad():
                other.copy_(one)
            ours.load_state_dict(theirs.state_dict())
        one.grad = other.grad = torch.randn(4, 3, generator=torch.Generator().manual_seed(t))
        theirs.step()
        if t >= 2:
            ours.step()
    torch.testing.assert_close(other, one, rtol=0, atol=1e-6)
    amsgrad = torch.optim.AdamW([one], amsgrad=True)
    with pytest.raises(ValueError, match="amsgrad must be False, got True: no maximum of second moments is kept"):
        ours.load_state_dict(amsgrad.state_dict())


# ---- tensors for numbers --------------------------------------------------------------------------------------------


@by_class
@pytest.mark.parametrize("shape", [(), (1,)], ids=["scalar", "one element"])
def test_a_tensor_learning_rate(method, shape):
    """In the constructor, set in a group, and loaded: each as the number in it."""
    lr = torch.tensor(method.keys["lr"], dtype=torch.float64)
    given, plain = mixed(with_keys(method, lr=lr.view(shape).clone())), mixed(method)
    assert all(group["lr"].shape == shape for group in given.param_groups)
    assert_equal(train(given, 5), train(plain, 5))
    assert torch.equal(lr, given.param_groups[0]["lr"].view(()))

    later = mixed(method)
    for group in later.param_groups:
        group["lr"] = lr.view(shape).clone()
    assert_equal(train(later, 5), held_by(plain))

    loaded = mixed(method)
    loaded.load_state_dict(given.state_dict())
    assert all(isinstance(group["lr"], torch.Tensor) for group in loaded.param_groups)
    with torch.no_grad():
        for p, q in zip(held_by(loaded), held_by(given), strict=True):
            p.copy_(q)
    assert_equal(train(loaded, 3), train(given, 3))


@by_class
def test_a_scheduler_fills_a_tensor_learning_rate(method):
    given = mixed(with_keys(method, lr=torch.tensor(method.keys["lr"], dtype=torch.float64)))
    plain = mixed(method)
    schedules = [torch.optim.lr_scheduler.ExponentialLR(one, 0.5) for one in (given, plain)]
    rate = given.param_groups[0]["lr"]
    for _ in range(3):
        assert_equal(train(given, 1), train(plain, 1))
        for schedule in schedules:
            schedule.step()
    assert given.param_groups[0]["lr"] is rate
    assert rate.item() == pytest.approx(method.keys["lr"] / 8)


@by_class
def test_tensor_betas(method):
    betas = mixed(method).defaults.get("betas")
    if betas is None:
        with pytest.raises(TypeError, match="betas"):
            mixed(with_keys(method, betas=(0.9, 0.99)))
        return
    given = mixed(with_keys(method, betas=tuple(torch.tensor(beta, dtype=torch.float64) for beta in betas)))
    assert_equal(train(given, 5), train(mixed(method), 5))


# ---- keywords and keys ----------------------------------------------------------------------------------------------

NEUTRAL = {"foreach": None, "fused": False, "capturable": False, "differentiable": False, "amsgrad": False}


@by_class
def test_keywords_of_torch_are_accepted_where_they_change_nothing(method):
    assert_equal(train(mixed(with_keys(method, **NEUTRAL)), 2), train(mixed(method), 2))
    told = r"^amsgrad must be False, got True: .*; foreach must be None or False, got True: "
    with pytest.raises(ValueError, match=told):
        mixed(with_keys(method, foreach=True, amsgrad=True))
    told = r"unexpected keyword argument 'adaptive' \(.*\), 'weight_decy' \(did you mean 'weight_decay'"
    with pytest.raises(TypeError, match=told):
        mixed(with_keys(method, weight_decy=0.1, adaptive=True))


@by_class
def test_keys_of_ones_own_are_kept_in_their_group_and_saved(method):
    """A learning rate's factor, a flag of SAM's, and what OneCycleLR writes."""
    keys = {"lr_scale": 0.5, "adaptive": True, "max_lr": 1.0, "min_lr": 0.1, "base_momentum": 0.8, "swa_lr": 0.1}
    optimizer = mixed(method)
    group = {**method.ranked, "params": [nn.Parameter(torch.randn(8, 12))], **keys}
    if "n" in group:
        group |= {"m": 4}
    optimizer.add_param_group(group)
    assert optimizer.param_groups[-1].items() >= keys.items()
    assert optimizer.state_dict()["param_groups"][-1].items() >= keys.items()
    train(optimizer, 2)
    type(optimizer)(optimizer.param_groups, **method.keys)


def test_slips_and_keys_of_other_classes_are_refused_all_at_once():
    slips = {"rnk": 2, "update_gap": 5, "sparsity": 0.5, "mine": 1, "scal": 2}
    group = {"params": [nn.Parameter(torch.ones(4, 3))], **slips}
    with pytest.raises(ValueError) as refused:
        optim.GaLoreAdamW([group])
    told = str(refused.value)
    assert "\n" not in told
    assert told.startswith(
        "unknown parameter group key 'rnk' = 2; did you mean 'rank'?; unknown parameter group key 's"
    )
    places = [told.index(f"key '{key}'") for key in ("rnk", "scal", "sparsity", "update_gap")]
    assert places == sorted(places)
    assert "mine" not in told
    with pytest.raises(ValueError, match=r"'alpha' = 0.5; a key of FiraAdamW"):
        optim.APOLLOAdamW([{"params": group["params"], "rank": 2, "alpha": 0.5}])


def test_keywords_of_published_classes_at_the_values_that_change_nothing():
    """What transformers and LLaMA-Factory forward, and their scripts' groups."""
    pytest.importorskip("bitsandbytes")
    p = [nn.Parameter(torch.ones(4, 3))]
    ranked = [{"params": p, "rank": 2, "dim": 2}]
    optim.GaLoreAdamW(ranked, no_deprecation_warning=True, correct_bias=True)
    optim.APOLLOAdamW(ranked, correct_bias=True)
    optim.FiraAdamW(ranked, no_deprecation_warning=False)
    keys = {"optim_bits": 8, "is_paged": False, "min_8bit_size": 4096, "percentile_clipping": 100, "block_wise": True}
    optim.GaLoreAdamW8bit(ranked, args=None, **keys)
    optim.Lion(p, use_triton=False, decoupled_weight_decay=False)
    off = {"quant": False, "quant_n_bit": 4, "quant_group_size": 256}
    for never in (None, 1, 1.0):  # APOLLO's script has 1 where it has no lazy refreshes
        off |= {"cos_threshold": never, "gamma_proj": 2, "queue_size": 5}
        optim.GaLoreAdamW([ranked[0] | off])
    for cls, given, told in (
        (optim.GaLoreAdamW, {"correct_bias": False}, "correct_bias must be True, got False: Adam's bias is corrected"),
        (optim.Lion, {"use_triton": True}, "use_triton must be False, got True: there is no Triton kernel"),
        (optim.GaLoreAdamW8bit, {"is_paged": True, "args": 1}, "args must be None, got 1: .*; is_paged must be False"),
    ):
        with pytest.raises(ValueError, match=told):
            cls(ranked if cls is not optim.Lion else p, **given)
    with pytest.raises(ValueError, match=r"dim must be 2, got 4: matrices are projected"):
        optim.GaLoreAdamW([ranked[0] | {"dim": 4}])
    with pytest.raises(
        ValueError, match=r"cos_threshold must be None or 1, got 0.4: GaLoreAdamW8bit has lazy refreshes"
    ):
        optim.GaLoreAdamW([ranked[0] | off | {"cos_threshold": 0.4}])


@pytest.mark.parametrize("cls", [optim.FiraAdamW, optim.GaLoreAdamW])
def test_alpha_is_taken_for_the_scale(cls):
    """As Fira's ``divide_params`` and its script write it, for both classes of its package."""
    held = [nn.Parameter(torch.ones(6, 4))]
    optimizer = cls([{"params": held, "rank": 2, "alpha": 0.5}])
    assert optimizer.param_groups[0]["scale"] == 0.5
    with pytest.raises(ValueError, match="alpha and scale are one key"):
        cls([{"params": held, "rank": 2, "alpha": 0.5, "scale": 0.25}])


# ---- devices and shapes ---------------------------------------------------------------------------------------------


@by_class
def test_the_default_device_has_no_say(method):
    """As ``torch.set_default_device`` sets it: everything is where its parameter is, or on the CPU."""
    expected = train(mixed(method), 5)
    made = mixed(method)
    with torch.device("meta"):
        for t in range(5):
            with torch.device("cpu"):
                give_gradients(held_by(made), t)
            made.step()
        saved = made.state_dict()
        made.load_state_dict(saved)
    assert_equal(held_by(made), expected)
    assert {v.device.type for state in made.state.values() for v in state.values()} == {"cpu"}


@by_class
def test_weights_that_are_not_contiguous(method):
    """They move as contiguous ones do, or are refused when they are given."""
    shapes = [(20, 12), (12, 20), (16,)]
    generator = torch.Generator().manual_seed(0)
    plain = [nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes]
    strided = [nn.Parameter(p.detach().t().contiguous().t()) for p in plain[:2]]
    strided.append(nn.Parameter(torch.empty(2 * 16)[::2].copy_(plain[2])))
    assert not any(p.is_contiguous() for p in strided)
    groups = [[{"params": held[:2], **method.ranked}, {"params": held[2:]}] for held in (plain, strided)]
    one = method.cls(groups[0], **method.keys)
    if {"sparsity", "keep"} & method.ranked.keys():
        with pytest.raises(ValueError, match=r"shape \(20, 12\) is not contiguous; a mask counts its places in memory"):
            method.cls(groups[1], **method.keys)
        return
    other = method.cls(groups[1], **method.keys)
    for a, b in zip(train(one, 6), train(other, 6), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@by_class
def test_nothing_happens_to_a_matrix_without_elements(method):
    """``nn.Linear(8, 0)``, in a group of matrices and beside it."""
    optimizer = mixed(method)
    for shape in ((0, 8), (8, 0)):
        optimizer.add_param_group({"params": [nn.Parameter(torch.empty(shape))], **method.ranked})
    optimizer.add_param_group({"params": [nn.Parameter(torch.empty(0))]})
    others = train(optimizer, 6)[:-3]
    assert_equal(others, train(mixed(method), 6))
    again = mixed(method)
    for shape in ((0, 8), (8, 0)):
        again.add_param_group({"params": [nn.Parameter(torch.empty(shape))], **method.ranked})
    again.add_param_group({"params": [nn.Parameter(torch.empty(0))]})
    again.load_state_dict(optimizer.state_dict())


# ---- steps ----------------------------------------------------------------------------------------------------------


@by_class
def test_gradients_are_never_written_into(method):
    """Nor are they let go of."""
    optimizer = mixed(method)
    for t in range(6):
        give_gradients(held_by(optimizer), t)
        before = [(p.grad, p.grad.clone(), p.grad._version) for p in held_by(optimizer)]
        optimizer.step()
        for p, (held, values, version) in zip(held_by(optimizer), before, strict=True):
            assert p.grad is held
            assert held._version == version
            assert torch.equal(held, values)


@by_class
def test_a_step_without_gradients_changes_nothing(method):
    optimizer = mixed(method)
    before = [p.detach().clone() for p in held_by(optimizer)]
    optimizer.step()
    assert_equal(held_by(optimizer), before)


@by_class
def test_no_learning_rate_and_no_decay_move_nothing_at_all(method):
    """Not by a rounding either; what a mask leaves out is gone all the same."""
    optimizer = mixed(with_keys(method, lr=0.0, weight_decay=0.0))
    train(optimizer, 1)
    before = [p.detach().clone() for p in held_by(optimizer)]
    train(optimizer, 3)
    for p, was in zip(held_by(optimizer), before, strict=True):
        moved = p.detach() != was
        assert not (moved & (p.detach() != 0)).any()


@by_class
def test_steps_that_are_numbers_load(method):
    """Of states saved before torch kept steps in tensors."""
    optimizer, other = mixed(method), mixed(method)
    train(optimizer, 4)
    saved = copy.deepcopy(optimizer.state_dict())
    for number, state in enumerate(saved["state"].values()):
        state["step"] = (float if number % 2 else int)(state["step"])
    with torch.no_grad():
        for p, q in zip(held_by(other), held_by(optimizer), strict=True):
            p.copy_(q)
    other.load_state_dict(saved)
    assert all(isinstance(state["step"], torch.Tensor) for state in other.state.values())
    assert_equal(train(optimizer, 3), train(other, 3))


@by_class
def test_hooks_are_called_around_steps_and_loading(method):
    optimizer, called = mixed(method), []
    optimizer.register_step_pre_hook(lambda *_: called.append("before"))
    optimizer.register_step_post_hook(lambda *_: called.append("after"))
    train(optimizer, 1)
    assert called == ["before", "after"]
    optimizer.register_state_dict_post_hook(lambda _, saved: {**saved, "more": 1})
    saved = optimizer.state_dict()
    assert saved["more"] == 1
    other = mixed(method)
    other.register_load_state_dict_pre_hook(lambda _, saved: called.append("loading"))
    other.register_load_state_dict_post_hook(lambda _: called.append("loaded"))
    other.load_state_dict(saved)
    assert called[2:] == ["loading", "loaded"]


@by_class
def test_it_is_printed_copied_and_saved_with_weights_only(method):
    optimizer = mixed(method)
    train(optimizer, 2)
    assert repr(optimizer).startswith(f"{method.cls.__name__} (\nParameter Group 0\n")
    twin = copy.deepcopy(optimizer)
    public = {name for name in vars(optimizer) if not name.startswith("_")}
    assert public == {name for name in vars(twin) if not name.startswith("_")}
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    twin.load_state_dict(torch.load(file, weights_only=True))
    assert_equal(train(optimizer, 2), train(twin, 2))


@by_class
def test_plain_parameters_are_said_to_be_trained_by_the_plain_rule(method):
    """Once, at the first step; not where there is a group of matrices."""
    if method.cls.matrix_key is None:
        return
    held = [nn.Parameter(torch.ones(8, 6))]
    key = method.cls.matrix_key
    off = {} if key not in ("n", "role") else {key: None}
    optimizer = method.cls(held, **{**method.keys, **off})
    held[0].grad = torch.ones(8, 6)
    with pytest.warns(
        UserWarning, match=rf"was given no group of matrices, with a key '{key}', .*param_groups\(model, {key}="
    ):
        optimizer.step()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.step()
        train(mixed(method), 2)


@pytest.mark.parametrize("name", ["LDAdamW", "RigLAdamW", "SRSTEAdamW"])
def test_a_compiled_step_is_the_step(name):
    """It is kept out of the graph, where a graph would not hold all of its arithmetic (core/test_compiled.py)."""
    optimizer, plain = mixed(CLASSES[name]), mixed(CLASSES[name])
    counter = torch._dynamo.testing.CompileCounter()
    compiled = torch.compile(lambda: optimizer.step(), backend=counter)
    for t in range(5):
        for one, step in ((optimizer, compiled), (plain, plain.step)):
            give_gradients(held_by(one), t)
            step()
    assert_equal(held_by(optimizer), held_by(plain))
    assert counter.frame_count == 0
