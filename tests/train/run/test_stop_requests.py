"""Signals as one process hears them; whole runs are in tests/distributed/test_stopping.py."""

import os
import signal
import time

import pytest

from gracile.train import pretrain
from gracile.train.run.stopping import Interrupted, StopRequests


def ends_of(which, *, launched, apart):
    """The number of the signal that a process dies of, in training, when two come; 0 where it lives on."""
    pid = os.fork()
    if pid == 0:
        os.environ.pop("RANK", None)
        if launched:
            os.environ["RANK"] = "0"
        with StopRequests() as requests:
            requests.waiting = True
            os.kill(os.getpid(), which)
            requests._came -= apart
            os.kill(os.getpid(), which)
            time.sleep(0.01)
            os._exit(0 if requests.number == which else 1)
    _, status = os.waitpid(pid, 0)
    return os.WTERMSIG(status) if os.WIFSIGNALED(status) else os.WEXITSTATUS(status)


@pytest.mark.parametrize("which", [signal.SIGINT, signal.SIGTERM])
def test_a_second_signal_ends_at_once_but_for_a_launchers_echo(which):
    assert ends_of(which, launched=False, apart=0) == which
    assert ends_of(which, launched=True, apart=0) == 0
    assert ends_of(which, launched=True, apart=5) == which


def test_before_training_a_signal_ends_the_run_where_it_is_and_handlers_are_put_back():
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(Interrupted) as stop, StopRequests():
        signal.raise_signal(signal.SIGTERM)
    assert (stop.value.code, str(stop.value)) == (143, "stopped by SIGTERM")
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_signal_while_the_configuration_is_read_says_nothing_of_checkpoints(monkeypatch, capsys):
    """Nobody knows yet which folder it is."""

    def interrupted(arguments):
        raise Interrupted(signal.SIGINT)

    monkeypatch.setattr(pretrain, "load_config", interrupted)
    assert pretrain.main(["any.yaml"]) == 130
    assert capsys.readouterr().err == "gracile pretrain: stopped by SIGINT; nothing had begun\n"
