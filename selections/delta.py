"""What was trained of a model, as a sparse file: new values and where they are, and the old ones, to undo it.

Tensors are compared by their bits. Of each that changed the file holds ``<name>.values`` and one of ``<name>.indices``
(places in the flattened tensor, int32), ``<name>.rows`` or ``<name>.columns`` (of a matrix in whose lines nearly all
entries changed); with ``undo``, ``<name>.old`` too. A fingerprint of the old values, in the header, refuses any other
base; deltas of disjoint places fit a base in any order, and are undone in any.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from ..optim.distributed import is_dtensor
from ..validation import flag, require

FILE, FORMAT = "delta.safetensors", "gracile-delta-1"
LINES = 0.9  # share of the entries of the changed lines from which these are stored whole
BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}

Tensors = nn.Module | Mapping[str, Tensor]


@dataclass(frozen=True)
class Change:
    """What changed of one tensor.

    Args:
        form: ``indices``, ``rows`` or ``columns``.
        at: their numbers, ascending (int32, or int64 of a tensor with more than 2^31 - 1 entries).
        values: the new ones: flat, k x n or m x k.
        old: those before, likewise; None where they were left out.
        shape: of the whole tensor.
        fingerprint: of the old values.
    """

    form: str
    at: Tensor
    values: Tensor
    old: Tensor | None
    shape: tuple[int, ...]
    fingerprint: str

    def of(self, tensor: Tensor) -> Tensor:
        """What a whole tensor has in these places."""
        at = self.at.to(tensor.device)
        if self.form == "indices":
            return tensor.reshape(-1).index_select(0, at)
        return tensor.index_select(0 if self.form == "rows" else 1, at)

    def put(self, tensor: Tensor, values: Tensor) -> None:
        """Write to these places."""
        at, values = self.at.to(tensor.device).long(), values.to(tensor.device)
        if self.form != "indices":
            tensor.index_copy_(0 if self.form == "rows" else 1, at, values)
        elif tensor.is_contiguous():
            tensor.view(-1).index_copy_(0, at, values)
        else:
            tensor.copy_(tensor.reshape(-1).index_copy(0, at, values).view(tensor.shape))


@dataclass(frozen=True)
class Delta:
    """What changed of a model, by the names of its parameters.

    Args:
        changes: of the tensors that changed.

    Raises:
        TypeError: without changes.

    Example:
        >>> from gracile.selections import Delta
        >>> Delta({}).count
        0
    """

    changes: Mapping[str, Change]

    @property
    def count(self) -> int:
        """How many numbers are stored as new."""
        return sum(change.values.numel() for change in self.changes.values())


def save_delta(model: Tensors, base: Tensors, folder: str | Path, *, undo: bool = True) -> Delta:
    """Write what ``model`` has other than ``base`` to ``folder``; of several processes the first writes.

    Args:
        model: a module, also split by FSDP2 (then every process calls), or its tensors by name.
        base: what it was before training, likewise.
        folder: is made where it is not there.
        undo: store old values too, so that ``undo_delta`` needs no base.

    Returns:
        What was written.

    Raises:
        ValueError: for a name that the base has not, another shape or dtype, or parameters that ZeRO 3 holds.

    Example:
        >>> import tempfile
        >>> from gracile.selections import merge_delta, save_delta, undo_delta
        >>> base, model = {"w": torch.zeros(2, 3)}, {"w": torch.tensor([[0.0, 1.0, 0.0], [0.0, 0.0, 0.0]])}
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     delta = save_delta(model, base, folder)
        >>> merge_delta(base, delta)
        >>> base["w"].sum().item(), delta.count
        (1.0, 1)
        >>> undo_delta(base, delta)
        >>> base["w"].sum().item()
        0.0
    """
    flag()("undo", undo)
    of_base = _tensors(base)
    changes = {}
    for name, tensor in _tensors(model).items():
        require(name in of_base, "base must have every parameter of the model", name)
        new, old = _whole(tensor, name), _whole(of_base[name], name)
        require(
            new.shape == old.shape and new.dtype == old.dtype,
            f"{name} of model and base must be of one shape and dtype ({tuple(old.shape)}, {old.dtype})",
            (tuple(new.shape), new.dtype),
        )
        changed = _change(new, old.to(new.device), undo)
        if changed is not None:
            changes[name] = changed
    if not dist.is_initialized() or dist.get_rank() == 0:
        _write(changes, Path(folder))
    return Delta(changes)


def load_delta(folder: str | Path) -> Delta:
    """Read a delta.

    Args:
        folder: as given to ``save_delta``.

    Raises:
        FileNotFoundError: where there is none.
        ValueError: for a file of another kind.

    Example:
        >>> import tempfile
        >>> from gracile.selections import load_delta, save_delta
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     saved = save_delta({"w": torch.ones(2)}, {"w": torch.zeros(2)}, folder)
        ...     load_delta(folder).changes["w"].values
        tensor([1., 1.])
    """
    path = Path(folder) / FILE
    if not path.is_file():
        raise FileNotFoundError(f"no {FILE} in {folder}; gracile.selections.save_delta writes one")
    with safe_open(path, "pt") as file:
        about = file.metadata() or {}
        require(
            about.get("format") == FORMAT,
            f"{path} must be a file of save_delta, of format {FORMAT}",
            about.get("format"),
        )
        held = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118, which is no mapping
    changes = {}
    for name, own in json.loads(about["tensors"]).items():
        old = held.get(f"{name}.old")
        at = held[f"{name}.{own['form']}"]
        changes[name] = Change(own["form"], at, held[f"{name}.values"], old, tuple(own["shape"]), own["fingerprint"])
    return Delta(changes)


@torch.no_grad()
def merge_delta(model: Tensors, delta: Delta | str | Path) -> None:
    """Put the new values into ``model``, which is the base, or has other deltas of disjoint places merged.

    Args:
        model: a module that is not split, or its tensors by name, changed in place.
        delta: or its folder.

    Raises:
        ValueError: for another base, before anything is written.

    Example:
        >>> from gracile.selections import Delta, merge_delta
        >>> merge_delta({"w": torch.zeros(2)}, Delta({}))
    """
    found = list(_fitting(model, delta))
    for name, change, tensor in found:
        if _fingerprint(change.of(tensor)) != change.fingerprint:
            merged = _same(change.of(tensor), change.values)
            raise ValueError(f"{name}: {_MERGED if merged else _OTHER}")
    for _, change, tensor in found:
        change.put(tensor, change.values)


@torch.no_grad()
def undo_delta(model: Tensors, delta: Delta | str | Path) -> None:
    """Put the old values back, to the bit.

    Args:
        model: as for ``merge_delta``.
        delta: or its folder.

    Raises:
        ValueError: for a model that the delta is not merged into, or a file without old values; before anything is
            written.

    Example:
        >>> from gracile.selections import Delta, undo_delta
        >>> undo_delta({"w": torch.zeros(2)}, Delta({}))
    """
    found = list(_fitting(model, delta))
    for name, change, tensor in found:
        if not _same(change.of(tensor), change.values):
            raise ValueError(f"{name}: this delta is not merged, or weights were trained since; merge it first")
        if change.old is None:
            raise ValueError(f"{name}: the delta was saved with undo=False; load the base instead")
    for _, change, tensor in found:
        assert change.old is not None
        change.put(tensor, change.old)


_MERGED = "this delta is merged already; undo it first"
_OTHER = "the delta was made of another base, whose values have another fingerprint; load the one it was trained from"


def _fitting(model: Tensors, delta: Delta | str | Path) -> Iterator[tuple[str, Change, Tensor]]:
    own = delta if isinstance(delta, Delta) else load_delta(delta)
    tensors = _tensors(model)
    for name, change in own.changes.items():
        require(name in tensors, "the model has no parameter of the delta's name", name)
        tensor = tensors[name]
        split = is_dtensor(tensor) or hasattr(tensor, "ds_tensor")
        require(not split, "a delta is merged into whole weights; merge before the model is split", name)
        fits = tuple(tensor.shape) == change.shape and tensor.dtype == change.values.dtype
        about = (tuple(tensor.shape), tensor.dtype)
        require(fits, f"{name} must be of shape {change.shape} and {change.values.dtype}", about)
        yield name, change, tensor


def _tensors(model: Tensors) -> dict[str, Tensor]:
    named = model.named_parameters() if isinstance(model, nn.Module) else model.items()
    return {name: tensor.detach() if not hasattr(tensor, "ds_tensor") else tensor for name, tensor in named}


def _whole(tensor: Tensor, name: str) -> Tensor:
    if hasattr(tensor, "ds_tensor"):
        raise ValueError(f"{name} is split by ZeRO 3; give tensors by name, gathered, in place of the module")
    whole: Tensor = tensor.full_tensor() if is_dtensor(tensor) else tensor  # type: ignore[attr-defined]
    return whole


def _bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(BITS[tensor.element_size()])


def _same(one: Tensor, other: Tensor) -> bool:
    return torch.equal(_bits(one), _bits(other.to(one.device)))


def _fingerprint(values: Tensor) -> str:
    return hashlib.sha256(_bits(values).cpu().numpy().tobytes()).hexdigest()


def _change(new: Tensor, old: Tensor, undo: bool) -> Change | None:
    differs = _bits(new) != _bits(old)
    count = int(differs.count_nonzero())
    if not count:
        return None
    dtype = torch.int32 if differs.numel() < 2**31 else torch.int64
    form, at = "indices", None
    for name, axis in (("rows", 1), ("columns", 0)) if differs.dim() == 2 else ():
        lines = differs.any(axis)
        if count >= LINES * int(lines.count_nonzero()) * differs.shape[axis]:
            form, at = name, lines.nonzero().view(-1)
            break
    at = (differs.view(-1).nonzero().view(-1) if at is None else at).to(dtype).cpu()
    places = Change(form, at, new, None, tuple(new.shape), "")
    before = places.of(old).cpu().contiguous()
    values = places.of(new).cpu().contiguous()
    return Change(form, at, values, before if undo else None, tuple(new.shape), _fingerprint(before))


def _write(changes: Mapping[str, Change], folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    held: dict[str, Tensor] = {}
    about: dict[str, dict[str, object]] = {}
    for name, change in changes.items():
        held |= {f"{name}.values": change.values, f"{name}.{change.form}": change.at}
        if change.old is not None:
            held[f"{name}.old"] = change.old
        about[name] = {"form": change.form, "shape": change.shape, "fingerprint": change.fingerprint}
    save_file(held, folder / FILE, metadata={"format": FORMAT, "tensors": json.dumps(about)})
