"""Drop-in ``torch.optim`` classes whose state is low-rank. Imports torch and nothing heavier."""

from .fira import FiraAdamW
from .galore import GaLoreAdamW, GaLoreLion
from .groups import param_groups
from .lion import Lion
from .memory import state_bytes

__all__ = ["FiraAdamW", "GaLoreAdamW", "GaLoreLion", "Lion", "param_groups", "state_bytes"]
