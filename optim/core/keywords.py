"""Keywords and group keys that other optimizers take and none here has: accepted where their value changes nothing,
refused by name and reason where it would.

An optimizer's keys are its constructor's arguments and those that every class has. Of the others, one that a class here
or a slip of the keyboard may mean is refused; a key that nobody knows is the user's own, and is kept in its group.
"""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

from ...validation import is_real, nearest

# Keys beside the constructor's: torch's named parameters, what its LR schedulers write, a label, and our own number.
FOREIGN_KEYS = frozenset(
    {"params", "param_names", "name", "group_number", "initial_lr", "swa_lr"}
    | {f"{bound}_{key}" for bound in ("min", "max", "base") for key in ("lr", "momentum")}
)
SLIP = 0.8  # how near a key must come to a known one to be taken for it


class Accepted(NamedTuple):
    """The values of a keyword that change nothing, None for any, and why no others."""

    values: tuple[object, ...] | None
    reason: str = ""

    def takes(self, value: object) -> bool:
        return self.values is None or any(_is(value, known) for known in self.values)


def _is(value: object, known: object) -> bool:
    """Equal, and of one type; 1.0 is 1, and True is not."""
    alike = type(value) is type(known) or (is_real(value) and is_real(known))
    return alike and bool(value == known)


ACCEPTED: Mapping[str, Accepted] = {
    # torch.optim
    "foreach": Accepted((None, False), "parameters are stepped one after the other"),
    "fused": Accepted((None, False), "parameters are stepped one after the other"),
    "differentiable": Accepted((False,), "no graph of a step is kept"),
    "amsgrad": Accepted((False,), "no maximum of second moments is kept"),
    "decoupled_weight_decay": Accepted((True,), "weight decay is decoupled"),
    # galore-torch, apollo-torch, fira
    "correct_bias": Accepted((True,), "Adam's bias is corrected"),
    "no_deprecation_warning": Accepted(None),
    "dim": Accepted((2,), "matrices are projected, not tensors of more dimensions"),
}
# lion-pytorch, where a decoupled decay is one that is not times the learning rate
OF_LION: Mapping[str, Accepted] = {
    "use_triton": Accepted((False,), "there is no Triton kernel"),
    "decoupled_weight_decay": Accepted((False,), "weight_decay is times the learning rate"),
}
# what turns Q-GaLore's two ideas off in a group
OF_Q_GALORE: Mapping[str, Accepted] = {
    "quant": Accepted((False,), "GaLoreAdamW8bit packs projectors"),
    "quant_n_bit": Accepted(None),
    "quant_group_size": Accepted(None),
    "cos_threshold": Accepted((None, 1), "GaLoreAdamW8bit has lazy refreshes"),  # 1 is never passed
    "gamma_proj": Accepted(None),
    "queue_size": Accepted(None),
}
OF_8_BITS: Mapping[str, Accepted] = {
    "optim_bits": Accepted((8, 32), "moments have 8 bits"),
    "args": Accepted((None,), "there is nothing for it to say"),
    "min_8bit_size": Accepted((4096,), "moments of fewer than 4096 elements stay fp32"),
    "percentile_clipping": Accepted((100,), "gradients are not clipped"),
    "block_wise": Accepted((True,), "codes are block-wise"),
    "is_paged": Accepted((False,), "moments are not paged"),
    # of its groups, for AdEMAMix
    "alpha": Accepted((0.0,), "there is no third moment"),
    "t_alpha": Accepted((None,), "there is no third moment"),
    "t_beta3": Accepted((None,), "there is no third moment"),
}


def refused_keywords(given: Mapping[str, object], accepted: Mapping[str, Accepted]) -> Iterator[str]:
    """Why a keyword that is accepted at some values is not at this one."""
    for key, value in sorted(given.items()):
        if key in accepted and not accepted[key].takes(value):
            neutral = " or ".join(map(repr, accepted[key].values or ()))
            yield f"{key} must be {neutral}, got {value!r}: {accepted[key].reason}"


def check_keywords(
    name: str, given: Mapping[str, object], known: Iterable[str], accepted: Mapping[str, Accepted]
) -> None:
    """Refuse what a constructor's ``torch_keywords`` cannot hold.

    Raises:
        TypeError: for keywords that nobody knows, all of them.
        ValueError: for values that would have to change something, all of them.
    """
    unknown = sorted(given.keys() - accepted.keys())
    if unknown:
        hints = (f"{key!r} ({nearest(key, known)})" for key in unknown)
        raise TypeError(f"{name} got an unexpected keyword argument {', '.join(hints)}")
    if refused := list(refused_keywords(given, accepted)):
        raise ValueError("; ".join(refused))


def check_keys(
    group: Mapping[str, object],
    own: Collection[str],
    accepted: Mapping[str, Accepted],
    elsewhere: Sequence[type],
) -> None:
    """Refuse keys of a group that would be ignored though they mean something.

    Args:
        own: the optimizer's keys.
        accepted: keys that are accepted at some values.
        elsewhere: classes whose keys are known too.

    Raises:
        ValueError: for all such keys, in one line, in their order by name.
    """
    refused = list(refused_keywords({k: v for k, v in group.items() if k not in own}, accepted))
    for key in sorted(map(str, group.keys() - own - FOREIGN_KEYS - accepted.keys())):
        theirs = min((kind.__name__ for kind in elsewhere if key in _known_to(kind)), default=None)
        if difflib.get_close_matches(key, own, n=1, cutoff=SLIP):
            hint = nearest(key, own)
        elif theirs is not None:
            hint = f"a key of {theirs}; known: {', '.join(sorted(own))}"
        else:
            continue
        refused.append(f"unknown parameter group key {key!r} = {group[key]!r}; {hint}")
    if refused:
        raise ValueError("; ".join(refused))


def _known_to(kind: type) -> set[str]:
    return keyword_names(kind) | getattr(kind, "renamed", {}).keys()


def keyword_names(kind: type) -> set[str]:
    """The named keywords of a constructor."""
    parameters = inspect.signature(kind.__init__).parameters.values()  # type: ignore[misc]  # of the class itself
    return {p.name for p in parameters if p.kind is not p.VAR_KEYWORD} - {"self", "params"}
