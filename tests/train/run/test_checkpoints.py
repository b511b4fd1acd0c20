from pathlib import Path

import pytest

from gracile.train.run import checkpoints


@pytest.fixture
def run(tmp_path) -> Path:
    for step in (5, 10, 20):
        folder = tmp_path / f"checkpoint-{step}"
        (folder / "inner").mkdir(parents=True)
        (folder / "weights").write_bytes(b"x" * step)
        (folder / "inner" / "state").write_bytes(b"y")
        checkpoints.seal(folder)
    return tmp_path


def test_newest_is_by_step_not_by_name(run):
    assert checkpoints.newest_whole(run) == (run / "checkpoint-20", {})
    (run / "checkpoint-100").mkdir()
    newest, skipped = checkpoints.newest_whole(run)
    assert newest == run / "checkpoint-20"
    assert "cut short" in skipped[run / "checkpoint-100"]


def cut(folder: Path) -> None:
    (folder / "weights").write_bytes(b"x")


def remove(folder: Path) -> None:
    (folder / "inner" / "state").unlink()


def unsealed(folder: Path) -> None:
    checkpoints.unseal(folder)


def garbled(folder: Path) -> None:
    (folder / checkpoints.MANIFEST).write_text('{"weights": ')


@pytest.mark.parametrize(
    ("damage", "word"),
    [(cut, "1 of 20 bytes"), (remove, "inner/state"), (unsealed, "cut short"), (garbled, "cut short")],
)
def test_a_damaged_checkpoint_is_named_and_skipped(run, damage, word):
    damage(run / "checkpoint-20")
    newest, skipped = checkpoints.newest_whole(run)
    assert newest == run / "checkpoint-10"
    assert word in skipped[run / "checkpoint-20"]


def test_sealing_again_does_not_count_the_manifest_itself(run):
    checkpoints.seal(run / "checkpoint-5")
    assert checkpoints.fault(run / "checkpoint-5") is None


def test_no_checkpoint(tmp_path):
    (tmp_path / "checkpoint-best").mkdir()
    assert checkpoints.newest_whole(tmp_path) == (None, {})


def test_atomic_write_leaves_nothing_beside_it(tmp_path):
    checkpoints.write_atomically(tmp_path / "f", "1")
    checkpoints.write_atomically(tmp_path / "f", "2")
    assert [p.name for p in tmp_path.iterdir()] == ["f"]
    assert (tmp_path / "f").read_text() == "2"
