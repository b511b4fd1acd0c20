"""Examples of many lengths to blocks of at most ``block_size`` tokens, padded or packed, and to batches.

Packed, a block holds several examples whose positions each begin at 0, and a batch has no attention mask: by the
positions transformers keeps one from attending to another (``build.packing_check`` looks whether a model does).
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import Dataset

from ..config.finetune_arguments import CUT, REFUSE, TunedDataArguments
from ..errors import BadInput
from .chat import NO_LOSS

if TYPE_CHECKING:
    import datasets  # takes a second, and is imported where data is read


class Piece(NamedTuple):
    """Tokens ``start`` to ``end`` of the example with a number."""

    row: int
    start: int
    end: int

    @property
    def length(self) -> int:
        return self.end - self.start


@dataclass(frozen=True)
class Fitted:
    """The pieces of a data set's examples, those of each together, and how many were not taken as they are.

    Attributes:
        empty: rows without a text, a response or messages, or of a single token.
        dropped: examples too long, or with nothing that carries loss.
        cut: examples whose end is left out.
    """

    pieces: list[Piece]
    empty: int = 0
    dropped: int = 0
    cut: int = 0

    def __str__(self) -> str:
        told = {"with nothing to learn left out": self.empty, "too long left out": self.dropped, "cut": self.cut}
        return ", ".join(f"{count:,} {what}" for what, count in told.items() if count)


def fit(rows: datasets.Dataset, goes_on: bool, data: TunedDataArguments, where: str) -> Fitted:
    """Every example as pieces of at most ``block_size`` tokens, as ``too_long`` says.

    Raises:
        BadInput: where some are longer, and that is to be refused.
    """
    size, lengths = data.block_size, _lengths(rows)
    long = [i for i, length in enumerate(lengths) if length > size]
    if long and not goes_on and data.too_long == REFUSE:
        raise BadInput(
            f"{where}: row {long[0] + 1} has {lengths[long[0]]:,} tokens, more than block_size={size}, and so have "
            f"{len(long):,} of {len(lengths):,} rows; give a larger block_size, or too_long: drop or cut"
        )
    masked = "labels" in rows.column_names
    pieces: list[Piece] = []
    counts = {"empty": 0, "dropped": 0, "cut": 0}
    for row, length in enumerate(lengths):
        if not length:
            counts["empty"] += 1
        elif goes_on:
            starts = range(0, length, size)
            pieces += [Piece(row, s, min(s + size, length)) for s in starts if length - s > 1]  # one to see, one to say
        elif length <= size:
            pieces.append(Piece(row, 0, length))
        elif data.too_long == CUT and (not masked or carries_loss(rows[row]["labels"][:size])):
            pieces.append(Piece(row, 0, size))
            counts["cut"] += 1
        else:
            counts["dropped"] += 1
    return Fitted(pieces, **counts)


def _lengths(rows: datasets.Dataset) -> list[int]:
    import pyarrow.compute

    column = rows.with_format("arrow")[:]["input_ids"] if len(rows) else None
    return [] if column is None else pyarrow.compute.list_value_length(column).to_pylist()


def carries_loss(labels: Iterable[int]) -> bool:
    """Whether any but the first label does: nothing predicts the first token."""
    return any(label != NO_LOSS for i, label in enumerate(labels) if i)


def pack(pieces: Sequence[Piece], size: int) -> list[list[Piece]]:
    """Blocks of pieces, the longest first, each into the fullest block that has room (best-fit decreasing)."""
    order = sorted(range(len(pieces)), key=lambda i: (-pieces[i].length, i))
    blocks: list[list[Piece]] = []
    room: list[tuple[int, int]] = []  # of each block that is not full, with its number
    for i in order:
        piece = pieces[i]
        at = bisect_left(room, (piece.length, -1))
        left, number = room.pop(at) if at < len(room) else (size, len(blocks))
        if number == len(blocks):
            blocks.append([])
        blocks[number].append(piece)
        if left - piece.length > 1:
            insort(room, (left - piece.length, number))
    return blocks


class ExampleBlocks(Dataset[Any]):
    """Blocks to train or to evaluate on.

    Args:
        rows: examples, with ``input_ids`` and ``labels``, or ``label`` where they are classified.
        pieces: which parts of them.
        size: tokens of a block, where several are packed into one; None for one piece a block.
        classes: of classified texts, in the order of the model's outputs.
    """

    def __init__(
        self, rows: datasets.Dataset, pieces: Sequence[Piece], size: int | None, classes: Sequence[str] = ()
    ) -> None:
        self.rows, self.packed = rows, size is not None
        self.blocks = [[piece] for piece in pieces] if size is None else pack(pieces, size)
        self.classes = {name: number for number, name in enumerate(classes)}

    def __len__(self) -> int:
        return len(self.blocks)

    @property
    def pieces(self) -> int:
        return sum(map(len, self.blocks))

    @property
    def tokens(self) -> int:
        return sum(piece.length for block in self.blocks for piece in block)

    def __getitem__(self, number: int) -> dict[str, Any]:
        found = [self._of(piece) for piece in self.blocks[number]]
        if self.classes:
            return found[0]
        block = {key: [item for one in found for item in one[key]] for key in ("input_ids", "labels")}
        if self.packed:
            block["position_ids"] = [i for piece in self.blocks[number] for i in range(piece.length)]
        return block

    def _of(self, piece: Piece) -> dict[str, Any]:
        row, part = self.rows[piece.row], slice(piece.start, piece.end)
        tokens = row["input_ids"][part]
        if self.classes:
            return {"input_ids": tokens, "labels": self.classes[row["label"]]}
        return {"input_ids": tokens, "labels": [NO_LOSS, *row["labels"][part][1:]]}


@dataclass(frozen=True)
class Collator:
    """Blocks to a batch, padded to its longest with ``padding``, which carries no loss and which nothing attends to."""

    padding: int

    def __call__(self, blocks: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        lengths = [len(block["input_ids"]) for block in blocks]
        longest = max(lengths)
        batch = {"input_ids": self._padded(blocks, "input_ids", lambda missing: [self.padding] * missing)}
        if "position_ids" in blocks[0]:  # what is padded is one more example of the block
            batch["position_ids"] = self._padded(blocks, "position_ids", lambda missing: list(range(missing)))
        else:
            batch["attention_mask"] = torch.tensor([[1] * n + [0] * (longest - n) for n in lengths])
        if isinstance(blocks[0]["labels"], int):
            batch["labels"] = torch.tensor([block["labels"] for block in blocks])
        else:
            batch["labels"] = self._padded(blocks, "labels", lambda missing: [NO_LOSS] * missing)
        return batch

    @staticmethod
    def _padded(blocks: Sequence[Mapping[str, Any]], key: str, padding: Any) -> Tensor:
        longest = max(len(block[key]) for block in blocks)
        return torch.tensor([[*block[key], *padding(longest - len(block[key]))] for block in blocks])
