"""One run, one folder: who has it is named, and a dead process's claim is taken over."""

import json
import os
import signal
import subprocess
import sys
from dataclasses import asdict, replace

import pytest

from gracile.train.errors import BadInput, RunStopped
from gracile.train.pretrain import main
from gracile.train.run import history, lock
from gracile.train.run.lock import LOCK, Owner, held
from gracile.train.run.stopping import Interrupted

SLEEPER = "import time; print('up', flush=True); time.sleep(600)"


@pytest.fixture
def other():
    """Another process that runs."""
    process = subprocess.Popen([sys.executable, "-c", SLEEPER], stdout=subprocess.PIPE)
    process.stdout.readline()
    yield process
    process.kill()
    process.wait()
    process.stdout.close()


def owned_by(pid: int) -> Owner:
    return replace(Owner.this(), pid=pid, born=lock._born(pid))


def test_a_folder_in_use_names_the_other_process_and_nothing_is_touched(tiny, tmp_path, other, capsys):
    run = tmp_path / "run"
    run.mkdir()
    (run / LOCK).write_text(json.dumps(asdict(owned_by(other.pid))))
    for more in ([], ["--resume_from_checkpoint", "true"]):
        assert main([tiny(), *more]) == 2
        err = capsys.readouterr().err
        assert len(err.splitlines()) == 1
        assert f"in use by process {other.pid} on " in err
        assert "another --output_dir" in err
    assert [p.name for p in run.iterdir()] == [LOCK]


def test_the_lock_of_a_killed_process_is_taken_over(tmp_path, other, capsys):
    (tmp_path / LOCK).write_text(json.dumps(asdict(owned_by(other.pid))))
    other.send_signal(signal.SIGKILL)
    os.waitid(os.P_PID, other.pid, os.WEXITED | os.WNOWAIT)  # not reaped: as a container leaves one
    with held(tmp_path):
        assert json.loads((tmp_path / LOCK).read_text())["pid"] == os.getpid()
    assert f"left locked by process {other.pid}" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(not lock.BOOT.exists(), reason="the system does not tell when a process began")
@pytest.mark.parametrize("change", [{"born": "1"}, {"boot": "of another start of the machine"}])
def test_a_process_of_the_same_number_is_not_the_owner(tmp_path, other, change):
    (tmp_path / LOCK).write_text(json.dumps(asdict(replace(owned_by(other.pid), **change))))
    with held(tmp_path):
        pass


def test_another_host_is_believed_and_the_way_around_said(tmp_path):
    (tmp_path / LOCK).write_text(json.dumps(asdict(replace(Owner.this(), host="elsewhere", pid=2**22))))
    with pytest.raises(BadInput, match=r"on elsewhere.*if that one has ended, remove .*run\.lock"), held(tmp_path):
        pass
    assert (tmp_path / LOCK).exists()


@pytest.mark.parametrize("text", ["", "{", "[]", '{"pid": 1}', "\x00\xff"])
def test_a_lock_that_cannot_be_read_is_refused_in_one_line(tmp_path, text, monkeypatch):
    monkeypatch.setattr(lock, "PATIENCE", 0.05)
    (tmp_path / LOCK).write_text(text)
    with pytest.raises(BadInput, match=r"does not say by whom; if no run writes there, remove"), held(tmp_path):
        pass


def test_folders_made_for_it_go_with_it(tmp_path):
    with pytest.raises(ZeroDivisionError), held(tmp_path / "a" / "b"):
        raise ZeroDivisionError
    assert list(tmp_path.iterdir()) == []
    with held(tmp_path / "a" / "b"):
        (tmp_path / "a" / "b" / "kept").touch()
    assert [p.name for p in (tmp_path / "a" / "b").iterdir()] == ["kept"]


def test_a_run_holds_it_and_leaves_none_also_when_it_fails(tiny, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr("gracile.train.pretrain._finish", lambda *a: seen.append((tmp_path / "run" / LOCK).exists()))
    assert main([tiny(max_steps=1)]) == 0
    assert seen == [True]
    assert not (tmp_path / "run" / LOCK).exists()

    def fail(*arguments):
        raise ZeroDivisionError

    monkeypatch.setattr("gracile.train.pretrain._train", fail)
    with pytest.raises(ZeroDivisionError):
        main([tiny(max_steps=1, output_dir=str(tmp_path / "other"))])
    assert not (tmp_path / "other" / LOCK).exists()


@pytest.mark.parametrize(
    ("end", "code"), [(RunStopped("the loss"), 1), (Interrupted(signal.SIGTERM, 1), 143)], ids=["stopped", "signal"]
)
def test_the_end_of_a_stopped_run_is_written_under_it(tiny, tmp_path, monkeypatch, end, code):
    seen, append = [], history.append

    def appended(folder, event, *arguments, **what):
        seen.append((event, (folder / LOCK).exists()))
        append(folder, event, *arguments, **what)

    def train(*arguments):
        raise end

    monkeypatch.setattr("gracile.train.run.history.append", appended)
    monkeypatch.setattr("gracile.train.pretrain._train", train)
    assert main([tiny(max_steps=1)]) == code
    assert seen == [("started", True), ("stopped", True)]
    assert not (tmp_path / "run" / LOCK).exists()


@pytest.mark.parametrize("call", ["write", "read"])
def test_a_signal_while_it_is_taken_leaves_none(tmp_path, monkeypatch, call):
    def interrupted(*arguments):
        raise Interrupted(signal.SIGINT)

    acquire = lock._acquire
    if call == "write":
        monkeypatch.setattr("os.fsync", interrupted)
    else:
        monkeypatch.setattr(lock, "_acquire", lambda *arguments: (acquire(*arguments), interrupted()))
    with pytest.raises(Interrupted), held(tmp_path / "new"):
        pass
    assert list(tmp_path.iterdir()) == []


ONE_OF_SEVERAL = """
import sys
from pathlib import Path
from gracile.train.errors import BadInput, RunStopped
from gracile.train.run.lock import held
sys.stdin.readline()
try:
    with held(Path(sys.argv[1])):
        print("got it", flush=True)
        sys.stdin.readline()
except BadInput as error:
    print("refused", error, flush=True)
"""


def test_of_several_that_find_a_dead_lock_one_gets_the_folder(tmp_path):
    dead = replace(Owner.this(), pid=2**22 + 1)  # beyond the highest
    (tmp_path / LOCK).write_text(json.dumps(asdict(dead)))
    command = [sys.executable, "-c", ONE_OF_SEVERAL, str(tmp_path)]
    several = [subprocess.Popen(command, stdin=-1, stdout=-1, text=True) for _ in range(4)]
    for process in several:
        process.stdin.write("\n")
        process.stdin.flush()
    told = [next(line for line in p.stdout if line.startswith(("got it", "refused"))) for p in several]
    for process in several:
        process.communicate("\n", timeout=60)
    assert sorted(line.split()[0] for line in told) == ["got", "refused", "refused", "refused"]
