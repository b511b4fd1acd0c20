"""The part of a configuration that every method has."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar

from peft import PeftConfig
from peft.utils.other import get_pattern_key
from torch import Tensor

from ..validation import Check, flag, is_whole, number, require, whole

COMMON_CHECKS: Mapping[str, Check] = {
    "r": whole(1),
    "alpha": number("> 0", optional=True),
    "dropout": number("in [0, 1)"),
    "seed": whole(0),
    "save_projection": flag(),
    "calibrated": flag(),
}
OF_OUTPUTS = ("of_outputs", "distance_of_outputs")


@dataclass
class AdapterConfig(PeftConfig):
    """Rank, scale and targets; a method's own configuration adds its fields, each with a check.

    Attributes:
        r: rank of the change of each matrix.
        rank_pattern: other ranks, by the ends of layers' names.
        alpha: the change is scaled by alpha / r; None scales it by 1.
        dropout: on what goes into the change, in training.
        target_modules, exclude_modules, layers_to_transform, layers_pattern, modules_to_save: as for peft's LoRA.
        target_parameters: names of parameters to adapt that no linear layer has: experts in one tensor (E, m, n).
        seed: of what is drawn.
        save_projection: store the frozen factors; False stores four numbers for each layer, by which a base that is not
            the one of training is refused.
        calibrated: whether ``calibrate`` has run with it.
    """

    method: ClassVar[Any] = None  # a member of a str-Enum, set by ``register``
    checks: ClassVar[Mapping[str, Check]] = {}
    without_effect: ClassVar[tuple[str, ...]] = ()  # fields that a method has no use for, which are refused
    calibrated_on: ClassVar[str] = "train"  # of the data of ``gracile finetune``, where a method has a ``statistic``

    r: int = field(default=8, metadata={"help": "Rank of the change of each matrix."})
    rank_pattern: dict[str, int] = field(
        default_factory=dict, metadata={"help": "Other ranks, by the ends of layers' names."}
    )
    alpha: float | None = field(
        default=None, metadata={"help": "The change is scaled by alpha / r; None scales it by 1."}
    )
    dropout: float = field(default=0.0, metadata={"help": "On what goes into the change, in training."})
    target_modules: set[str] | list[str] | str | None = field(
        default=None, metadata={"help": "Ends of the names of the layers to adapt, a regular expression or all-linear."}
    )
    exclude_modules: set[str] | list[str] | str | None = field(
        default=None, metadata={"help": "Layers to leave out, likewise."}
    )
    target_parameters: list[str] | None = field(
        default=None, metadata={"help": "Parameters to adapt that no linear layer has: experts in one tensor."}
    )
    layers_to_transform: list[int] | int | None = field(default=None, metadata={"help": "Numbers of blocks to adapt."})
    layers_pattern: list[str] | str | None = field(
        default=None, metadata={"help": "What the list of blocks is called, with layers_to_transform."}
    )
    modules_to_save: list[str] | None = field(
        default=None, metadata={"help": "Modules that are trained entirely and saved beside the adapter."}
    )
    seed: int = field(default=0, metadata={"help": "Of what is drawn."})
    save_projection: bool = field(
        default=True,
        metadata={"help": "Store the frozen factors; False stores marks by which another base is refused."},
    )
    calibrated: bool = field(default=False, metadata={"help": "Set by gracile.adapters.calibrate."})

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = type(self).method
        self.target_modules, self.exclude_modules = _as_set(self.target_modules), _as_set(self.exclude_modules)
        for kind in reversed(type(self).__mro__):
            checks = COMMON_CHECKS if kind is AdapterConfig else vars(kind).get("checks", {})
            for key, check in checks.items():
                check(key, getattr(self, key))
        defaults = {own.name: own.default for own in fields(self) if own.name in self.without_effect}
        for key, default in defaults.items():
            if getattr(self, key) != default:
                raise ValueError(
                    f"{key} has no effect with {type(self).__name__}, got {getattr(self, key)!r}; leave it out"
                )
        good = all(is_whole(rank) and rank >= 1 for rank in self.rank_pattern.values())
        require(good, "rank_pattern must map names to whole numbers >= 1", self.rank_pattern)

    @property
    def reads_outputs(self) -> bool:
        """Whether the method has a term or a distance on the model's outputs, with the weights that it was given."""
        kind = type(self)
        return any(getattr(kind, name) is not getattr(AdapterConfig, name) for name in OF_OUTPUTS)

    @property
    def reads_base(self) -> bool:
        """Whether these are given the base's own logits, which cost a pass."""
        return False

    def of_outputs(self, logits: Tensor, base: Tensor | None, labels: Tensor | None) -> Tensor | None:
        """A term of the loss on the model's outputs, already weighted; or None.

        Args:
            logits: examples x tokens x vocabulary, or examples x classes.
            base: those of the base model, where ``reads_base``.
            labels: -100 where a token has none.
        """
        return None

    def distance_of_outputs(self, logits: Tensor, base: Tensor | None, labels: Tensor | None) -> Tensor | None:
        """A distance that is no part of the loss, of which layers are given the gradient (``take_distance``); or None.
        The arguments are those of ``of_outputs``."""
        return None

    def rank_of(self, name: str) -> int:
        """The rank of a layer."""
        return self.rank_pattern.get(get_pattern_key(list(self.rank_pattern), name), self.r)

    def scale_of(self, name: str) -> float:
        """The factor on a layer's change."""
        return 1.0 if self.alpha is None else self.alpha / self.rank_of(name)

    @property
    def statistics(self) -> Mapping[str, Tensor]:
        """What ``calibrate`` found for each layer, by its name; it is not saved."""
        found: Mapping[str, Tensor] = self.__dict__.get("_statistics", {})
        return found

    @statistics.setter
    def statistics(self, found: Mapping[str, Tensor]) -> None:
        self.__dict__["_statistics"] = found


def _as_set(names: Any) -> Any:
    return set(names) if isinstance(names, Iterable) and not isinstance(names, str) else names
