"""Adapters that peft does not have, used by peft's own verbs: importing this package makes them known to it.

    from gracile.adapters import SorsaConfig
    model = get_peft_model(model, SorsaConfig(r=16, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"))

Saved adapters load by ``PeftModel.from_pretrained`` in a process that imported this package; ``to_lora`` writes those
whose change is of low rank as LoRA, which loads anywhere.
"""

from .calibration import calibrate
from .config import AdapterConfig
from .factors import gram_defect, svd_factors
from .gradients import scaled_gradient
from .layer import AdapterLayer, LowRankLayer
from .lora import to_lora
from .methods.lora_sb import LoraSBConfig
from .methods.lora_xs import LoraXSConfig
from .methods.sorsa import SorsaConfig
from .methods.svfit import SVFitConfig
from .names import AdapterType
from .penalty import adapter_layers, penalty
from .registry import METHODS, register
from .tuner import AdapterTuner, StepCallback

__all__ = [
    "METHODS",
    "AdapterConfig",
    "AdapterLayer",
    "AdapterTuner",
    "AdapterType",
    "LoraSBConfig",
    "LoraXSConfig",
    "LowRankLayer",
    "SVFitConfig",
    "SorsaConfig",
    "StepCallback",
    "adapter_layers",
    "calibrate",
    "gram_defect",
    "penalty",
    "register",
    "scaled_gradient",
    "svd_factors",
    "to_lora",
]
