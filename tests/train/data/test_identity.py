"""A resumed run knows its data by content: not by time, place or name."""

import os
import shutil

import pytest
import yaml

from gracile.train.config.arguments import DataArguments
from gracile.train.data import identity
from gracile.train.data.corpus import open_corpus
from gracile.train.pretrain import main

RESUME = ["--resume_from_checkpoint", "true"]


@pytest.fixture
def begun(tiny, tmp_path, corpus):
    data = tmp_path / "data.txt"
    shutil.copy(corpus / "argparse.txt", data)
    config = tiny(dataset=str(data), max_steps=6, optimizer="adamw")
    assert main([config]) == 0
    return config, data


def refused(config, capsys, *more):
    capsys.readouterr()
    assert main([config, *RESUME, *more]) == 2
    return capsys.readouterr().err.strip().splitlines()[-1]


def test_touched_or_copied_elsewhere_is_the_same(begun, tmp_path):
    config, data = begun
    os.utime(data, (1, 1))
    assert main([config, *RESUME, "--max_steps", "8"]) == 0
    (tmp_path / "elsewhere").mkdir()
    shutil.move(data, tmp_path / "elsewhere" / "other.txt")
    assert main([config, *RESUME, "--max_steps", "9", "--dataset", str(tmp_path / "elsewhere" / "other.txt")]) == 0


def test_another_content_of_equal_size_and_time_is_not(begun, tmp_path, capsys):
    config, data = begun
    times = data.stat()
    text = data.read_bytes()
    data.write_bytes(text[:5000] + bytes([text[5000] ^ 1]) + text[5001:])
    os.utime(data, ns=(times.st_atime_ns, times.st_mtime_ns))
    told = refused(config, capsys, "--max_steps", "8")
    assert "data.txt has as many bytes, but others" in told
    assert "--ignore_data_changes true" in told
    assert main([config, *RESUME, "--max_steps", "8", "--ignore_data_changes", "true"]) == 0
    assert "going on, as ignore_data_changes says" in capsys.readouterr().out
    assert main([config, *RESUME, "--max_steps", "9"]) == 0, "run.yaml says what ran last"


def test_what_differs_is_named(begun, tmp_path, capsys, corpus):
    config, _ = begun
    assert "has 4 files, 1 when it began" in refused(config, capsys, "--dataset", str(corpus))
    own = ["--validation_dataset", str(corpus / "typing.txt")]
    assert "2 data sets, 1 when it began" in refused(config, capsys, *own)
    (tmp_path / "run" / identity.DATA_FILE).write_text("[]]")
    assert "data.json" in refused(config, capsys, *own)


def test_a_run_of_an_older_version_resumes(begun, tmp_path, capsys):
    """Which knew its data by path, size and time."""
    config, data = begun
    saved = yaml.safe_load((tmp_path / "run" / "run.yaml").read_text())
    tokens = saved["data"].rsplit("-", 1)[1]
    stamp = (str(data), data.stat().st_size, data.stat().st_mtime_ns)
    saved["data"] = f"{identity.hashed([stamp], 'text')}-{tokens}"
    saved["config"]["dataset"] = str(data)
    (tmp_path / "run" / "run.yaml").write_text(yaml.safe_dump(saved))
    (tmp_path / "run" / identity.DATA_FILE).unlink()
    os.utime(data, (1, 1))
    assert "older version" in refused(config, capsys, "--max_steps", "8")
    os.utime(data, ns=(stamp[2], stamp[2]))
    assert main([config, *RESUME, "--max_steps", "8"]) == 0


def test_other_content_under_the_same_name_is_read_anew(tmp_path):
    """Nothing that was read before is taken for it, whatever size and time say."""
    path = tmp_path / "a.jsonl"
    for word in ("one", "two"):
        path.write_text(f'{{"text": "{word}"}}\n')
        os.utime(path, (1, 1))
        assert list(open_corpus(DataArguments(dataset=str(path))).sources[0].texts()) == [word]
