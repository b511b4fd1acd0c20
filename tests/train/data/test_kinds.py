"""Files of every kind, compression and encoding give the same documents; columns of every kind become text."""

import bz2
import csv
import gzip
import io
import json
import lzma

import datasets
import pyarrow as pa
import pyarrow.parquet
import pytest

from gracile.train.config.arguments import DataArguments
from gracile.train.data import packing
from gracile.train.data.blocks import collate, make_blocks
from gracile.train.data.corpus import open_corpus
from gracile.train.data.tokenizer import get_tokenizer
from gracile.train.errors import BadInput

TEXTS = ["first\nof three", 'ünïcode ↦ 🙂, "quoted"', "third " * 40]


def lines(texts):
    return "".join(json.dumps({"n": 1, "text": text}, ensure_ascii=False) + "\n" for text in texts).encode()


def table(texts, delimiter):
    stream = io.StringIO()
    csv.writer(stream, delimiter=delimiter).writerows([["n", "text"], *([1, text] for text in texts)])
    return stream.getvalue().encode()


def parquet(texts):
    stream = io.BytesIO()
    pa.parquet.write_table(pa.table({"n": [1] * len(texts), "text": texts}), stream)
    return stream.getvalue()


def arrow(texts, writer=pa.ipc.new_stream):
    stream, rows = io.BytesIO(), pa.table({"n": [1] * len(texts), "text": texts})
    with writer(stream, rows.schema) as out:
        out.write_table(rows)
    return stream.getvalue()


KINDS = {
    ".jsonl": lines(TEXTS),
    ".JSONL": lines(TEXTS),
    ".ndjson": lines(TEXTS),
    ".json": json.dumps([{"text": text} for text in TEXTS]).encode(),
    ".csv": table(TEXTS, ","),
    ".tsv": table(TEXTS, "\t"),
    ".parquet": parquet(TEXTS),
    ".arrow": arrow(TEXTS),
    ".Arrow": arrow(TEXTS, pa.ipc.new_file),
}
PACKINGS = {
    "": bytes,
    ".gz": gzip.compress,
    ".xz": lzma.compress,
    ".bz2": bz2.compress,
    ".zst": lambda data: pa.compress(data, "zstd", asbytes=True),
    ".GZ": gzip.compress,
}


def texts_of(dataset, **changes):
    return list(open_corpus(DataArguments(dataset=str(dataset), **changes)).sources[0].texts())


@pytest.mark.parametrize(
    ("suffix", "packed"),
    [
        *((suffix, "") for suffix in KINDS),
        *((s, p) for s in (".jsonl", ".csv", ".parquet", ".arrow") for p in PACKINGS),
    ],
)
def test_every_kind_of_file(tmp_path, suffix, packed):
    path = tmp_path / f"a{suffix}{packed}"
    path.write_bytes(PACKINGS[packed](KINDS[suffix]))
    assert texts_of(path, streaming=True) == TEXTS


@pytest.mark.parametrize("suffix", [".txt", ".TXT", ".md", ".md.gz", ".txt.zst", ".py.XZ"])
def test_a_text_file_is_a_document(tmp_path, suffix):
    packed = PACKINGS[(tmp_path / f"a{suffix}").suffix.lower().replace(".txt", "").replace(".md", "")]
    for number, text in enumerate(TEXTS):
        (tmp_path / f"{number}{suffix}").write_bytes(packed(text.encode()))
    (tmp_path / "README.md").write_text("of the data, and no part of it")
    assert texts_of(tmp_path) == TEXTS
    assert texts_of(tmp_path / f"1{suffix}") == TEXTS[1:2]


def test_folders_of_save_to_disk(tmp_path):
    data = datasets.Dataset.from_dict({"text": TEXTS, "n": [1, 2, 3]})
    data.save_to_disk(tmp_path / "one", num_shards=2)
    datasets.DatasetDict(train=data, validation=data.select([2])).save_to_disk(tmp_path / "both")
    assert texts_of(tmp_path / "one") == texts_of(tmp_path / "one", streaming=True) == TEXTS
    source = open_corpus(DataArguments(dataset=str(tmp_path / "both"))).sources[0]
    assert (list(source.texts()), list(source.validation.texts())) == (TEXTS, TEXTS[2:])


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-32", "utf-16-be"])
def test_a_byte_order_mark_decides_and_is_said(tmp_path, encoding):
    mark = b"\xfe\xff" if encoding == "utf-16-be" else b""
    (tmp_path / "a.txt").write_bytes(mark + TEXTS[1].encode(encoding))
    (tmp_path / "b.txt").write_text(TEXTS[0])
    corpus = open_corpus(DataArguments(dataset=str(tmp_path)))
    assert list(corpus.sources[0].texts()) == [TEXTS[1], TEXTS[0]]
    assert any("1 of 2 files" in note and "byte order mark" in note for note in corpus.notes)
    (tmp_path / "a.jsonl").write_bytes(mark + lines(TEXTS).decode().encode(encoding))
    assert texts_of(tmp_path / "a.jsonl") == TEXTS


def test_an_encoding_that_is_given(tmp_path):
    (tmp_path / "a.txt").write_bytes("café\r\n\x00".encode("latin-1"))
    assert texts_of(tmp_path / "a.txt", encoding="latin-1") == ["café\n\x00"]


def test_line_breaks_and_rows_without_a_text(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"one\r\ntwo\rthree\n")
    (tmp_path / "a.jsonl").write_bytes(b'{"n": 1}\r\n\r\n{"text": null}\r\n{"text": "x\\r\\n"}')
    assert texts_of(tmp_path / "a.txt") == ["one\ntwo\nthree\n"]
    assert texts_of(tmp_path / "a.jsonl") == ["", "", "x\r\n"]


# ---- columns ---------------------------------------------------------------------------------------------------------

CHAT = [{"role": "user", "content": "Hällo"}, {"role": "assistant", "content": "Yes"}]
TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}"


@pytest.fixture(scope="module")
def tokenizer(corpus):
    return get_tokenizer(None, open_corpus(DataArguments(dataset=str(corpus))), vocab_size=500)


def test_lists_of_texts_are_joined(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": ["a", "b"]}\n{"text": []}\n{"text": ["c"]}\n')
    assert texts_of(tmp_path / "a.jsonl") == ["a\nb", "", "c"]


@pytest.mark.parametrize("streaming", [False, True])
def test_messages_go_through_the_chat_template(tmp_path, tokenizer, streaming, monkeypatch):
    (tmp_path / "a.parquet").write_bytes(b"")
    pa.parquet.write_table(pa.table({"messages": [CHAT] * 30}), tmp_path / "a.parquet")
    data = DataArguments(
        dataset=str(tmp_path / "a.parquet"),
        text_column="messages",
        block_size=8,
        validation_blocks=2,
        streaming=streaming,
    )
    monkeypatch.setattr(tokenizer, "chat_template", TEMPLATE + "</s>")
    blocks = make_blocks(open_corpus(data), tokenizer, data)
    text = tokenizer.decode(blocks.validation[0]["input_ids"] + blocks.validation[1]["input_ids"])
    assert "<user>Hällo\n<assi" in tokenizer.decode([i for b in _first(blocks.train, 6) for i in b["input_ids"]])
    assert "</s></s>" not in text
    monkeypatch.setattr(tokenizer, "chat_template", "{{ raise_exception('no roles') }}")
    with pytest.raises(BadInput, match="no roles"):
        make_blocks(open_corpus(data), tokenizer, data)


def _first(blocks, count):
    iterator = iter(blocks)
    return [next(iterator) for _ in range(count)]


# ---- one document an example -----------------------------------------------------------------------------------------


def test_one_document_an_example_and_no_loss_on_padding(tmp_path, tokenizer):
    (tmp_path / "a.jsonl").write_bytes(lines([f"word {n} " * n for n in range(12)]))
    data = DataArguments(dataset=str(tmp_path / "a.jsonl"), block_size=16, validation_blocks=1, packing=False)
    blocks = make_blocks(open_corpus(data), tokenizer, data)
    batch = collate([blocks.train[i] for i in range(len(blocks.train))])
    assert batch["input_ids"].shape[1] == 16
    kept = batch["attention_mask"] == 1
    assert (batch["labels"][kept] == batch["input_ids"][kept]).all()
    assert (batch["labels"][~kept] == -100).all()
    assert (~kept).any()
    for example in blocks.train:
        ids = example["input_ids"][: sum(example["attention_mask"])]
        assert tokenizer.eos_token_id not in ids[:-1], "one document"
    long = tokenizer("word 11 " * 11, add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
    pieces = [e["input_ids"] for e in packing.pack(["word 11 " * 11], tokenizer, 16, packed=False)]
    assert [i for piece in pieces for i in piece][: len(long)] == long, "a longer one goes on in further examples"
