"""A corpus to training and validation blocks: what is held out, what is mixed, and how a batch is made."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from transformers import PreTrainedTokenizerBase

from ..config.arguments import DataArguments
from ..errors import BadInput
from . import identity
from .corpus import Corpus, Source, told
from .packing import Example, Packing, pack
from .stream import BlockStream, Documents

if TYPE_CHECKING:
    import datasets  # takes a second, and is imported where data is read

PACKING_VERSION = 1  # part of the cache key: raise it when packing changes
MOST_BLOCKS = 500_000_000  # of an epoch of a mixture, whose order is held in memory


@dataclass(frozen=True)
class Blocks:
    """Training and validation examples: ``{"input_ids": block_size token ids}``, and ``attention_mask`` if padded."""

    train: datasets.Dataset | BlockStream
    validation: datasets.Dataset


def make_blocks(corpus: Corpus, tokenizer: PreTrainedTokenizerBase, data: DataArguments) -> Blocks:
    """Pack ``corpus`` and hold out validation blocks. The split depends on the corpus alone, not on a run's seed.

    Raises:
        BadInput: where a data set gives too few blocks.
    """
    held_out = None
    if corpus.held_out is not None:
        held_out = _first_blocks(corpus.held_out, tokenizer, data, data.validation_blocks)
        _need(held_out.num_rows, 1, corpus.held_out, data)
    counts = [max(1, round(share * data.validation_blocks)) for share in corpus.shares]
    if corpus.streamed:
        return _streamed_blocks(corpus, tokenizer, data, counts, held_out)
    return _packed_blocks(corpus, tokenizer, data, counts, held_out)


def _features(data: DataArguments) -> datasets.Features:
    import datasets

    mask = {} if data.packing else {"attention_mask": datasets.List(datasets.Value("int8"))}
    return datasets.Features({"input_ids": datasets.List(datasets.Value("int32")), **mask})


def _first_blocks(
    source: Source, tokenizer: PreTrainedTokenizerBase, data: DataArguments, count: int
) -> datasets.Dataset:
    """At most ``count`` validation examples of a data set that is all validation."""
    import datasets

    if not source.streamed:
        packed = _packed(source, tokenizer, data)
        return packed.select(range(min(count, packed.num_rows)))
    taken, _ = _taken(source, source, tokenizer, data, count)
    return datasets.Dataset.from_list(taken, features=_features(data))


# ---- files that are packed once -------------------------------------------------------------------------------------


def _packed(source: Source, tokenizer: PreTrainedTokenizerBase, data: DataArguments) -> datasets.Dataset:
    """The examples of a data set, its documents in a fixed shuffled order; cached."""
    import datasets

    assert isinstance(source.documents, datasets.Dataset)
    shuffled = source.documents.shuffle(seed=0)

    def blocks() -> Iterator[Example]:
        texts = (source.text(document, tokenizer) for document in shuffled)
        return pack(texts, tokenizer, data.block_size, data.packing)

    if next(blocks(), None) is None:  # an empty Arrow file cannot be opened
        return datasets.Dataset.from_dict({name: [] for name in _features(data)}, features=_features(data))
    template = tokenizer.chat_template if source.is_chat else None
    further = [part for part in (template, None if data.packing else "padded") if part is not None]
    key = (source.fingerprint, identity.of_tokenizer(tokenizer), data.block_size, PACKING_VERSION, *further)
    try:
        return datasets.Dataset.from_generator(blocks, features=_features(data), fingerprint=identity.hashed(*key))
    except datasets.exceptions.DatasetsError as error:
        raise told(error, f"dataset {source.name!r}") from None


def _packed_blocks(
    corpus: Corpus,
    tokenizer: PreTrainedTokenizerBase,
    data: DataArguments,
    counts: list[int],
    held_out: datasets.Dataset | None,
) -> Blocks:
    """Of each data set the last blocks are held out, which share at most one document with those trained on."""
    import datasets

    train, validation = [], []
    for source, count in zip(corpus.sources, counts, strict=True):
        packed = _packed(source, tokenizer, data)
        own = held_out
        if own is None and source.validation is not None:
            own = _first_blocks(source.validation, tokenizer, data, count)
            _need(own.num_rows, 1, source.validation, data)
            validation.append(own)
        _need(packed.num_rows, 2 if own is None else 1, source, data)
        border = packed.num_rows
        if own is None:
            border -= max(1, min(count, packed.num_rows // 10))
            validation.append(packed.select(range(border, packed.num_rows)))
        train.append(packed.select(range(border)))
    together = datasets.concatenate_datasets(validation) if held_out is None else held_out
    return Blocks(_mixed(train, corpus), together)


def _mixed(parts: list[datasets.Dataset], corpus: Corpus) -> datasets.Dataset:
    """All blocks; or, by weight, an epoch in which each block is there at least once."""
    import datasets

    if corpus.weights is None or len(parts) == 1:
        return parts[0] if len(parts) == 1 else datasets.concatenate_datasets(parts)
    need = {
        len(part) / weight: name.name for part, weight, name in zip(parts, corpus.weights, corpus.sources, strict=True)
    }
    longest = max(need)
    if longest > MOST_BLOCKS:
        raise BadInput(
            f"dataset_weights: all of {need[longest]!r} would be read once in {longest:,.0f} blocks, more than the "
            f"{MOST_BLOCKS:,} that can be ordered; give it a larger weight, or set streaming: true"
        )
    return datasets.interleave_datasets(
        parts, probabilities=list(corpus.weights), seed=0, stopping_strategy="all_exhausted"
    )


# ---- streams --------------------------------------------------------------------------------------------------------


def _taken(
    source: Source, text_of: Source, tokenizer: PreTrainedTokenizerBase, data: DataArguments, count: int
) -> tuple[list[Example], int]:
    """The first ``count`` blocks of a stream, and how many documents they took."""
    taken: list[Example] = []
    used = 0
    packing = Packing(tokenizer, data.block_size, data.packing)
    for document in source.documents:
        used += 1
        for block in packing.add(text_of.text(document, tokenizer)):
            taken.append(block)
            if len(taken) == count:
                return taken, used
    return taken, used


def _streamed_blocks(
    corpus: Corpus,
    tokenizer: PreTrainedTokenizerBase,
    data: DataArguments,
    counts: list[int],
    held_out: datasets.Dataset | None,
) -> Blocks:
    """Each stream's own validation split, else its first documents, which training then skips."""
    import datasets

    validation: list[Example] = []
    streams = []
    for source, count in zip(corpus.sources, counts, strict=True):
        taken: list[Example] = []
        rest, used = source.documents, 0
        if held_out is None:
            from_ = source.validation or source
            taken, used = _taken(from_, from_, tokenizer, data, count)
            _need(len(taken), 1, from_, data)
            if source.validation is None:
                rest = source.documents.skip(used)
        validation += taken
        stream = Documents(source, rest, Packing(tokenizer, data.block_size, data.packing))
        if stream.is_empty():
            if not used:
                _need(0, 1, source, data)
            raise BadInput(
                f"dataset {source.name!r} is a stream of {used} document(s), and all went into its {len(taken)} "
                "validation block(s); leave streaming out, or give a validation_dataset or fewer validation_blocks"
            )
        streams.append(stream)
    train = BlockStream(streams, corpus.weights)
    if held_out is None:
        held_out = datasets.Dataset.from_list(validation, features=_features(data))
    return Blocks(train, held_out)


def _need(count: int, least: int, source: Source, data: DataArguments) -> None:
    if count < least:
        what = "one to train and one to validate on are needed" if least == 2 else "at least one is needed"
        raise BadInput(
            f"dataset {source.name!r} gives {count} block(s) of block_size={data.block_size} tokens, but {what}; "
            "give more text or a smaller block_size"
        )


def collate(examples: list[Example]) -> dict[str, torch.Tensor]:
    """A batch; every token is a label, but for padding. (Collators that know padding by its token would mask the end
    token with it.)"""
    batch = {key: torch.tensor([e[key] for e in examples], dtype=torch.long) for key in examples[0]}
    labels = batch["input_ids"]
    if "attention_mask" in batch:
        labels = labels.masked_fill(batch["attention_mask"] == 0, -100)
    return {**batch, "labels": labels}
