"""Text to training blocks: a corpus, a fixed train / validation split, packing.

A corpus is ``stdlib``, local files, or a hub data set. Local corpora are packed once into memory-mapped Arrow files
by ``datasets`` (cached, safe against a kill); hub data and ``streaming: true`` are packed while they are read.
"""

from __future__ import annotations

import glob
import hashlib
import sysconfig
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import PreTrainedTokenizerBase

from ..config.arguments import DataArguments
from ..errors import BadInput
from ..sources import source_of

if TYPE_CHECKING:
    import datasets  # takes a second, and is imported where data is read

# How a file is read, by its ending: the builder of ``datasets`` and its options. A text file is one document.
READERS: dict[str, tuple[str, dict[str, str]]] = {
    ".txt": ("text", {"sample_by": "document", "encoding_errors": "replace"}),
    ".py": ("text", {"sample_by": "document", "encoding_errors": "replace"}),
    ".jsonl": ("json", {}),
    ".json": ("json", {}),
    ".parquet": ("parquet", {}),
}
NOT_SOURCE = {"site-packages", "test", "tests", "idle_test", "__pycache__"}
PACKING_VERSION = 1  # part of the cache key: raise it when packing changes


@dataclass(frozen=True)
class Corpus:
    """Documents in a fixed order, under the column ``text``."""

    name: str
    documents: datasets.Dataset | datasets.IterableDataset
    fingerprint: str
    validation: datasets.IterableDataset | None = None  # where the corpus comes with a validation split of its own

    @property
    def streamed(self) -> bool:
        import datasets

        return isinstance(self.documents, datasets.IterableDataset)

    def texts(self) -> Iterator[str]:
        for document in self.documents:
            yield document["text"] or ""


@dataclass(frozen=True)
class Blocks:
    """Training and validation examples: ``{"input_ids": block_size token ids}``."""

    train: datasets.Dataset | datasets.IterableDataset
    validation: datasets.Dataset


def open_corpus(data: DataArguments, trust_remote_code: bool = False) -> Corpus:
    """Find the corpus that ``data.dataset`` names.

    Raises:
        BadInput: for a path that does not exist, files of a kind that cannot be read, a column that is not there,
            or a hub data set that cannot be reached.
    """
    if data.dataset == "stdlib":
        return _local(data, _stdlib_files())
    files = _files(data.dataset)
    if files is not None:
        return _local(data, files)
    return _hub(data, trust_remote_code)


def _stdlib_files() -> list[Path]:
    root = Path(sysconfig.get_paths()["stdlib"])
    return sorted(p for p in root.rglob("*.py") if not NOT_SOURCE & set(p.relative_to(root).parts[:-1]))


def _files(name: str) -> list[Path] | None:
    """Local files behind a path, folder or glob; None for what can only be a hub name."""
    path = Path(name).expanduser()
    if path.is_dir():
        files = sorted(p for p in path.rglob("*") if p.suffix in READERS and p.is_file())
    elif glob.has_magic(name):
        files = sorted(Path(p) for p in glob.glob(str(path), recursive=True) if Path(p).is_file())
    elif path.is_file():
        files = [path]
    elif path.suffix in READERS or name.startswith(("/", ".", "~")):
        raise BadInput(f"dataset {name!r} does not exist")
    else:
        return None
    if not files:
        raise BadInput(f"dataset {name!r} matches no {' / '.join(sorted(READERS))} file")
    return files


def _local(data: DataArguments, files: list[Path]) -> Corpus:
    import datasets

    kinds = {p.suffix: READERS.get(p.suffix) for p in files}
    for suffix, reader in kinds.items():
        if reader is None:
            known = ", ".join(sorted(READERS))
            raise BadInput(f"dataset {data.dataset!r} holds {suffix or 'extensionless'} files; readable are {known}")
    builders = {reader[0]: reader[1] for reader in kinds.values() if reader is not None}
    if len(builders) > 1:
        raise BadInput(f"dataset {data.dataset!r} mixes {', '.join(sorted(kinds))} files; choose one kind with a glob")
    (builder, options) = builders.popitem()
    paths = [str(p) for p in files]
    try:
        documents = datasets.load_dataset(builder, data_files=paths, split="train", streaming=data.streaming, **options)
        documents = _text_only(documents, data)
    except (datasets.exceptions.DatasetsError, OSError, ValueError) as error:
        raise BadInput(f"dataset {data.dataset!r} cannot be read: {_one_line(error.__cause__ or error)}") from None
    stamps = [(p, Path(p).stat().st_size, Path(p).stat().st_mtime_ns) for p in paths]
    return Corpus(data.dataset, documents, _hash(stamps, data.text_column))


def _hub(data: DataArguments, trust_remote_code: bool) -> Corpus:
    import datasets

    source = source_of("dataset", data.dataset)
    if not source.on_hub:
        raise BadInput(f"dataset {data.dataset!r} is neither a file nor a folder")
    options = {"streaming": True, **({"trust_remote_code": True} if trust_remote_code else {})}
    try:
        splits = datasets.load_dataset(source.name, data.dataset_config, **options)
        train, validation = splits["train"], splits.get("validation")
        documents = _text_only(train, data)
        own = None if validation is None else _text_only(validation, data)
    except Exception as error:  # every kind of network, hub and builder error means the same to the user
        raise BadInput(
            f"dataset {data.dataset!r} (dataset_config {data.dataset_config!r}) could not be "
            f"opened on the hub: {_one_line(error)}"
        ) from None
    return Corpus(data.dataset, documents, _hash(data.dataset, data.dataset_config, data.text_column), own)


def _text_only(documents: Any, data: DataArguments) -> Any:
    columns = documents.column_names or list(next(iter(documents)))
    if data.text_column not in columns:
        raise ValueError(f"it has no column text_column={data.text_column!r}; columns are {', '.join(columns)}")
    documents = documents.select_columns([data.text_column])
    return documents if data.text_column == "text" else documents.rename_column(data.text_column, "text")


def pack(texts: Iterable[str], tokenizer: PreTrainedTokenizerBase, block_size: int) -> Iterator[dict[str, list[int]]]:
    """Blocks of exactly ``block_size`` token ids from the documents laid end to end, each closed by the end token.

    Only the end of the last document, less than one block, is left out.
    """
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    rest: list[int] = []
    for text in texts:
        if not text:
            continue
        rest += tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"] + end
        whole = len(rest) - len(rest) % block_size
        for start in range(0, whole, block_size):
            yield {"input_ids": rest[start : start + block_size]}
        rest = rest[whole:]


def make_blocks(corpus: Corpus, tokenizer: PreTrainedTokenizerBase, data: DataArguments) -> Blocks:
    """Pack ``corpus`` and hold out validation blocks. The split depends on the corpus alone, not on a run's seed.

    Raises:
        BadInput: where the text gives fewer than two blocks.
    """
    return _streamed_blocks(corpus, tokenizer, data) if corpus.streamed else _packed_blocks(corpus, tokenizer, data)


def _features() -> datasets.Features:
    import datasets

    return datasets.Features({"input_ids": datasets.List(datasets.Value("int32"))})


def _packed_blocks(corpus: Corpus, tokenizer: PreTrainedTokenizerBase, data: DataArguments) -> Blocks:
    """Documents in a fixed shuffled order; the last blocks are the validation set, which shares at most one document
    with the training set."""
    import datasets

    assert isinstance(corpus.documents, datasets.Dataset)
    shuffled = corpus.documents.shuffle(seed=0)

    def blocks() -> Iterator[dict[str, list[int]]]:
        return pack((document["text"] for document in shuffled), tokenizer, data.block_size)

    if next(blocks(), None) is None:  # an empty Arrow file cannot be opened
        _need_two_blocks(0, corpus, data)
    packed = datasets.Dataset.from_generator(
        blocks,
        features=_features(),
        fingerprint=_hash(corpus.fingerprint, tokenizer_identity(tokenizer), data.block_size, PACKING_VERSION),
    )
    _need_two_blocks(packed.num_rows, corpus, data)
    held_out = max(1, min(data.validation_blocks, packed.num_rows // 10))
    border = packed.num_rows - held_out
    return Blocks(packed.select(range(border)), packed.select(range(border, packed.num_rows)))


def _streamed_blocks(corpus: Corpus, tokenizer: PreTrainedTokenizerBase, data: DataArguments) -> Blocks:
    """The stream's own validation split, else its first documents, which training then skips."""
    import datasets

    assert isinstance(corpus.documents, datasets.IterableDataset)
    source = corpus.documents if corpus.validation is None else corpus.validation
    taken: list[dict[str, list[int]]] = []
    documents_used = 0

    def counted() -> Iterator[str]:
        nonlocal documents_used
        for document in source:
            documents_used += 1
            yield document["text"] or ""

    for block in pack(counted(), tokenizer, data.block_size):
        taken.append(block)
        if len(taken) == data.validation_blocks:
            break
    rest = corpus.documents if corpus.validation is not None else corpus.documents.skip(documents_used)

    def blocks() -> Iterator[dict[str, list[int]]]:
        return pack((document["text"] or "" for document in rest), tokenizer, data.block_size)

    train = datasets.IterableDataset.from_generator(blocks, features=_features())
    _need_two_blocks(len(taken) + (next(iter(train), None) is not None), corpus, data)
    return Blocks(train, datasets.Dataset.from_list(taken, features=_features()))


def _need_two_blocks(count: int, corpus: Corpus, data: DataArguments) -> None:
    if count < 2:
        raise BadInput(
            f"dataset {corpus.name!r} gives {count} block(s) of block_size={data.block_size} tokens, but one to train "
            "and one to validate on are needed; give more text or a smaller block_size"
        )


def collate(examples: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
    """A batch; every token is a label. (Collators that mask the padding token would mask the end token with it.)"""
    input_ids = torch.tensor([example["input_ids"] for example in examples], dtype=torch.long)
    return {"input_ids": input_ids, "labels": input_ids}


def tokenizer_identity(tokenizer: PreTrainedTokenizerBase) -> str:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    vocabulary = backend.to_str() if backend is not None else str(sorted(tokenizer.get_vocab().items()))
    return _hash(vocabulary, tokenizer.eos_token)


def _hash(*parts: object) -> str:
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
