"""Local files: which a name stands for, what their endings say, and how they are opened."""

from __future__ import annotations

import bz2
import codecs
import contextlib
import glob
import gzip
import io
import json
import lzma
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, TextIO

from ..errors import BadInput

TEXT, JSON, CSV, PARQUET, ARROW = "text", "json", "csv", "parquet", "arrow"
# What a file holds, by its ending in any case. A text file is one document.
KINDS = {
    ".txt": TEXT, ".md": TEXT, ".py": TEXT, ".jsonl": JSON, ".ndjson": JSON, ".json": JSON,
    ".csv": CSV, ".tsv": CSV, ".parquet": PARQUET, ".arrow": ARROW,
}  # fmt: skip
PACKED = (".gz", ".xz", ".zst", ".bz2")  # may follow one of them
IN_CHARACTERS = (TEXT, JSON, CSV)
READABLE = f"{', '.join(KINDS)}, each also with {', '.join(PACKED)}"
# A byte order mark decides; the longer ones first, for UTF-32's begins with UTF-16's.
MARKS = (
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
HEAD = 1 << 16
MOST_BYTES = (1 << 31) - 1  # of one text in an Arrow table


@dataclass(frozen=True)
class File:
    """A file of a data set: what it holds, and how it is compressed."""

    path: Path
    kind: str
    packed: str

    @property
    def suffix(self) -> str:
        return kind_of(self.path)[1]


@dataclass(frozen=True)
class Found:
    """The files of a data set in a fixed order, those held out by whoever saved it, and how many were left out."""

    files: list[File]
    validation: list[File]
    left_out: int = 0


def kind_of(path: Path) -> tuple[str, str, str]:
    """What a file holds (empty where it cannot be read), the ending that says so, and that of its compression."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    packed = suffixes.pop() if suffixes and suffixes[-1] in PACKED else ""
    suffix = suffixes[-1] if suffixes else ""
    return KINDS.get(suffix, ""), suffix, packed


def local_files(name: str) -> Found | None:
    """The files behind a path, a folder or a glob; None for what is no path to a file.

    Raises:
        BadInput: for a path that does not exist, or files of no kind or of several kinds.
    """
    path = Path(name).expanduser()
    if path.is_dir():
        saved = _saved_to_disk(path, name)
        if saved is not None:
            return saved
        listed = sorted(p for p in path.rglob("*") if p.is_file() and not p.name.startswith("."))
        paths = [p for p in listed if kind_of(p)[0] and p.stem.lower() != "readme"]
        left_out = len(listed) - len(paths)
    elif path.is_file():
        paths, left_out = [path], 0
    elif glob.has_magic(name):
        paths, left_out = sorted(p for p in map(Path, glob.glob(str(path), recursive=True)) if p.is_file()), 0
    elif kind_of(path)[0] or kind_of(path)[2] or name.startswith(("/", ".", "~")):
        raise BadInput(f"dataset {name!r} does not exist")
    else:
        return None
    if not paths:
        raise BadInput(f"dataset {name!r} matches no file that can be read: {READABLE}")
    return Found(_of_one_kind(paths, name), [], left_out)


def _of_one_kind(paths: Sequence[Path], name: str) -> list[File]:
    for path in paths:
        kind, suffix, packed = kind_of(path)
        if not kind:
            what = f"{suffix}{packed}" or "extensionless"
            raise BadInput(f"dataset {name!r} holds {what} files ({path.name}); readable are {READABLE}")
    files = [File(p, kind_of(p)[0], kind_of(p)[2]) for p in paths]
    if len({file.kind for file in files}) > 1:
        suffixes = sorted({file.suffix for file in files})
        raise BadInput(f"dataset {name!r} mixes {', '.join(suffixes)} files; choose one kind with a glob")
    return files


def _saved_to_disk(folder: Path, name: str) -> Found | None:
    """A folder that ``Dataset.save_to_disk`` or ``DatasetDict.save_to_disk`` wrote."""
    if (folder / "state.json").is_file() and (folder / "dataset_info.json").is_file():
        return Found(_saved_split(folder, name), [])
    if not (folder / "dataset_dict.json").is_file():
        return None
    with _one_line(name, folder / "dataset_dict.json"):
        splits = [str(split) for split in json.loads((folder / "dataset_dict.json").read_text("utf-8"))["splits"]]
    if "train" not in splits:
        one = f"{name.rstrip('/')}/{splits[0] if splits else 'SPLIT'}"
        raise BadInput(f"dataset {name!r} has no split 'train' but {', '.join(splits) or 'none'}; give one: {one}")
    held_out = _saved_split(folder / "validation", name) if "validation" in splits else []
    return Found(_saved_split(folder / "train", name), held_out)


def _saved_split(folder: Path, name: str) -> list[File]:
    with _one_line(name, folder / "state.json"):
        state = json.loads((folder / "state.json").read_text("utf-8"))
        names = [str(entry["filename"]) for entry in state["_data_files"]]
    for entry in names:
        if Path(entry).name != entry or not (folder / entry).is_file():
            raise BadInput(
                f"dataset {name!r}: {folder / 'state.json'} names {entry!r}, which is not there; save it again"
            )
    if not names:
        raise BadInput(f"dataset {name!r} holds no documents")
    return [File(folder / entry, ARROW, "") for entry in names]


@contextlib.contextmanager
def _one_line(name: str, path: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = " ".join(str(error).split())
        raise BadInput(f"dataset {name!r}: {path} is not what save_to_disk writes: {reason}") from None


# ---- opening --------------------------------------------------------------------------------------------------------


def open_bytes(file: File) -> BinaryIO:
    """The file's bytes, decompressed while they are read."""
    if file.packed == ".zst":
        import pyarrow  # its own zstd: no package more

        raw: Any = pyarrow.CompressedInputStream(pyarrow.OSFile(str(file.path)), "zstd")
        return io.BufferedReader(raw, HEAD)
    openers: dict[str, Any] = {".gz": gzip.open, ".xz": lzma.open, ".bz2": bz2.open}
    stream: BinaryIO = openers.get(file.packed, open)(file.path, "rb")
    return stream


def open_text(file: File, encoding: str | None, newline: str | None = None) -> TextIO:
    """The file's characters, strictly decoded: as its byte order mark says, else ``encoding``, else UTF-8."""
    stream = open_bytes(file)
    try:
        with open_bytes(file) as head:
            found = encoding_of(head.read(HEAD), encoding)
        return io.TextIOWrapper(stream, encoding=found, errors="strict", newline=newline)
    except BaseException:
        stream.close()
        raise


def encoding_of(head: bytes, encoding: str | None) -> str:
    """How a file that begins with ``head`` is decoded.

    Raises:
        ValueError: for text of two or four bytes a character without a mark, which would pass as UTF-8 full of NULs.
    """
    for mark, name in MARKS:
        if head.startswith(mark):
            return name
    if encoding is None and head.count(0) > len(head) // 5:
        raise ValueError("it looks like UTF-16 without a byte order mark, or is no text; say what it is with encoding")
    return encoding or "utf-8"


def first_bad_byte(file: File, encoding: str | None) -> str:
    """Where decoding fails, in words."""
    with open_bytes(file) as stream:
        name = encoding_of(stream.read(HEAD), encoding)
    decoder = codecs.getincrementaldecoder(name)("strict")
    offset, line = 0, 1
    with open_bytes(file) as stream:
        while True:
            chunk = stream.read(1 << 20)
            pending = decoder.getstate()[0] if chunk or offset else b""
            try:
                line += decoder.decode(chunk, final=not chunk).count("\n")
            except UnicodeDecodeError as error:
                line += error.object[: error.start].decode(name, errors="ignore").count("\n")
                at = offset - len(pending) + error.start
                bad = error.object[error.start : error.start + 1].hex()
                return f"byte {at:,} (0x{bad}, line {line:,}) is not {name.removesuffix('-sig').upper()}"
            if not chunk:
                return f"it is not {name.upper()}"
            offset += len(chunk)
