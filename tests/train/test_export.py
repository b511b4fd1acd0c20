"""``gracile export``: a run's folder, masked, in; a smaller model that says the same, and a report, out."""

import json
import shutil

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from gracile.models import sparse_export
from gracile.train.cli import COMMANDS
from gracile.train.config.arguments import DataArguments
from gracile.train.config.parser import load_config
from gracile.train.data.blocks import make_blocks
from gracile.train.data.corpus import open_corpus
from gracile.train.export import loss, main
from gracile.train.pretrain import pretrain

SETTINGS = {
    "model": "2m",
    "model_overrides": '{"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, '
    '"num_attention_heads": 2, "vocab_size": 400}',
    "block_size": 32,
    "validation_blocks": 20,
    "optimizer": "adamw",
    "learning_rate": 0.01,
    "max_steps": 8,
    "per_device_train_batch_size": 4,
    "per_device_eval_batch_size": 10,
    "save_strategy": "no",
    "report_to": "none",
    "disable_tqdm": True,
}


def mask(model):
    torch.manual_seed(0)
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and ("attn" in name or "mlp" in name):
            kept = torch.rand_like(module.weight).topk(module.in_features // 10, 1).indices
            with torch.no_grad():
                module.weight.mul_(torch.zeros_like(module.weight).scatter_(1, kept, 1))


@pytest.fixture(scope="module")
def trained(corpus, tmp_path_factory):
    """A run that has ended."""
    folder = tmp_path_factory.mktemp("runs") / "dense"
    flags = [f"--{key}={value}" for key, value in (SETTINGS | {"dataset": corpus, "output_dir": folder}).items()]
    pretrain(load_config(flags))
    return folder


@pytest.fixture(scope="module")
def sparse(trained):
    """The same with 90 percent of its matrices' weights zero."""
    folder = trained.with_name("masked")
    shutil.copytree(trained, folder)
    model = AutoModelForCausalLM.from_pretrained(trained)
    mask(model)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def exported(sparse):
    """By default: the folder, and its report."""
    assert main([str(sparse)]) == 0
    folder = sparse.with_name("masked-sparse")
    return folder, json.loads((folder / "report.json").read_text())


def test_the_model_says_the_same(sparse, exported):
    folder, told = exported
    before, after = AutoModelForCausalLM.from_pretrained(sparse), sparse_export.load(folder)
    text = "def main(argv):"
    ids = AutoTokenizer.from_pretrained(folder)(text, return_tensors="pt")["input_ids"]
    assert ids.equal(AutoTokenizer.from_pretrained(sparse)(text, return_tensors="pt")["input_ids"])
    with torch.no_grad():
        torch.testing.assert_close(after(ids).logits, before(ids).logits)
    assert told["perplexity"]["sparse"] == pytest.approx(told["perplexity"]["dense"], rel=1e-5)
    generated = after.generate(ids, max_new_tokens=3, do_sample=False)
    assert generated.equal(before.generate(ids, max_new_tokens=3, do_sample=False))


def test_the_report_is_of_what_is_there(sparse, exported):
    folder, told = exported
    assert told["zeros"] == pytest.approx(0.9, abs=0.02)
    assert told["bytes"]["sparse"] == (folder / "sparse.safetensors").stat().st_size
    written = (sparse / "model.safetensors").stat().st_size
    assert told["bytes"]["dense"] == pytest.approx(written, rel=0.02), "but for the file's head"
    layout = json.loads((folder / "sparse.json").read_text())["layers"]
    forms = {name: layer["form"] for name, layer in told["layers"].items()}
    assert layout.keys() == {name for name, form in forms.items() if form != "dense"}
    assert len(forms) == 14
    for layer in told["layers"].values():
        assert layer["form"] == min(layer["ms"]["1"], key=layer["ms"]["1"].get), "the fastest of those measured"
    by = told["forms"]["1"]
    for form in ("dense", "condensed", "csr"):
        assert by[form]["layers"] == 14
        summed = sum(layer["ms"]["1"][form] for layer in told["layers"].values())
        assert by[form]["ms"] == pytest.approx(summed)
    assert by["as written"]["ms"] == pytest.approx(sum(min(x["ms"]["1"].values()) for x in told["layers"].values()))
    assert told["model_ms"]["1"].keys() == {"dense", "sparse"}


def test_the_loss_is_the_runs(trained, metrics):
    """Of the model that has not been masked, its last evaluation."""
    settings = yaml.safe_load((trained / "run.yaml").read_text())["config"]
    data = DataArguments(**{key: settings[key] for key in ("dataset", "block_size", "validation_blocks")})
    blocks = make_blocks(open_corpus(data), AutoTokenizer.from_pretrained(trained), data)
    assert len(blocks.validation) == 20
    found = loss(AutoModelForCausalLM.from_pretrained(trained), blocks)
    assert found == pytest.approx(metrics(trained)["validation_loss"], rel=1e-5)
    assert found < 5.9, "it has learned something: ln 400 is 5.99"


def run_json(capsys, *arguments):
    capsys.readouterr()
    assert main([str(a) for a in arguments] + ["--json"]) == 0
    return json.loads(capsys.readouterr().out)


@pytest.mark.parametrize("form", ["dense", "condensed", "csr"])
def test_a_form_is_chosen(form, sparse, tmp_path, capsys):
    told = run_json(
        capsys, sparse, "--sparse", form, "--tokens", 7, "--output_dir", tmp_path / "out", "--validation_blocks", 3
    )
    assert {layer["form"] for layer in told["layers"].values()} == {form}
    assert told["forms"].keys() == told["model_ms"].keys() == {"1", "7"}
    assert told["data"]["validation_blocks"] == 3
    smaller = told["bytes"]["dense"] / told["bytes"]["sparse"]
    assert smaller == pytest.approx(1, abs=0.1) if form == "dense" else smaller > 1.5


def test_blocks_and_bf16(sparse, tmp_path, capsys):
    model = AutoModelForCausalLM.from_pretrained(sparse, dtype=torch.bfloat16)
    with torch.no_grad():
        for layer in model.model.layers:
            for linear in (layer.mlp.gate_proj, layer.mlp.up_proj, layer.mlp.down_proj):
                linear.weight.normal_(std=0.02)
                linear.weight[32:], linear.weight[:, 32:] = 0, 0
    shutil.copytree(sparse, tmp_path / "run")
    model.save_pretrained(tmp_path / "run")
    told = run_json(capsys, tmp_path / "run", "--sparse", "blocks", "--output_dir", tmp_path / "out")
    assert told["dtype"] == "bfloat16"
    forms = {name.split(".")[-1]: layer["form"] for name, layer in told["layers"].items()}
    assert {name for name, form in forms.items() if form == "blocks"} == {"gate_proj", "up_proj", "down_proj"}
    assert set(forms.values()) == {"blocks", "dense"}, "where blocks leave nothing out, layers stay dense"
    assert told["perplexity"]["sparse"] == pytest.approx(told["perplexity"]["dense"], rel=0.01)
    loaded = sparse_export.load(tmp_path / "out")
    assert loaded.dtype == torch.bfloat16
    assert loaded.model.layers[0].mlp.up_proj.block == 32


def test_other_data_and_no_run_file(sparse, corpus, tmp_path, capsys):
    bare = tmp_path / "bare"
    shutil.copytree(sparse, bare)
    (bare / "run.yaml").unlink()
    message = "holds no run.yaml: say what to measure the perplexity on with --dataset"
    assert refused(capsys, bare).endswith(message)
    told = run_json(capsys, bare, "--dataset", corpus / "inspect.txt", "--validation_blocks", 2)
    assert told["data"] == {"dataset": str(corpus / "inspect.txt"), "validation_blocks": 2, "block_size": 256}
    assert (tmp_path / "bare-sparse" / "report.json").is_file()


def test_the_table_is_read(sparse, tmp_path, capsys):
    folder = tmp_path / "made" / "out"
    assert main([str(sparse), "--output_dir", str(folder), "--sparse", "csr"]) == 0
    out = capsys.readouterr().out
    assert "14 sparse linear layers" in out.splitlines()[0]
    assert "written as 14 csr" in out.splitlines()[0]
    for word in ("weights", "perplexity", "model, 1 token", "condensed", "as written", f"{folder}/ holds the model"):
        assert word in out
    assert "nan" not in out


def refused(capsys, *arguments):
    capsys.readouterr()
    assert main([str(a) for a in arguments]) == 2
    err = capsys.readouterr().err
    assert err.startswith("gracile export: ")
    assert err.count("\n") == 1
    return err.rstrip("\n")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--sparse", "csc"], "sparse must be one of auto, dense, condensed, csr, blocks, 2:4, got 'csc'"),
        (["--sparse", "2:4", "--device", "cpu"], "no layer can be held in the form '2:4' in torch.float32 on cpu"),
        (["--sparse", "blocks"], "no layer can be held in the form 'blocks'"),
        (["--tokens", "0"], "tokens must be at least 1, got 0"),
        (["--tokens", "many"], "tokens must be a whole number, got 'many'"),
        (["--tokens", "1025"], "tokens must be at most 1024, the positions that the model knows, got 1025"),
        (["--validation_blocks", "0"], "validation_blocks must be at least 1, got 0"),
        (["--dataset", "/no/where.txt"], "dataset '/no/where.txt' does not exist"),
        (["--output_dir", "/proc/out"], "output_dir '/proc/out' cannot be made"),
        (["--device", "tpu9"], "device 'tpu9' cannot be used"),
        (["--tokns", "3"], "unrecognized arguments: --tokns 3"),
    ],
)
def test_bad_input_gets_one_line(arguments, message, sparse, tmp_path, capsys):
    given = arguments if "--output_dir" in arguments else [*arguments, "--output_dir", tmp_path / "out"]
    assert message in refused(capsys, sparse, *given)
    assert not (tmp_path / "out").exists(), "nothing is written"


def test_bad_checkpoints(trained, sparse, tmp_path, capsys):
    assert "CHECKPOINT" in refused(capsys)
    assert "holds no config.json: give the folder of a saved model" in refused(capsys, tmp_path)
    out = ["--output_dir", tmp_path / "out"]
    assert "no linear layer is at least 50% zeros" in refused(capsys, trained, *out)
    assert "holds something already" in refused(capsys, sparse, "--output_dir", trained)
    broken = tmp_path / "broken"
    shutil.copytree(sparse, broken)
    (broken / "model.safetensors").write_bytes(b"x")
    assert "cannot be loaded" in refused(capsys, broken, *out)
    shutil.copy(sparse / "model.safetensors", broken)
    (broken / "run.yaml").write_text(yaml.safe_dump({"gracile": "0"}))
    assert "is not what gracile pretrain writes" in refused(capsys, broken, *out)
    assert not (tmp_path / "out").exists()


def test_a_checkpoint_of_other_layers_is_refused(sparse, tmp_path, capsys):
    """As a checkpoint within a run of layers that store less holds it."""
    folder = tmp_path / "layers"
    shutil.copytree(sparse, folder)
    state = load_file(folder / "model.safetensors")
    state["model.layers.0.mlp.up_proj.values"] = state.pop("model.layers.0.mlp.up_proj.weight")
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    assert "does not hold a model of plain layers" in refused(capsys, folder, "--output_dir", tmp_path / "out")


def test_it_is_a_command():
    assert "export" in COMMANDS
