"""State of the published packages, galore-torch, apollo-torch and fira, as the classes of the same names keep it here.

    theirs                                         here
    step              a number                     step, a tensor: refreshes come at the same steps
    projector         an object with a matrix      basis, transposed where P is on the right; or the seed it came from
    exp_avg, ...      in the gradient's dtype      the same, widened to what it has here
    state1, state2    codes of bitsandbytes        exp_avg, exp_avg_sq: the same codes
    scaling_grad      Fira's last norm             residual_norm
    scaled_grad       APOLLO's last norm           update_norm
    seed              of APOLLO's first matrix     seed, advanced to that of the present one
    RMS               of weights, for Adafactor    nothing: it is measured at each step

A projector counts with its own rank, gap, scale and side, whatever its group says: where they differ, and wherever
something is not in this list, the state is refused.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ...validation import is_whole, require
from ..core.types import Group
from ..distributed import FullMatrix, FullShard, has_subspace
from ..state.blockwise_8bit import IN_8_BITS, of_bitsandbytes
from ..state.spec import StateSpec, new_tensor
from .gaussian import following, gaussian_columns

NESTED = "__bnb_optimizer_quant_state__"  # where bitsandbytes puts its tensors when it saves them
NUMBERS = {"exp_avg": "1", "exp_avg_sq": "2"}  # of bitsandbytes' tensors
DESCRIBED = ("rank", "update_proj_gap", "scale", "proj_type")  # of a projector, by its group
BESIDE = {"verbose", "svd_count"}  # what a projector has that moves nothing


@dataclass(frozen=True)
class Published:
    """What a published class keeps beside its moments and its projectors.

    Args:
        package: where it comes from.
        scale: what its groups and projectors call ``scale``.
        renamed: keys of state by their names here, with those there; one that is missing there is zero.
        derived: keys that a matrix always has there, and that nothing here needs.
        scratch: keys that may be there, without a meaning for the next step.
    """

    package: str
    scale: str = "scale"
    renamed: Mapping[str, str] = field(default_factory=dict)
    derived: tuple[str, ...] = ()
    scratch: tuple[str, ...] = ()


def is_foreign(state: Mapping[str, Any]) -> bool:
    """Whether another kind of optimizer saved a parameter's state: ours count in a tensor."""
    counts = isinstance(state.get("step"), Tensor)
    return not counts and not all(isinstance(value, Tensor) for value in state.values())


class PublishedState:
    """The state of a whole parameter as a published class saved it, to be taken over tensor by tensor.

    Args:
        saved: what was saved of the parameter.
        published: what that class keeps.
        shard: the parameter, without its memory.
        group: its group here.
        device: on which projections are drawn.
    """

    def __init__(
        self, saved: Mapping[str, Any], published: Published, shard: FullShard, group: Group, device: torch.device
    ) -> None:
        self.published, self.shard, self.group, self.device = published, shard, group, device
        self.left = {**saved, **saved.get(NESTED, {})}  # what was not taken yet
        self.left.pop(NESTED, None)
        self.steps = 0
        self.told = ", ".join(sorted(map(str, self.left)))

    def as_declared(self, specs: Sequence[StateSpec]) -> dict[str, Tensor] | None:
        """What ``specs`` declare; None where the parameter has not moved yet.

        Raises:
            ValueError: where the class here would not go on as that one.
        """
        if "step" not in self.left:
            self._check_unmoved()
            return None
        own: dict[str, Tensor] = {}
        for spec in specs:
            own |= self._taken(spec)
        self._check_left(own)
        return own

    def _taken(self, spec: StateSpec) -> dict[str, Tensor]:
        held = [tensor.name for tensor in spec.codec.held(spec, self.shard)]
        if all(isinstance(self.left.get(name), Tensor) for name in held):
            return {name: _widened(self.left.pop(name), spec) for name in held}
        if spec.name == "step":
            self.steps = _whole("step", self.left.pop("step"))
            return {"step": torch.tensor(float(self.steps), dtype=torch.float32, device="cpu")}
        if spec.name == "basis" and has_subspace(self.shard):
            return {"basis": self._basis(spec, self.shard)}
        if spec.name == "seed" and has_subspace(self.shard):
            return {"seed": torch.tensor(self._seed(self.shard), dtype=spec.dtype, device="cpu")}
        if spec.name in self.published.renamed:
            norm = self.left.pop(self.published.renamed[spec.name], 0.0)
            return {spec.name: torch.as_tensor(norm, dtype=spec.dtype, device="cpu")}
        if spec.codec is IN_8_BITS:
            return of_bitsandbytes(spec, NUMBERS[spec.name], self.left)
        raise ValueError(f"it has nothing that {spec.name!r} could be; it has {self.told}")

    # ---- a subspace -------------------------------------------------------------------------------------------------

    def _projector(self) -> dict[str, Any]:
        """The attributes of the projector, which its group describes."""
        package = self.published.package
        held = dict(getattr(self.left.pop("projector", None), "__dict__", {}))
        if "ortho_matrix" not in held:
            raise ValueError(f"it has no projector of {package}; it has {self.told}")
        if missing := [key for key in self.published.derived if key not in self.left]:
            raise ValueError(f"it has no {missing[0]!r}, which matrices of {package} have; it has {self.told}")
        for key in DESCRIBED:
            there = self.published.scale if key == "scale" else key
            if there not in held:
                raise ValueError(f"its projector has no {there!r}, which those of {package} have")
            value = held.pop(there)
            if value != self.group[key]:
                raise ValueError(
                    f"its projector has {there}={value!r}, which counts; its group has {self.group[key]!r}"
                )
        if unknown := held.keys() - {"ortho_matrix", "seed"} - BESIDE:
            raise ValueError(f"its projector has {', '.join(map(repr, sorted(unknown)))}, which nobody knows here")
        return held

    def _basis(self, spec: StateSpec, shard: FullMatrix) -> Tensor:
        held = self._projector()
        if "seed" in held:
            raise ValueError("its projector draws its matrix from a seed, and here it comes from the gradient")
        if spec.shape != shard.side.basis_shape:
            raise ValueError("its projector is not packed; load it with quant=False")
        columns = _columns(held, shard)
        return new_tensor(spec.shape, spec.dtype, columns.device, spec, empty=True).copy_(columns)

    def _seed(self, shard: FullMatrix) -> int:
        """The seed of the present projection: saved are the first one's, and the one after the present one's."""
        held = self._projector()
        columns, after = _columns(held, shard), held.get("seed")
        seeds = [_whole("seed", self.left.pop("seed", None))]
        while len(seeds) <= self.steps and (len(seeds) == 1 or seeds[-1] != after):  # a refresh a step, at most
            seeds.append(following(seeds[-1]))
        if len(seeds) == 1 or seeds[-1] != after:
            raise ValueError(f"its projector's seed={after!r} does not follow from its first, {seeds[0]}")
        if not torch.equal(gaussian_columns(shard.side, seeds[-2], self.device).to(columns), columns):
            raise ValueError(
                f"its projector has other numbers than seed={seeds[-2]} draws on {self.device.type!r}; load it on the "
                "kind of device that it was trained on"
            )
        return seeds[-2]

    # ---- what is not taken ------------------------------------------------------------------------------------------

    def _check_unmoved(self) -> None:
        """Refuse all but a first seed: APOLLO's are there before a step, and here they are born in the first one."""
        if self.left.keys() != {"seed"}:
            raise ValueError(f"it has no step; it has {self.told}")
        if has_subspace(self.shard) and self.group.get("proj") == "random":
            born = self.group["seed"] + self.shard.position
            require(self.left["seed"] == born, f"its first seed must be seed + position = {born}", self.left["seed"])

    def _check_left(self, own: Mapping[str, Tensor]) -> None:
        """Refuse keys that nothing here stands for."""
        passing = {
            key for key in (*self.published.derived, *self.published.scratch) if self.left.pop(key, None) is not None
        }
        if "unorm_vec" in passing and own["exp_avg"].dtype == torch.float32:
            warnings.warn(
                "bitsandbytes took galore-torch's percentile_clipping=100 for max_unorm=100: where moments are fp32, "
                "updates were bounded by 100 times the weights' norm, which for a projected matrix is next to nothing; "
                "here they are not",
                UserWarning,
                stacklevel=2,
            )
        if self.left:
            raise ValueError(f"{', '.join(map(repr, sorted(self.left)))} would be ignored; it has {self.told}")


def _columns(projector: Mapping[str, Any], shard: FullMatrix) -> Tensor:
    """P of a projector (side x r): theirs is transposed where it is on the right."""
    matrix, side = projector["ortho_matrix"], shard.side
    if not isinstance(matrix, Tensor):
        raise ValueError(f"its projector holds a {type(matrix).__name__}, not one matrix")
    expected = side.basis_shape[::-1] if side.right else side.basis_shape
    if tuple(matrix.shape) != expected:
        raise ValueError(f"its projector has a matrix of shape {tuple(matrix.shape)}, expected {expected}")
    return matrix.detach().t() if side.right else matrix.detach()


def _widened(value: Tensor, spec: StateSpec) -> Tensor:
    """At least in the dtype that it has here: bf16 second moments would stand still."""
    both = value.is_floating_point() and spec.dtype.is_floating_point
    return value.to(torch.promote_types(value.dtype, spec.dtype)) if both else value


def _whole(key: str, value: Any) -> int:
    number = value.item() if isinstance(value, Tensor) and value.numel() == 1 else value
    number = int(number) if isinstance(number, float) and number.is_integer() else number
    require(is_whole(number) and number >= 0, f"its {key} must be a whole number", value)
    return int(number)
