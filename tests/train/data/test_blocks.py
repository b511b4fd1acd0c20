import itertools
import json
import random
import sysconfig
from pathlib import Path

import datasets
import pytest

from gracile.train.config.arguments import DataArguments
from gracile.train.data.blocks import collate, make_blocks
from gracile.train.data.corpus import open_corpus
from gracile.train.data.packing import pack
from gracile.train.data.tokenizer import get_tokenizer
from gracile.train.errors import BadInput


@pytest.fixture(scope="module")
def tokenizer(corpus):
    return get_tokenizer(None, open_corpus(DataArguments(dataset=str(corpus))), vocab_size=500)


def blocks_of(dataset, tokenizer, **changes):
    data = DataArguments(dataset=str(dataset), **{"block_size": 32, "validation_blocks": 20, **changes})
    return make_blocks(open_corpus(data), tokenizer, data)


def ids(blocks) -> list[list[int]]:
    return [block["input_ids"] for block in blocks]


@pytest.mark.parametrize("block_size", [2, 7, 64])
def test_packing_loses_no_token_where_documents_meet(tokenizer, block_size):
    generator = random.Random(0)
    texts = ["", *("word " * generator.randrange(30) for _ in range(50)), "ünïcode ↦ 🙂"]
    stream = []
    for text in filter(None, texts):
        stream += tokenizer(text, add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
    packed = ids(pack(texts, tokenizer, block_size))
    assert all(len(block) == block_size for block in packed)
    assert list(itertools.chain(*packed)) == stream[: len(stream) - len(stream) % block_size]


def test_blocks_decode_to_the_text_of_the_files(corpus, tokenizer):
    blocks = blocks_of(corpus, tokenizer)
    text = tokenizer.decode(list(itertools.chain(*ids(blocks.train), *ids(blocks.validation))))
    files = {p.read_text(encoding="utf-8") for p in corpus.iterdir()}
    whole = [document for document in text.split(tokenizer.eos_token) if document in files]
    assert len(whole) >= len(files) - 1 == 3, "all but perhaps the last document, whose end may be less than a block"


def test_split_is_disjoint_fixed_and_complete(corpus, tokenizer):
    first, again = blocks_of(corpus, tokenizer), blocks_of(corpus, tokenizer)
    assert ids(first.train) == ids(again.train)
    assert ids(first.validation) == ids(again.validation)
    assert len(first.validation) == 20
    many = blocks_of(corpus, tokenizer, validation_blocks=10**6)
    total = len(first.train) + len(first.validation)
    assert len(many.train) + len(many.validation) == total
    assert len(many.validation) == total // 10, "never more than a tenth"
    assert ids(many.validation)[-20:] == ids(first.validation)


def test_all_kinds_of_files_give_the_same_blocks(corpus, tokenizer, tmp_path):
    texts = [p.read_text(encoding="utf-8") for p in sorted(corpus.iterdir())]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"body": t, "n": 1}) + "\n" for t in texts))
    datasets.Dataset.from_dict({"body": texts}).to_parquet(tmp_path / "a.parquet")
    wanted = ids(blocks_of(corpus, tokenizer).train)
    assert ids(blocks_of(corpus / "*.txt", tokenizer).train) == wanted
    assert ids(blocks_of(tmp_path / "a.jsonl", tokenizer, text_column="body").train) == wanted
    assert ids(blocks_of(tmp_path / "a.parquet", tokenizer, text_column="body").train) == wanted


def test_streaming_reads_every_document_once(corpus, tokenizer):
    streamed = blocks_of(corpus, tokenizer, streaming=True)
    texts = [p.read_text(encoding="utf-8") for p in sorted(corpus.iterdir())]
    assert ids(streamed.validation) == ids(itertools.islice(pack(texts, tokenizer, 32), 20))
    rest = ids(pack(texts[1:] * 2, tokenizer, 32))
    assert ids(itertools.islice(streamed.train, len(rest))) == rest, "the document that validation used is skipped"


def test_stdlib_is_this_pythons_source_without_tests_and_packages():
    documents = open_corpus(DataArguments()).documents
    source = Path(sysconfig.get_paths()["stdlib"], "argparse.py").read_text(encoding="utf-8")
    assert source in documents["text"]
    assert sum(map(len, documents["text"])) > 3_000_000
    installed = Path(pytest.__file__).read_text(encoding="utf-8")
    assert installed not in documents["text"]


def test_every_token_is_a_label():
    batch = collate([{"input_ids": [2, 0, 5]}, {"input_ids": [2, 2, 2]}])
    assert batch["labels"].tolist() == [[2, 0, 5], [2, 2, 2]]


@pytest.mark.parametrize(
    ("dataset", "changes", "words"),
    [
        ("{}/nowhere.txt", {}, ["nowhere.txt", "does not exist"]),
        ("{}/*.rst", {}, ["*.rst", "matches no"]),
        ("{}/empty", {}, ["empty", "matches no"]),
        ("{}/short.txt", {}, ["short.txt", "0 block(s)", "block_size=32"]),
        ("{}/short.txt", {"streaming": True}, ["short.txt", "0 block(s)"]),
        ("{}/image.png", {}, ["image.png", ".png"]),
        ("{}/a.jsonl", {}, ["a.jsonl", "text_column='text'", "body"]),
        ("{}/broken.jsonl", {}, ["broken.jsonl"]),
        ("{}", {}, ["mixes"]),
        ("nobody/nothing", {}, ["nobody/nothing", "hub"]),
    ],
)
def test_bad_data(tmp_path, tokenizer, dataset, changes, words):
    (tmp_path / "empty").mkdir()
    (tmp_path / "short.txt").write_text("one")
    (tmp_path / "image.png").write_bytes(b"\x89PNG")
    (tmp_path / "a.jsonl").write_text('{"body": "x"}\n')
    (tmp_path / "broken.jsonl").write_text('{"text": "x"\n[[[')
    with pytest.raises(BadInput) as error:
        blocks_of(dataset.format(tmp_path), tokenizer, **changes)
    assert all(word in str(error.value) for word in words), str(error.value)
    assert "\n" not in str(error.value)
