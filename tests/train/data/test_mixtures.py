"""Several data sets by weight, validation data of one's own, and streams that go on where they stood."""

import collections
import itertools
import json

import pytest

from gracile.train.config.arguments import DataArguments
from gracile.train.data import rows
from gracile.train.data.blocks import make_blocks
from gracile.train.data.corpus import open_corpus
from gracile.train.data.stream import STREAM_FILE
from gracile.train.data.tokenizer import get_tokenizer
from gracile.train.pretrain import main


@pytest.fixture(scope="module")
def tokenizer(corpus):
    return get_tokenizer(None, open_corpus(DataArguments(dataset=str(corpus))), vocab_size=500)


@pytest.fixture(scope="module")
def letters(tmp_path_factory):
    """Three data sets, of words of one letter each: a, b, c. The last is the longest."""
    folder = tmp_path_factory.mktemp("letters")
    for letter, count in (("a", 40), ("b", 120), ("c", 300)):
        documents = (f"{letter} {n} " * 6 for n in range(count))
        (folder / f"{letter}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
    return folder


def blocks_of(letters, tokenizer, names, **changes):
    data = DataArguments(dataset=[str(letters / f"{name}.jsonl") for name in names], block_size=8,
                         **{"validation_blocks": 10, **changes})  # fmt: skip
    return make_blocks(open_corpus(data), tokenizer, data)


def letter(tokenizer, block):
    text = tokenizer.decode(block["input_ids"])
    return next(name for name in "abc" if name in text.replace("</s>", ""))


@pytest.mark.parametrize("streaming", [False, True])
def test_weights_are_shares_of_the_blocks_and_every_draw_is_the_same(letters, tokenizer, streaming):
    made = [blocks_of(letters, tokenizer, "abc", dataset_weights=[5, 3, 2], streaming=streaming) for _ in range(2)]
    first, again = ([b["input_ids"] for b in itertools.islice(blocks.train, 3000)] for blocks in made)
    assert first == again
    counts = collections.Counter(letter(tokenizer, {"input_ids": ids}) for ids in first)
    for name, share in zip("abc", (0.5, 0.3, 0.2), strict=True):
        assert abs(counts[name] / len(first) - share) < 0.04
    held_out = collections.Counter(letter(tokenizer, block) for block in made[0].validation)
    assert held_out == {"a": 5, "b": 3, "c": 2}


def test_without_weights_each_is_there_once(letters, tokenizer):
    parts = [blocks_of(letters, tokenizer, name) for name in "ab"]
    both = blocks_of(letters, tokenizer, "ab", validation_blocks=20)
    assert len(both.train) == sum(len(part.train) for part in parts)
    assert len(both.validation) == sum(len(part.validation) for part in parts)


@pytest.mark.parametrize("streaming", [False, True])
def test_validation_data_of_ones_own(letters, tokenizer, streaming):
    changes = {"validation_dataset": str(letters / "c.jsonl"), "streaming": streaming}
    blocks = blocks_of(letters, tokenizer, "a", **changes)
    assert len(blocks.validation) == 10
    assert {letter(tokenizer, block) for block in blocks.validation} == {"c"}
    assert {letter(tokenizer, block) for block in itertools.islice(blocks.train, 100)} == {"a"}
    if not streaming:
        assert len(blocks.train) == len(blocks_of(letters, tokenizer, "a").train) + 10, "nothing is held out of it"


@pytest.mark.parametrize(("names", "weights"), [("c", None), ("abc", [1, 1, 3])])
@pytest.mark.parametrize("packing", [True, False])
def test_a_stream_goes_on_from_every_place(letters, tokenizer, names, weights, packing):
    def stream():
        return blocks_of(letters, tokenizer, names, dataset_weights=weights, streaming=True, packing=packing).train

    whole = stream()
    whole.keep = 10**6
    wanted = [block["input_ids"] for block in itertools.islice(whole, 2500)]
    for given in (1, 2, 3, 50, 51, 777, 2000):
        other = stream()
        other.start_from(json.loads(json.dumps(whole.place(given))), skipped=7)
        found = [block["input_ids"] for block in itertools.islice(other, 7 + 100)]
        assert found[7:] == wanted[given : given + 100]
        assert next(iter(other))["input_ids"] == wanted[0], "only once"


def test_a_resumed_stream_opens_no_file_before_its_place(tiny, tmp_path, corpus, monkeypatch, metrics):
    files = tmp_path / "data"
    files.mkdir()
    text = (corpus / "argparse.txt").read_text(encoding="utf-8")
    for number in range(12):
        (files / f"{number:02}.txt").write_text(text[number * 1500 : number * 1500 + 1500], encoding="utf-8")
    changes = {"dataset": str(files), "streaming": True, "validation_dataset": str(corpus / "tarfile.txt")}
    assert main([tiny(**changes)]) == 0
    checkpoint = tmp_path / "run" / "checkpoint-10"
    assert (checkpoint / STREAM_FILE).is_file()
    opened = []
    whole = rows._whole
    monkeypatch.setattr(rows, "_whole", lambda file, encoding: opened.append(file.path.name) or whole(file, encoding))
    place = json.loads((checkpoint / STREAM_FILE).read_text())["place"]
    data = DataArguments(dataset=str(files), streaming=True, block_size=32)
    source = open_corpus(data).sources[0]
    stream = source.documents.repeat(None)
    stream.load_state_dict(place["parts"][0]["state"])
    opened.clear()
    next(iter(stream))
    assert opened
    assert min(opened) > "01.txt", "the first files were not read again"
