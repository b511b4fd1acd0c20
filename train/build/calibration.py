"""Adapters that start from gradients of the model: a pass over some examples before they are put on it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor
from torch.utils.data import DataLoader, Subset
from transformers import PreTrainedModel

from ..config.finetune_arguments import FinetuneConfig
from ..data.examples import Collator
from ..data.tuning import TuningData

FORGETTING = "forgetting"
EXAMPLES = 64  # where calibration_examples does not say


def is_calibrated(kind: type[Any]) -> bool:
    """Whether a method of adapters starts from gradients."""
    return hasattr(kind, "statistic")


def calibrate_on(
    model: PreTrainedModel, adapter: Any, config: FinetuneConfig, data: TuningData, collate: Collator
) -> None:
    """Give an adapter's configuration what it starts from: gradients of what is trained on, or of what is not to be
    forgotten, by what its method asks for.

    Raises:
        ValueError: where it asks for data that the run does not have.
    """
    from ...adapters import calibrate

    blocks: Any = data.train
    if adapter.calibrated_on == FORGETTING:
        if data.forgetting is None:
            raise ValueError("it starts from gradients on what is not to be forgotten; give forgetting_dataset")
        blocks = data.forgetting
    count = min(len(blocks), config.data.calibration_examples or EXAMPLES)
    loader = DataLoader(Subset(blocks, range(count)), config.run.per_device_train_batch_size, collate_fn=collate)
    model.to(config.run.device)  # type: ignore[arg-type]
    calibrate(model, adapter, _moved(loader, config.run.device))


def _moved(batches: DataLoader[Any], device: Any) -> Iterator[dict[str, Tensor]]:
    for batch in batches:
        yield {key: value.to(device) for key, value in batch.items()}
