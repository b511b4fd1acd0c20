"""Deltas: what is stored, merged into the base and undone to the bit; other bases are refused."""

import copy

import pytest
import torch
from safetensors.torch import load_file
from selected_models import llama, train
from torch import nn

from gracile.optim import SparseAdamW
from gracile.selections import (
    S2FT,
    Entries,
    Rows,
    SaRA,
    load_delta,
    merge_delta,
    save_delta,
    selection_groups,
    undo_delta,
)
from gracile.selections.method import masked_group


def bits(model):
    return [p.detach().contiguous().view(torch.uint8) for p in model.parameters()]


def same(one, other):
    return all(torch.equal(a, b) for a, b in zip(bits(one), bits(other), strict=True))


def trained(groups_of, base):
    model = copy.deepcopy(base)
    groups = groups_of(model)
    make = SparseAdamW if "selected" in groups[0] else torch.optim.AdamW
    train(model, make(groups, lr=1e-2, weight_decay=0.1))
    return model


METHODS = {
    "s2ft": lambda model: S2FT(down_ratio=0.1, v_ratio=0.25).groups(model),
    "sara": lambda model: SaRA(share=0.1).groups(model),
    "hft": lambda model: selection_groups(model, "hft"),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", METHODS)
def test_merged_it_is_the_trained_model_and_undone_the_base(name, dtype, tmp_path):
    base = llama().to(dtype)
    model = trained(METHODS[name], base)
    saved = save_delta(model, base, tmp_path)
    merged = copy.deepcopy(base)
    merge_delta(merged, tmp_path)
    assert same(merged, model)
    assert not same(merged, base)
    undo_delta(merged, tmp_path)
    assert same(merged, base)
    changed = sum(int((a != b).sum()) for a, b in zip(model.parameters(), base.parameters(), strict=True))
    assert changed <= saved.count < 1.02 * changed


def test_the_file_has_rows_columns_or_places_and_no_more(tmp_path):
    base = llama(1)
    model = trained(lambda model: S2FT(down_ratio=0.25, v_ratio=0.5).groups(model), base)
    model.lm_head.weight.data[3, 5] += 1.0
    save_delta(model, base, tmp_path)
    held = load_file(tmp_path / "delta.safetensors")
    forms = {key.split(".")[-3] + "." + key.split(".")[-1]: value for key, value in held.items() if "values" not in key}
    assert forms["down_proj.columns"].dtype == torch.int32
    assert forms["v_proj.rows"].tolist() == sorted(forms["v_proj.rows"].tolist())
    assert forms["lm_head.indices"].tolist() == [3 * 32 + 5]
    assert held["lm_head.weight.values"].tolist() == [model.lm_head.weight[3, 5].item()]
    assert len(held) == 9
    assert load_delta(tmp_path).count == 12 * 32 + 8 * 32 + 1


def test_disjoint_deltas_commute(tmp_path):
    base = llama()
    small = lambda p: p.detach().abs() < 4e-3  # noqa: E731
    parts = {
        "small": lambda m: [masked_group({p: Entries(small(p)) for n, p in m.named_parameters() if "proj" in n})],
        "large": lambda m: [masked_group({p: Entries(~small(p)) for n, p in m.named_parameters() if "up_proj" in n})],
    }
    for name, groups_of in parts.items():
        save_delta(trained(groups_of, base), base, tmp_path / name)
    one, other = copy.deepcopy(base), copy.deepcopy(base)
    for name in ("small", "large"):
        merge_delta(one, tmp_path / name)
    for name in ("large", "small"):
        merge_delta(other, tmp_path / name)
    assert same(one, other)
    for name in ("small", "large"):  # in the other order than the last one merged
        undo_delta(one, tmp_path / name)
    assert same(one, base)


def test_signs_of_zero_and_what_is_no_number_are_told_apart_by_bits(tmp_path):
    base = {"w": torch.tensor([0.0, float("nan"), 1.0, float("inf")]), "same": torch.tensor([float("nan")])}
    model = {"w": torch.tensor([-0.0, float("nan"), 1.0, 2.0]), "same": torch.tensor([float("nan")])}
    assert save_delta(model, base, tmp_path).changes.keys() == {"w"}
    merged = {name: tensor.clone() for name, tensor in base.items()}
    merge_delta(merged, tmp_path)
    assert torch.equal(merged["w"].view(torch.int32), model["w"].view(torch.int32))
    undo_delta(merged, tmp_path)
    assert torch.equal(merged["w"].view(torch.int32), base["w"].view(torch.int32))


def test_tensors_that_are_not_contiguous_are_written_where_they_are(tmp_path):
    base = {"w": torch.arange(12.0).view(3, 4)}
    model = {"w": base["w"].clone()}
    model["w"][1, 2] = 50.0
    save_delta(model, base, tmp_path)
    merged = {"w": base["w"].t().contiguous().t()}
    merge_delta(merged, tmp_path)
    assert torch.equal(merged["w"], model["w"])


def test_other_bases_are_refused_before_anything_is_written(tmp_path):
    base = llama(1)
    model = trained(METHODS["sara"], base)
    save_delta(model, base, tmp_path)
    last = list(load_delta(tmp_path).changes)[-1]
    other = copy.deepcopy(base)
    change = load_delta(tmp_path).changes[last]
    with torch.no_grad():
        dict(other.named_parameters())[last].view(-1)[change.at[0]] += 1e-3
    before = copy.deepcopy(other)
    with pytest.raises(ValueError, match=f"^{last}: the delta was made of another base"):
        merge_delta(other, tmp_path)
    assert same(other, before)
    with pytest.raises(ValueError, match=r": this delta is merged already; undo it first$"):
        merge_delta(model, tmp_path)
    with pytest.raises(ValueError, match=r": this delta is not merged, or weights were trained since; merge it first$"):
        undo_delta(base, tmp_path)


def test_without_old_values_a_file_is_half_as_large_and_not_undone(tmp_path):
    base = llama()
    model = trained(METHODS["s2ft"], base)
    sizes = []
    for undo in (True, False):
        save_delta(model, base, tmp_path / str(undo), undo=undo)
        sizes.append((tmp_path / str(undo) / "delta.safetensors").stat().st_size)
    assert sizes[1] < 0.65 * sizes[0]
    merged = copy.deepcopy(base)
    merge_delta(merged, tmp_path / "False")
    assert same(merged, model)
    with pytest.raises(ValueError, match=r": the delta was saved with undo=False; load the base instead$"):
        undo_delta(merged, tmp_path / "False")


@pytest.mark.parametrize(
    ("model", "base", "message"),
    [
        ({"w": torch.ones(2)}, {}, "base must have every parameter of the model, got 'w'"),
        ({"w": torch.ones(2)}, {"w": torch.ones(3)}, r"w of model and base must be of one shape and dtype \(\(3,\)"),
        ({"w": torch.ones(2)}, {"w": torch.ones(2).bfloat16()}, "w of model and base must be of one shape and dtype"),
    ],
)
def test_what_cannot_be_compared_is_refused_in_a_line(model, base, message, tmp_path):
    with pytest.raises(ValueError, match=f"^{message}"):
        save_delta(model, base, tmp_path)


def test_what_does_not_fit_a_delta_is_refused_in_a_line(tmp_path):
    save_delta({"w": torch.zeros(3, 3)}, {"w": torch.ones(3, 3)}, tmp_path)
    for model, message in [
        (nn.Linear(1, 1), "the model has no parameter of the delta's name, got 'w'"),
        ({"w": torch.ones(2)}, r"w must be of shape \(3, 3\) and torch.float32, got"),
        ({"w": torch.ones(3, 3).half()}, r"w must be of shape \(3, 3\) and torch.float32, got"),
    ]:
        with pytest.raises(ValueError, match=f"^{message}"):
            merge_delta(model, tmp_path)
    with pytest.raises(FileNotFoundError, match=r"^no delta.safetensors in nowhere; gracile.selections.save_delta"):
        load_delta("nowhere")
    with pytest.raises(ValueError, match=r"^undo must be True or False, got 1$"):
        save_delta({}, {}, tmp_path, undo=1)


def test_rows_of_a_delta_are_those_of_the_selection(tmp_path):
    base = nn.Linear(6, 9, bias=False)
    model = copy.deepcopy(base)
    optimizer = SparseAdamW([masked_group({model.weight: Rows((2, 8))})], lr=1e-2)
    model.weight.grad = torch.ones_like(model.weight)
    optimizer.step()
    assert save_delta(model, base, tmp_path).changes["weight"].at.tolist() == [2, 8]
