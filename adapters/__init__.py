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
from .methods.alignguard import AlignGuardConfig
from .methods.allora import ALLoraConfig
from .methods.ba_lora import BALoraConfig
from .methods.dsee import DSEEConfig, prune_base
from .methods.intrinsic_dimension import IntrinsicDimensionConfig, dimension_for
from .methods.lora_sb import LoraSBConfig
from .methods.lora_xs import LoraXSConfig
from .methods.mask_tuning import MaskTuningConfig, gradient_dropout
from .methods.pst import PSTConfig
from .methods.soka import SokaConfig
from .methods.sorsa import SorsaConfig
from .methods.spp import SPPConfig
from .methods.svfit import SVFitConfig
from .names import AdapterType
from .penalty import adapter_layers, penalty
from .registry import METHODS, register
from .sparse_lora import SparseLora, SparseLoraCallback
from .tuner import AdapterTuner, StepCallback

__all__ = [
    "METHODS",
    "ALLoraConfig",
    "AdapterConfig",
    "AdapterLayer",
    "AdapterTuner",
    "AdapterType",
    "AlignGuardConfig",
    "BALoraConfig",
    "DSEEConfig",
    "IntrinsicDimensionConfig",
    "LoraSBConfig",
    "LoraXSConfig",
    "LowRankLayer",
    "MaskTuningConfig",
    "PSTConfig",
    "SPPConfig",
    "SVFitConfig",
    "SokaConfig",
    "SorsaConfig",
    "SparseLora",
    "SparseLoraCallback",
    "StepCallback",
    "adapter_layers",
    "calibrate",
    "dimension_for",
    "gradient_dropout",
    "gram_defect",
    "penalty",
    "prune_base",
    "register",
    "scaled_gradient",
    "svd_factors",
    "to_lora",
]
