"""Adapters that begin with data: some examples go through the model before they are put on it, or after.

    of gracile.adapters       gradients                         before
    LoRA with "corda"         covariances of inputs             before    Yang et al. 2024, arXiv:2406.05223
    LoRA with "lora_ga"       gradients                         before    Wang et al. 2024, arXiv:2407.05000
    LoRA with "eva"           singular vectors of inputs        after     Paischer et al. 2024, arXiv:2410.07170

CorDA and LoRA-GA take what their factors begin with off the base's weights. Loaded onto the base itself, such an
adapter would miss it: what is saved at the end is a LoRA of twice the rank, B A - B0 A0.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.utils.data import DataLoader, Subset
from transformers import PreTrainedModel

from ..config.finetune_arguments import FinetuneConfig
from ..data.examples import Collator
from ..data.tuning import TuningData

FORGETTING = "forgetting"
EXAMPLES = 64  # where calibration_examples does not say
EVA, CORDA, LORA_GA = "eva", "corda", "lora_ga"  # values of init_lora_weights
OFF_THE_BASE = (CORDA, LORA_GA)
Batches = DataLoader[Any]


def is_calibrated(kind: type[Any], given: Mapping[str, Any]) -> bool:
    """Whether a method of adapters, with the fields that are given, begins with data."""
    return hasattr(kind, "statistic") or given.get("init_lora_weights") in _BEGINNINGS


def put_on(model: PreTrainedModel, adapter: Any, config: FinetuneConfig, data: TuningData, collate: Collator) -> Any:
    """``model`` with a new adapter, which sees examples if it begins with data: of what is trained on, or of what is
    not to be forgotten, by what its method asks for.

    Raises:
        ValueError: where it asks for data that the run does not have, and for what peft refuses.
    """
    import peft

    if not is_calibrated(type(adapter), vars(adapter)):
        return peft.get_peft_model(model, adapter)
    begin = _BEGINNINGS.get(getattr(adapter, "init_lora_weights", None), _from_gradients)
    blocks: Any = data.train
    if getattr(adapter, "calibrated_on", None) == FORGETTING:
        if data.forgetting is None:
            raise ValueError("it starts from gradients on what is not to be forgotten; give forgetting_dataset")
        blocks = data.forgetting
    some = Subset(blocks, range(min(len(blocks), config.data.calibration_examples or EXAMPLES)))
    at_once = 1 if begin is _corda else config.run.per_device_train_batch_size  # its hooks take one example
    model.to(config.run.device)  # type: ignore[arg-type]
    return begin(model, adapter, DataLoader(some, at_once, collate_fn=_Moved(collate, config.run.device)))


class _Moved:
    """What a collator makes, on a device."""

    def __init__(self, collate: Collator, device: Any) -> None:
        self.collate, self.device = collate, device

    def __call__(self, blocks: Any) -> dict[str, Tensor]:
        return {key: value.to(self.device) for key, value in self.collate(blocks).items()}


# ---- the ways to begin ----------------------------------------------------------------------------------------------


def _from_gradients(model: Any, adapter: Any, batches: Batches) -> Any:
    import peft

    from ...adapters import calibrate

    calibrate(model, adapter, batches)
    return peft.get_peft_model(model, adapter)


def _eva(model: Any, adapter: Any, batches: Batches) -> Any:
    import peft

    tuned = peft.get_peft_model(model, adapter)
    peft.initialize_lora_eva_weights(
        tuned, batches, gather_distributed_inputs=False, show_progress_bar=False
    )  # all processes see the same examples
    return tuned


def _corda(model: Any, adapter: Any, batches: Batches) -> Any:
    import peft

    try:
        from peft.tuners.lora.corda import preprocess_corda
    except ImportError as missing:
        raise ValueError(
            f"init_lora_weights corda needs {missing.name}, which is not installed; install it with: pip install attrs"
        ) from None

    @torch.no_grad()
    def look() -> None:
        for batch in batches:
            model(**batch)

    preprocess_corda(model, adapter, run_model=look)
    return _noting_factors(peft.get_peft_model(model, adapter))


def _lora_ga(model: Any, adapter: Any, batches: Batches) -> Any:
    import peft
    from peft.tuners.lora.loraga import preprocess_loraga

    def look() -> None:
        for batch in batches:
            model(**batch).loss.backward()

    adapter.lora_ga_config = adapter.lora_ga_config or peft.LoraGAConfig()
    preprocess_loraga(model, adapter, look)
    model.zero_grad(set_to_none=True)
    return _noting_factors(peft.get_peft_model(model, adapter))


_BEGINNINGS: dict[Any, Callable[[Any, Any, Batches], Any]] = {EVA: _eva, CORDA: _corda, LORA_GA: _lora_ga}


# ---- what is saved of those that changed the base -------------------------------------------------------------------


def _noting_factors(tuned: Any) -> Any:
    import peft

    first = peft.get_peft_model_state_dict(tuned)
    tuned.first_factors = {key: value.detach().cpu().clone() for key, value in first.items()}
    return tuned


def make_loadable(tuned: Any, folder: Path) -> None:
    """Make a saved adapter that took its first factors off the base one for the base as it is: a LoRA of rank 2 r.

    Args:
        folder: holds the adapter as peft saved it, with the factors that were trained.
    """
    first: dict[str, Tensor] | None = getattr(tuned, "first_factors", None)
    if first is None:
        return
    weights, settings = folder / "adapter_model.safetensors", folder / "adapter_config.json"
    trained, said = load_file(weights), json.loads(settings.read_text())
    both = {key: torch.cat(pair, dim) for key, pair, dim in _pairs(trained, first)}
    said |= {"init_lora_weights": True, "corda_config": None, "lora_ga_config": None, "r": 2 * said["r"]}
    said["lora_alpha"] *= 2**0.5 if said["use_rslora"] else 2  # the scale is alpha / r, or alpha / sqrt(r)
    save_file(both, weights, metadata={"format": "pt"})
    settings.write_text(json.dumps(said, indent=2, sort_keys=True) + "\n")


def _pairs(trained: dict[str, Tensor], first: dict[str, Tensor]) -> Iterator[tuple[str, tuple[Tensor, Tensor], int]]:
    for key, value in trained.items():
        before = first[key].to(value)
        yield (key, (value, before), 0) if "lora_A" in key else (key, (value, -before), 1)
