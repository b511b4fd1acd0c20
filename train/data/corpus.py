"""Documents of a run: the standard library's source, local files, hub data sets, or several of them by weight.

Local documents are copied once into memory-mapped Arrow files by ``datasets`` (cached by their content, safe against a
kill); hub data and ``streaming: true`` are read while they are trained on.
"""

from __future__ import annotations

import math
import sysconfig
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import PreTrainedTokenizerBase

from ..config.arguments import DataArguments
from ..errors import BadInput
from ..sources import MARK, source_of
from . import columns, identity
from .files import HEAD, IN_CHARACTERS, TEXT, File, Found, encoding_of, local_files, open_bytes
from .rows import no_column, values

if TYPE_CHECKING:
    import datasets  # takes a second, and is imported where data is read

NOT_SOURCE = {"site-packages", "test", "tests", "idle_test", "__pycache__"}


@dataclass(frozen=True)
class Source:
    """One data set: documents in a fixed order, under the column ``text``.

    Attributes:
        kind: what the column holds; ``columns.rendered`` makes text of it.
        contents: name, size and hash of each file; empty for a hub's.
        validation: where the data set comes with a validation split of its own.
        notes: what a reader of the log should know of how it was read.
    """

    name: str
    kind: str
    documents: datasets.Dataset | datasets.IterableDataset
    fingerprint: str
    contents: tuple[dict[str, Any], ...] = ()
    older: str | None = None
    validation: Source | None = None
    notes: tuple[str, ...] = ()

    @property
    def streamed(self) -> bool:
        import datasets

        return isinstance(self.documents, datasets.IterableDataset)

    @property
    def is_chat(self) -> bool:
        return self.kind == columns.MESSAGES

    def texts(self, tokenizer: PreTrainedTokenizerBase | None = None) -> Iterator[str]:
        """The documents; messages need the tokenizer, whose chat template says how they read."""
        for document in self.documents:
            yield self.text(document, tokenizer)

    def text(self, document: Any, tokenizer: PreTrainedTokenizerBase | None) -> str:
        text = document["text"] or ""
        if not self.is_chat:
            return str(text)
        if tokenizer is None:
            raise BadInput(
                f"dataset {self.name!r} holds messages: choose a tokenizer that has a chat template; "
                "the one that is trained on the data has none"
            )
        return columns.rendered(text, self.kind, tokenizer, f"dataset {self.name!r}")


@dataclass(frozen=True)
class Corpus:
    """What a run reads: data sets, their shares of the blocks (None: all of each), and validation data of its own."""

    sources: tuple[Source, ...]
    weights: tuple[float, ...] | None = None
    held_out: Source | None = None

    @property
    def name(self) -> str:
        return ", ".join(source.name for source in self.sources)

    @property
    def documents(self) -> Any:
        """Those of the only data set."""
        (source,) = self.sources
        return source.documents

    @property
    def streamed(self) -> bool:
        return self.sources[0].streamed

    @property
    def shares(self) -> tuple[float, ...]:
        """What a tokenizer, and validation where it is held out, takes of each data set."""
        return self.weights or (1 / len(self.sources),) * len(self.sources)

    @property
    def notes(self) -> tuple[str, ...]:
        read = (*self.sources, *(() if self.held_out is None else (self.held_out,)))
        return tuple(f"{source.name}: {note}" for source in read for note in source.notes)

    @property
    def fingerprint(self) -> str:
        """Of the documents that are trained on."""
        if len(self.sources) == 1:
            return self.sources[0].fingerprint
        return identity.hashed([source.fingerprint for source in self.sources], self.weights)

    def texts(self, characters: int) -> Iterator[str]:
        """The first documents of each data set: together about as many characters."""
        for source, share in zip(self.sources, self.shares, strict=True):
            seen = 0
            for text in source.texts():
                yield text
                seen += len(text)
                if seen >= characters * share:
                    break

    def identity(self, tokenizer: PreTrainedTokenizerBase) -> identity.Identity:
        """What a resumed run compares."""
        tokens = identity.of_tokenizer(tokenizer)
        every = (*self.sources, *(() if self.held_out is None else (self.held_out,)))
        whole = self.fingerprint if self.held_out is None else identity.hashed(self.fingerprint, every[-1].fingerprint)
        if any(source.is_chat for source in every):
            whole = identity.hashed(whole, tokenizer.chat_template)
        older = self.sources[0].older if len(every) == 1 else None
        sets = [{"dataset": s.name, "identity": s.fingerprint, "files": list(s.contents)} for s in every]
        now = f"{identity.BY_CONTENT}{whole}-{tokens}"
        return identity.Identity(now, None if older is None else f"{older}-{tokens}", sets)


def open_corpus(data: DataArguments, trust_remote_code: bool = False) -> Corpus:
    """Find what ``data`` names.

    Raises:
        BadInput: for a path that does not exist, files that cannot be read, a column that is not there or is no text,
            a hub data set that cannot be reached, or weights that do not fit.
    """
    weights = _weights(data)
    try:
        "".encode(data.encoding or "utf-8")
    except LookupError:
        raise BadInput(
            f"encoding {data.encoding!r} is not known; choose one such as latin-1, cp1252 or gb18030"
        ) from None
    sources = tuple(_open(name, data, trust_remote_code) for name in data.dataset)
    if len({source.streamed for source in sources}) > 1:
        raise BadInput(
            f"dataset {', '.join(data.dataset)}: hub data is streamed; set streaming: true for local files too"
        )
    if weights is None and len(sources) > 1 and sources[0].streamed:
        raise BadInput("dataset_weights must say the share of each data set, for streams have no length")
    held_out = None
    if data.validation_dataset is not None:
        held_out = _open(data.validation_dataset, data, trust_remote_code)
        held_out = replace(held_out, name=f"validation_dataset {held_out.name}")
    return Corpus(sources, weights, held_out)


def _weights(data: DataArguments) -> tuple[float, ...] | None:
    if len(set(data.dataset)) < len(data.dataset):
        raise BadInput(f"dataset names {', '.join(data.dataset)}: each once; dataset_weights says how often it is read")
    given = data.dataset_weights
    if given is None:
        return None
    if len(given) != len(data.dataset):
        raise BadInput(f"dataset_weights has {len(given)} numbers for {len(data.dataset)} data sets; give one for each")
    if not all(math.isfinite(weight) and weight > 0 for weight in given):
        raise BadInput(f"dataset_weights must be numbers above 0, got {', '.join(map(str, given))}")
    return tuple(weight / sum(given) for weight in given)


def _open(name: str, data: DataArguments, trust_remote_code: bool) -> Source:
    if not name.strip():
        raise BadInput(f"dataset {name!r} is empty; give a path, stdlib or hub:org/name")
    if name == "stdlib":
        return _local(name, Found([File(p, TEXT, "") for p in stdlib_files()], []), data)
    found = None if name.startswith(MARK) else local_files(name)
    return _hub(name, data, trust_remote_code) if found is None else _local(name, found, data)


def stdlib_files() -> list[Path]:
    """The source of the standard library, in a fixed order."""
    root = Path(sysconfig.get_paths()["stdlib"])
    return sorted(p for p in root.rglob("*.py") if not NOT_SOURCE & set(p.relative_to(root).parts[:-1]))


# ---- local files ----------------------------------------------------------------------------------------------------


def _local(name: str, found: Found, data: DataArguments) -> Source:
    column = data.text_column
    try:
        notes = _notes(found, data.encoding)
        of_files = chain.from_iterable(values(file, column, data.encoding) for file in found.files)
        kind = columns.kind_of(of_files, column, f"dataset {name!r}")
        contents = tuple(map(identity.content_of, found.files))
        fingerprint = identity.of_contents(contents, column, data.encoding, kind)
        documents = _documents(name, found.files, kind, data, fingerprint)
    except OSError as error:
        raise BadInput(f"dataset {name!r} cannot be read: {error.strerror or error}") from None
    marked = any("mark" in note for note in notes)
    older = None if marked or data.encoding is not None else identity.of_times(found.files, column)
    validation = None
    if found.validation:
        validation = _local(f"{name} (validation)", Found(found.validation, []), data)
        older = None
    return Source(name, kind, documents, fingerprint, contents, older, validation, notes)


def _notes(found: Found, encoding: str | None) -> tuple[str, ...]:
    """What is said of the files: those left out, and those in another encoding than UTF-8 without a mark."""
    encodings: Counter[str] = Counter()
    for file in found.files:
        if file.kind in IN_CHARACTERS:
            try:
                with open_bytes(file) as stream:
                    encodings[encoding_of(stream.read(HEAD), encoding)] += 1
            except Exception as error:  # as many kinds as there are compressions
                reason = getattr(error, "strerror", None) or " ".join(str(error).split())
                raise BadInput(f"{file.path} cannot be read: {reason}") from None
    said = [
        f"{count:,} of {len(found.files):,} files read as {name.removesuffix('-sig').upper()}"
        f"{', as encoding says' if name == encoding else ', by a byte order mark'}"
        for name, count in sorted(encodings.items())
        if name != "utf-8"
    ]
    return (*said, *([f"{found.left_out:,} files of other kinds left out"] if found.left_out else []))


def _documents(name: str, files: list[File], kind: str, data: DataArguments, fingerprint: str) -> Any:
    import datasets

    column, encoding, where = data.text_column, data.encoding, f"dataset {name!r}"
    features = datasets.Features({"text": datasets.Value("large_string")})

    def texts(files: list[File]) -> Iterator[dict[str, str]]:
        for file in files:
            found = values(file, column, encoding)
            for text in columns.as_text(found, kind, column, str(file.path)):
                yield {"text": text}

    if data.streaming:
        return datasets.IterableDataset.from_generator(texts, features=features, gen_kwargs={"files": files})
    try:
        return datasets.Dataset.from_generator(
            texts, features=features, gen_kwargs={"files": files}, fingerprint=identity.hashed("documents", fingerprint)
        )
    except datasets.exceptions.DatasetsError as error:
        raise told(error, where) from None


def told(error: BaseException, where: str) -> BadInput:
    """What a generator met that ``datasets`` ran."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, BadInput):
            return cause
        last, cause = cause, cause.__cause__ or cause.__context__
    return BadInput(f"{where} cannot be read: {_one_line(last)}")


# ---- the hub --------------------------------------------------------------------------------------------------------


def _hub(name: str, data: DataArguments, trust_remote_code: bool) -> Source:
    import datasets

    source = source_of("dataset", name)
    if not source.on_hub:
        raise BadInput(f"dataset {name!r} is neither a file nor a folder")
    options = {"streaming": True, **({"trust_remote_code": True} if trust_remote_code else {})}
    try:
        splits = datasets.load_dataset(source.name, data.dataset_config, **options)
        train, validation = splits["train"], splits.get("validation")
        kind, documents = _text_only(train, data, name)
        own = None if validation is None else _text_only(validation, data, name)
    except BadInput:
        raise
    except Exception as error:  # every kind of network, hub and builder error means the same to the user
        raise BadInput(
            f"dataset {name!r} (dataset_config {data.dataset_config!r}) could not be "
            f"opened on the hub: {_one_line(error)}"
        ) from None
    known = identity.hashed(source.name, data.dataset_config, data.text_column)
    held_out = None if own is None else Source(f"{name} (validation)", *own, known)
    return Source(name, kind, documents, known, older=known, validation=held_out)


def _text_only(documents: Any, data: DataArguments, name: str) -> tuple[str, Any]:
    """What the column holds, and a stream of it as text."""
    column, where = data.text_column, f"dataset {name!r}"
    found = documents.column_names or list(next(iter(documents)))
    if column not in found:
        raise no_column(column, dict.fromkeys(found), where)
    documents = documents.select_columns([column])
    kind = columns.kind_of((row[column] for row in documents), column, where)
    if kind != columns.TEXT:

        def as_text(row: dict[str, Any]) -> dict[str, str]:
            (text,) = columns.as_text([row[column]], kind, column, where)
            return {"text": text}

        return kind, documents.map(as_text, remove_columns=[column] if column != "text" else None)
    return kind, documents if column == "text" else documents.rename_column(column, "text")


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
