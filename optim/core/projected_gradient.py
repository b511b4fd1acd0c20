"""A gradient of which the coordinates are kept, in the place of the gradient."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

aten = torch.ops.aten
VIEWS = (aten.detach.default, aten.view.default, aten.slice.Tensor)  # of all of it
ADDED = (aten.add_.Tensor, aten.add.Tensor)
SCALED = (aten.mul_.Tensor, aten.mul_.Scalar)
SCALED_EACH = (aten._foreach_mul_.Tensor, aten._foreach_mul_.Scalar)
UNSCALED = aten._amp_foreach_non_finite_check_and_unscale_.default


OUTSIDE = 4  # columns that tell how large what coordinates leave is: to some percent


class Kept(NamedTuple):
    """What is kept of a gradient, all of it linear in it.

    ``coordinates``: G P (right) or P^T G, or the entries in a mask. ``outside``: what they leave, such as G - G P P^T,
    times ``OUTSIDE`` random columns, or more that are scaled to count as these, whose squares tell how large it is.
    """

    coordinates: Tensor
    outside: Tensor

    def norm(self) -> Tensor:
        inside, outside = map(torch.linalg.vector_norm, self)
        return torch.hypot(inside.float(), outside.float() / OUTSIDE**0.5).to(inside.dtype)


class ProjectedGradient(Tensor):
    """Looks like the gradient. Another pass adds to it, which is projected as it is added; clipping and ``GradScaler``
    scale it. Its norm is exact after one pass, and after several as exact as ``Kept.norm``. Whatever else would read
    it raises."""

    kept: Kept
    one_norm: Tensor | None  # of the gradient of one pass
    reduce: Callable[[Tensor], Kept]
    complete: Callable[[], None] | None = None  # sums ``outside`` over processes, which waits until a norm is read

    @staticmethod
    def __new__(
        cls,
        like: Tensor,
        kept: Kept,
        one_norm: Tensor | None,
        reduce: Callable[[Tensor], Kept],
        shape: Sequence[int] | None = None,
    ) -> ProjectedGradient:
        made: ProjectedGradient = Tensor._make_wrapper_subclass(
            cls, like.shape if shape is None else shape, dtype=like.dtype, device=like.device
        )
        made.kept, made.one_norm, made.reduce = kept, one_norm, reduce
        return made

    @classmethod
    def of(cls, G: Tensor, reduce: Callable[[Tensor], Kept]) -> ProjectedGradient:
        return cls(G, reduce(G), torch.linalg.vector_norm(G), reduce)

    @classmethod
    def of_part(cls, G: Tensor, reduce: Callable[[Tensor], Kept]) -> ProjectedGradient:
        """Of a gradient that will be added to others."""
        return cls(G, reduce(G), None, reduce)

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"ProjectedGradient({tuple(self.shape)}, coordinates {tuple(self.kept.coordinates.shape)})"

    def total_norm(self) -> Tensor:
        if self.complete is not None:
            self.complete()
        return self.kept.norm() if self.one_norm is None else self.one_norm.clone()

    def scale_(self, factor: Any) -> None:
        held = [*self.kept] if self.one_norm is None else [*self.kept, self.one_norm]
        for tensor in held:
            tensor.mul_(factor)

    def add_pass_(self, gradient: Tensor, alpha: Any = 1) -> None:
        for held, more in zip(self.kept, self.reduce(gradient), strict=True):
            held.add_(more, alpha=alpha)
        self.one_norm = None

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        own, rest, keywords = args[0], args[1:], kwargs or {}
        if func is aten.detach.default:
            return own
        if func in VIEWS:
            seen = func(torch.empty(own.shape, device="meta"), *rest, **keywords).shape
            if seen.numel() == own.numel():
                return cls(own, own.kept, own.one_norm, own.reduce, seen)
        if func is aten.neg.default:
            return cls(own, Kept(*(-held for held in own.kept)), own.one_norm, own.reduce)
        if func in ADDED and isinstance(own, ProjectedGradient) and not isinstance(rest[0], ProjectedGradient):
            own.add_pass_(rest[0], keywords.get("alpha", 1))
            return own
        if func is aten.linalg_vector_norm.default and rest in ((), (2,)):
            return own.total_norm()
        if func is aten._foreach_norm.Scalar and rest in ((), (2,)):
            return [_norm(gradient) for gradient in own]
        if func in SCALED:
            own.scale_(rest[0])
            return own
        if func in SCALED_EACH:
            for gradient in own:
                gradient.scale_(rest[0]) if isinstance(gradient, ProjectedGradient) else gradient.mul_(rest[0])
            return None
        if func is UNSCALED:
            _unscale(own, *rest)
            return None
        raise RuntimeError(
            f"of a gradient its coordinates are kept, and torch's {func._schema.name.removeprefix('aten::')} wants all "
            "of it; give zero_grad its set_to_none=True, or call remove() of what release_gradients returned"
        )


def local_of(gradient: Any) -> Any:
    """What this process holds of a gradient, if there is one."""
    return getattr(gradient, "_local_tensor", gradient)


def _norm(gradient: Tensor) -> Tensor:
    return gradient.total_norm() if isinstance(gradient, ProjectedGradient) else torch.linalg.vector_norm(gradient)


def _unscale(gradients: list[Tensor], found_inf: Tensor, inv_scale: Tensor) -> None:
    """``GradScaler``'s: what is kept is not finite where the gradient was not, and a norm is where that could be."""
    whole = [gradient for gradient in gradients if not isinstance(gradient, ProjectedGradient)]
    if whole:
        torch._amp_foreach_non_finite_check_and_unscale_(whole, found_inf, inv_scale)
    for gradient in gradients:
        if isinstance(gradient, ProjectedGradient):
            held = [*gradient.kept] if gradient.one_norm is None else [*gradient.kept, gradient.one_norm]
            torch._amp_foreach_non_finite_check_and_unscale_(held, found_inf, inv_scale)
