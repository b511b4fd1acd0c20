"""The values of one column, row by row, from files of each kind; every fault names its file and row."""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from ..errors import BadInput
from .files import CSV, JSON, MOST_BYTES, PARQUET, TEXT, File, first_bad_byte, open_bytes, open_text

BATCH = 256  # rows of a columnar file held at a time
PATIENCE = 1000  # rows without the column before it is said not to be there


def values(file: File, column: str, encoding: str | None) -> Iterator[Any]:
    """The column's value in each row of ``file``; None where a row has none. A text file is a row.

    Raises:
        BadInput: for a file that cannot be read, or has no such column.
    """
    with _named(file, encoding):
        if file.kind == TEXT:
            yield _whole(file, encoding)
        elif file.kind == JSON:
            yield from _column(_json_rows(file, encoding), column, file)
        elif file.kind == CSV:
            yield from _column(_csv_rows(file, encoding), column, file)
        elif file.kind == PARQUET:
            yield from _parquet(file, column)
        else:
            yield from _arrow(file, column)


def records(file: File, encoding: str | None) -> Iterator[Mapping[str, Any]]:
    """The rows of ``file``, with all their columns.

    Raises:
        BadInput: for a file that cannot be read. A text file has no columns, and is refused.
    """
    with _named(file, encoding):
        if file.kind == TEXT:
            raise ValueError("a text file has no columns")
        if file.kind == JSON:
            yield from _json_rows(file, encoding)
        elif file.kind == CSV:
            yield from _csv_rows(file, encoding)
        else:
            for batch in _parquet_batches(file) if file.kind == PARQUET else _arrow_batches(file):
                yield from batch.to_pylist()


@contextmanager
def _named(file: File, encoding: str | None) -> Iterator[None]:
    import pyarrow

    try:
        yield
    except UnicodeDecodeError:
        where = first_bad_byte(file, encoding)
        raise BadInput(f"{file.path}: {where}; convert the file, or say what it is with encoding") from None
    except (OSError, EOFError, ValueError, csv.Error, pyarrow.ArrowException, MemoryError, RecursionError) as error:
        if isinstance(error, OSError) and error.strerror:
            raise BadInput(f"{file.path} cannot be read: {error.strerror}") from None
        raise BadInput(f"{file.path} cannot be read: {' '.join(str(error).split()) or type(error).__name__}") from None
    except Exception as error:
        if type(error).__module__ in ("zlib", "lzma", "_lzma"):
            raise BadInput(f"{file.path} cannot be read: {error}") from None
        raise


def _whole(file: File, encoding: str | None) -> str:
    size = file.path.stat().st_size
    if size <= MOST_BYTES:
        with open_text(file, encoding) as stream:
            text = stream.read()
        size = len(text)
    if size > MOST_BYTES:
        raise ValueError(f"a text file is one document, and {size:,} bytes are more than one may have; split it")
    return text


def _json_rows(file: File, encoding: str | None) -> Iterator[Mapping[str, Any]]:
    """Objects, one a line; or a list of objects."""
    with open_text(file, encoding) as stream:
        if _first_character(file, encoding) == "[":
            rows = json.load(stream)
            numbered = ((f"entry {n}", row) for n, row in enumerate(rows, 1))
        else:
            numbered = ((f"line {n}", _parsed(line, n)) for n, line in enumerate(stream, 1) if line.strip())
        for where, row in numbered:
            if not isinstance(row, dict):
                raise ValueError(f"{where} is {_json_kind(row)}, not an object with columns")
            yield row


def _first_character(file: File, encoding: str | None) -> str:
    """The first one that is no space."""
    with open_text(file, encoding) as stream:
        first = " "
        while first and first.isspace():
            first = stream.read(1)
        return first


def _parsed(line: str, number: int) -> Any:
    try:
        return json.loads(line)
    except ValueError as error:
        raise ValueError(f"line {number} is not JSON: {error}") from None


def _json_kind(value: Any) -> str:
    kinds = {list: "a list", str: "a text", bool: "true or false", type(None): "null"}
    return kinds.get(type(value), "a number")


def _csv_rows(file: File, encoding: str | None) -> Iterator[Mapping[str, Any]]:
    csv.field_size_limit(min(sys.maxsize, 2**31 - 1))  # of C's long, which has 32 bits on some systems
    with open_text(file, encoding, newline="") as stream:
        reader = csv.DictReader(stream, delimiter="\t" if file.suffix == ".tsv" else ",", strict=True)
        for row in reader:
            if None in row:
                raise ValueError(f"line {reader.line_num} has more fields than the header")
            yield row


def _column(rows: Iterator[Mapping[str, Any]], column: str, file: File) -> Iterator[Any]:
    """One column of rows that need not all have it."""
    seen: dict[str, Any] = {}
    lacking = 0
    for row in rows:
        if lacking >= 0:
            if column in row:
                yield from [None] * lacking
                lacking = -1
            else:
                lacking += 1
                seen |= {key: value for key, value in row.items() if seen.get(key) is None}
                if lacking == PATIENCE:
                    raise no_column(column, seen, str(file.path))
                continue
        yield row.get(column)
    if lacking > 0:
        raise no_column(column, seen, str(file.path))


def no_column(column: str, seen: Mapping[str, Any], where: str) -> BadInput:
    """What to say where a column is missing."""
    columns = ", ".join(seen)
    return BadInput(f"{where} has no column text_column={column!r}; columns are {columns or 'none'}")


def _parquet(file: File, column: str) -> Iterator[Any]:
    for batch in _parquet_batches(file, column):
        yield from batch.column(0).to_pylist()


def _parquet_batches(file: File, column: str | None = None) -> Iterator[Any]:
    """Its record batches, of one column or of all."""
    import pyarrow.parquet

    with open_bytes(file) as stream:
        source: Any = stream
        if file.packed:  # its directory is at the end
            source = pyarrow.BufferReader(stream.read())
        table = pyarrow.parquet.ParquetFile(source)
        if column is not None:
            _check_schema(table.schema_arrow, column, file)
        yield from table.iter_batches(batch_size=BATCH, columns=None if column is None else [column])


def _arrow(file: File, column: str) -> Iterator[Any]:
    for batch in _arrow_batches(file, column):
        yield from batch.column(batch.schema.get_field_index(column)).to_pylist()


def _arrow_batches(file: File, column: str | None = None) -> Iterator[Any]:
    """The record batches of Arrow's stream, as datasets writes it, or of its file format."""
    import pyarrow

    with open_bytes(file) as stream:
        source: Any = pyarrow.BufferReader(stream.read()) if file.packed else pyarrow.memory_map(str(file.path))
        if source.size() == 0:
            raise ValueError("it is empty")
        if source.read(6) == b"ARROW1":
            opened = pyarrow.ipc.open_file(source)
            batches = (opened.get_batch(i) for i in range(opened.num_record_batches))
        else:
            source.seek(0)
            opened = pyarrow.ipc.open_stream(source)
            batches = iter(opened)
        if column is not None:
            _check_schema(opened.schema, column, file)
        yield from batches


def _check_schema(schema: Any, column: str, file: File) -> None:
    if column not in schema.names:
        raise no_column(column, dict.fromkeys(schema.names), str(file.path))
