"""Drop-in ``torch.optim`` classes whose state is low-rank. Imports torch and nothing heavier."""

from typing import TYPE_CHECKING

from .factored.relora import ReLoRAAdamW
from .factored.sltrain import SLTrainAdamW, SLTrainAdamW8bit
from .factored.sst import SSTAdamW
from .full_state import full_state, load_full_state
from .groups import param_groups
from .kept_out_of_ddp import keep_out_of_ddp
from .lion import Lion
from .low_rank.apollo import APOLLOAdamW
from .low_rank.dct import DCTAdamW
from .low_rank.fira import FiraAdamW
from .low_rank.galore import GaLoreAdafactor, GaLoreAdamW, GaLoreLion
from .low_rank.galore_plus import GaLorePlusAdamW
from .low_rank.gradnormlorp import GradNormLoRPAdamW
from .low_rank.ldadam import LDAdamW
from .low_rank.q_galore import GaLoreAdamW8bit
from .memory import state_bytes
from .published_file import read_published
from .released import release_gradients
from .scale import SCALE
from .schedules import JaggedCosineLR
from .sparse.blast import BlockSparseAdamW
from .sparse.cast import CastAdamS
from .sparse.hyper_sparse import HyperSparseAdamW
from .sparse.rigl import RigLAdamW, SETAdamW
from .sparse.sparse_adamw import SparseAdamW
from .sparse.sr_ste import SRSTEAdamW
from .sparse.srigl import SRigLAdamW
from .sparse.wgsef import WGSEFAdamW

__all__ = [
    "SCALE",
    "APOLLOAdamW",
    "BlockSparseAdamW",
    "CastAdamS",
    "DCTAdamW",
    "FiraAdamW",
    "GaLoreAdafactor",
    "GaLoreAdamW",
    "GaLoreAdamW8bit",
    "GaLoreLion",
    "GaLorePlusAdamW",
    "GradNormLoRPAdamW",
    "HyperSparseAdamW",
    "JaggedCosineLR",
    "LDAdamW",
    "Lion",
    "ReLoRAAdamW",
    "RigLAdamW",
    "SETAdamW",
    "SLTrainAdamW",
    "SLTrainAdamW8bit",
    "SRSTEAdamW",
    "SRigLAdamW",
    "SSTAdamW",
    "SparseAdamW",
    "WGSEFAdamW",
    "full_state",
    "keep_out_of_ddp",
    "load_full_state",
    "param_groups",
    "read_published",
    "release_gradients",
    "state_bytes",
]

# Names on the import lines of published scripts, and what stands in their place.
REPLACED = {
    "QAPOLLOAdamW": "APOLLOAdamW, on weights in bf16 (theirs trains int8 weights, with moments in fp32)",
    "GaLoreRMSProp": "GaLoreAdamW with betas=(0.0, 0.99) (RMSProp with its bias corrected)",
    "FiraRMSProp": "FiraAdamW with betas=(0.0, 0.99) (RMSProp with its bias corrected)",
    "divide_params": "param_groups(model, rank=rank, target_modules=target_modules_list, scale=alpha)",
}

if not TYPE_CHECKING:  # which would take every name for one of the module

    def __getattr__(name: str) -> object:
        """Tell what replaces a name; an AttributeError would be lost in that of the import."""
        if name in REPLACED:
            raise ImportError(f"gracile.optim has no {name}; use {REPLACED[name]}")
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
