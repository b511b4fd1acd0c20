"""Data that cannot be used: one line, exit code 2, nothing written."""

import bz2
import gzip
import json
import lzma

import datasets
import pyarrow as pa
import pyarrow.parquet
import pytest

from gracile.train.pretrain import main


def rows(*values, column="text"):
    return "".join(json.dumps({column: value}) + "\n" for value in values)


def saved(folder, splits=None, **columns):
    data = datasets.Dataset.from_dict(columns)
    (data if splits is None else datasets.DatasetDict(dict.fromkeys(splits, data))).save_to_disk(folder)


def cut(data, share=0.5):
    return data[: int(len(data) * share)]


OUTSIDE = '{"_data_files": [{"filename": "../x"}]}'
LONG = "some words and more of them\n" * 400
ZST = pa.compress(LONG.encode(), "zstd", asbytes=True)
CHAT = [{"role": "user", "content": "hello " * 200}, {"role": "assistant", "content": "yes " * 200}]

# What is written under a folder, by name (text, bytes or a function of the path); which name is the data set; the other
# keys; and words of the message.
BAD = {
    "integers": ({"a.jsonl": rows(1, 2)}, "a.jsonl", {}, ["a.jsonl", "text_column='text'", "numbers"]),
    "integers in parquet": (
        {"a.parquet": lambda p: pa.parquet.write_table(pa.table({"text": [1, 2]}), p)}, "a.parquet", {}, ["numbers"],
    ),
    "booleans": ({"a.jsonl": rows(True)}, "a.jsonl", {}, ["true or false"]),
    "mappings": ({"a.jsonl": rows({"en": "x", "fr": "y"})}, "a.jsonl", {}, ["mappings with en, fr"]),
    "lists of numbers": ({"a.jsonl": rows([1, 2])}, "a.jsonl", {}, ["lists of numbers"]),
    "token ids in a saved folder": (
        {"d": lambda p: saved(p, input_ids=[[1, 2]])}, "d", {"text_column": "input_ids"}, ["lists of numbers"],
    ),
    "bytes": (
        {"a.parquet": lambda p: pa.parquet.write_table(pa.table({"text": [b"x"]}), p)}, "a.parquet", {}, ["bytes"],
    ),
    "messages without a chat template": (
        {"a.jsonl": rows(CHAT, column="messages")}, "a.jsonl", {"text_column": "messages"}, ["chat template"],
    ),
    "messages of another form": (
        {"a.jsonl": rows([{"from": "human", "value": "x"}])}, "a.jsonl", {}, ["mappings with from, value", "role"],
    ),
    "a text among lists": ({"a.jsonl": rows(["x"], "y")}, "a.jsonl", {}, ["lists of texts, but in row 2 text"]),
    "a number among texts": ({"a.jsonl": rows(LONG, 7)}, "a.jsonl", {}, ["a.jsonl", "row 2", "numbers"]),
    "an empty jsonl": ({"a.jsonl": ""}, "a.jsonl", {}, ["a.jsonl", "no documents"]),
    "an empty list": ({"a.json": "[]"}, "a.json", {}, ["a.json", "no documents"]),
    "a csv of one line": ({"a.csv": "text,n\n"}, "a.csv", {}, ["a.csv", "no documents"]),
    "an empty text": ({"a.txt": ""}, "a.txt", {}, ["a.txt", "0 block(s)"]),
    "only nulls": ({"a.jsonl": rows(None, None)}, "a.jsonl", {}, ["empty in every row"]),
    "an empty saved folder": ({"d": lambda p: saved(p, text=[])}, "d", {}, ["no documents"]),
    "no such column": ({"a.csv": "body,n\nx,1\n"}, "a.csv", {}, ["text_column='text'", "body, n"]),
    "no such column in a saved folder": ({"d": lambda p: saved(p, body=["x"])}, "d", {}, ["columns are body"]),
    "splits without train": ({"d": lambda p: saved(p, ["test"], text=["x"])}, "d", {}, ["no split 'train'", "d/test"]),
    "a saved folder without a file": (
        {"d": lambda p: (saved(p, text=["x"]), next(p.glob("*.arrow")).unlink())}, "d", {}, ["not there"],
    ),
    "a cut arrow file": (
        {"d": lambda p: (saved(p, text=["x" * 9999]), (f := next(p.glob("*.arrow"))).write_bytes(cut(f.read_bytes())))},
        "d", {}, [".arrow", "cannot be read"],
    ),
    "a state of no list": (
        {"d": lambda p: (saved(p, text=["x"]), (p / "state.json").write_text("[]"))}, "d", {}, ["state.json"],
    ),
    "a path in a state": (
        {"d": lambda p: (saved(p, text=["x"]), (p / "state.json").write_text(OUTSIDE))},
        "d", {}, ["'../x'"],
    ),
    "latin-1": (
        {"a.txt": (LONG + "caf\xe9").encode("latin-1")}, "a.txt", {}, ["byte 11,203 (0xe9, line 401)", "UTF-8"],
    ),
    "latin-1 in jsonl": ({"a.jsonl": b'{"text": "ok"}\n{"text": "\xe9"}\n'}, "a.jsonl", {}, ["0xe9, line 2"]),
    "latin-1 in csv": ({"a.csv": b"text\nok\n\xe9\n"}, "a.csv", {}, ["0xe9, line 3"]),
    "latin-1, later file": ({"d/a.txt": LONG, "d/b.txt": b"\xff"}, "d", {}, ["b.txt", "byte 0"]),
    "cut UTF-8": ({"a.txt": "é".encode()[:1]}, "a.txt", {}, ["byte 0 (0xc3"]),
    "UTF-16 without a mark": ({"a.txt": LONG.encode("utf-16-le")}, "a.txt", {}, ["UTF-16", "encoding"]),
    "cut UTF-16": ({"a.txt": LONG.encode("utf-16")[:-1]}, "a.txt", {}, ["a.txt", "UTF-16"]),
    "an encoding that is none": ({"a.txt": LONG}, "a.txt", {"encoding": "utf8mb4"}, ["encoding", "utf8mb4"]),
    "an encoding of no text": ({"a.txt": LONG}, "a.txt", {"encoding": "rot13"}, ["encoding", "rot13"]),
    "a picture": ({"a.png": b"\x89PNG"}, "a.png", {}, ["a.png", ".txt", ".jsonl"]),
    "a picture called txt": ({"a.txt": b"\x89PNG\r\n\x1a\n"}, "a.txt", {}, ["byte 0 (0x89"]),
    "gz of what": ({"a.gz": gzip.compress(b"x")}, "a.gz", {}, [".gz", "a.gz"]),
    "a tar": ({"a.tar.gz": gzip.compress(b"x")}, "a.tar.gz", {}, [".tar.gz"]),
    "a cut gz": ({"a.txt.gz": cut(gzip.compress(LONG.encode()))}, "a.txt.gz", {}, ["a.txt.gz", "cannot be read"]),
    "a cut xz": ({"a.txt.xz": cut(lzma.compress(LONG.encode()))}, "a.txt.xz", {}, ["a.txt.xz", "cannot be read"]),
    "a cut bz2": ({"a.txt.bz2": cut(bz2.compress(LONG.encode()))}, "a.txt.bz2", {}, ["a.txt.bz2", "cannot be read"]),
    "a cut zst": ({"a.txt.zst": cut(ZST, 0.9)}, "a.txt.zst", {}, ["a.txt.zst", "cannot be read"]),
    "no gz": ({"a.jsonl.gz": rows("x")}, "a.jsonl.gz", {}, ["a.jsonl.gz", "cannot be read"]),
    "no zst": ({"a.jsonl.zst": rows("x")}, "a.jsonl.zst", {}, ["a.jsonl.zst", "cannot be read"]),
    "no parquet": ({"a.parquet": "PAR0"}, "a.parquet", {}, ["a.parquet", "cannot be read"]),
    "no arrow": ({"a.arrow": "what"}, "a.arrow", {}, ["a.arrow", "cannot be read"]),
    "broken JSON": ({"a.jsonl": rows("x") + '{"text": '}, "a.jsonl", {}, ["a.jsonl", "line 2 is not JSON"]),
    "JSON lines of lists": ({"a.jsonl": '"x"\n'}, "a.jsonl", {}, ["line 1 is a text", "not an object"]),
    "half a character": ({"a.jsonl": '{"text": "\\ud83d"}\n'}, "a.jsonl", {}, ["row 1", "half a character"]),
    "deep JSON": ({"a.jsonl": "[" * 100_000}, "a.jsonl", {}, ["a.jsonl", "cannot be read"]),
    "a csv with too many fields": ({"a.csv": "text\nx,y\n"}, "a.csv", {}, ["line 2", "more fields"]),
    "an open quote": ({"a.csv": 'text\n"x\n'}, "a.csv", {}, ["a.csv", "cannot be read"]),
    "kinds mixed": ({"d/a.txt": "x", "d/b.jsonl": "{}"}, "d", {}, ["mixes .jsonl, .txt", "glob"]),
    "not there": ({}, "a.jsonl.zst", {}, ["a.jsonl.zst", "does not exist"]),
    "a folder of nothing": ({"d/.hidden.txt": LONG, "d/README.md": LONG}, "d", {}, ["no file that can be read"]),
    "one document streamed": ({"a.txt": LONG}, "a.txt", {"streaming": True}, ["a stream of 1 document"]),
    "a stream without an end": (
        {"d/a.txt": LONG, "d/b.txt": LONG}, "d", {"streaming": True, "max_steps": -1}, ["max_steps", "stream"],
    ),
    "validation too short": (
        {"a.txt": LONG, "v.txt": "x"}, "a.txt", {"validation_dataset": "v.txt"}, ["v.txt", "0 block(s)", "validation"],
    ),
    "validation not there": ({"a.txt": LONG}, "a.txt", {"validation_dataset": "v.txt"}, ["v.txt", "does not exist"]),
    "weights for another number": ({"a.txt": LONG}, "a.txt", {"dataset_weights": [1, 2]}, ["2 numbers for 1 data set"]),
    "a weight of 0": (
        {"a.txt": LONG, "b.txt": LONG}, ["a.txt", "b.txt"], {"dataset_weights": [1, 0]}, ["dataset_weights", "0.0"],
    ),
    "a weight that is none": (
        {"a.txt": LONG, "b.txt": LONG}, ["a.txt", "b.txt"], {"dataset_weights": [1, "nan"]}, ["dataset_weights", "nan"],
    ),
    "one data set twice": ({"a.txt": LONG}, ["a.txt", "a.txt"], {}, ["a.txt", "each once"]),
    "streams without weights": (
        {"a.txt": LONG, "b.txt": LONG}, ["a.txt", "b.txt"], {"streaming": True}, ["dataset_weights", "share"],
    ),
    "a weight that takes for ever": (
        {"a.txt": LONG, "b.txt": LONG}, ["a.txt", "b.txt"], {"dataset_weights": [1, 1e-9]}, ["b.txt", "larger weight"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_one_line_exit_code_2_and_nothing_written(tiny, tmp_path, capsys, case):
    files, name, changes, words = BAD[case]
    home = tmp_path / "data"
    for path, content in {".keep": "", **files}.items():
        (home / path).parent.mkdir(parents=True, exist_ok=True)
        if callable(content):
            content(home / path)
        else:
            (home / path).write_bytes(content if isinstance(content, bytes) else content.encode())
    names = [name] if isinstance(name, str) else name
    if "validation_dataset" in changes:
        changes = {**changes, "validation_dataset": str(home / changes["validation_dataset"])}
    config = tiny(dataset=[str(home / one) for one in names], optimizer="adamw", **changes)
    capsys.readouterr()
    assert main([config]) == 2
    err = capsys.readouterr().err.strip().splitlines()
    message = err[-1]
    assert [line for line in err if line.startswith("gracile pretrain:")] == [message]
    assert all(word in message for word in words), message
    assert not (tmp_path / "run").exists()
