"""What version 0.1.0 saved is loaded and gone on from, and its runs are computed again: ``make_checkpoints.py``.

Where this machine computes as the one that wrote the files does (``fingerprint``), every bit is compared; elsewhere
weights to 1e-5 of their norm, or to what a case says, and states by their keys, dtypes and shapes.
"""

import runpy
from inspect import isclass
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from gracile import optim

made = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("make_checkpoints.py"))))
CASES = {
    " ".join([name, variant]).strip(): (name, variant, case)
    for name, variants in made.CASES.items()
    for variant, case in variants.items()
}
by_case = pytest.mark.parametrize(("name", "variant", "case"), CASES.values(), ids=CASES)


@pytest.fixture(scope="module")
def exact():
    """Whether this machine's arithmetic is that of the one that wrote the files."""
    return made.read("about")["fingerprint"] == made.fingerprint()


@pytest.fixture(scope="module")
def record_of():
    """What was recorded of a case, each file read once. A test gets its own copy."""
    files = {}

    def read(name, variant):
        if name not in files:
            files.clear()
            files[name] = made.read(name)
        return made.copied(files[name][variant])

    return read


# Whose arithmetic is another since: what was saved loads to the bit, and runs are others.
CHANGED = {
    ("GaLoreAdamW8bit", "quant"): "its overlaps are corrected for chance, and measured from a random start",
    ("GaLoreAdamW8bit", "cos_threshold"): "as above",
}
SINCE = [
    ("maximize", False),
    ("reset_sigma", False),
    ("grown_step", "shared"),
    ("grown_warmup", 0),
]  # keys of groups that came later, at what they are by default


# ---- comparing ------------------------------------------------------------------------------------------------------


def assert_same_form(recorded, found, path=""):
    """Keys, dtypes and shapes, and whatever is no tensor."""
    assert type(found) is type(recorded), path
    if isinstance(recorded, torch.Tensor):
        assert (found.dtype, found.shape) == (recorded.dtype, recorded.shape), path
    elif isinstance(recorded, dict):
        if "params" in recorded:
            found = {key: value for key, value in found.items() if key in recorded or (key, value) not in SINCE}
        assert found.keys() == recorded.keys(), path
        for key, value in recorded.items():
            assert_same_form(value, found[key], f"{path}[{key!r}]")
    elif isinstance(recorded, (list, tuple)):
        assert len(found) == len(recorded), path
        for i, (one, other) in enumerate(zip(recorded, found, strict=True)):
            assert_same_form(one, other, f"{path}[{i}]")
    else:
        assert found == recorded, path


def as_then(recorded, found):
    """A state_dict as that version saved it: with masks just as long as they are, and with dtypes for their names."""
    found = {**found, "param_groups": [dict(group) for group in found["param_groups"]], "state": dict(found["state"])}
    for number, state in found["state"].items():
        if (then := recorded["state"].get(number, {})).get("indices") is not None:
            count = len(then["indices"])
            assert (state["indices"][count:] == 2**31 - 1).all()
            packed = [key for key, value in state.items() if value.shape == state["indices"].shape]
            found["state"][number] = state | {key: state[key][:count] for key in packed}
    for group in found["param_groups"]:
        if isinstance(group.get("state_dtype"), str):
            group["state_dtype"] = getattr(torch, group["state_dtype"].removeprefix("torch."))
    return found


def assert_same_bits(recorded, found):
    assert_same_form(recorded, found)
    one, other = tensors(recorded), tensors(found)
    different = [path for path, tensor in one.items() if not torch.equal(made.bits(tensor), made.bits(other[path]))]
    assert not different, different


def tensors(nested, path=""):
    """Those in nested mappings and lists, by their path."""
    if isinstance(nested, torch.Tensor):
        return {path: nested}
    pairs = nested.items() if isinstance(nested, dict) else enumerate(nested) if isinstance(nested, list) else ()
    return {key: tensor for name, value in pairs for key, tensor in tensors(value, f"{path}[{name!r}]").items()}


def assert_same_weights(recorded, found, exact, near=1e-5):
    """Of long tensors there is a digest and some elements."""
    if exact:
        assert_same_bits(recorded, found)
        return
    assert found.keys() == recorded.keys()
    for name, value in recorded.items():
        one, other = ((v["some"] if isinstance(v, dict) else v) for v in (value, found[name]))
        assert (other.dtype, other.shape) == (one.dtype, one.shape), name
        gap = torch.linalg.vector_norm(one.double() - other.double())
        assert gap <= near * torch.linalg.vector_norm(one.double()), name


# ---- optimizers -----------------------------------------------------------------------------------------------------


def assert_same_run(recorded, found, name, variant, case, exact):
    if (name, variant) not in CHANGED:
        assert_same_weights(recorded, made.short(found), exact, case.near)
        return
    assert recorded.keys() == found.keys()
    assert all(value.isfinite().all() for value in found.values())


def test_every_class_of_that_version_has_a_record():
    """And is still there."""
    recorded = {path.stem for path in made.DATA.glob("*.pt")} - {"about", "layers", "exported", "steps"}
    assert recorded == made.CASES.keys() | {"JaggedCosineLR"}
    assert recorded <= {name for name in optim.__all__ if isclass(getattr(optim, name))}


@by_case
def test_a_run_from_the_start_is_the_recorded_one(name, variant, case, record_of, exact):
    """Weights, state, the form of what is saved, and the groups; then the weights at the end."""
    record = record_of(name, variant)
    model, optimizer = made.at_save(case)
    found = made.saved_of(model, optimizer)
    saved = {key: record[key] for key in found}
    found["state_dict"] = as_then(saved["state_dict"], found["state_dict"])
    assert_same_run(made.short(saved.pop("weights")), found.pop("weights"), name, variant, case, exact)
    (assert_same_bits if exact and (name, variant) not in CHANGED else assert_same_form)(saved, found)
    assert_same_run(record["end"], made.go_on(model, optimizer, case), name, variant, case, exact)


@by_case
def test_a_recorded_checkpoint_goes_on(name, variant, case, record_of, exact):
    record = record_of(name, variant)
    model, optimizer = made.taken_over(case, record["weights"])
    optimizer.load_state_dict(record["state_dict"])
    saved = record_of(name, variant)["state_dict"]
    assert_same_bits(saved, as_then(saved, optimizer.state_dict()))
    assert_same_run(record["end"], made.go_on(model, optimizer, case), name, variant, case, exact)


@by_case
def test_a_recorded_full_state_goes_on(name, variant, case, record_of, exact):
    record = record_of(name, variant)
    model, optimizer = made.taken_over(case, record["weights"])
    optim.load_full_state(optimizer, record["full_state"])
    assert_same_run(record["end_from_full"], made.go_on(model, optimizer, case), name, variant, case, exact)


# ---- layers and schedules -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", made.LAYERS)
def test_a_layer_saves_and_computes_what_it_did(name, exact, record_of):
    """Made from the same linear layer, and loaded."""
    recorded = record_of("layers", name)
    fresh, loaded = made.layer_of(name), made.layer_of(name)
    with torch.no_grad():
        for p in loaded.parameters():
            p.add_(1)
    loaded.load_state_dict(recorded["weights"])
    for model in (fresh, loaded):
        found = made.layer_record(model)
        assert_same_form(recorded, found)
        for key in recorded:
            alike = [{"": d[key]} if key == "output" else d[key] for d in (recorded, found)]
            assert_same_weights(*alike, exact)


def test_the_schedule_is_the_recorded_one():
    recorded, found = made.read("JaggedCosineLR"), made.schedule_record()
    assert found["rates"] == pytest.approx(recorded["rates"], rel=1e-12)
    assert found["saved"].keys() == recorded["saved"].keys()
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.3)
    schedule = optim.JaggedCosineLR(optimizer, 20, 2, 6, restart_warmup_steps=3, min_ratio=0.2)
    schedule.load_state_dict(recorded["saved"])
    rates = []
    for _ in range(made.SAVED, 19):
        optimizer.step()
        schedule.step()
        rates.append(optimizer.param_groups[0]["lr"])
    assert rates == pytest.approx(recorded["rates"][made.SAVED + 1 :], rel=1e-12)


def test_an_exported_model_is_loaded_and_answers_as_it_did(exact, tmp_path):
    recorded, found = made.read("exported"), made.answers(made.unpack(made.EXPORTED, tmp_path))
    assert_same_bits(
        {key: recorded[key] for key in ("weights", "kinds")}, {key: found[key] for key in ("weights", "kinds")}
    )
    assert_same_weights({"logits": recorded["logits"]}, {"logits": found["logits"]}, exact)
