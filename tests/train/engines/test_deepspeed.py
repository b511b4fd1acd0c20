"""Which configurations of DeepSpeed are refused, and that those of the package are not."""

import json
from pathlib import Path

import pytest

from gracile.train.engines.deepspeed import refuse
from gracile.train.errors import BadInput

CONFIGS = sorted((Path(__file__).parents[2] / "configs" / "deepspeed").glob("*.json"))
SOUND = {"zero_allow_untested_optimizer": True, "zero_optimization": {"stage": 2}}
OFFLOADED = {"stage": 2, "offload_optimizer": {"device": "cpu"}}


@pytest.mark.parametrize("path", CONFIGS, ids=[path.stem for path in CONFIGS])
def test_the_configurations_of_the_package_are_taken(path):
    refuse(json.loads(path.read_text()))


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"torch_autocast": {"enabled": True, "dtype": "bfloat16"}},
        {"torch_autocast": {"enabled": False, "dtype": "float16"}},
        {"zero_optimization": {"stage": 3, "zero_hpz_partition_size": 1, "mics_shard_size": -1}},
        {"zero_optimization": OFFLOADED, "zero_force_ds_cpu_optimizer": False},
    ],
    ids=str,
)
def test_what_can_work_is_taken(changes):
    refuse({**SOUND, **changes})


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"zero_optimization": {"elastic_checkpoint": True}}, ["zero_optimization.elastic_checkpoint is True"]),
        ({"torch_autocast": {"enabled": True, "dtype": "float16"}}, ["torch_autocast.dtype is 'float16'", "bf16"]),
        ({"zero_optimization": {"zero_hpz_partition_size": 2}}, ["zero_hpz_partition_size is 2"]),
        ({"zero_optimization": {"mics_shard_size": 2}}, ["mics_shard_size is 2"]),
        ({"tensor_parallel": {"autotp_size": 2}}, ["tensor_parallel.autotp_size is 2"]),
        ({"zero_allow_untested_optimizer": False}, ["zero_allow_untested_optimizer must be true"]),
        ({"zero_optimization": OFFLOADED}, ["zero_force_ds_cpu_optimizer must be false"]),
    ],
    ids=str,
)
def test_what_cannot_work_is_one_line(changes, words):
    with pytest.raises(BadInput) as error:
        refuse({**SOUND, **changes})
    assert all(word in str(error.value) for word in words), str(error.value)
    assert "\n" not in str(error.value)
