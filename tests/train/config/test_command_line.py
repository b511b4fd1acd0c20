"""How the commands are given their keys, and how they speak."""

import json
import os
import re
import select
import shutil
import subprocess
import time

import pytest
import yaml

from gracile.train import cli, completion, memory
from gracile.train.atomic_write import non_finite, valid_json
from gracile.train.config.parser import load_config
from gracile.train.errors import BadInput
from gracile.train.pretrain import main
from gracile.train.run import report


@pytest.mark.parametrize(
    "line",
    [
        ["--max_steps", "1", "FILE"],
        ["--max_steps=1", "FILE"],
        ["--bf16", "FILE", "--max_steps", "1"],
        ["--no_dataloader_pin_memory", "FILE", "--max_steps", "1"],
        ["--max_steps", "1", "--target_modules", "q_proj", "v_proj", "FILE"],
        ["--local_rank=0", "--max_steps", "1", "FILE"],
    ],
)
def test_the_configuration_may_stand_anywhere(tiny, line):
    path = tiny()
    config = load_config([path if word == "FILE" else word for word in line])
    assert (config.name, config.run.max_steps) == ("tiny", 1)
    assert config.run.bf16 is (line[0] == "--bf16")
    assert config.optimizer.rank == 4, "from the file"


def test_a_recipe_may_stand_anywhere(tmp_path):
    config = load_config(["--output_dir", str(tmp_path), "--rank", "7", "llama_60m_galore"])
    assert (config.name, config.optimizer.rank, config.model.model) == ("llama_60m_galore", 7, "60m")


def test_paths_are_looked_for_beside_the_file_and_then_in_the_working_directory(tmp_path, monkeypatch):
    for folder in ("here", "there"):
        (tmp_path / folder).mkdir()
    (tmp_path / "there" / "a.txt").write_text("beside")
    (tmp_path / "here" / "b.txt").write_text("in the working directory")
    (tmp_path / "there" / "zero.json").write_text("{}")
    monkeypatch.chdir(tmp_path / "here")

    def dataset(name):
        settings = {"dataset": name, "output_dir": "out"}
        (tmp_path / "there" / "c.yaml").write_text(yaml.safe_dump(settings))
        config = load_config(["../there/c.yaml"])
        assert config.run.output_dir == "out"
        return config

    assert dataset("a.txt").data.dataset == ["../there/a.txt"]
    assert dataset("*.txt").data.dataset == ["../there/*.txt"]
    assert dataset("b.txt").data.dataset == ["b.txt"]
    assert dataset("stdlib").data.dataset == ["stdlib"]
    assert dataset("a.txt").resolved()["dataset"] == [str(tmp_path / "here" / "../there/a.txt")], "runs from anywhere"


def test_keys_that_a_run_and_its_optimizer_share_can_both_be_given(tiny):
    more = ["--block_size", "16", "--optimizer_args.block_size", "8", "--optimizer_args.mlp_only=false"]
    config = load_config([tiny(optimizer_args={"seed": 3}), *more])
    assert config.data.block_size == 16
    assert config.optimizer.optimizer_args == {"seed": 3, "block_size": 8, "mlp_only": False}
    changed = load_config([tiny(), "--model_overrides.hidden_size", "64"]).model.model_overrides
    assert (changed["hidden_size"], changed["vocab_size"]) == (64, 400)


def test_an_error_names_the_way_to_give_a_method_its_key(tiny):
    with pytest.raises(BadInput, match=r"--optimizer_args\.error_feedback"):
        load_config([tiny(), "--error_feedback", "8bit"])


def test_json_is_valid_whatever_a_run_came_to():
    told = {"a": float("inf"), "b": [1.5, float("nan")], "c": {"d": -float("inf")}, "e": "inf"}
    assert json.loads(valid_json(told), parse_constant=pytest.fail) == {
        "a": None, "b": [1.5, None], "c": {"d": None}, "e": "inf"
    }  # fmt: skip
    assert list(non_finite(told)) == ["a", "b[1]", "c.d"]


def test_metrics_of_a_diverged_run_are_json_and_say_so(tiny, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(report, "perplexity", lambda loss: float("inf"))
    assert main([tiny(max_steps=1)]) == 0
    text = (tmp_path / "run" / "metrics.json").read_text()
    assert json.loads(text, parse_constant=pytest.fail)["validation_perplexity"] is None
    assert "not finite, and null in metrics.json: validation_perplexity" in capsys.readouterr().out


def test_without_a_terminal_there_are_lines_and_no_bars(tiny, tmp_path, capsys):
    assert main([tiny(max_steps=4, logging_steps=2, eval_strategy="steps", eval_steps=2, disable_tqdm=None)]) == 0
    said = capsys.readouterr()
    assert re.search(r"^step 2/4  loss 5\.\d+  grad norm \S+  lr \S+$", said.out, re.MULTILINE)
    assert len(re.findall(r"^step 4/4  validation loss \S+$", said.out, re.MULTILINE)) == 1, "it is measured once"
    assert "\r" not in said.out + said.err
    assert "it/s]" not in said.err


@pytest.mark.draws
def test_a_curve_of_one_point_can_be_seen(tmp_path, monkeypatch):
    from matplotlib.axes import Axes

    drawn = []
    plot = Axes.plot

    def spy(self, *points, **keywords):
        drawn.append(points)
        return plot(self, *points, **keywords)

    monkeypatch.setattr(Axes, "plot", spy)
    report.plot_losses(tmp_path, [{"step": 1, "loss": 5.0}], 100, "one")
    assert drawn[0][2] == "o"
    report.plot_losses(tmp_path, [], 100, "none")
    assert (tmp_path / "loss.png").stat().st_size > 0


@pytest.mark.parametrize(
    ("more", "row"), [([], "peak, as this run is"), (["true"], "peak, checkpointed, as this run is")]
)
def test_memory_marks_the_peak_of_the_run(tiny, capsys, more, row):
    flags = ["--gradient_checkpointing", *more] if more else []
    assert memory.main([tiny(), *flags]) == 0
    rows = re.findall(r"^  (peak.*?)  +\d", capsys.readouterr().out, re.MULTILINE)
    assert [name for name in rows if "as this run is" in name] == [row]
    assert len(rows) == 2


SHELLS = {"bash": ["--norc", "-i"], "zsh": ["-f", "-i"]}


@pytest.fixture(params=SHELLS)
def typed(request, tmp_path):
    """What stands on the line of a shell after a text and a tab, and what it lists; each in a terminal of its own."""
    shell = request.param
    if shutil.which(shell) is None:
        pytest.skip(f"there is no {shell} here")
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "mine.yaml").touch()
    (tmp_path / "script").write_text(completion.script(shell))
    ours, theirs = os.openpty()
    terminal = ["sh", "-c", 'exec "$@" <>"$0" >&0 2>&1', os.ttyname(theirs)]  # whoever opens it first has it
    environment = {**os.environ, "HOME": str(tmp_path), "TERM": "dumb", "PS1": "<ready>", "COLUMNS": "1000"}
    process = subprocess.Popen(
        [*terminal, shell, *SHELLS[shell]], env=environment, cwd=tmp_path, start_new_session=True
    )

    def until(end, text=""):
        deadline = time.monotonic() + 60
        while end not in text:
            assert select.select([ours], [], [], deadline - time.monotonic())[0], text
            text += os.read(ours, 65536).decode()
        return text

    def type_in(line):
        os.write(ours, f"{line}echo end\r".encode())
        found = until("\nend")
        until("<ready>", found[found.index("\nend") :])
        return found

    until("<ready>")
    assert "not found" not in type_in("stty cols 1000; . ./script; ")
    yield lambda line: type_in(f"{line}\t\t\x15")  # a second tab lists; ^U takes the line away
    process.kill()
    process.wait()
    os.close(theirs)
    os.close(ours)


def test_a_shell_completes_commands_keys_and_names(typed):
    assert "gracile pretrain" in typed("gracile pre")
    assert "--learning_rate" in typed("gracile pretrain --learn")
    assert "rigl_adamw" in typed("gracile pretrain --optimizer rig")
    assert "sltrain" in typed("gracile pretrain --layer slt")
    found = typed("gracile pretrain quickstart_2_4_")
    assert re.search(r"quickstart_2_4_cast\s+quickstart_2_4_sr_ste\s", found), found
    found = typed("gracile pretrain runs/m")
    assert "runs/mine.yaml" in found
    assert "maestro" not in found


def test_completion_knows_two_shells(capsys):
    assert completion.main(["fish"]) == 2
    assert "fish" in capsys.readouterr().err


def test_ctrl_c_in_a_command_without_a_run_is_one_line(monkeypatch, capsys):
    def interrupted():
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "main", interrupted)
    with pytest.raises(SystemExit) as end:
        cli.command()
    assert end.value.code == 130
    assert capsys.readouterr().err == "gracile: stopped by SIGINT\n"
