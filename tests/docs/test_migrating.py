"""Each row of the tables in docs/migrating.md, against the packages it speaks of."""

import dataclasses
import importlib
import inspect
import re
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn

from gracile import optim
from gracile.models.convert import convert

PAGE = Path(__file__).resolve().parents[2] / "docs" / "migrating.md"
TABLE = re.compile(r"<!-- check: (\S+) -> (\S+) -->\n\n((?:\|.*\n)+)")
# What their groups hold beside what their constructors take, and values other than the defaults.
GROUP_KEYS = {
    "galore_torch": {"rank": 4, "update_proj_gap": 200, "scale": 0.25, "proj_type": "std"},
    "apollo_torch": {
        "rank": 4,
        "update_proj_gap": 200,
        "scale": 1.0,
        "proj_type": "std",
        "proj": "random",
        "scale_type": "channel",
    },
    "fira": {"rank": 4, "update_proj_gap": 200, "alpha": 0.25, "proj_type": "std"},
}
LORA = {
    "r": 4, "lora_alpha": 8.0, "lora_dropout": 0.1, "target_modules": ["0"], "rank_pattern": {"0": 2},
    "exclude_modules": ["1"], "target_parameters": ["experts.down_proj"], "layers_to_transform": [0],
    "layers_pattern": "layers", "modules_to_save": ["lm_head"], "task_type": "CAUSAL_LM",
}  # fmt: skip
# Fields of LoraConfig for other methods, for its own bookkeeping or for single layers: the page leaves them out.
LORA_LEFT_OUT = {
    "task_type", "peft_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode",
    "exclude_modules", "fan_in_fan_out", "bias", "layers_to_transform", "layers_pattern", "megatron_config",
    "megatron_core", "trainable_token_indices", "loftq_config", "eva_config", "corda_config", "lora_ga_config",
    "velora_config", "alora_invocation_tokens", "use_qalora", "qalora_group_size", "monteclora_config",
    "layer_replication", "runtime_config", "target_parameters", "use_bdlora", "arrow_config", "kasa_config",
    "ensure_weight_tying",
}  # fmt: skip


def named(path):
    module, _, name = path.rpartition(".")
    return getattr(importlib.import_module(module), name)


def rows():
    for theirs, ours, table in TABLE.findall(PAGE.read_text(encoding="utf-8")):
        for line in table.splitlines()[2:]:
            key, here, _ = (cell.strip() for cell in line.strip("|").split("|"))
            yield theirs, ours, key.strip("`"), here


ROWS = list(rows())
TABLES = sorted({(theirs, ours) for theirs, ours, _, _ in ROWS})


def keyword(key, theirs):
    """A name and a value: the one in the row, that of their groups, or their default."""
    if "=" in key:
        name, value = key.split("=")
        return name, value.strip('"')
    held = LORA if theirs.startswith("peft") else GROUP_KEYS[theirs.partition(".")[0]]
    if key in held:
        return key, held[key]
    return key, inspect.signature(named(theirs)).parameters[key].default


def build(ours, theirs, name, value):
    """An optimizer with the keyword where it belongs, an adapter's configuration, or a converted model."""
    if ours.startswith("gracile.adapters"):
        return named(ours)(**{"target_modules": ["0"], name: value})
    if theirs.startswith("peft"):
        keys = {"rank": 4, "target_modules": ["0"], name: value}
        return convert(nn.Sequential(nn.Linear(16, 8), nn.Linear(8, 8)), named(ours), **keys)
    group = {"params": [nn.Parameter(torch.randn(16, 8))], "rank": 4}
    held = GROUP_KEYS[theirs.partition(".")[0]]
    in_group = name in held or name in ("scale", "alpha")
    return named(ours)([{**group, name: value} if in_group else group], **({} if in_group else {name: value}))


@pytest.mark.parametrize(("theirs", "ours", "key", "here"), ROWS, ids=[f"{row[0]}-{row[2]}" for row in ROWS])
def test_a_row_says_what_happens(theirs, ours, key, here):
    if key == "params":
        assert here == "same"
        return
    name, value = keyword(key, theirs)
    if here == "same":
        build(ours, theirs, name, value)
        return
    with pytest.raises((TypeError, ValueError), match=name):
        build(ours, theirs, name, value)
    if here.startswith("renamed to"):
        build(ours, theirs, re.search(r"`(\w+)`", here)[1], value)
    else:
        assert here == "refused"


@pytest.mark.parametrize(("theirs", "ours"), TABLES)
def test_a_table_has_every_keyword_of_theirs(theirs, ours):
    listed = {key.split("=")[0] for *both, key, _ in ROWS if both == [theirs, ours]}
    if theirs.startswith("peft"):
        fields = {field.name for field in dataclasses.fields(named(theirs))}
        assert listed <= fields
        assert fields - listed <= LORA_LEFT_OUT
        return
    parameters = set(inspect.signature(named(theirs)).parameters)
    assert listed == parameters | GROUP_KEYS[theirs.partition(".")[0]].keys()


def test_every_package_of_the_page_has_its_tables():
    assert {theirs.partition(".")[0] for theirs, _ in TABLES} == {*GROUP_KEYS, "peft"}


# ---- names, and checkpoints -----------------------------------------------------------------------------------------


def table_after(mark):
    """The cells of each row of a table."""
    found = re.search(rf"<!-- {mark} -->\n\n((?:\|.*\n)+)", PAGE.read_text(encoding="utf-8"))
    return [[cell.strip().strip("`") for cell in line.strip("|").split("|")] for line in found[1].splitlines()[2:]]


@pytest.mark.parametrize(("name", "instead"), table_after("names"))
def test_a_name_that_is_not_here_says_what_is_in_its_place(name, instead):
    with pytest.raises(ImportError, match=rf"^gracile.optim has no {name}; use ") as refused:
        exec(f"from gracile.optim import {name}", {})
    assert "\n" not in str(refused.value)
    used = re.match(r"\w+", instead)[0]
    assert f"use {used}" in str(refused.value)
    assert used in optim.__all__
    assert name not in dir(optim)


def test_the_page_has_all_names_that_say_what_is_in_their_place():
    assert {name for name, _ in table_after("names")} == optim.REPLACED.keys()
    with pytest.raises(ImportError, match="cannot import name 'GaLoreAdam'"):
        exec("from gracile.optim import GaLoreAdam", {})
    assert not hasattr(optim, "GaLoreAdam")


def test_adamw_without_a_first_moment_is_rmsprop_with_its_bias_corrected():
    one, other = (nn.Parameter(torch.linspace(-1, 1, 20)) for _ in range(2))
    ours = optim.GaLoreAdamW([{"params": [one]}], lr=0.1, betas=(0.0, 0.99), eps=1e-12)
    theirs = torch.optim.RMSprop([other], alpha=0.99, eps=1e-12)
    for t in range(1, 9):
        one.grad = other.grad = torch.randn(20, generator=torch.Generator().manual_seed(t))
        theirs.param_groups[0]["lr"] = 0.1 * (1 - 0.99**t) ** 0.5
        ours.step()
        theirs.step()
    torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


def test_the_checkpoints_of_the_page_are_those_that_are_tested():
    from tests.optim.low_rank.test_published import CASES, PLAIN

    tested = {(case.theirs, case.ours) for case in CASES.values()} | {(theirs, ours) for theirs, ours, *_ in PLAIN}
    written = {(named(theirs), getattr(optim, ours, None)) for theirs, ours, _ in table_after("loads")}
    assert written == tested | {(torch.optim.AdamW, None)}


# ---- what the page says of numbers ----------------------------------------------------------------------------------


def trained(cls, group, **keys):
    torch.manual_seed(0)
    weights = [nn.Parameter(torch.randn(24, 16)), nn.Parameter(torch.randn(16, 24))]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        optimizer = cls([{"params": weights, "rank": 4, "update_proj_gap": 5, "proj_type": "std", **group}], **keys)
    for t in range(12):
        torch.manual_seed(100 + t)
        for p in weights:
            p.grad = torch.randn_like(p)
        optimizer.step()
    return weights


def test_galore_with_exact_vectors_is_theirs_to_the_bit():
    theirs = trained(named("galore_torch.GaLoreAdamW"), {"scale": 0.25}, lr=0.01)
    ours = trained(optim.GaLoreAdamW, {"scale": 0.25, "subspace_method": "svd"}, lr=0.01)
    assert all(torch.equal(p, q) for p, q in zip(theirs, ours, strict=True))


def test_apollo_agrees_with_theirs():
    group = {"scale": 1.0, "proj": "random", "scale_type": "channel"}
    theirs = trained(named("apollo_torch.APOLLOAdamW"), group, lr=0.01)
    ours = trained(optim.APOLLOAdamW, group, lr=0.01)
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)


def test_fira_agrees_with_theirs():
    theirs = trained(named("fira.FiraAdamW"), {"alpha": 0.25}, lr=0.01)
    ours = trained(optim.FiraAdamW, {"scale": 0.25, "subspace_method": "svd"}, lr=0.01)
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)


def test_relora_layers_compute_what_pefts_do_and_merge_to_the_same():
    from peft import LoraConfig, get_peft_model

    def model():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(16, 8), nn.Tanh(), nn.Linear(8, 8))

    theirs = get_peft_model(model(), LoraConfig(r=4, lora_alpha=8, target_modules=["0", "2"]))
    ours = convert(model(), named("gracile.models.layers.ReLoRALinear"), ["0", "2"], rank=4, alpha=8.0)
    with torch.no_grad():
        for name, p in ours.named_parameters():
            layer, _, part = name.rpartition(".")
            if part in ("A", "B"):
                theirs.get_parameter(f"base_model.model.{layer}.lora_{part}.default.weight").copy_(p.normal_())
    x = torch.randn(3, 16)
    torch.testing.assert_close(ours(x), theirs(x))
    frozen = [name for name, p in ours.named_parameters() if not p.requires_grad]
    assert frozen == ["0.weight", "2.weight"]
    torch.testing.assert_close(named("gracile.models.convert.merge")(ours)(x), theirs.merge_and_unload()(x))
