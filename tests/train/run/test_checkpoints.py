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
    [(cut, "1 of 20 bytes"), (remove, "inner/state"), (unsealed, "cut short"), (garbled, "cannot be read")],
)
def test_a_damaged_checkpoint_is_named_and_skipped(run, damage, word):
    damage(run / "checkpoint-20")
    newest, skipped = checkpoints.newest_whole(run)
    assert newest == run / "checkpoint-10"
    assert word in skipped[run / "checkpoint-20"]


@pytest.mark.parametrize("damage", [cut, unsealed, garbled])
def test_what_is_not_whole_never_pushes_out_what_is(run, damage):
    damage(run / "checkpoint-20")
    checkpoints.rotate(run, 2)
    assert [c.name for c in checkpoints.checkpoints(run)] == ["checkpoint-10", "checkpoint-5"]
    checkpoints.rotate(run, 1)
    assert [c.name for c in checkpoints.checkpoints(run)] == ["checkpoint-10"]
    checkpoints.rotate(run, 1)
    assert checkpoints.newest_whole(run) == (run / "checkpoint-10", {})


def test_the_oldest_go_by_when_they_were_sealed_and_the_best_stays(run):
    checkpoints.seal(run / "checkpoint-5")
    checkpoints.rotate(run, None)
    checkpoints.rotate(run, 2, best=str(run / "checkpoint-10"))
    assert [c.name for c in checkpoints.checkpoints(run)] == ["checkpoint-10", "checkpoint-5"]


def test_damage_that_was_seen_is_remembered_until_the_checkpoint_is_written_anew(run):
    flipped(run / "checkpoint-20")
    assert checkpoints.fault(run / "checkpoint-20", sizes_only=True) is None
    checkpoints.distrust(run / "checkpoint-20")
    assert checkpoints.newest_whole(run, sizes_only=True)[0] == run / "checkpoint-10"
    checkpoints.seal(run / "checkpoint-20")
    assert checkpoints.newest_whole(run, sizes_only=True)[0] == run / "checkpoint-20"


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


def flipped(folder: Path) -> None:
    (folder / "weights").write_bytes(b"x" * 10 + b"y" + b"x" * 9)


def test_flipped_bytes_are_found_and_the_checkpoint_before_is_taken(run):
    flipped(run / "checkpoint-20")
    newest, skipped = checkpoints.newest_whole(run)
    assert newest == run / "checkpoint-10"
    assert skipped[run / "checkpoint-20"] == "weights is not what was written (its checksum differs)"


def test_a_checksum_is_over_all_parts_of_a_file(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoints, "PART", 100)
    monkeypatch.setattr(checkpoints, "CHUNK", 30)
    data = bytes(range(250))
    for place in (0, 99, 100, 199, 200, 249):
        (tmp_path / "file").write_bytes(data)
        checkpoints.seal(tmp_path)
        assert checkpoints.fault(tmp_path) is None
        (tmp_path / "file").write_bytes(data[:place] + b"\xff" + data[place + 1 :])
        assert "checksum" in checkpoints.fault(tmp_path)


def test_older_manifests_have_sizes_only(run):
    folder = run / "checkpoint-20"
    (folder / checkpoints.MANIFEST).write_text('{"weights": 20, "inner/state": 1}')
    assert checkpoints.newest_whole(run) == (folder, {})
    assert not checkpoints.has_checksums(folder)
    assert checkpoints.has_checksums(run / "checkpoint-10")


@pytest.mark.parametrize(
    "text",
    ["[]", "3", "null", '{"files": {"weights": 3}}', '{"files": {"weights": ["a", "b"]}}', "\ud800",
     '{"../outside": 3}', '{"/etc/passwd": 3}', '{"weights": null}'],
)  # fmt: skip
def test_a_manifest_of_any_other_form_cannot_be_read(run, text):
    (run / "checkpoint-20" / checkpoints.MANIFEST).write_bytes(text.encode("utf-8", "surrogatepass"))
    newest, skipped = checkpoints.newest_whole(run)
    assert newest == run / "checkpoint-10"
    assert skipped[run / "checkpoint-20"] == "complete.json cannot be read"


def test_nothing_is_left_of_a_write_that_failed(tmp_path, monkeypatch):
    def full(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoints.os, "replace", full)
    with pytest.raises(OSError, match="No space"):
        checkpoints.write_atomically(tmp_path / "f", "1")
    assert list(tmp_path.iterdir()) == []
