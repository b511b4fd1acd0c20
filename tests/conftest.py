"""Every test run has its own, empty Hugging Face cache and no network; fixtures of tiny runs on real text."""

import atexit
import functools
import gc
import json
import os
import shutil
import tempfile
from importlib import util
from pathlib import Path

import pytest
import yaml
from pool import Pool

_cache = tempfile.mkdtemp(prefix="gracile-test-cache-")
atexit.register(shutil.rmtree, _cache, ignore_errors=True)
# Before anything imports torch, huggingface_hub or datasets: they read these once.
os.environ |= {
    "HF_HOME": _cache,
    "HF_HUB_OFFLINE": "1",
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "OMP_NUM_THREADS": "1",  # two workers with two threads each wait for one another in tiny products: 8 times slower
}


STARTING_PROCESSES = ("tests/distributed/", "tests/compat/", "tests/examples/", "tests/chaos/")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """With several workers (``-n 2 --dist loadscope``) the tests of a file stay together, for they share fixtures, and
    so do all that start processes: two process groups at once would wait for each other's turns."""
    from xdist.scheduler import LoadScopeScheduling

    class Scheduling(LoadScopeScheduling):
        def _split_scope(self, nodeid):
            path = nodeid.split("::")[0]
            return "processes" if path.startswith(STARTING_PROCESSES) else path

    return Scheduling(config, log)


def pytest_collection_finish():
    """What has been imported stays: the Trainer collects garbage in every run, and need not look at it each time."""
    gc.collect()
    gc.freeze()


MODULES = ("argparse", "inspect", "tarfile", "typing")


def module_text(name: str) -> str:
    return Path(util.find_spec(name).origin).read_text(encoding="utf-8")


@pytest.fixture(scope="session")
def pool():
    """Process groups, to run commands and functions in: ``pool.run`` and ``pool.call``."""
    processes = Pool()
    yield processes
    processes.close()


@pytest.fixture(scope="session")
def corpus(tmp_path_factory) -> Path:
    """Four text files, 350 kB."""
    folder = tmp_path_factory.mktemp("corpus")
    for name in MODULES:
        (folder / f"{name}.txt").write_text(module_text(name), encoding="utf-8")
    return folder


@pytest.fixture
def tiny(tiny_in, tmp_path):
    """Settings of a run that takes a second or two; ``tiny(key=value)`` writes them and returns the YAML's path."""
    return functools.partial(tiny_in, tmp_path)


@pytest.fixture(scope="session")
def tiny_in(corpus):
    """The same for any folder, for runs that several tests read."""

    def write(folder: Path, **changes) -> str:
        settings = {
            "model": "2m",
            "model_overrides": {
                "hidden_size": 32,
                "intermediate_size": 88,
                "num_hidden_layers": 2,
                "num_attention_heads": 2,
                "vocab_size": 400,
            },
            "dataset": str(corpus),
            "block_size": 32,
            "validation_blocks": 20,
            "optimizer": "galore_adamw",
            "rank": 4,
            "update_proj_gap": 4,
            "learning_rate": 0.01,
            "max_steps": 12,
            "per_device_train_batch_size": 4,
            "gradient_accumulation_steps": 2,
            "save_steps": 5,
            "logging_steps": 3,
            "disable_tqdm": True,
            "output_dir": str(folder / "run"),
        } | changes
        path = folder / "tiny.yaml"
        path.write_text(yaml.safe_dump({k: v for k, v in settings.items() if v is not None}))
        return str(path)

    return write


@pytest.fixture
def metrics():
    def read(output_dir) -> dict:
        return json.loads((Path(output_dir) / "metrics.json").read_text())

    return read
