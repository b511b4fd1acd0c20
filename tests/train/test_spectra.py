"""``gracile spectra``: two folders in; a table, JSON and a picture out."""

import json
import math
import shutil

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from gracile.models import build_llama
from gracile.spectra import Measures, compare
from gracile.train.cli import COMMANDS
from gracile.train.spectra import main
from gracile.train.weight_pairs import place_of

SMALL = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 40}
PACKED = torch.ones(32, 32, dtype=torch.uint8)
KINDS = [f"self_attn.{part}_proj" for part in "qkvo"] + [f"mlp.{part}_proj" for part in ("gate", "up", "down")]


def randomize_lora(model):
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.1)


def saved_lora(folder, base, **config):
    """An adapter in ``folder / adapter``, and the model that it makes in ``folder / merged``."""
    model = AutoModelForCausalLM.from_pretrained(base)
    model = get_peft_model(model, LoraConfig(**{"r": 4, "target_modules": ["q_proj", "down_proj"], **config}))
    randomize_lora(model)
    model.save_pretrained(folder / "adapter")
    model.merge_and_unload().save_pretrained(folder / "merged")
    return folder / "adapter", folder / "merged"


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("spectra") / "base"
    torch.manual_seed(0)
    build_llama("2m", **SMALL).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def tuned(base):
    """The same with noise on every weight, and a spike in one matrix."""
    folder = base.with_name("tuned")
    shutil.copytree(base, folder)
    torch.manual_seed(0)
    state = load_file(base / "model.safetensors")
    state = {name: tensor + 1e-4 * torch.randn_like(tensor) for name, tensor in state.items()}
    state["model.layers.1.mlp.up_proj.weight"] += torch.outer(torch.ones(48), torch.ones(32)) / 10
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def lora(base):
    return saved_lora(base.parent, base)


def told(capsys, tmp_path, *arguments):
    """What is printed, and what is in the JSON."""
    capsys.readouterr()
    path = tmp_path / "told.json"
    assert main([*map(str, arguments), "--json", str(path)]) == 0
    return capsys.readouterr().out, json.loads(path.read_text())


def by_name(report):
    return {one["name"]: one for one in report["matrices"]}


def test_two_models(base, tuned, tmp_path, capsys):
    out, report = told(capsys, tmp_path, base, tuned)
    found = by_name(report)
    assert list(found) == [f"model.layers.{i}.{kind}.weight" for i in range(2) for kind in sorted(KINDS)]
    one, state = (load_file(folder / "model.safetensors") for folder in (base, tuned))
    for name, measures in found.items():
        expected = compare(one[name], state[name])._asdict()
        for key in Measures._fields:
            if not key.startswith("control"):  # whose seed is of the name
                assert measures[key] == pytest.approx(expected[key] if key != "similarity" else [*expected[key]]), key
    assert found["model.layers.1.mlp.up_proj.weight"]["intruders"] == 1
    assert report["all"]["intruders"] == pytest.approx(1 / 14)
    assert report["by_layer"]["1"]["intruders"] == pytest.approx(1 / 7)
    assert report["by_layer"]["0"]["intruders"] == 0
    assert report["by_kind"]["mlp.up_proj"]["intruders"] == 0.5
    largest = max(measures["left_angle_max"] for measures in found.values())
    assert report["all"]["left_angle_max"] == largest
    assert report["by_kind"].keys() == set(KINDS)
    assert report["settings"] == {"k": 10, "epsilon": 0.5, "subspace": 64}
    lines = out.splitlines()
    assert lines[0].startswith(f"{tuned} against {base}: 14 matrices; of 140 leading left singular vectors 1 are")
    names = [line.split()[0] for line in lines if line.startswith("  ")]
    assert names == ["layer", "0", "1", "kind", *sorted(KINDS), "all"]
    assert "nan" not in out


def test_a_model_and_itself(base, tmp_path, capsys):
    out, report = told(capsys, tmp_path, base, base)
    assert "of 140 leading left singular vectors 0 are intruders" in out
    assert "nan" not in out
    assert report["all"]["unchanged"] == 1
    assert report["all"]["relative_norm"] == 0


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"use_rslora": True, "lora_alpha": 3},
        {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {r"layers\.1\.mlp\.down_proj": 32}},
        {"target_modules": "all-linear"},
    ],
    ids=["plain", "rslora", "patterns", "all-linear"],
)
def test_an_adapter_is_what_it_makes_of_the_model(config, base, tmp_path, capsys):
    adapter, merged = saved_lora(tmp_path, base, **config)
    out, report = told(capsys, tmp_path, base, adapter)
    _, other = told(capsys, tmp_path, base, merged)
    found, expected = by_name(report), by_name(other)
    assert len(found) == (14 if config.get("target_modules") else 4)
    for name, measures in found.items():
        for key in Measures._fields:
            assert measures[key] == pytest.approx(expected[name][key], rel=1e-3, abs=1e-3), (name, key)
    assert all(one["unchanged"] == 1 for name, one in expected.items() if name not in found)
    assert f"{len(found)} matrices" in out.splitlines()[0]


def test_what_was_trained_whole_beside_the_factors(base, tmp_path, capsys):
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(base),
        LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["up_proj", "lm_head"]),
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "modules_to_save" in name:
                parameter.mul_(1.5)
    model.save_pretrained(tmp_path / "adapter")
    _, report = told(capsys, tmp_path, base, tmp_path / "adapter", "--embeddings")
    found = by_name(report)
    assert {one["kind"] for one in found.values()} == {"lm_head", "mlp.up_proj", "self_attn.q_proj"}
    assert found["lm_head.weight"]["drift"] == pytest.approx(0.5, abs=1e-6)
    assert found["model.layers.0.mlp.up_proj.weight"]["drift"] == pytest.approx(0.5, abs=1e-6)


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gpt2")
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=40, n_positions=16))
    model.save_pretrained(folder / "base")
    return folder


def test_inputs_by_outputs_are_turned(gpt2, tmp_path, capsys):
    """GPT-2's Conv1D: the left vectors are those of the outputs there too, of a model and of an adapter."""
    model = GPT2LMHeadModel.from_pretrained(gpt2 / "base")
    model = get_peft_model(model, LoraConfig(r=2, target_modules=["c_attn", "c_proj"], fan_in_fan_out=True))
    randomize_lora(model)
    model.save_pretrained(tmp_path / "adapter")
    model.merge_and_unload().save_pretrained(tmp_path / "merged")
    (_, one), (_, other) = (told(capsys, tmp_path, gpt2 / "base", tmp_path / name) for name in ("adapter", "merged"))
    found, expected = by_name(one), by_name(other)
    assert {tuple(measures["shape"]) for measures in found.values()} == {(96, 32), (32, 32), (32, 128)}
    for name, measures in found.items():
        for key in Measures._fields:
            assert measures[key] == pytest.approx(expected[name][key], rel=1e-3, abs=1e-3), (name, key)
    name = "transformer.h.0.attn.c_attn.weight"
    W0, W1 = (load_file(folder / "model.safetensors")[name].T for folder in (gpt2 / "base", tmp_path / "merged"))
    assert expected[name]["similarity"] == pytest.approx([*compare(W0, W1).similarity])


def grown(tensor):
    """Experts of one tensor by half more each, the first by nothing; others to double."""
    return tensor * (1 + 0.5 * torch.arange(len(tensor)).view(-1, 1, 1)) if tensor.ndim == 3 else 2 * tensor


def test_experts_are_matrices(tmp_path, capsys):
    """In one tensor, and in one each: a row of the table for all of a layer."""
    torch.manual_seed(0)
    tensors = {
        "model.layers.0.mlp.experts.down_proj": torch.randn(3, 12, 16),
        "model.layers.1.mlp.experts.0.w1.weight": torch.randn(12, 16),
        "model.layers.1.mlp.experts.1.w1.weight": torch.randn(12, 16),
        "model.layers.1.conv.weight": torch.randn(12, 1, 4),
    }
    for name in ("base", "tuned"):
        (tmp_path / name).mkdir()
        save_file(tensors, tmp_path / name / "model.safetensors")
        tensors = {key: grown(tensor) for key, tensor in tensors.items()}
    _, report = told(capsys, tmp_path, tmp_path / "base", tmp_path / "tuned")
    drifts = {name: one["drift"] for name, one in by_name(report).items()}
    assert drifts == pytest.approx(
        {f"model.layers.0.mlp.experts.down_proj[{i}]": 0.5 * i for i in range(3)}
        | {f"model.layers.1.mlp.experts.{i}.w1.weight": 1 for i in range(2)}, abs=1e-6
    )  # fmt: skip
    assert report["by_kind"]["mlp.experts.down_proj"]["drift"] == pytest.approx(0.5, abs=1e-6)
    assert report["by_kind"]["mlp.experts.w1"]["matrices"] == 2


def test_experts_that_are_held_inputs_first(tmp_path, capsys):
    torch.manual_seed(0)
    tensors = {"model.layers.0.mlp.experts.gate_up_proj": torch.randn(2, 16, 24)}
    for name in ("base", "tuned"):
        (tmp_path / name).mkdir()
        save_file(tensors, tmp_path / name / "model.safetensors")
        (tmp_path / name / "config.json").write_text('{"model_type": "gpt_oss"}')
    _, report = told(capsys, tmp_path, tmp_path / "base", tmp_path / "tuned")
    assert [one["shape"] for one in report["matrices"]] == [[24, 16]] * 2


def test_shards_and_bf16(base, tuned, tmp_path, capsys):
    for folder in (base, tuned):
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
        model.save_pretrained(tmp_path / folder.name, max_shard_size="20KB")
        assert (tmp_path / folder.name / "model.safetensors.index.json").is_file()
    _, report = told(capsys, tmp_path, tmp_path / "base", tmp_path / "tuned")
    assert report["all"]["intruders"] == pytest.approx(1 / 14)
    assert 0.1 < report["all"]["unchanged"] < 0.9


def test_chosen_modules(base, tuned, tmp_path, capsys):
    kinds = lambda *flags: set(told(capsys, tmp_path, base, tuned, *flags)[1]["by_kind"])  # noqa: E731
    assert kinds("--modules", "q_proj,mlp.up") == {"self_attn.q_proj", "mlp.up_proj"}
    assert kinds("--modules", r".*layers\.1\.mlp\.(up|down)_proj\.weight") == {"mlp.up_proj", "mlp.down_proj"}
    assert kinds("--embeddings") == {*KINDS, "lm_head", "model.embed_tokens"}
    assert kinds("--embeddings", "--modules", "lm_head") == {"lm_head"}


def test_the_picture(base, tuned, tmp_path, capsys):
    path = tmp_path / "spectra.svg"
    told(capsys, tmp_path, base, tuned, "--plot", path, "--modules", "up_proj,q_proj")
    for title in ("Intruder dimensions", "Similarity to the base", "Effective rank of the update", "Principal angles"):
        assert title in path.read_text()


def test_a_picture_of_nothing_in_no_layer(base, tmp_path, capsys):
    path = tmp_path / "spectra.png"
    told(capsys, tmp_path, base, base, "--plot", path, "--embeddings", "--modules", "lm_head")
    assert path.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("name", "layer", "kind"),
    [
        ("model.layers.3.self_attn.q_proj.weight", "model.layers 3", "self_attn.q_proj"),
        ("transformer.h.11.mlp.c_fc.weight", "transformer.h 11", "mlp.c_fc"),
        ("encoder.block.2.layer.0.SelfAttention.q.weight", "encoder.block 2", "layer.0.SelfAttention.q"),
        ("model.layers.1.mlp.experts.17.w1.weight", "model.layers 1", "mlp.experts.w1"),
        ("lm_head.weight", "", "lm_head"),
    ],
)
def test_where_a_matrix_is(name, layer, kind):
    assert place_of(name)[1:] == (layer, kind)


def test_two_stacks_have_layers_each(tmp_path, capsys):
    tensors = {f"{stack}.block.0.layer.0.q.weight": torch.eye(4) for stack in ("encoder", "decoder")}
    save_file(tensors, tmp_path / "model.safetensors")
    _, report = told(capsys, tmp_path, tmp_path, tmp_path)
    assert list(report["by_layer"]) == ["decoder.block 0", "encoder.block 0"]


# ---- refused --------------------------------------------------------------------------------------------------------


def refused(capsys, *arguments):
    capsys.readouterr()
    assert main([str(a) for a in arguments]) == 2
    err = capsys.readouterr().err
    assert err.startswith("gracile spectra: ")
    assert err.count("\n") == 1
    return err.rstrip("\n")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--k", "0"], "k must be at least 1, got 0"),
        (["--k", "ten"], "k must be a whole number, got 'ten'"),
        (["--epsilon", "1.5"], "epsilon must be above 0 and at most 1, got 1.5"),
        (["--epsilon", "nan"], "epsilon must be above 0 and at most 1, got nan"),
        (["--subspace", "-1"], "subspace must be at least 1, got -1"),
        (["--modules", "q_prj"], "modules: 'q_prj' matches no matrix; did you mean 'q_proj'?"),
        (["--modules", "lm_head"], "modules: 'lm_head' matches no matrix; known:"),
        (["--modules", "("], "modules: '(' is no regular expression"),
        (["--modules", ","], "modules is empty"),
        (["--device", "tpu9"], "device 'tpu9' cannot be used"),
        (["--json", "out.txt"], "json must be a .json file, got 'out.txt'"),
        (["--plot", "/no/where/out.png"], "plot: the folder of '/no/where/out.png' does not exist"),
        (["--colour", "red"], "unrecognized arguments: --colour red"),
    ],
)
def test_bad_arguments_get_one_line(arguments, message, base, tuned, capsys):
    assert message in refused(capsys, base, tuned, *arguments)


def without_layers(folder):
    save_file({"lm_head.weight": torch.ones(3, 3)}, folder / "model.safetensors")


def only_pickled(folder):
    (folder / "model.safetensors").unlink()
    torch.save({}, folder / "pytorch_model.bin")


def shard_outside(folder):
    (folder / "model.safetensors").rename(folder.parent / "stray.safetensors")
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../stray.safetensors"}}')


def missing_shard(folder):
    files = dict.fromkeys(load_file(folder / "model.safetensors"), "a.safetensors")
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))


def changed(**changes):
    def change(folder):
        state = load_file(folder / "model.safetensors")
        for name, tensor in changes.items():
            name = next(key for key in state if name in key)
            state.pop(name)
            if tensor is not None:
                state[name] = tensor
        save_file(state, folder / "model.safetensors")

    return change


@pytest.mark.parametrize(
    ("which", "harm", "message"),
    [
        ("base", lambda folder: shutil.rmtree(folder), "is no folder; give that of a saved model"),
        ("tuned", lambda folder: (folder / "model.safetensors").unlink(), "holds neither model.safetensors nor"),
        ("tuned", lambda folder: (folder / "model.safetensors").write_bytes(b"no"), "safetensors' cannot be read"),
        ("tuned", only_pickled, "holds only pytorch_model.bin; save it again with save_pretrained"),
        ("tuned", shard_outside, "has no weight_map from tensors to files beside it"),
        ("tuned", missing_shard, "a.safetensors' cannot be read"),
        ("base", without_layers, "holds no matrix of a numbered layer; --embeddings takes others"),
        ("base", lambda folder: (folder / "config.json").write_text("["), "config.json cannot be read"),
        ("tuned", changed(q_proj=None), "lacks model.layers.0.self_attn.q_proj.weight, which BASE has"),
        ("tuned", changed(q_proj=torch.ones(32, 31)), "q_proj.weight is 32 x 32 and 32 x 31 in BASE and TUNED"),
        ("tuned", changed(q_proj=torch.full((32, 32), math.nan)), "q_proj.weight: W1 holds infinite or NaN weights"),
        ("base", changed(q_proj=PACKED), "q_proj.weight in U8, and weights that are quant"),
        ("tuned", changed(q_proj=PACKED), "q_proj.weight in U8, and weights that are quant"),
    ],
)  # fmt: skip
def test_bad_folders_get_one_line(which, harm, message, base, tuned, tmp_path, capsys):
    for folder in (base, tuned):
        shutil.copytree(folder, tmp_path / folder.name)
    harm(tmp_path / which)
    assert message in refused(capsys, tmp_path / "base", tmp_path / "tuned")


def config(**changes):
    def change(folder):
        path = folder / "adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return change


def adapter_state(change):
    def harm(folder):
        state = load_file(folder / "adapter_model.safetensors")
        change(state)
        save_file(state, folder / "adapter_model.safetensors")

    return harm


Q_A = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
Q_B = Q_A.replace("lora_A", "lora_B")


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (config(peft_type="IA3"), "is a peft adapter of type IA3, and LORA alone is read; merge it"),
        (config(use_dora=True), "is a LoRA with use_dora, which is not read; merge it into its model first"),
        (config(init_lora_weights="pissa"), "began with init_lora_weights 'pissa', which changes the base; merge"),
        (config(target_parameters=["experts"]), "is a LoRA with target_parameters, which is not read"),
        (lambda folder: (folder / "adapter_config.json").write_text("{"), "adapter_config.json cannot be read"),
        (lambda folder: (folder / "adapter_model.safetensors").unlink(), "and no adapter_model.safetensors"),
        (adapter_state(lambda state: state.pop(Q_A)), "q_proj.weight, lora_B, and lacks the other"),
        (adapter_state(lambda state: state.update({Q_A: torch.ones(3, 32)})), "(32, 4) and (3, 32), which do not fit"),
        (adapter_state(lambda state: state.update({Q_A: torch.ones(4, 31)})), "is 32 x 32 and 32 x 31 in BASE"),
        (adapter_state(lambda state: state.update({"x.lora_A.weight": torch.ones(4, 31)})), "holds x.lora_A.weight"),
        (adapter_state(lambda state: state.update({Q_A: math.nan * state[Q_A]})), "A holds infinite or NaN weights"),
        (adapter_state(lambda state: state.update({Q_A.replace("lora_A", "lora_magnitude_vector"): torch.ones(2)})),
         "A change that is no plain LoRA must be merged first"),
    ],
)  # fmt: skip
def test_bad_adapters_get_one_line(harm, message, base, lora, tmp_path, capsys):
    shutil.copytree(lora[0], tmp_path / "adapter")
    harm(tmp_path / "adapter")
    assert message in refused(capsys, base, tmp_path / "adapter")


def test_what_is_not_a_pair(base, lora, capsys):
    assert "BASE " in refused(capsys, lora[0], base)
    assert "is an adapter; give the folder of the model that it was trained on" in refused(capsys, lora[0], base)
    assert "changes none of the matrices that were chosen" in refused(capsys, base, lora[0], "--modules", "v_proj")
    assert "TUNED" in refused(capsys, base)


def test_it_is_a_command():
    assert "spectra" in COMMANDS
