"""``benchmarks/published_scripts.py`` on a small script of our own, and what its results say."""

import json
import os
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
CHECKOUT = Path(__file__).parent / "checkout"
STEPS = 5


@pytest.fixture(scope="module")
def published():
    """The command's modules, as ``python benchmarks/published_scripts.py`` finds them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHMARKS))
        import published_list
        import published_scripts
        import stand_ins

        yield published_scripts, published_list, stand_ins


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    folder = tmp_path_factory.mktemp("corpus")
    text = Path(__file__).read_text()
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel()
    tokenizer.train_from_iterator([text], trainers.BpeTrainer(vocab_size=300, show_progress=False))
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder / "tokenizer")
    (folder / "passages.json").write_text(json.dumps([text[i : i + 99] for i in range(0, 40 * 50, 50)]))
    return folder


@pytest.fixture
def script(published):
    _, known, _ = published
    swap = known.Edit("pretrain.py", "from galore_torch import GaLoreAdamW", "from gracile.optim import GaLoreAdamW")
    group = '    {"params": [model.proj.weight], "rank": 4, "update_proj_gap": 2, "scale": 0.25, "proj_type": "std"},'
    svd = known.Edit("pretrain.py", group, group.replace("}", ', "subspace_method": "svd"}'))
    return known.Script(
        name="ours",
        repository="nobody/nothing",
        marker="model.py",
        file="pretrain.py",
        arguments=(str(STEPS),),
        change=(swap,),
        exact=(swap, svd),
        steps=STEPS,
        elsewhere=(("GaLoreAdamW", "fused", True), ("GaLoreAdamW", "fused", False)),
    )


def run_here(published):
    _, _, stand_ins = published
    return lambda job, printed: stand_ins.run(job)


def test_a_script_runs_as_published_and_with_the_import_line_changed(published, corpus, script):
    command, _, _ = published
    before = surroundings()
    row = command.row(script, CHECKOUT, corpus, "cpu", run_here(published))
    assert row["difference"] == 0
    assert row["loss_default"] != row["loss_exact"] == row["loss"]
    assert (row["lines"], row["lines_exact"]) == (1, 2)
    assert row["diff"].splitlines() == [
        "+++ pretrain.py",
        "-from galore_torch import GaLoreAdamW",
        "+from gracile.optim import GaLoreAdamW",
    ]
    assert row["accepted"] == ["lr", "proj_type", "rank", "scale", "subspace_method", "update_proj_gap"]
    assert row["refused"] == ["fused must be None or False, got True: parameters are stepped one after the other"]
    assert row["ends_with"] is None
    assert len(row["at_steps"]["default"]) == 1
    assert surroundings() == before


def surroundings():
    """What a run changes for its time."""
    modules = {name for name in ("wandb", "loguru", "model") if name in sys.modules}
    functions = torch.autograd.backward, torch.cuda.set_device, transformers.AutoTokenizer.from_pretrained
    return dict(os.environ), os.getcwd(), modules, functions, torch.distributed.is_initialized()


def test_first_weights_are_taken_over(published, corpus, script):
    """Where layers draw them in another order: here, from another seed."""
    command, known, _ = published
    seed = known.Edit("pretrain.py", "torch.manual_seed(0)", "torch.manual_seed(1)")
    other = replace(script, change=(seed,), exact=())
    assert command.row(other, CHECKOUT, corpus, "cpu", run_here(published))["difference"] > 0
    taken = replace(other, same_start=True)
    assert command.row(taken, CHECKOUT, corpus, "cpu", run_here(published))["difference"] == 0


def test_a_script_that_does_not_run_says_why(published, corpus, script):
    command, known, _ = published
    unknown = known.Edit("pretrain.py", "from galore_torch import Other", "pass")
    with pytest.raises(command.Failed, match="0 times the line 'from galore_torch import Other', not once"):
        command.row(replace(script, change=(unknown,)), CHECKOUT, corpus, "cpu", run_here(published))
    broken = known.Edit("pretrain.py", "    optimizer.step()", '    raise SystemExit("no more")')
    with pytest.raises(command.Failed, match="1 steps of 5: SystemExit: no more"):
        command.row(replace(script, change=(broken,)), CHECKOUT, corpus, "cpu", run_here(published))


# ---- its results ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def told(published):
    return json.loads(published[0].RESULTS.read_text(encoding="utf-8"))


def test_the_pages_are_those_of_the_results(published, told):
    command, _, _ = published
    page = command.PAGE.read_text(encoding="utf-8")
    between = page.partition(command.BEGIN)[2].partition(command.END)[0]
    assert between.strip() == command.page(told).strip()
    assert command.RESULTS.with_suffix(".md").read_text(encoding="utf-8") == command.page(told)


def test_the_results_keep_the_promise(published, told):
    """Of every script that is known: losses as near as it says, and one line where the optimizer is an import."""
    _, known, _ = published
    assert [row["name"] for row in told["scripts"]] == [script.name for script in known.SCRIPTS]
    for row, script in zip(told["scripts"], known.SCRIPTS, strict=True):
        assert row["difference"] <= script.within, row["name"]
        if "import" in script.change[0].old and len(script.change) == 1:
            assert (row["lines"], row["lines_exact"]) == (1, 1 + (len(script.exact) > 1)), row["name"]


# ---- what the page says of bitsandbytes -----------------------------------------------------------------------------


def test_galores_8_bit_class_moves_small_moments_only_with_the_stand_in(published, monkeypatch):
    """Of 128 x 16 moments; bitsandbytes takes the arguments by position for ``max_unorm`` and ``skip_zeros``."""
    pytest.importorskip("bitsandbytes")
    import galore_torch

    from gracile.optim import GaLoreAdamW8bit

    _, _, stand_ins = published
    monkeypatch.setattr(torch.cuda, "synchronize", lambda *_: None)

    def moved(cls, **keys):
        torch.manual_seed(0)
        weight = torch.nn.Parameter(torch.zeros(128, 128))
        group = {"params": [weight], "rank": 16, "update_proj_gap": 20, "scale": 0.25, "proj_type": "std", **keys}
        optimizer = cls([group], lr=0.01, weight_decay=0.0)
        for _ in range(3):
            weight.grad = torch.randn(128, 128)
            optimizer.step()
        return weight.detach()

    assert not moved(galore_torch.GaLoreAdamW8bit).any()
    for replaced in stand_ins.of_older_bitsandbytes():
        monkeypatch.setattr(*replaced)
    ours = moved(GaLoreAdamW8bit, subspace_method="svd")
    assert ours.any()
    torch.testing.assert_close(moved(galore_torch.GaLoreAdamW8bit), ours, rtol=0, atol=1e-6)
