"""Checkpoints of galore-torch, apollo-torch and fira go on here with their arithmetic, or are refused."""

import builtins
import copy
import os
import pickle
import sys
import warnings

import apollo_torch
import bitsandbytes
import fira
import galore_torch
import pytest
import torch
from galore_torch.galore_projector import GaLoreProjector
from torch import nn
from transformers.optimization import Adafactor

from gracile import optim
from gracile.optim import full_state, load_full_state, read_published
from gracile.optim.published_file import PublishedProjector
from tests.helpers import held_by

SHAPES = [(20, 12), (12, 20), (16, 16), (9,)]  # tall, wide, square, and a vector without a rank
LARGE = [(160, 96), (96, 160), (128, 128), (9,)]  # whose 48 coordinates a line are more than 4096
RANK, GAP, SAVED, END = 4, 5, 7, 17  # refreshes at 0, 5, 10 and 15
GROUP = {"rank": RANK, "update_proj_gap": GAP, "scale": 0.25, "proj_type": "std", "weight_decay": 0.1}
APOLLO = {**GROUP, "scale": 4.0, "proj": "random", "scale_type": "channel"}
OF_FIRA = {"alpha" if key == "scale" else key: value for key, value in GROUP.items()}
FIXED = {"relative_step": False, "scale_parameter": False, "lr": 0.01}
EXACT = {"subspace_method": "svd"}


class Case:
    """A published class, ours, the keys of its group of matrices, and those of both constructors and of ours alone."""

    def __init__(self, theirs, ours, group, keys=None, own=None, shapes=SHAPES):
        self.theirs, self.ours, self.group, self.shapes = theirs, ours, group, shapes
        self.keys = {"lr": 0.01} if keys is None else keys
        self.own = EXACT if own is None else own
        self.in_8_bits = ours is optim.GaLoreAdamW8bit

    def parameters(self, dtype=torch.float32):
        generator = torch.Generator().manual_seed(0)
        return [nn.Parameter((0.1 * torch.randn(shape, generator=generator)).to(dtype)) for shape in self.shapes]

    def built(self, kind, held, group=None, **keys):
        """The vector's group comes first, so that no matrix has position 0."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            return kind(
                [{"params": held[3:], "weight_decay": 0.0}, {"params": held[:3], **(group or self.group)}],
                **{**self.keys, **keys},
            )

    def published(self, dtype=torch.float32, steps=SAVED):
        theirs = self.built(self.theirs, self.parameters(dtype))
        follow(theirs, 0, steps)
        return theirs

    def here(self, theirs=None, **keys):
        """Ours, on copies of the weights."""
        held = self.parameters() if theirs is None else [*held_by(theirs)[1:], held_by(theirs)[0]]
        return self.built(self.ours, [nn.Parameter(p.detach().clone()) for p in held], **{**self.own, **keys})


def follow(optimizer, begin, end):
    """Steps with gradients that depend on the step's number alone; sizes that change, as APOLLO's limiter minds."""
    for t in range(begin, end):
        generator = torch.Generator().manual_seed(100 + t)
        for p in held_by(optimizer):
            p.grad = ((1 + t % 3) * torch.randn(p.shape, generator=generator)).to(p.dtype)
        optimizer.step()


def difference(one, other):
    """The largest of a parameter, relative to its largest weight."""
    pairs = zip(held_by(one), held_by(other), strict=True)
    return max(((p - q).abs().max() / q.abs().max()).item() for p, q in pairs)


CASES = {
    "GaLore": Case(galore_torch.GaLoreAdamW, optim.GaLoreAdamW, GROUP),
    "GaLore reverse_std": Case(galore_torch.GaLoreAdamW, optim.GaLoreAdamW, {**GROUP, "proj_type": "reverse_std"}),
    "GaLore left": Case(galore_torch.GaLoreAdamW, optim.GaLoreAdamW, {**GROUP, "proj_type": "left"}),
    "GaLore right": Case(galore_torch.GaLoreAdamW, optim.GaLoreAdamW, {**GROUP, "proj_type": "right"}),
    "GaLore of apollo-torch": Case(apollo_torch.GaLoreAdamW, optim.GaLoreAdamW, GROUP),
    "Adafactor": Case(galore_torch.GaLoreAdafactor, optim.GaLoreAdafactor, GROUP, {}),
    "Adafactor with a moment": Case(
        galore_torch.GaLoreAdafactor, optim.GaLoreAdafactor, GROUP, {"beta1": 0.9, **FIXED}
    ),
    "8 bits": Case(
        galore_torch.GaLoreAdamW8bit, optim.GaLoreAdamW8bit, {**GROUP, "rank": 48}, {"lr": 0.01}, EXACT, LARGE
    ),
    "Fira": Case(fira.FiraAdamW, optim.FiraAdamW, OF_FIRA),
    "APOLLO": Case(apollo_torch.APOLLOAdamW, optim.APOLLOAdamW, APOLLO, None, {}),
    "APOLLO svd": Case(apollo_torch.APOLLOAdamW, optim.APOLLOAdamW, {**APOLLO, "proj": "svd"}, None, {}),
    "APOLLO front": Case(apollo_torch.APOLLOAdamW, optim.APOLLOAdamW, APOLLO, {"lr": 0.01, "scale_front": True}, {}),
    "APOLLO no limiter": Case(
        apollo_torch.APOLLOAdamW, optim.APOLLOAdamW, APOLLO, {"lr": 0.01, "disable_nl": True}, {}
    ),
    "APOLLO mini": Case(
        apollo_torch.APOLLOAdamW, optim.APOLLOAdamW, {**APOLLO, "rank": 1, "scale_type": "tensor"}, None, {}
    ),
}
PLAIN = [  # what a group without a rank stands for, too
    (Adafactor, optim.GaLoreAdafactor, (20, 12), {}),
    (bitsandbytes.optim.AdamW8bit, optim.GaLoreAdamW8bit, (64, 80), {"weight_decay": 0.0}),
]
by_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())


@pytest.fixture(autouse=True)
def no_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "synchronize", lambda *_: None)  # which their 8-bit class calls


@pytest.fixture(autouse=True)
def not_bounded():
    """What is said of moments in fp32 beside 8-bit ones, which one test is about."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "bitsandbytes took")
        yield


# ---- a run goes on --------------------------------------------------------------------------------------------------


@by_case
def test_a_run_goes_on_with_the_arithmetic_of_its_class(case):
    """Saved between the refreshes at 5 and 10, followed over those at 10 and 15; what is loaded shares nothing."""
    theirs = case.published()
    ours, fresh = case.here(theirs), case.here(theirs)
    ours.load_state_dict(theirs.state_dict())
    for t in range(SAVED, END):
        for one in (ours, fresh, theirs):
            follow(one, t, t + 1)
        assert difference(ours, theirs) <= 2e-6
    assert difference(fresh, theirs) > 1e-3
    keys = [key for key in case.group if key != "alpha"]
    assert [ours.param_groups[1][key] for key in keys] == [case.group[key] for key in keys]


@by_case
def test_in_bf16_it_goes_on_to_the_rounding_of_the_weights(case):
    """Moments are fp32 here; theirs are in the gradient's dtype."""
    theirs = case.published(torch.bfloat16)
    ours = case.here(theirs)
    ours.load_state_dict(theirs.state_dict())
    for p, q in zip(held_by(ours), held_by(theirs), strict=True):
        held, there = ours.state[p], theirs.state[q]
        for key in ("exp_avg", "exp_avg_sq", "exp_avg_sq_row"):
            if held.get(key, held["step"]).dtype != torch.uint8 and key in there:
                assert held[key].dtype == torch.float32
                assert torch.equal(held[key], there[key].float())
    follow(ours, SAVED, 12)
    follow(theirs, SAVED, 12)
    assert difference(ours, theirs) <= 4 * torch.finfo(torch.bfloat16).eps


def test_with_bf16_moments_galore_goes_on_to_the_bit():
    case = CASES["GaLore"]
    theirs = case.published(torch.bfloat16)
    ours = case.here(theirs, state_dtype=torch.bfloat16)
    ours.load_state_dict(theirs.state_dict())
    follow(ours, SAVED, END)
    follow(theirs, SAVED, END)
    assert difference(ours, theirs) == 0


def test_the_default_way_to_a_subspace_keeps_theirs_until_the_next_refresh():
    case = CASES["GaLore"]
    theirs = case.published()
    ours = case.here(theirs, subspace_method="iterate")
    ours.load_state_dict(theirs.state_dict())
    assert ours.param_groups[1]["subspace_method"] == "iterate"
    follow(ours, SAVED, 10)
    follow(theirs, SAVED, 10)
    assert difference(ours, theirs) == 0
    before = ours.state[held_by(ours)[1]]["basis"].clone()
    follow(ours, 10, 11)
    assert not torch.equal(before, ours.state[held_by(ours)[1]]["basis"])


@by_case
def test_what_was_loaded_is_saved_and_loaded_as_ever(case, tmp_path):
    """As the Trainer resumes: with ``weights_only=True``."""
    theirs = case.published()
    ours, again = case.here(theirs), case.here(theirs)
    ours.load_state_dict(theirs.state_dict())
    torch.save(ours.state_dict(), tmp_path / "optimizer.pt")
    again.load_state_dict(torch.load(tmp_path / "optimizer.pt", weights_only=True))
    follow(ours, SAVED, 12)
    follow(again, SAVED, 12)
    assert difference(again, ours) == 0
    assert {k: v.dtype for k, v in ours.state[held_by(ours)[1]].items()} == {
        k: v.dtype for k, v in trained(case).items()
    }


def trained(case):
    ours = case.here()
    follow(ours, 0, 1)
    return ours.state[held_by(ours)[1]]


@pytest.mark.parametrize(("theirs", "ours", "shape", "keys"), PLAIN, ids=["Adafactor", "AdamW8bit"])
def test_optimizers_that_the_plain_rule_stands_for_go_on(theirs, ours, shape, keys):
    one, other = (nn.Parameter(torch.linspace(-1, 1, shape[0] * shape[1]).view(shape)) for _ in range(2))
    published, here = theirs([one], **keys), ours([other], **keys)
    follow(published, 0, SAVED)
    with torch.no_grad():
        other.copy_(one)
    here.load_state_dict(published.state_dict())
    follow(published, SAVED, 12)
    follow(here, SAVED, 12)
    assert difference(here, published) <= 2e-6


def test_parameters_that_never_moved_have_no_state_yet():
    """APOLLO's have a seed before the first step, and it is ours."""
    case = CASES["APOLLO"]
    theirs = case.built(case.theirs, case.parameters())
    ours = case.here()
    ours.load_state_dict(theirs.state_dict())
    assert not ours.state
    follow(ours, 0, 12)
    follow(theirs, 0, 12)
    assert difference(ours, theirs) <= 2e-6
    other = case.here(seed=5)
    saved = case.built(case.theirs, case.parameters()).state_dict()
    with pytest.raises(ValueError, match=r"parameter 1, .*its first seed must be seed \+ position = 6, got 2"):
        other.load_state_dict(saved)


def test_a_bound_that_is_not_kept_is_said():
    case = CASES["8 bits"]
    theirs = case.published()
    with pytest.warns(UserWarning, match="bitsandbytes took galore-torch's percentile_clipping=100 for max_unorm=100"):
        case.here(theirs).load_state_dict(theirs.state_dict())


# ---- files ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def without_packages(monkeypatch):
    """As where they are not installed."""
    for name in list(sys.modules):
        if name.partition(".")[0] in ("galore_torch", "apollo_torch", "fira"):
            monkeypatch.setitem(sys.modules, name, None)


@by_case
@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_a_file_is_read_without_the_package_that_saved_it(case, zipped, tmp_path, request):
    """As their scripts write it: with a scheduler's state and a configuration beside the optimizer's."""
    theirs = case.published()
    schedule = torch.optim.lr_scheduler.LambdaLR(torch.optim.SGD([torch.ones(1)]), lambda step: 1.0)
    kept = {"optimizer": theirs.state_dict(), "scheduler": schedule.state_dict(), "config": {"lr": 0.01, "name": None}}
    torch.save(kept, tmp_path / "optimizer.pt", _use_new_zipfile_serialization=zipped)
    request.getfixturevalue("without_packages")
    with pytest.raises(ImportError):
        __import__("galore_torch")
    allowed = set(torch.serialization.get_safe_globals())
    saved = read_published(tmp_path / "optimizer.pt")
    assert set(torch.serialization.get_safe_globals()) == allowed
    assert saved["config"] == kept["config"]
    projectors = [state["projector"] for state in saved["optimizer"]["state"].values() if "projector" in state]
    assert [isinstance(projector, PublishedProjector) for projector in projectors] == [True] * 3
    ours = case.here(theirs)
    ours.load_state_dict(saved["optimizer"])
    follow(ours, SAVED, 12)
    follow(theirs, SAVED, 12)
    assert difference(ours, theirs) <= 2e-6


class Poison:
    """Runs when it is loaded."""

    def __init__(self, call, argument):
        self.call, self.argument = call, argument

    def __reduce__(self):
        return self.call, (self.argument,)


def in_a_projector(path, poison):
    projector = GaLoreProjector(4)
    projector.ortho_matrix = poison
    torch.save({"state": {0: {"projector": projector}}, "param_groups": []}, path)


def in_a_group(path, poison):
    torch.save({"state": {}, "param_groups": [{"params": [0], "lr": poison}]}, path)


def in_a_legacy_file(path, poison):
    torch.save({"state": poison}, path, _use_new_zipfile_serialization=False)


def alone(path, poison):
    path.write_bytes(pickle.dumps(poison, protocol=2))


@pytest.mark.parametrize("write", [in_a_projector, in_a_group, in_a_legacy_file, alone])
@pytest.mark.parametrize("call", [os.system, builtins.exec], ids=["system", "exec"])
def test_a_file_that_would_run_something_is_refused_and_nothing_runs(write, call, tmp_path):
    ran, path = tmp_path / "ran", tmp_path / "optimizer.pt"
    write(path, Poison(call, f"touch {ran}" if call is os.system else f"open({str(ran)!r}, 'w')"))
    with pytest.raises(ValueError, match=r"optimizer.pt holds an object of \S*(system|exec); of objects, ") as refused:
        read_published(path)
    assert "\n" not in str(refused.value)
    assert not ran.exists()


def test_what_stands_in_for_a_projector_cannot_be_called(tmp_path):
    """A file may call what it names; here that is a class without code, and other classes are refused by name."""
    saved = Poison(GaLoreProjector, 4)
    torch.save(saved, tmp_path / "called.pt")
    with pytest.raises(ValueError, match=r"called\.pt holds what is neither a tensor nor a number; of objects, only"):
        read_published(tmp_path / "called.pt")
    torch.save(nn.Linear(2, 2), tmp_path / "module.pt")
    with pytest.raises(
        ValueError, match=r"holds an object of torch\.nn\.modules\.linear\.Linear; of objects, only proj"
    ):
        read_published(tmp_path / "module.pt")


# ---- refused --------------------------------------------------------------------------------------------------------


def matrix_of(saved):
    return saved["state"][1]


def projector_of(saved):
    return matrix_of(saved)["projector"]


def in_projector(key, value):
    return lambda saved: vars(projector_of(saved)).__setitem__(key, value)


def in_state(key, value):
    return lambda saved: matrix_of(saved).__setitem__(key, value)


def in_codes(key, value):
    return lambda saved: matrix_of(saved)["__bnb_optimizer_quant_state__"].__setitem__(key, value)


def in_groups(key, value):
    return lambda saved: saved["param_groups"][1].__setitem__(key, value)


def without(key):
    return lambda saved: matrix_of(saved).__delitem__(key)


def not_clipped(saved):
    in_codes("gnorm_vec", torch.zeros(100))(saved)


def with_larger_blocks(saved):
    in_codes("absmax2", torch.ones(4))(saved)


REFUSED = {
    "no bias correction": ("GaLore", in_groups("correct_bias", False), "correct_bias must be True, got False"),
    "two matrices": ("GaLore", in_groups("proj_type", "full"), "proj_type must be one of std, .*, got 'full'"),
    "tensors": ("GaLore", in_groups("dim", 4), "dim must be 2, got 4: matrices are projected"),
    "Tucker factors": ("GaLore", in_projector("ortho_matrix", [torch.ones(2)]), "holds a list, not one matrix"),
    "no matrix yet": ("GaLore", in_projector("ortho_matrix", None), "holds a NoneType, not one matrix"),
    "another side": (
        "GaLore",
        in_projector("ortho_matrix", torch.ones(20, 4)),
        r"has a matrix of shape \(20, 4\), expected \(4, 12\)",
    ),
    "another gap": (
        "GaLore",
        in_projector("update_proj_gap", 200),
        "its projector has update_proj_gap=200, which counts; its group has 5",
    ),
    "another scale": ("Fira", in_projector("alpha", 1.0), "its projector has alpha=1.0, which counts; .* has 0.25"),
    "a projector that knows more": ("GaLore", in_projector("queue", []), "its projector has 'queue', which nobody"),
    "a projector from a seed": ("GaLore", in_projector("seed", 3), "draws its matrix from a seed, and here it comes"),
    "a text for a projector": ("GaLore", in_state("projector", "P"), "has no projector of galore-torch; it has exp_"),
    "an unknown key": ("GaLore", in_state("momentum", 0.9), "'momentum' would be ignored; it has exp_avg"),
    "half a step": ("GaLore", in_state("step", 7.5), "its step must be a whole number, got 7.5"),
    "no step": ("GaLore", without("step"), "it has no step; it has exp_avg, exp_avg_sq, projector"),
    "no moment": ("GaLore", without("exp_avg"), "it has nothing that 'exp_avg' could be; it has exp_avg_sq"),
    "moments of another rank": (
        "GaLore",
        in_state("exp_avg", torch.zeros(20, 5)),
        r"does not fit GaLoreAdamW .*'exp_avg': \(20, 5\)",
    ),
    "seeds that lead elsewhere": ("APOLLO", in_projector("seed", 3), "its projector's seed=3 does not follow from it"),
    "numbers of another device": (
        "APOLLO",
        in_projector("ortho_matrix", torch.ones(4, 12)),
        r"has other numbers than seed=\d+ draws on 'cpu'; load it on the kind of device",
    ),
    "no seed": ("APOLLO svd", without("seed"), "it has no 'seed', which matrices of apollo-torch have"),
    "larger blocks": ("8 bits", with_larger_blocks, "absmax2 must hold a scale for each block of 256 of 7680"),
    "another map": ("8 bits", in_codes("qmap1", torch.linspace(-1, 1, 256)), "qmap1 must be the dynamic map of bit"),
    "fp32 moments": ("8 bits", in_codes("state1", torch.zeros(160, 48)), "state1 of 7680 elements must be torch.uint8"),
    "clipped gradients": ("8 bits", not_clipped, "'gnorm_vec' would be ignored"),
    "AdEMAMix": ("8 bits", in_groups("alpha", 5.0), "alpha must be 0.0, got 5.0: there is no third moment"),
}


def forms(optimizer):
    groups = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
    held = [{k: v.clone() for k, v in optimizer.state[p].items()} for p in held_by(optimizer)]
    return groups, held


@pytest.mark.parametrize(("name", "damage", "told"), REFUSED.values(), ids=REFUSED.keys())
def test_what_would_not_go_on_is_refused_in_one_line_and_nothing_changes(name, damage, told):
    case = CASES[name]
    saved = copy.deepcopy(case.published().state_dict())
    ours = case.here()
    follow(ours, 0, 2)
    groups, states = forms(ours)
    damage(saved)
    with pytest.raises(ValueError, match=told) as refused:
        ours.load_state_dict(saved)
    assert "\n" not in str(refused.value)
    assert forms(ours)[0] == groups
    for state, before in zip(forms(ours)[1], states, strict=True):
        assert state.keys() == before.keys()
        assert all(torch.equal(state[key], before[key]) for key in before)


STRANGERS = {
    "GaLore into Fira": ("GaLore", "Fira", "its projector has no 'alpha', which those of fira have"),
    "Fira into GaLore": ("Fira", "GaLore", "its projector has no 'scale', which those of galore-torch have"),
    "APOLLO into GaLore": ("APOLLO", "GaLore", "'seed' would be ignored"),
    "Adafactor into GaLore": ("Adafactor", "GaLore", "it has nothing that 'exp_avg' could be"),
}


@pytest.mark.parametrize(("saved", "into", "told"), STRANGERS.values(), ids=STRANGERS.keys())
def test_the_state_of_another_method_is_refused(saved, into, told):
    kept = CASES[saved].published().state_dict()
    kept["param_groups"] = CASES[into].published(steps=0).state_dict()["param_groups"]  # so that no key of theirs tells
    with pytest.raises(ValueError, match=told):
        CASES[into].here().load_state_dict(kept)


def test_quant_and_classes_without_a_published_one_refuse():
    case = CASES["8 bits"]
    saved = case.published().state_dict()
    with pytest.raises(ValueError, match="its projector is not packed; load it with quant=False"):
        case.here(quant=True).load_state_dict(saved)
    with pytest.raises(ValueError, match="it has nothing that 'overlap' could be"):
        case.here(cos_threshold=0.5).load_state_dict(saved)
    case = CASES["GaLore"]
    lion = optim.GaLoreLion([{"params": case.parameters()[3:]}, {"params": case.parameters()[:3], **case.group}])
    saved = case.published().state_dict()
    for group in saved["param_groups"]:
        del group["eps"]
    with pytest.raises(ValueError, match="does not fit GaLoreLion"):
        lion.load_state_dict(saved)


# ---- whole state, for any layout ------------------------------------------------------------------------------------


@by_case
def test_load_full_state_takes_it_too(case):
    """Groups stay as they are here; tests/distributed/test_full_state.py has two processes."""
    theirs = case.published()
    ours, other = case.here(theirs), case.here(theirs)
    ours.load_state_dict(theirs.state_dict())
    load_full_state(other, theirs.state_dict())
    one, same = full_state(ours)["parameters"], full_state(other)["parameters"]
    assert one.keys() == same.keys() == {0, 1, 2, 3}
    for number, state in one.items():
        assert state.keys() == same[number].keys()
        for key, value in state.items():  # 8-bit moments are quantized again
            torch.testing.assert_close(same[number][key], value, rtol=0, atol=0.01 * case.in_8_bits * value.abs().max())


def test_load_full_state_refuses_what_load_state_dict_takes():
    case = CASES["GaLore"]
    ours = case.here()
    follow(ours, 0, 2)
    with pytest.raises(ValueError, match=r"a state_dict\(\) of GaLoreAdamW is loaded by load_state_dict"):
        load_full_state(ours, ours.state_dict())
    saved = case.published().state_dict()
    saved["param_groups"][1]["correct_bias"] = False
    with pytest.raises(ValueError, match="correct_bias must be True"):
        load_full_state(ours, saved)
    saved["param_groups"][1]["correct_bias"] = True
    with pytest.raises(ValueError, match="its projector has update_proj_gap=5, which counts; its group has 50"):
        load_full_state(case.built(case.ours, case.parameters(), {**GROUP, "update_proj_gap": 50}), saved)
