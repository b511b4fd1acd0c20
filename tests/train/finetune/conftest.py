"""What the tests of fine-tuning share."""

import functools

import pytest
from conversations import new_tokenizer, save_base, short_run

from gracile.train.config.finetune_arguments import TunedDataArguments
from gracile.train.finetune import main


@pytest.fixture
def tokenizer():
    return new_tokenizer()


@pytest.fixture(scope="session")
def base(tmp_path_factory):
    """The folder of a saved model."""
    return save_base(tmp_path_factory.mktemp("base"))


@pytest.fixture
def short(base, tmp_path):
    """``short(key=value)`` writes the settings of a short run and returns the YAML's path."""
    return functools.partial(short_run, tmp_path, base)


@pytest.fixture
def settings():
    """``settings(key=value)``: what is read."""

    def of(**changes):
        return TunedDataArguments(**{"block_size": 96, "chat_template": "zephyr"} | changes)

    return of


@pytest.fixture
def refused(short, tmp_path, capsys):
    """The one line with which a configuration is refused; nothing is written."""

    def line(*words, **changes):
        config = short(**changes)
        capsys.readouterr()
        assert main([config, *words]) == 2
        lines = [text for text in capsys.readouterr().err.splitlines() if text.startswith("gracile finetune: ")]
        assert len(lines) == 1
        assert not (tmp_path / "run").exists()
        return lines[0]

    return line
