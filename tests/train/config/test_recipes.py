"""The embedded recipes: where their numbers come from, and that each key that one names reaches what it is for."""

import functools
import inspect
import json
import re
import warnings
from importlib import resources

import pytest
import torch
from conversations import conversation, save_base, write
from transformers import Qwen2Config

from gracile.models import build_llama
from gracile.models.layers import FactoredLinear
from gracile.optim.core.group_checks import MATRIX_KEYS
from gracile.registry import LAYERS, OPTIMIZERS, recipes
from gracile.selections import selection_groups
from gracile.train.build.adapter import with_adapter
from gracile.train.build.layers import converted
from gracile.train.build.model import architecture, untrained
from gracile.train.build.optimizer import MASK_KEYS, SUBSPACE_KEYS, build_optimizer, unused_keys, without_effect
from gracile.train.build.selected import build_selected
from gracile.train.build.tuned_model import untrained_base
from gracile.train.config.arguments import DTYPES
from gracile.train.config.checks import accepted_keywords, check_sizes, check_values
from gracile.train.config.finetune_arguments import FinetuneConfig
from gracile.train.config.finetune_checks import check_finetune
from gracile.train.config.parser import load_config, load_settings
from gracile.train.finetune import main as finetune

EMBEDDED = [entry.name for entry in recipes().values() if entry.command == "pretrain"]
TUNED = [entry.name for entry in recipes().values() if entry.command == "finetune"]
PAPERS = [name for name in EMBEDDED if name.startswith("llama_")]
GALORE, SMET = "2403.03507", "2606.00888"
TEXTS = {name: resources.files("gracile.configs").joinpath(f"{name}.yaml").read_text("utf-8") for name in recipes()}
ON_A_CARD = [name for name in PAPERS if name.endswith("gb")]  # whose steps are what fits there
TOKENS_A_STEP = 512 * 256
STEPS = 6


@functools.cache
def config_of(name, *more):
    """As it is read, but that a model which another run saves is the smallest one; a warning is an error."""
    saved = ("--model", "2m") if name in ("quickstart_spdf_dense", "quickstart_2_4_cast") else ()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return load_config([name, *saved, *more], needs_output_dir=False)


@pytest.mark.parametrize("name", TUNED)
def test_a_recipe_of_a_fine_tuning_has_keys_and_values_of_one(name):
    config = load_settings(FinetuneConfig, [name], needs_output_dir=False)
    check_finetune(config)
    assert unused_keys(config, ()) == []
    assert config.run.folder.name == name


# What the models of fine-tunings are, as their config.json on the hub says.
QWEN = {
    "Qwen/Qwen2.5-0.5B-Instruct": Qwen2Config(
        vocab_size=151936, hidden_size=896, intermediate_size=4864, num_hidden_layers=24, num_attention_heads=14,
        num_key_value_heads=2, max_position_embeddings=32768, tie_word_embeddings=True,
    ),
    "Qwen/Qwen2.5-7B": Qwen2Config(
        vocab_size=152064, hidden_size=3584, intermediate_size=18944, num_hidden_layers=28, num_attention_heads=28,
        num_key_value_heads=4, max_position_embeddings=131072, tie_word_embeddings=False,
    ),
}  # fmt: skip
# Of each: the numbers that are trained, by hand. Of a block's matrices (m, n): r (m + n), all, or columns of one.
SMALL_BLOCK = ((896, 896), (128, 896), (128, 896), (896, 896), (4864, 896), (4864, 896), (896, 4864))
LARGE_BLOCK = ((3584, 3584), (512, 3584), (512, 3584), (3584, 3584), *2 * ((18944, 3584),), (3584, 18944))
TRAINED_NUMBERS = {
    "finetune_lora": 24 * sum(8 * (m + n) for m, n in SMALL_BLOCK),
    "finetune_qlora": 28 * sum(64 * (m + n) for m, n in LARGE_BLOCK),
    "finetune_galore": 494_032_768,
    "finetune_s2ft": round(0.03 * 24 * 4864) * 896,
}


def usually(shown):
    """All of them, of which `make test` takes those that ``shown`` is true of."""
    return [pytest.param(name, marks=() if shown(name) else pytest.mark.thorough) for name in TRAINED_NUMBERS]


@pytest.mark.parametrize("name", usually(lambda name: name != "finetune_qlora"))
def test_a_recipe_of_a_fine_tuning_fits_the_model_that_it_names(name):
    """On the meta device: nothing is downloaded or allocated."""
    config = load_settings(FinetuneConfig, [name], needs_output_dir=False)
    known = QWEN[config.model.model.removeprefix("hub:")]
    check_sizes(config, known)
    model = untrained_base(config, known, [])
    if config.has_adapter:
        model = with_adapter(model, config, None, None)
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    elif config.model.selection is not None:
        build_selected(model, config)
        (group,) = selection_groups(model, config.model.selection, **config.model.selection_args)
        trained = sum(own.count(p) for p, own in group["selected"].items())
    else:
        trained = sum(p.numel() for group in build_selected(model, config).param_groups for p in group["params"])
    assert trained == TRAINED_NUMBERS[name]


@pytest.mark.parametrize("name", usually(lambda name: name == "finetune_qlora"))
def test_a_recipe_of_a_fine_tuning_trains_a_smaller_model(name, tmp_path):
    """With its own keys, on conversations or texts of the tests."""
    if "quantize" in TEXTS[name]:
        pytest.importorskip("bitsandbytes")
    texts = [{"text": "It is 3. You are welcome. " * 9}, {"text": "x y z"}] * 12
    chats = [{"messages": conversation(i)} for i in range(60)]
    data = write(tmp_path / "data.jsonl", texts if "format: text" in TEXTS[name] else chats)
    given = {"model": save_base(tmp_path / "base"), "dataset": data, "chat_template": "zephyr", "block_size": 64}
    given |= {"max_steps": 3, "gradient_accumulation_steps": 1, "eval_strategy": "no", "warmup_steps": 0}
    given |= {"output_dir": tmp_path / "run", **({"rank": 16} if "rank: " in TEXTS[name] else {})}
    assert finetune([name, *(word for key, value in given.items() for word in (f"--{key}", str(value)))]) == 0
    told = json.loads((tmp_path / "run" / "metrics.json").read_text(encoding="utf-8"))
    assert told["validation_loss"] < told["validation_loss_before"]


@functools.cache
def built(name, *more):
    """Model and optimizer on the meta device, without a warning either."""
    config = config_of(name, *more)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = untrained(config, architecture(config.model), DTYPES[config.model.dtype])
        return model, build_optimizer(model, config.optimizer, config.run)


def is_for_matrices(group):
    return any(group.get(key) is not None for key in MATRIX_KEYS)


# ---- where the numbers come from ------------------------------------------------------------------------------------


def header_of(name):
    lines = TEXTS[name].splitlines()
    end = next(i for i, line in enumerate(lines) if not line.startswith("#"))
    assert max(map(len, lines)) <= 120
    return " ".join(line.removeprefix("# ") for line in lines[:end])


def tokens_a_step(name):
    config = config_of(name)
    own = config.run.train_batch_size * config.run.gradient_accumulation_steps * config.data.block_size
    return own if name in ON_A_CARD else TOKENS_A_STEP


@pytest.mark.parametrize("name", PAPERS)
def test_a_header_names_size_tokens_and_paper(name):
    header, config = header_of(name), config_of(name)
    size, tokens = re.match(r"LLaMA-(\w+) on C4, ([\d.]+)B tokens[:,] ", header).groups()
    assert name.split("_")[1] == config.model.model == size.lower()
    assert float(tokens) == round(config.run.max_steps * tokens_a_step(name) / 1e9, 1)
    cited = set(re.findall(r"arXiv:(\d{4}\.\d{5})\b", header))
    optimizer, layer = OPTIMIZERS[config.optimizer.optimizer], LAYERS.get(config.model.layer)
    own = {entry.arxiv for entry in (optimizer, layer) if entry is not None}
    of_galore = optimizer.name == "adamw" or optimizer.name.startswith("galore")  # and their baselines
    assert cited & (own | {GALORE} if of_galore else own)
    assert cited <= own | {GALORE, SMET}, "or a slip"


@pytest.mark.parametrize("name", PAPERS)
def test_the_schedule_is_that_of_the_authors_scripts(name):
    run, big = config_of(name).run, name.split("_")[1] == "7b"
    assert run.get_warmup_steps(run.max_steps) == run.max_steps // 10
    assert (run.lr_scheduler_type, run.lr_scheduler_kwargs) == ("cosine_with_min_lr", {"min_lr_rate": 0.1})
    assert run.weight_decay == 0
    assert run.gradient_checkpointing == big
    assert run.max_grad_norm == (1 if big and "apollo" not in name and name not in ON_A_CARD else 0)


# Of the authors' scripts: learning rate, rank, steps between subspaces, scale; betas and eps of all groups.
ADAM, SHORT = ((0.9, 0.999), 1e-6), ((0.9, 0.95), 1e-8)
SCRIPTS = {
    "llama_60m_galore": (0.01, 128, 200, 0.25, *ADAM),
    "llama_7b_galore": (0.005, 1024, 500, 0.25, *ADAM),
    "llama_60m_apollo": (0.01, 128, 200, 1, *ADAM),
    "llama_130m_apollo": (0.01, 192, 200, 1, *ADAM),
    "llama_350m_apollo": (0.01, 256, 200, 1, *ADAM),
    "llama_1b_apollo": (0.01, 256, 200, 1, *ADAM),
    "llama_7b_apollo": (0.01, 256, 200, 1, *ADAM),
    "llama_60m_apollo_mini": (0.01, 1, 200, 128, *ADAM),
    "llama_130m_apollo_mini": (0.01, 1, 200, 192, *ADAM),
    "llama_350m_apollo_mini": (0.01, 1, 200, 128, *ADAM),
    "llama_1b_apollo_mini": (0.01, 1, 200, 128, *ADAM),
    "llama_7b_apollo_mini": (0.01, 1, 200, 128, *ADAM),
    "llama_60m_fira": (0.01, 128, 200, 0.25, *ADAM),
    "llama_130m_fira": (0.01, 256, 200, 0.25, *ADAM),
    "llama_350m_fira": (0.01, 256, 200, 0.25, *ADAM),
    "llama_1b_fira": (0.01, 512, 200, 0.0625, *ADAM),
    "llama_7b_fira": (0.005, 64, 500, 0.0625, *ADAM),
    "llama_60m_q_galore": (0.015, 128, 200, 0.25, *SHORT),
    "llama_130m_q_galore": (0.015, 256, 200, 0.25, *SHORT),
    "llama_350m_q_galore": (0.01, 256, 200, 0.25, *SHORT),
    "llama_1b_q_galore": (0.01, 1024, 200, 0.25, *SHORT),
    "llama_7b_q_galore": (0.004, 1024, 500, 0.25, *SHORT),
    "llama_7b_galore_24gb": (0.005, 1024, 500, 0.25, *ADAM),
    "llama_7b_q_galore_16gb": (0.004, 1024, 500, 0.25, *SHORT),
    "llama_7b_q_apollo_12gb": (0.01, 1, 200, 128, *ADAM),
    "llama_350m_ldadam": (0.001, 8, None, None, (0.908, 0.99), 1e-8),
    "llama_60m_gradnormlorp": (0.01, 128, 250, 0.25, *ADAM),
}


@pytest.mark.parametrize("name", SCRIPTS)
def test_what_the_authors_scripts_say_reaches_the_groups(name):
    _, optimizer = built(name, "--model", "2m")
    lr, rank, gap, scale, betas, eps = SCRIPTS[name]
    assert {(group["lr"], group["betas"], group["eps"]) for group in optimizer.param_groups} == {(lr, betas, eps)}
    (matrices,) = filter(is_for_matrices, optimizer.param_groups)
    assert (matrices["rank"], matrices.get("update_proj_gap"), matrices.get("scale")) == (rank, gap, scale)


# ---- each key is for something --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", EMBEDDED)
def test_every_key_of_the_optimizer_is_in_a_group_with_its_value(name):
    config = config_of(name)
    check_values(config)
    assert without_effect(config) == []
    _, optimizer = built(name)
    matrices = list(filter(is_for_matrices, optimizer.param_groups)) or optimizer.param_groups
    accepted = OPTIMIZERS[config.optimizer.optimizer].accepts()
    named = {key: config.given[key] for key in ("rank", *SUBSPACE_KEYS, *MASK_KEYS) if key in config.given}
    if config.model.layer is not None:  # whose they may be, too
        named = {key: value for key, value in named.items() if key in accepted and key != "sparsity"}
    if "keep" in accepted and "sparsity" in named:
        named["keep"] = 1 - named.pop("sparsity")
    named |= config.optimizer.optimizer_args or {}
    for key, value in named.items():
        held = [group[key] for group in matrices]
        assert [str(v).removeprefix("torch.") if key == "state_dtype" else v for v in held] == [value] * len(held), key


LAYERED = [name for name, text in TEXTS.items() if "\nlayer: " in text]
WITH_TARGETS = [name for name in PAPERS if name not in LAYERED and "\ntarget_modules: " in TEXTS[name]]


@pytest.mark.parametrize("name", LAYERED)
def test_every_key_of_a_layer_is_its_own_or_its_schedules(name):
    config = config_of(name)
    entry = LAYERS[config.model.layer]
    model, _ = built(name)
    layers = [module for module in model.modules() if isinstance(module, FactoredLinear)]
    assert {type(layer) for layer in layers} == {entry.cls}
    named = {"rank": config.optimizer.rank} if "rank" in config.given else {}
    for key, value in {**named, **(config.model.layer_args or {})}.items():
        if key in accepted_keywords(entry.cls):
            assert all(getattr(layer, key) == value for layer in layers), key
        else:
            assert key in accepted_keywords(entry.schedule)


@pytest.mark.parametrize("name", WITH_TARGETS)
def test_the_targets_are_the_matrices_of_a_block(name):
    config = config_of(name)
    model, optimizer = built(name)
    held = sum(len(group["params"]) for group in filter(is_for_matrices, optimizer.param_groups))
    per_block = {("attn", "mlp"): 7, ("mlp",): 3}[tuple(config.optimizer.target_modules)]
    assert held == per_block * model.config.num_hidden_layers


# ---- and it trains --------------------------------------------------------------------------------------------------

SMALL = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
TEXT = inspect.getsource(inspect)[:256].encode()


METHODS = {re.sub("llama_[0-9]+[mb]_", "", name): name for name in EMBEDDED}  # the last of each
TRAINED = [pytest.param(name, marks=() if name in METHODS.values() else pytest.mark.thorough) for name in EMBEDDED]


@pytest.mark.parametrize("name", TRAINED)
def test_a_few_steps_on_some_text_lower_its_loss(name):
    """On a smaller model, from a rate that rises, as a recipe's does."""
    rank = min(32, config_of(name).optimizer.rank)
    config = config_of(name, "--model", "2m", "--rank", str(rank))
    torch.manual_seed(0)
    model = converted(build_llama("2m", vocab_size=128, dtype=DTYPES[config.model.dtype], **SMALL), config)
    optimizer = build_optimizer(model, config.optimizer, config.run)
    rates = [group["lr"] for group in optimizer.param_groups]
    tokens = torch.tensor(list(TEXT)).view(4, 64)
    losses = []
    for step in range(STEPS):
        loss = model(input_ids=tokens, labels=tokens).loss
        losses.append(loss.item())
        loss.backward()
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * (step + 1) / STEPS
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < losses[0] - 0.1
