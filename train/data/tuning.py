"""The data of a fine-tuning: files or hub data sets to examples, what is held out, and what it is recognised by."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from ..config.finetune_arguments import LABEL, TunedDataArguments
from ..errors import BadInput
from ..sources import MARK, source_of
from . import docstrings, formats, identity
from .corpus import stdlib_files, told
from .examples import ExampleBlocks, Fitted, Piece, carries_loss, fit
from .files import TEXT, File, Found, local_files
from .formats import Format
from .rows import records, values

if TYPE_CHECKING:
    import datasets  # takes a second, and is imported where data is read

ENCODING_VERSION = 1  # part of the cache key: raise it when examples change
SEEN = 1000  # rows whose columns are looked at


@dataclass(frozen=True)
class Source:
    """One data set.

    Attributes:
        rows: reads its rows anew, each with where it stands.
        validation: where the data set comes with a validation split of its own.
    """

    name: str
    columns: list[str]
    rows: Callable[[], Iterator[tuple[str, Mapping[str, Any]]]]
    fingerprint: str
    contents: tuple[dict[str, Any], ...] = ()
    validation: Source | None = None


@dataclass(frozen=True)
class Part:
    """A data set as examples: encoded, in its format, and fitted into blocks."""

    source: Source
    format: str
    rows: datasets.Dataset
    fitted: Fitted


@dataclass(frozen=True)
class TuningData:
    """What a run reads.

    Attributes:
        classes: of classified texts, in the order of the model's outputs.
        parts: every data set that was read.
    """

    train: ExampleBlocks
    validation: ExampleBlocks
    forgetting: ExampleBlocks | None
    classes: tuple[str, ...]
    parts: tuple[Part, ...]
    identity: identity.Identity

    @property
    def notes(self) -> list[str]:
        told = [(part.source.name, str(part.fitted)) for part in self.parts]
        return [f"{name}: {text}" for name, text in told if text]


def open_tuning_data(
    data: TunedDataArguments,
    tokenizer: PreTrainedTokenizerBase,
    trust_remote_code: bool = False,
    known_classes: Sequence[str] = (),
) -> TuningData:
    """Read and encode what ``data`` names.

    Args:
        known_classes: those that a saved model has outputs for, in their order.

    Raises:
        BadInput: for data that cannot be read, that is of no format or too long, or of which nothing is left.
    """
    reader = _Reader(data, tokenizer, trust_remote_code)
    train = [reader.part(name, data.format, "dataset") for name in data.dataset]
    if len({part.format for part in train}) > 1:
        raise BadInput(f"dataset: {', '.join(f'{p.source.name!r} is {p.format}' for p in train)}; say format")
    wanted = train[0].format
    held_out = []
    if data.validation_dataset is not None:
        held_out = [reader.part(data.validation_dataset, wanted, "validation_dataset")]
    elif any(part.source.validation is not None for part in train):
        splits = [part.source.validation for part in train if part.source.validation is not None]
        held_out = [reader.part_of(split, wanted, "validation split of dataset") for split in splits]
    other = None
    if data.forgetting_dataset is not None:
        same = LABEL if wanted == LABEL else None  # a classification head says nothing of other texts
        other = reader.part(data.forgetting_dataset, same, "forgetting_dataset")
    classes = _classes(train, known_classes) if wanted == LABEL else ()
    every = (*train, *held_out, *(() if other is None else (other,)))
    for part in every if classes else ():
        _check_classes(part, classes)
    seen, kept = _split(train, held_out, data)
    size = data.block_size if data.packing else None
    return TuningData(
        train=_joined(seen, size, classes),
        validation=_joined(kept, size, classes),
        forgetting=None if other is None else _joined([_first(other, data)], size, classes),
        classes=classes,
        parts=every,
        identity=reader.identity(every),
    )


Share = tuple[Part, list[Piece]]


def _split(train: list[Part], held_out: list[Part], data: TunedDataArguments) -> tuple[list[Share], list[Share]]:
    """What is trained on and what is validated on; the same whatever a run's seed is."""
    if held_out:
        return [(part, part.fitted.pieces) for part in train], [_first(part, data) for part in held_out]
    seen: list[Share] = []
    kept: list[Share] = []
    for part in train:
        rows = list(dict.fromkeys(piece.row for piece in part.fitted.pieces))
        if len(rows) < 2:
            raise BadInput(
                f"dataset {part.source.name!r} gives {len(rows)} example(s), but one to train and one to validate on "
                "are needed; give more rows, or a validation_dataset"
            )
        share = max(1, round(data.validation_examples / len(train)))
        count = max(1, min(share, len(rows) // 10))
        chosen = {rows[i] for i in np.random.default_rng(0).permutation(len(rows))[:count]}
        seen.append((part, [piece for piece in part.fitted.pieces if piece.row not in chosen]))
        kept.append((part, [piece for piece in part.fitted.pieces if piece.row in chosen]))
    return seen, kept


def _first(part: Part, data: TunedDataArguments) -> Share:
    return part, part.fitted.pieces[: data.validation_examples]


def _joined(shares: list[Share], size: int | None, classes: Sequence[str]) -> ExampleBlocks:
    """The pieces of several data sets as those of one."""
    import datasets

    rows = [part.rows for part, _ in shares]
    starts = np.cumsum([0, *(len(each) for each in rows)]).tolist()
    pieces = [
        piece._replace(row=piece.row + start) for (_, own), start in zip(shares, starts, strict=False) for piece in own
    ]
    return ExampleBlocks(rows[0] if len(rows) == 1 else datasets.concatenate_datasets(rows), pieces, size, classes)


def _classes(train: list[Part], known: Sequence[str]) -> tuple[str, ...]:
    """Of the labels that are trained on: those of the saved model, if they are the same, else in their order."""
    found = {str(label) for part in train for label in part.rows.unique("label") if label}
    if found and found <= set(known):
        return tuple(known)
    numbers = all(label.lstrip("-").isdigit() for label in found)
    classes = tuple(sorted(found, key=int) if numbers else sorted(found))
    if len(classes) < 2:
        raise BadInput(f"label_column holds {len(classes)} class(es) in dataset, {', '.join(classes)}; two are needed")
    return classes


def _check_classes(part: Part, classes: Sequence[str]) -> None:
    for label in part.rows.unique("label"):
        if label and label not in classes:
            raise BadInput(f"{part.source.name!r} has the label {label!r}, which dataset has not: {', '.join(classes)}")


class _Reader:
    """Opens data sets and encodes them with one tokenizer."""

    def __init__(self, data: TunedDataArguments, tokenizer: PreTrainedTokenizerBase, trust_remote_code: bool) -> None:
        self.data, self.tokenizer, self.trust_remote_code = data, tokenizer, trust_remote_code

    def part(self, name: str, wanted: str | None, key: str) -> Part:
        return self.part_of(self._source(name, key), wanted, key)

    def part_of(self, source: Source, wanted: str | None, key: str) -> Part:
        """A data set; of one that is not trained on, as many rows as are evaluated on."""
        where = f"{key} {source.name!r}"
        name = formats.format_of(source.columns, self.data, wanted, where)
        form = formats.KINDS[name](self.data, self.tokenizer, where)
        most = None if key == "dataset" else self.data.validation_examples
        rows = self._encoded(source, form, where, most)
        fitted = fit(rows, form.goes_on, self.data, where)
        if not fitted.pieces:
            raise BadInput(f"{where} gives no example of {len(rows):,} rows: {fitted or 'it is empty'}")
        return Part(source, name, rows, fitted)

    def identity(self, parts: Sequence[Part]) -> identity.Identity:
        """What a resumed run compares."""
        whole = identity.hashed([(part.source.fingerprint, part.format) for part in parts], self._template)
        now = f"{identity.BY_CONTENT}{whole}-{identity.of_tokenizer(self.tokenizer)}"
        sets = [
            {"dataset": part.source.name, "identity": part.source.fingerprint, "files": list(part.source.contents)}
            for part in parts
        ]
        return identity.Identity(now, None, sets)

    @property
    def _template(self) -> Any:
        return self.data.chat_template if self.data.chat_template == "none" else self.tokenizer.chat_template

    def _encoded(self, source: Source, form: Format, where: str, most: int | None) -> datasets.Dataset:
        """An example for each of the first rows, empty where the row is; cached by content, format, tokenizer and
        template."""
        import datasets

        labels = datasets.Value("string") if form.name == LABEL else datasets.List(datasets.Value("int32"))
        name = "label" if form.name == LABEL else "labels"
        features = datasets.Features({"input_ids": datasets.List(datasets.Value("int32")), name: labels})
        nothing: dict[str, Any] = {"input_ids": [], name: "" if form.name == LABEL else []}

        def examples() -> Iterator[dict[str, Any]]:
            for place, row in islice(source.rows(), most):
                example = form.encode(row, place)
                teaches = example is not None and (isinstance(example.labels, str) or carries_loss(example.labels))
                yield {"input_ids": example.tokens, name: example.labels} if example and teaches else nothing

        columns = formats.needed(form.name, self.data)
        key = (source.fingerprint, most, form.name, columns, identity.of_tokenizer(self.tokenizer), self._template)
        try:
            return datasets.Dataset.from_generator(
                examples, features=features, fingerprint=identity.hashed("examples", ENCODING_VERSION, *key)
            )
        except datasets.exceptions.DatasetsError as error:
            raise told(error, where) from None

    # ---- where rows come from -----------------------------------------------------------------------------------

    def _source(self, name: str, key: str) -> Source:
        if not name.strip():
            raise BadInput(f"{key} {name!r} is empty; give a path or hub:org/name")
        if name in ("stdlib", docstrings.NAME):
            return self._local(name, Found([File(path, TEXT, "") for path in stdlib_files()], []), key)
        found = None if name.startswith(MARK) else local_files(name)
        return self._hub(name, key) if found is None else self._local(name, found, key)

    def _local(self, name: str, found: Found, key: str) -> Source:
        encoding, text = self.data.encoding, self.data.text_column
        try:
            "".encode(encoding or "utf-8")
        except LookupError:
            raise BadInput(f"encoding {encoding!r} is not known; choose one such as latin-1 or cp1252") from None

        def rows_of(file: File) -> Iterator[Mapping[str, Any]]:
            if name == docstrings.NAME:
                yield from docstrings.questions(file.path)
            elif file.kind == TEXT:
                yield from ({text: one} for one in values(file, text, encoding))
            else:
                yield from records(file, encoding)

        def rows() -> Iterator[tuple[str, Mapping[str, Any]]]:
            for file in found.files:
                for number, row in enumerate(rows_of(file), 1):
                    yield f"{file.path}: row {number}", row

        try:
            columns = list(dict.fromkeys(column for _, row in islice(rows(), SEEN) for column in row))
            contents = tuple(map(identity.content_of, found.files))
        except OSError as error:
            raise BadInput(f"{key} {name!r} cannot be read: {error.strerror or error}") from None
        if not columns:
            raise BadInput(f"{key} {name!r} holds no rows")
        fingerprint = identity.of_contents(contents, encoding, name == docstrings.NAME)
        split = self._local(f"{name} (validation)", Found(found.validation, []), key) if found.validation else None
        return Source(name, columns, rows, fingerprint, contents, split)

    def _hub(self, name: str, key: str) -> Source:
        import datasets

        source = source_of(key, name)
        if not source.on_hub:
            raise BadInput(f"{key} {name!r} is neither a file nor a folder")
        options = {"trust_remote_code": True} if self.trust_remote_code else {}
        try:
            splits = datasets.load_dataset(source.name, self.data.dataset_config, **options)
            train, validation = splits["train"], splits.get("validation")
        except Exception as error:  # every kind of network, hub and builder error means the same to the user
            reason = " ".join(str(error).split()) or type(error).__name__
            raise BadInput(f"{key} {name!r} could not be opened on the hub: {reason}") from None

        def of(split: Any, called: str, own: Source | None) -> Source:
            def rows() -> Iterator[tuple[str, Mapping[str, Any]]]:
                for number, row in enumerate(split, 1):
                    yield f"{called}: row {number}", row

            return Source(called, list(split.column_names), rows, identity.hashed(split._fingerprint), (), own)

        return of(train, name, None if validation is None else of(validation, f"{name} (validation)", None))
