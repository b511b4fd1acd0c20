"""How a planned run will be split: the share of each process."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from transformers import TrainingArguments

from ..errors import BadInput
from .deepspeed import settings_of
from .layout import count_of

MOST_PROCESSES = 16_384  # beyond, counting takes forever


@dataclass(frozen=True)
class Division:
    """How DeepSpeed will split a run: stage 0 is one process, or DistributedDataParallel's replicas."""

    stage: int = 0
    processes: int = 1
    offload: bool = False
    # DeepSpeed's own keys, in elements, with its defaults
    reduce_bucket: int = 500_000_000
    prefetch_bucket: int = 50_000_000
    persistence_threshold: int = 100_000
    overlap: bool | None = None

    def __post_init__(self) -> None:
        if not 1 <= self.processes <= MOST_PROCESSES:
            raise BadInput(f"world_size must be at least 1 and at most {MOST_PROCESSES:,}, got {self.processes}")
        if self.stage not in range(4):
            raise BadInput(f"zero must be 0, 1, 2 or 3, got {self.stage}")
        if self.offload and not self.stage:
            raise BadInput("offload needs ZeRO: give --zero 1, 2 or 3, or a deepspeed configuration")

    @classmethod
    def of(cls, run: TrainingArguments, hidden_size: int) -> Division:
        """As the run's DeepSpeed configuration says, on the processes that were launched.

        Raises:
            BadInput: for FSDP, which is not planned.
        """
        if run.fsdp:
            raise BadInput("fsdp is not planned; leave it out and give --zero 3 for nearly the same split")
        settings = settings_of(run)
        if settings is None:
            return cls(processes=run.world_size)
        zero = settings.get("zero_optimization", {})
        if _device(zero, "offload_param") is not None:
            raise BadInput("deepspeed: offload_param is not planned; leave it out, or offload the optimizer alone")
        square = hidden_size**2  # what transformers puts in place of "auto"

        def number(key: str, default: int, auto: int) -> int:
            value = zero.get(key, default)
            value = auto if value == "auto" else value
            if isinstance(value, bool) or not isinstance(value, (int, float)):
                raise BadInput(f"deepspeed: {key} must be a number or auto, got {value!r}")
            return int(value)

        return cls(
            stage=zero.get("stage", 0),
            processes=run.world_size,
            offload=_device(zero, "offload_optimizer") is not None,
            reduce_bucket=number("reduce_bucket_size", cls.reduce_bucket, square),
            prefetch_bucket=number("stage3_prefetch_bucket_size", cls.prefetch_bucket, int(0.9 * square)),
            persistence_threshold=number(
                "stage3_param_persistence_threshold", cls.persistence_threshold, 10 * hidden_size
            ),
            overlap=zero.get("overlap_comm"),
        )

    def part(self, count: int, from_stage: int) -> int:
        """How many of ``count`` elements one process holds, where they are split from a stage of ZeRO on."""
        return -(-count // self.processes) if self.stage >= from_stage else count

    def __str__(self) -> str:
        named = {0: "", 1: "ZeRO 1 on ", 2: "ZeRO 2 on ", 3: "ZeRO 3 on "}[self.stage]
        more = ", optimizer offloaded" if self.offload else ""
        return f"{named}{count_of(self.processes)}{more}"


def _device(zero: dict[str, Any], key: str) -> str | None:
    device: str | None = (zero.get(key) or {}).get("device")
    return None if device == "none" else device
