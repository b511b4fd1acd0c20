"""What a run's data is: its content, wherever it lies and whenever it was written."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import xxhash  # what datasets hashes with
from transformers import PreTrainedTokenizerBase

from .files import File

DATA_FILE = "data.json"
# Keys that say where data lies, and by which nothing is recognised.
PLACES = ("dataset", "validation_dataset", "forgetting_dataset", "tokenizer", "chat_template", "ignore_data_changes")
BY_CONTENT = "content-"  # an identity without it is of an older version: of sizes and times


def hashed(*parts: object) -> str:
    """A short name of what the parts say."""
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]


def content_of(file: File) -> dict[str, Any]:
    """Name, size and 128-bit hash of a file as it is on disk."""
    digest, size = xxhash.xxh3_128(), 0
    with file.path.open("rb") as stream:
        while chunk := stream.read(1 << 22):
            digest.update(chunk)
            size += len(chunk)
    return {"name": file.path.name, "bytes": size, "xxh3_128": digest.hexdigest()}


def of_contents(contents: Iterable[dict[str, Any]], *settings: object) -> str:
    """The identity of files in their order; their names do not count."""
    return hashed([(one["bytes"], one["xxh3_128"]) for one in contents], *settings)


def of_times(files: Sequence[File], column: str) -> str:
    """The identity that runs of older versions have for the same files."""
    paths = [str(file.path) for file in files]
    return hashed([(p, Path(p).stat().st_size, Path(p).stat().st_mtime_ns) for p in paths], column)


def of_tokenizer(tokenizer: PreTrainedTokenizerBase) -> str:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    vocabulary = backend.to_str() if backend is not None else str(sorted(tokenizer.get_vocab().items()))
    return hashed(vocabulary, tokenizer.eos_token)


@dataclass(frozen=True)
class Identity:
    """The data of a run.

    Attributes:
        now: what run.yaml holds.
        older: what it would hold if an older version had begun the run; None where that could not read such data.
        sets: name, identity and files of each data set, as data.json holds them.
    """

    now: str
    older: str | None
    sets: list[dict[str, Any]]

    def is_that_of(self, saved: str) -> bool:
        return saved in (self.now, self.older)

    def record(self) -> str:
        return json.dumps(self.sets, indent=1, ensure_ascii=False) + "\n"

    def difference(self, folder: Path, saved: str) -> str:
        """How it differs from the data of the run in ``folder``, in words."""
        if not saved.startswith(BY_CONTENT):
            return "a file's size, time or place, by which the older version that began it knew data"
        try:
            return _difference(json.loads((folder / DATA_FILE).read_text("utf-8")), self.sets)
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return f"its content, its tokenizer or how it is read ({DATA_FILE}, which says more, cannot be read)"


def _difference(before: list[dict[str, Any]], now: list[dict[str, Any]]) -> str:
    if len(before) != len(now):
        return f"{len(now)} data sets, {len(before)} when it began"
    for old, new in zip(before, now, strict=True):
        if old["identity"] == new["identity"]:
            continue
        name, files, then_files = new["dataset"], new["files"], old["files"]
        if len(then_files) != len(files):
            return f"{name!r} has {len(files):,} files, {len(then_files):,} when it began"
        for then, file in zip(then_files, files, strict=True):
            if then["xxh3_128"] != file["xxh3_128"]:
                known = file["name"] if then["name"] == file["name"] else f"{file['name']} (then {then['name']})"
                if then["bytes"] != file["bytes"]:
                    return f"{known} has {file['bytes']:,} bytes, {then['bytes']:,} when it began"
                return f"{known} has as many bytes, but others"
        return f"how {name!r} is read (text_column, encoding, dataset_config)"
    return "the tokenizer, or the weights of the data sets"
