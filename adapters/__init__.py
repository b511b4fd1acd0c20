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
from .output_terms import class_consistency, class_diversity, leading_share, token_consistency, token_entropy
from .penalty import adapter_layers, penalized_loss, penalty, with_penalty
from .registry import METHODS, register
from .sparse_lora import SparseLora, SparseLoraCallback
from .tuner import AdapterTuner, StepCallback
from .weight_terms import angle_term, fisher_term, overlap_term

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
    "angle_term",
    "calibrate",
    "class_consistency",
    "class_diversity",
    "dimension_for",
    "fisher_term",
    "gradient_dropout",
    "gram_defect",
    "leading_share",
    "overlap_term",
    "penalized_loss",
    "penalty",
    "prune_base",
    "register",
    "scaled_gradient",
    "svd_factors",
    "to_lora",
    "token_consistency",
    "token_entropy",
    "with_penalty",
]
