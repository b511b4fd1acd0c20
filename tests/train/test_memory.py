"""``gracile memory``: what is planned is what is held, and bad input gets one line."""

import json
import re

import pytest
import torch
import transformers
from mixtures import build_mixture
from torch import nn

from gracile.models import build_llama
from gracile.models.core.expert_layers import ExpertLayers
from gracile.registry import OPTIMIZERS
from gracile.train import memory
from gracile.train.build import model as building
from gracile.train.build.layers import converted
from gracile.train.build.model import build_model, checkpoint_activations
from gracile.train.build.optimizer import build_optimizer
from gracile.train.config.parser import load_config
from gracile.train.engines.division import Division
from gracile.train.errors import BadInput
from gracile.train.measurement import measure
from gracile.train.measurement.fake_pass import FakePass, Ledger, Pass
from gracile.train.measurement.kinds import GRADIENTS, STATE, WEIGHTS
from gracile.train.measurement.planner import Planner
from gracile.train.memory import bytes_of, main

GIB = 2**30


def config_of(*arguments):
    return load_config(["quickstart", *arguments], needs_output_dir=False)


def told(capsys, *arguments):
    capsys.readouterr()
    assert main([*arguments, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


# ---- planned is held ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained():
    """A real model of each size and layer, with a gradient for every trained parameter."""
    models = {}

    def of(config):
        key = (config.model.model, config.model.layer)
        if key not in models:
            models.clear()
            plain = build_llama(config.model.model, **(config.model.model_overrides or {}))
            model = models[key] = converted(plain, config)
            for p in model.parameters():
                if p.requires_grad:
                    p.grad = torch.full_like(p, 1e-3).add_(p.detach(), alpha=0.1)
        return models[key]

    return of


TWO_LAYERS = ["--model_overrides", '{"num_hidden_layers": 2}']
NAMES = [*OPTIMIZERS, "adamw on low_rank", "adamw on maestro", "adamw on autosparse"]
# Every class plans the shapes of the smallest model; those of another, one class of each kind of state.
KINDS = ("galore_adamw_8bit", "galore_adafactor", "dct_adamw", "sltrain_adamw_8bit", "srigl_adamw", "adamw on maestro")
CASES = [("2m", name, False) for name in NAMES] + [("9m", name, False) for name in KINDS]
CASES += [("9m", name, True) for name in NAMES if name not in KINDS] + [("60m", name, True) for name in NAMES]


@pytest.mark.parametrize(
    ("size", "name"),
    [pytest.param(*case, marks=pytest.mark.thorough if thorough else ()) for *case, thorough in CASES],
)
def test_weights_gradients_and_state_to_the_byte(trained, size, name):
    name, _, layer = name.partition(" on ")
    layer = layer or OPTIMIZERS[name].layer
    chosen = [] if layer is None else ["--layer", layer]
    chosen += ["--sparsity", "0.5"] if OPTIMIZERS[name].accepts() & {"sparsity", "keep"} else []
    chosen += ["--optimizer_args", '{"block_size": 16}'] if "block" in name else []
    chosen += TWO_LAYERS if size == "2m" else []
    config = config_of("--model", size, "--optimizer", name, "--rank", "32", *chosen)
    model = trained(config)
    optimizer = build_optimizer(model, config.optimizer, config.run)
    optimizer.step()
    held = measure.held(model, optimizer)
    planner = Planner(config)
    plan = planner.plan(name, 1, checkpointing=False)
    assert {kind: plan.held[kind] for kind in (WEIGHTS, GRADIENTS)} == {k: held[k] for k in (WEIGHTS, GRADIENTS)}
    assert {kind: plan.held[kind] for kind in STATE} == {kind: held.get(kind, 0) for kind in STATE}
    assert planner.parameters == sum(p.numel() for p in model.parameters())


def test_a_saved_model_in_bf16_with_tied_embeddings(tmp_path, capsys):
    saved = build_llama("2m", dtype=torch.bfloat16, tie_word_embeddings=True)
    saved.save_pretrained(tmp_path / "saved")
    elements = sum(p.numel() for p in saved.parameters())
    whole = told(capsys, "quickstart", "--model", str(tmp_path / "saved"), "--dtype", "bfloat16", "--compare", "adamw")
    plan = whole["optimizers"]["adamw"]["held"]
    assert whole["parameters"] == elements
    assert plan["weights"] == 2 * elements + measure.storage_bytes(saved.buffers())
    assert (plan["gradients"], plan["master weights"]) == (2 * elements, 0)
    assert plan["moments"] == 4 * elements + 4 * len(list(saved.parameters()))


def test_moments_can_be_kept_in_bf16(capsys):
    keys = ("--dtype", "bfloat16", "--compare", "galore_adamw,adamw")
    wide = told(capsys, "quickstart", *keys)["optimizers"]
    narrow = told(capsys, "quickstart", *keys, "--optimizer_args", '{"state_dtype": "bfloat16"}')["optimizers"]
    clocks = 4 * len(list(build_llama("2m", device="meta").parameters()))
    assert narrow["adamw"] == wide["adamw"], "torch's takes no such key"
    before, after = (plan["galore_adamw"]["held"]["moments"] - clocks for plan in (wide, narrow))
    assert before == 2 * after


ONE_LAYER = ("quickstart", "--model_overrides", '{"num_hidden_layers": 1}')


def test_an_adamw_with_moments_like_the_others_stands_beside_torchs(capsys):
    """Which has bf16 moments for bf16 weights, half of what GaLore's fp32 ones are compared with."""
    names = ("--compare", "galore_adamw,adamw,galore_adamw_8bit")
    plans = told(capsys, *ONE_LAYER, "--dtype", "bfloat16", *names)["optimizers"]
    dtypes = {name: plan["dtype_of_moments"] for name, plan in plans.items()}
    wide = "adamw, fp32 moments"
    assert dtypes == {"galore_adamw": "fp32", "adamw": "bf16", wide: "fp32", "galore_adamw_8bit": "8 bits"}
    in_fp32 = told(capsys, *ONE_LAYER, "--compare", "adamw")["optimizers"]["adamw"]["held"]["moments"]
    assert plans[wide]["held"] == plans["adamw"]["held"] | {"moments": in_fp32}
    assert plans[wide]["peak"] - plans["adamw"]["peak"] == in_fp32 - plans["adamw"]["held"]["moments"] > 10**6
    state = {name: plan["held"]["moments"] + plan["held"]["projectors"] for name, plan in plans.items()}
    assert state["adamw"] < state["galore_adamw"] < state[wide]


def test_the_table_and_the_picture_name_the_dtypes_of_moments(tmp_path, monkeypatch, capsys):
    drawn = []
    monkeypatch.setattr(memory, "draw", lambda path, bars, *rest: drawn.append(list(bars)))
    picture = str(tmp_path / "plan.png")
    names = ("--compare", "adamw,galore_adamw")
    assert main([*ONE_LAYER, "--dtype", "bfloat16", *names, "--plot", picture]) == 0
    out = capsys.readouterr().out
    assert re.search(r"at most +adamw  adamw, fp32 moments  galore_adamw\n", out)
    assert re.search(r"dtype of moments +bf16 +fp32 +fp32\n", out)
    assert "compare fp32 ones with adamw, fp32 moments." in out
    assert drawn == [["adamw, bf16 moments", "adamw, fp32 moments", "galore_adamw"]]


def test_gradients_that_are_freed_are_in_the_title_and_only_where_an_optimizer_can(tmp_path, monkeypatch, capsys):
    titles = []
    monkeypatch.setattr(memory, "draw", lambda *drawn: titles.append(drawn[-1]))
    freed = ("--keep_gradients", "nothing", "--max_grad_norm", "0", "--gradient_accumulation_steps", "1")
    assert main([*ONE_LAYER, *freed, "--compare", "adamw,galore_adamw", "--plot", str(tmp_path / "plan.png")]) == 0
    out = capsys.readouterr().out
    assert out.splitlines()[0].endswith("; 1 process, keep_gradients nothing")
    assert titles[0].endswith("; 1 process, keep_gradients nothing")
    kept, alone = re.search(r"gradients +([\d.]+) MiB +([\d.]+) MiB\n", out).groups()
    assert float(alone) < float(kept) / 2


@pytest.mark.parametrize(
    "keys",
    [
        ["--compare", "galore_adamw,adamw"],  # in fp32
        ["--compare", "galore_adamw,adamw", "--dtype", "bfloat16", "--optimizer_args", '{"state_dtype": "bfloat16"}'],
        ["--compare", "galore_adamw,adamw", "--bf16", "true", "--zero", "2", "--world_size", "2"],
        ["--compare", "adamw", "--dtype", "bfloat16"],
        ["--compare", "galore_adamw_8bit,adamw", "--dtype", "bfloat16"],
    ],
)
def test_where_dtypes_are_alike_nothing_is_put_beside(keys, capsys):
    assert set(told(capsys, *ONE_LAYER, *keys)["optimizers"]) == set(keys[1].split(","))


# ---- passes ---------------------------------------------------------------------------------------------------------


def test_a_ledger_counts_what_lives():
    kept = torch.ones(1000)
    with Ledger([kept]) as ledger:
        kept.mul_(2)
        views = kept[:10].view(2, 5)
        assert ledger.forward_has_ended() == 0, "what was there before"
        one = kept + 1
        two = one.double()
        del two
        three = kept * 1
        ledger.is_gradient(three)
        ledger.is_gradient(three)
        del one, three
        four = torch.empty(3000)
    assert ledger.at_peak.bytes == 4 * 1000 + 8 * 1000
    assert ledger.forward_has_ended() == 4 * 3000, "and nothing else is left"
    assert views.numel() + four.numel() == 3010


def test_a_linear_layer_keeps_its_input_alone():
    class Loss(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two = nn.Linear(64, 128, bias=False), nn.Linear(128, 256, bias=False)

        def forward(self, input_ids, labels):
            hidden = torch.ones(input_ids.numel(), 64)
            self.loss = self.two(self.one(hidden)).sum()
            return self

    one = FakePass(Loss).of((2, 5))
    hidden, between, loss = 10 * 64 * 4, 10 * 128 * 4, 4
    assert one.activations == hidden + between + loss
    assert one.at_peak.gradients <= 4 * (64 * 128 + 128 * 256)
    later = FakePass(Loss, accumulated=True).of((2, 5))
    assert (later.activations, later.at_peak.gradients) == (one.activations, 0)


@pytest.mark.parametrize("family", ["Mixtral", "Qwen3Moe"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_experts_in_one_tensor_are_planned(family, dtype):
    """What a pass over real tensors allocates, routed as it comes."""
    sizes = {
        "vocab_size": 96,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    }
    experts = {"num_local_experts": 4, "num_experts": 4, "moe_intermediate_size": 16, "num_experts_per_tok": 2}
    config = getattr(transformers, f"{family}Config")(**sizes, **experts, num_key_value_heads=2, use_cache=False)

    def make():
        return transformers.AutoModelForCausalLM.from_config(config, dtype=dtype).train()

    planned = FakePass(make).of((2, 16))
    model, tokens = make(), torch.randint(96, (2, 16))
    ledger = Ledger([*model.parameters(), *model.buffers(), tokens])
    with ledger:
        loss = model(input_ids=tokens, labels=tokens).loss
        activations = ledger.forward_has_ended()
        loss.backward()
    assert planned.activations == pytest.approx(activations, rel=0.02)
    assert planned.at_peak.bytes == pytest.approx(ledger.at_peak.bytes, rel=0.02)


@pytest.mark.parametrize(
    ("layer", "checkpointing"),
    [
        ("sltrain", True),
        *(pytest.param(*other, marks=pytest.mark.thorough) for other in (("sltrain", False), ("sst", False))),
    ],
)
def test_experts_as_layers_are_planned_to_the_byte(layer, checkpointing, tmp_path):
    """What a pass makes of them is there until the backward pass, of one module at a time with checkpoints."""
    build_mixture("gpt_oss").save_pretrained(tmp_path)
    keys = ("--rank", "4", "--block_size", "16", "--optimizer", f"{layer}_adamw")
    planner = Planner(config_of("--model", str(tmp_path), "--layer", layer, *keys))
    planned = planner._pass((2, 16), checkpointing, layer)
    plain = planner._pass((2, 16), checkpointing, None)
    model = build_model(planner.config, None).train()
    model.config.use_cache = False  # as the Trainer does
    if checkpointing:
        checkpoint_activations(model, planner.config.run)
    tokens = torch.zeros((2, 16), dtype=torch.long)
    ledger = Ledger([*model.parameters(), *model.buffers(), tokens])
    for p in model.parameters():
        if p.requires_grad:
            p.register_post_accumulate_grad_hook(lambda p: ledger.is_gradient(p.grad))
    with ledger:
        loss = model(input_ids=tokens, labels=tokens).loss
        activations = ledger.forward_has_ended()
        loss.backward()
    assert planned == Pass(activations, ledger.at_peak)
    made = sum(those.weight().nbytes for those in model.modules() if isinstance(those, ExpertLayers))
    kept = planned.activations - plain.activations
    assert abs(kept) < 0.01 * made if checkpointing else made <= kept


def test_nothing_is_computed_and_the_same_pass_costs_the_same_again():
    planner = Planner(config_of("--model", "60m"))
    plans = [planner.plan("adamw", batch, checkpointing=False) for batch in (1, 4, 1)]
    assert plans[0] == plans[2] != plans[1]
    huge = planner.plan("adamw", 10**6, checkpointing=True)
    assert huge.peak > 10**13


def test_the_peak_is_less_than_all_together_unless_gradients_are_kept():
    once = Planner(config_of("--gradient_accumulation_steps", "1")).plan("adamw", 1, False)
    twice = Planner(config_of("--gradient_accumulation_steps", "2")).plan("adamw", 1, False)
    assert once.held == twice.held | {"temporary": once.held["temporary"]}
    assert once.at_peak["gradients"] < once.held["gradients"] == twice.at_peak["gradients"]
    assert once.peak < twice.peak <= sum(twice.held.values())


def test_checkpointing_by_the_configuration_is_planned_as_the_trainer_does_it():
    run = config_of("--gradient_checkpointing", "true").run
    assert building.checkpoints_activations(run)
    assert not building.checkpoints_activations(config_of().run)
    model = build_llama("2m", device="meta")
    building.checkpoint_activations(model, run)
    assert model.is_gradient_checkpointing


@pytest.fixture(scope="module")
def planner():
    """It remembers the passes that it has planned."""
    return Planner(config_of(*TWO_LAYERS))


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("budget", [GIB // 8, 3 * GIB])
def test_the_largest_micro_batch_fits_and_the_next_does_not(planner, checkpointing, budget):
    found = planner.largest_micro_batch("galore_adamw", checkpointing, budget)
    assert found == 0 or planner.plan("galore_adamw", found, checkpointing).peak <= budget
    assert planner.plan("galore_adamw", found + 1, checkpointing).peak > budget
    assert found > 1 or not checkpointing


# ---- processes ------------------------------------------------------------------------------------------------------


def test_zero_splits_what_its_stage_splits(capsys):
    """In bf16, 64 processes: parts are rounded up, by a few elements of each matrix."""
    keys = ("llama_130m_galore", *TWO_LAYERS, "--bf16", "true", "--compare", "adamw")
    whole = told(capsys, *keys)["optimizers"]["adamw"]
    elements = whole["held"]["weights"] // 2
    for stage in (1, 2, 3):
        split = told(capsys, *keys, "--zero", str(stage), "--world_size", "64")["optimizers"]["adamw"]["held"]
        assert split["weights"] == pytest.approx(2 * elements / (64 if stage == 3 else 1), rel=0.02)
        assert split["master weights"] == pytest.approx(4 * elements / 64, rel=1e-4)
        assert split["gradients"] == pytest.approx(2 * elements / (64 if stage >= 2 else 1), rel=1e-4)
        assert split["moments"] == pytest.approx(8 * elements / 64, rel=1e-4)
        assert split["activations"] == whole["held"]["activations"]


def test_what_is_offloaded_is_on_the_host(capsys):
    keys = ("quickstart", "--zero", "2", "--world_size", "2")
    here = told(capsys, *keys)["optimizers"]["galore_adamw"]
    there = told(capsys, *keys, "--offload", "optimizer")["optimizers"]["galore_adamw"]
    for kind in ("master weights", "moments", "projectors", "gradients"):
        assert there["held"][kind] == 0 < there["offloaded"][kind] == here["held"][kind]
        assert here["offloaded"][kind] == 0
    assert there["held"]["weights"] == here["held"]["weights"]
    assert told(capsys, *keys, "--offload", "none")["optimizers"]["galore_adamw"] == here


def test_a_deepspeed_file_says_how(tmp_path):
    zero = {"stage": 3, "reduce_bucket_size": "auto", "offload_optimizer": {"device": "cpu"}}
    zero |= {"stage3_param_persistence_threshold": 0, "stage3_prefetch_bucket_size": 1000}
    path = tmp_path / "deepspeed.json"
    path.write_text(json.dumps({"zero_allow_untested_optimizer": True, "zero_optimization": zero}))
    division = Division.of(config_of("--deepspeed", str(path)).run, 128)
    assert (division.stage, division.offload, division.reduce_bucket) == (3, True, 128 * 128)
    assert (division.persistence_threshold, division.prefetch_bucket) == (0, 1000)


# ---- what is printed ------------------------------------------------------------------------------------------------


def test_the_table_and_the_picture(tmp_path, capsys):
    picture = tmp_path / "plan.png"
    arguments = [*ONE_LAYER, "--compare", "adamw, galore_adamw", "--budget", "2GiB", "--gpu", "h100,24", "--plot"]
    assert main([*arguments, str(picture)]) == 0
    out = capsys.readouterr().out
    lines = {line.strip().split("  ")[0]: line for line in out.splitlines()}
    assert out.startswith("2m, 1,249,664 parameters in float32; 16 x 128 tokens a pass; 1 process\n")
    assert lines["moments"].split() == ["moments", "9.5", "MiB", "8.4", "MiB"]
    assert lines["dtype of moments"].split()[-2:] == ["fp32", "fp32"]
    assert lines["fits 24GB (RTX3090, RTX4090)"].split()[-2:] == ["yes", "yes"]
    assert "fits 80GB (A100-80GB, H100)" in lines
    assert not any("141GB" in line for line in lines)
    assert picture.read_bytes()[:4] == b"\x89PNG"
    plain, checkpointed = (
        int(lines[key].split()[-1]) for key in ("micro batch in 2.00 GiB", "micro batch, checkpointed")
    )
    assert 16 < plain < checkpointed


@pytest.mark.parametrize(
    ("text", "size"), [("24GiB", 24 * GIB), ("80GB", 80 * 10**9), ("512 mib", 2**29), ("1.5GiB", 3 * 2**29)]
)
def test_amounts(text, size):
    assert bytes_of(text) == size


@pytest.mark.parametrize("text", ["24", "GiB", "-1GiB", "0GiB", "24 G", "1e3GB", ""])
def test_what_is_no_amount(text):
    with pytest.raises(BadInput, match="budget must be an amount such as 24GiB"):
        bytes_of(text)


def zero(**settings):
    return json.dumps({"zero_optimization": settings})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--world_size", "0"], "world_size must be at least 1 and at most 16,384, got 0"),
        (["--zero", "3", "--world-size", "3000000"], "world_size must be at least 1 and at most 16,384, got 3000000"),
        (["--world_size", "two"], "world_size must be a whole number, got 'two'"),
        (["--zero", "4"], "zero must be 0, 1, 2 or 3, got 4"),
        (["--offload", "optimizer"], "offload needs ZeRO: give --zero 1, 2 or 3"),
        (["--offload", "disk"], "offload"),
        (["--gpu", "h1000"], "unknown gpu 'h1000'; give its memory as --budget, or one of 24GB (RTX3090, RTX4090)"),
        (["--budget", "1MiB"], "budget is 1.0 MiB, less than the 7.1 MiB of weights"),
        (["--budget", "much"], "budget must be an amount such as 24GiB"),
        (["--compare", "adamw,galor"], "unknown optimizer 'galor'"),
        (["--compare", ""], "unknown optimizer ''"),
        (["--budget"], "budget needs a value, as in --budget=VALUE"),
        (["--budget", "1" + 400 * "0" + "GiB"], "budget must be an amount such as 24GiB"),
        (["--micro_batch", "0"], "micro_batch must be at least 1, and"),
        (["--micro_batch", "100000000000000"], "a pass over 100000000000000 x 128 tokens is too large"),
        (["--seq_len", "-5"], "seq_len must be at least 2, and a size that a computer can count, got -5"),
        (["--seq_len", "1"], "seq_len must be at least 2"),
        (["--label_smoothing_factor", "0.1"], "label_smoothing_factor is 0.1, which is not planned"),
        (["--model_overrides", '{"hidden_size": 0}'], "hidden_size must be a whole number >= 1, got 0"),
        (["--model_overrides", '{"num_key_value_heads": 3}'], "model '2m' cannot pass 16 x 128 tokens"),
        (["--deepspeed", zero(stage=2, reduce_bucket_size="x")], "reduce_bucket_size must be a number or auto"),
        (["--deepspeed", zero(stage=3, offload_param={"device": "cpu"})], "offload_param is not planned"),
        (["--dtype", "int8"], "unknown dtype 'int8'"),
        (["--plot", "nowhere/plan.png"], "the folder of 'nowhere/plan.png' does not exist"),
        (["--plot", "plan.txt"], "plot must be a .png or .svg or .pdf file"),
        (["--wold_size", "2"], "unknown key 'wold_size'"),
        (["--optimizer_args", '{"state_dtype": "int4"}'], "unknown state_dtype 'int4'"),
        (["--model", "8m"], "unknown model '8m'"),
    ],
)  # fmt: skip
def test_bad_input_gets_one_line(arguments, message, capsys):
    assert main(["quickstart", *arguments]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("gracile memory: ")
    assert err.count("\n") == 1
    assert message in err
