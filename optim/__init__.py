"""Drop-in ``torch.optim`` classes whose state is low-rank. Imports torch and nothing heavier."""

from .apollo import APOLLOAdamW
from .blast import BlockSparseAdamW
from .cast import CastAdamS
from .dct import DCTAdamW
from .fira import FiraAdamW
from .full_state import full_state, load_full_state
from .galore import GaLoreAdafactor, GaLoreAdamW, GaLoreLion
from .galore_plus import GaLorePlusAdamW
from .gradnormlorp import GradNormLoRPAdamW
from .groups import param_groups
from .hyper_sparse import HyperSparseAdamW
from .ldadam import LDAdamW
from .lion import Lion
from .memory import state_bytes
from .q_galore import GaLoreAdamW8bit
from .relora import ReLoRAAdamW
from .rigl import RigLAdamW, SETAdamW
from .schedules import JaggedCosineLR
from .sltrain import SLTrainAdamW, SLTrainAdamW8bit
from .sparse import SparseAdamW
from .sr_ste import SRSTEAdamW
from .srigl import SRigLAdamW
from .sst import SSTAdamW
from .wgsef import WGSEFAdamW

__all__ = [
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
    "load_full_state",
    "param_groups",
    "state_bytes",
]
