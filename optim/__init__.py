"""Drop-in ``torch.optim`` classes whose state is low-rank. Imports torch and nothing heavier."""

from .galore import GaLoreAdamW
from .groups import param_groups
from .memory import state_bytes

__all__ = ["GaLoreAdamW", "param_groups", "state_bytes"]
