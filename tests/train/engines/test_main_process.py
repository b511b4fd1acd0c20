"""What the first process finds out is found out once, and all hear of it."""

from types import SimpleNamespace

import pytest

from gracile.train.engines.main_process import on_main
from gracile.train.errors import BadInput
from gracile.train.run import checkpoints


@pytest.fixture
def told(monkeypatch):
    """What goes from the first process to the others, in a group of two."""
    sent = []

    def broadcast(objects, src):
        if sent:
            objects[:] = sent
        else:
            sent[:] = objects

    monkeypatch.setattr("torch.distributed.broadcast_object_list", broadcast)
    return sent


def of(rank):
    return SimpleNamespace(world_size=2, process_index=rank)


def test_the_files_of_a_checkpoint_are_compared_on_one_process(told, tmp_path, monkeypatch):
    """SHA-256 of every byte, at each start."""
    (tmp_path / "weights").write_bytes(b"numbers")
    checkpoints.seal(tmp_path)
    hashed, measured = [], checkpoints._measured
    monkeypatch.setattr(checkpoints, "_measured", lambda files: hashed.extend(files) or measured(files))
    (tmp_path / "weights").write_bytes(b"letters")
    faults = [on_main(of(rank), lambda: checkpoints.fault(tmp_path)) for rank in (0, 1)]
    assert faults == ["weights is not what was written (its checksum differs)"] * 2
    assert hashed == [tmp_path / "weights"]


def test_what_is_wrong_is_raised_on_every_process(told):
    def find():
        raise BadInput("no checkpoint there")

    for rank in (0, 1):
        with pytest.raises(BadInput, match="no checkpoint there"):
            on_main(of(rank), find)
