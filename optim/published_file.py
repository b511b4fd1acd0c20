"""Files that galore-torch, apollo-torch and fira saved, read without running any of what is in them.

Their optimizers keep Python objects in their state, which ``torch.load(weights_only=True)`` refuses, and loading them
without it runs whatever a file says. Here each of their classes is a bag of attributes that has no code.
"""

from __future__ import annotations

import os
import pickle
import re
from typing import IO, Any

import torch


class PublishedProjector:
    """What a projector of those packages held: attributes, and nothing that could be called."""


def _of_name(name: str) -> type[PublishedProjector]:
    """What ``torch.load`` takes for the class of that name."""
    module, _, own = name.rpartition(".")
    return type(own, (PublishedProjector,), {"__module__": module})


STAND_INS: list[Any] = [
    _of_name("galore_torch.galore_projector.GaLoreProjector"),
    _of_name("apollo_torch.svd_projector.GaLoreProjector"),
    _of_name("apollo_torch.random_projector.GradientProjector"),
    _of_name("fira.gradient_projection.GradientProjector"),
]


def read_published(file: str | os.PathLike[str] | IO[bytes]) -> Any:
    """What a file of galore-torch, apollo-torch or fira holds, to be given to ``load_state_dict``.

    Nothing in the file is run, and the packages need not be installed. It may be a ``state_dict()``, as the Hugging
    Face Trainer writes it, or a dictionary that has one, as the scripts of these packages do: ``["optimizer"]``.

    Args:
        file: a path or an open file, as for ``torch.load``.

    Returns:
        What was saved, tensors on the CPU, with objects of these packages as plain attributes. Of
        ``gracile.optim`` the class of the same name takes the ``state_dict()`` in it, in one process or under DDP by
        ``load_state_dict``, split by ZeRO or FSDP2 by ``load_full_state``. It refuses what it would not go on with.

    Raises:
        ValueError: for a file that holds anything else than tensors, numbers, text and such objects.

    Example:
        >>> import galore_torch
        >>> from torch import nn
        >>> from gracile.optim import GaLoreAdamW, read_published
        >>> weight = nn.Parameter(torch.randn(64, 32))
        >>> groups = [{"params": [weight], "rank": 4, "update_proj_gap": 200, "scale": 0.25, "proj_type": "std"}]
        >>> theirs = galore_torch.GaLoreAdamW(groups, lr=0.01, no_deprecation_warning=True)
        >>> weight.square().sum().backward()
        >>> theirs.step()
        >>> torch.save({"optimizer": theirs.state_dict(), "update_step": 1}, "optimizer.pt")

        >>> ours = GaLoreAdamW(groups, lr=0.01, subspace_method="svd")
        >>> ours.load_state_dict(read_published("optimizer.pt")["optimizer"])
        >>> {key: tuple(tensor.shape) for key, tensor in ours.state[weight].items()}
        {'step': (), 'basis': (32, 4), 'exp_avg': (64, 4), 'exp_avg_sq': (64, 4)}
    """
    try:
        with torch.serialization.safe_globals(STAND_INS):
            return torch.load(file, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, TypeError) as error:  # the second of a projector that is called
        found = re.search(r"GLOBAL (\S+)", str(error))
        what = f"an object of {found[1]}" if found else "what is neither a tensor nor a number"
        name = getattr(file, "name", file)
        raise ValueError(
            f"{name} holds {what}; of objects, only projectors of galore-torch, apollo-torch and fira are read, "
            "and nothing of it was run"
        ) from None
