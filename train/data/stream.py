"""An endless stream of blocks whose place can be saved: a resumed run reads on from there, not from the start."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from torch.utils.data import IterableDataset, get_worker_info

from ..atomic_write import write_atomically
from ..errors import BadInput
from .corpus import Source
from .packing import Example, Packing

STREAM_FILE = "stream.json"
DRAWS = 1024  # of data sets at once: the number of a block says which


class Documents:
    """One data set of a stream, read again and again. A place in it is the state before a document, as ``datasets``
    gives it, what was left over from those before, and how many blocks of the document have been given."""

    def __init__(self, source: Source, documents: Any, packing: Packing) -> None:
        self.source, self.documents, self.packing = source, documents, packing

    def is_empty(self) -> bool:
        """Whether not even one block comes of it."""
        packing = self._new_packing()
        texts = (self.source.text(document, packing.tokenizer) for document in self.documents)
        return next((block for text in texts for block in packing.add(text)), None) is None

    def _new_packing(self) -> Packing:
        kind = type(self.packing)
        return kind(self.packing.tokenizer, self.packing.block_size, self.packing.packed)

    def blocks(self, place: dict[str, Any] | None) -> Iterator[tuple[Example, dict[str, Any]]]:
        """Blocks from ``place`` on, each with the place behind it."""
        state, rest, given = (None, [], 0) if place is None else (place["state"], place["rest"], place["given"])
        packing = self._new_packing()
        packing.rest = list(rest)
        documents = self.documents.repeat(None)
        if state is not None:
            documents.load_state_dict(state)
        for document in documents:
            before = list(packing.rest)
            for number, block in enumerate(packing.add(self.source.text(document, packing.tokenizer)), 1):
                if number > given:
                    yield block, {"state": state, "rest": before, "given": number}
            given, state = 0, documents.state_dict()


class BlockStream(IterableDataset[Any]):
    """Blocks of one or several data sets, in turns that chance decides by their weights; the same every time.

    Args:
        parts: the data sets.
        weights: their shares of the blocks; needed where there are several.
    """

    def __init__(self, parts: Sequence[Documents], weights: Sequence[float] | None = None) -> None:
        self.parts, self.weights = list(parts), weights
        self.data, self.keep = "", 0  # places of the last so many blocks are remembered
        self._places: dict[int, dict[str, Any]] = {}
        self._start: tuple[int, dict[str, Any]] | None = None

    def begin(self, data: str, each: int, checkpoint: Path | None = None) -> None:
        """Prepare for training with ``each`` blocks a step, from where a checkpoint's stream of the same data stood.

        The Trainer skips the blocks of the steps that are done: as many are given that hold nothing. Without a place
        in the checkpoint they are read again.
        """
        self.data, self.keep = data, 4 * each + 64  # a loader reads ahead, by less than two steps
        if checkpoint is None or not (checkpoint / STREAM_FILE).is_file():
            return
        try:
            saved = json.loads((checkpoint / STREAM_FILE).read_text("utf-8"))
            state = json.loads((checkpoint / "trainer_state.json").read_text("utf-8"))
            if saved["data"] == data:
                self.start_from(saved["place"], int(state["global_step"]) * each)
        except (OSError, ValueError, KeyError, TypeError) as error:
            reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
            raise BadInput(f"{str(checkpoint / STREAM_FILE)!r} cannot be read: {reason}; resume from another") from None

    def start_from(self, place: dict[str, Any], skipped: int) -> None:
        """The next iteration gives ``skipped`` blocks that hold nothing, and goes on from ``place``."""
        self._start = (skipped, place)

    def place(self, given: int) -> dict[str, Any] | None:
        """Where the stream was after so many blocks of an iteration, if that is remembered."""
        return self._places.get(given)

    def save(self, checkpoint: Path, given: int) -> None:
        """Write where the stream stood after ``given`` blocks; nothing where it is not known: another process reads, or
        a hub data set has no state that JSON can hold."""
        place = self.place(given)
        with suppress(TypeError):
            if place is not None:
                write_atomically(checkpoint / STREAM_FILE, json.dumps({"data": self.data, "place": place}))

    def __iter__(self) -> Iterator[Example]:
        worker = get_worker_info()
        if worker is not None and worker.id > 0:  # one reads; others would read the same
            return
        (given, place), self._start = self._start or (0, {"block": 0, "parts": [None] * len(self.parts)}), None
        block, places = int(place["block"]), list(place["parts"])
        if given:
            packing = self.parts[0].packing
            nothing = {"input_ids": [packing.padding] * packing.block_size}
            if not packing.packed:
                nothing["attention_mask"] = [1] * packing.block_size
            for _ in range(given):
                yield nothing
        readers = [part.blocks(at) for part, at in zip(self.parts, places, strict=True)]
        while True:
            chosen = self._chosen(block)
            example, places[chosen] = next(readers[chosen])
            block, given = block + 1, given + 1
            if self.keep:
                self._places[given] = {"block": block, "parts": list(places)}
                if len(self._places) > self.keep:
                    del self._places[next(iter(self._places))]
            yield example

    def _chosen(self, block: int) -> int:
        if len(self.parts) == 1:
            return 0
        if getattr(self, "_drawn", (-1,))[0] != block // DRAWS:
            rng = np.random.default_rng([0, block // DRAWS])
            self._drawn = (block // DRAWS, rng.choice(len(self.parts), size=DRAWS, p=self.weights))
        return int(self._drawn[1][block % DRAWS])
