"""Rows to examples, examples to blocks and batches; and that packed examples do not see each other."""

import csv
import random

import pyarrow as pa
import pyarrow.parquet
import pytest
import torch
from conversations import conversation, write
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from gracile.train.build.packing_check import check_packing
from gracile.train.data.chat import NO_LOSS, TEMPLATES
from gracile.train.data.examples import Collator, Piece, pack
from gracile.train.data.formats import Labelled, PromptAndResponse, Text
from gracile.train.data.tuning import open_tuning_data
from gracile.train.errors import BadInput

PAIRS = [{"prompt": f"Say {i}:", "response": f"It is {i}."} for i in range(30)]


def opened(tokenizer, data):
    tokenizer.chat_template = TEMPLATES["zephyr"]
    return open_tuning_data(data, tokenizer)


def blocks(found):
    return [found.train[i] for i in range(len(found.train))]


# ---- formats, by hand -----------------------------------------------------------------------------------------------


def test_prompt_and_response_end_to_end(tokenizer, settings):
    form = PromptAndResponse(settings(chat_template="none"), tokenizer, "x")
    tokens, labels = form.encode({"prompt": "Say 1:", "response": " one"}, "row 1")
    seen, heard = tokenizer("Say 1:")["input_ids"], tokenizer(" one")["input_ids"]
    assert tokens == [*seen, *heard, tokenizer.eos_token_id]
    assert labels == [NO_LOSS] * len(seen) + [*heard, tokenizer.eos_token_id]


def test_prompts_of_several_columns_are_those_that_are_filled(tokenizer, settings):
    form = PromptAndResponse(settings(chat_template="none", prompt_column=["a", "b"]), tokenizer, "x")
    both = form.encode({"a": "one", "b": "two", "response": "three"}, "row 1")
    assert tokenizer.decode(both.tokens) == "one\n\ntwothree</s>"
    assert tokenizer.decode(form.encode({"a": "one", "b": "", "response": "x"}, "row 1").tokens) == "onex</s>"
    assert form.encode({"a": "one", "b": "", "response": ""}, "row 1") is None


def test_a_text_ends_with_the_end_token_and_a_labelled_one_is_left_as_it_is(tokenizer, settings):
    tokens, labels = Text(settings(), tokenizer, "x").encode({"text": "It is 3."}, "row 1")
    assert tokens == labels == [*tokenizer("It is 3.")["input_ids"], tokenizer.eos_token_id]
    form = Labelled(settings(), tokenizer, "x")
    assert form.encode({"text": "It is 3.", "label": 7}, "row 1") == (tokens[:-1], "7")
    with pytest.raises(BadInput, match="row 1: label must be"):
        form.encode({"text": "a", "label": 0.5}, "row 1")


# ---- files ----------------------------------------------------------------------------------------------------------


def test_every_kind_of_file_gives_the_same_examples(tokenizer, settings, tmp_path):
    with (tmp_path / "a.csv").open("w", newline="") as file:
        table = csv.DictWriter(file, ["prompt", "response"])
        table.writeheader()
        table.writerows(PAIRS)
    pa.parquet.write_table(pa.Table.from_pylist(PAIRS), tmp_path / "a.parquet")
    files = [write(tmp_path / "a.jsonl", PAIRS), str(tmp_path / "a.csv"), str(tmp_path / "a.parquet")]
    found = [opened(tokenizer, settings(dataset=file)) for file in files]
    assert blocks(found[0]) == blocks(found[1]) == blocks(found[2])
    assert (len(found[0].train), len(found[0].validation)) == (27, 3)


def test_what_is_held_out_is_trained_on_by_none_and_several_files_are_laid_together(tokenizer, settings, tmp_path):
    files = [write(tmp_path / "a.jsonl", PAIRS[:20]), write(tmp_path / "b.jsonl", PAIRS[20:])]
    found = opened(tokenizer, settings(dataset=files))
    kept = [found.validation[i]["input_ids"] for i in range(len(found.validation))]
    seen = [block["input_ids"] for block in blocks(found)]
    assert len(seen) + len(kept) == 30
    assert not [tokens for tokens in kept if tokens in seen]


def test_rows_with_nothing_to_learn_are_left_out_and_counted(tokenizer, settings, tmp_path):
    rows = [*PAIRS, {"prompt": "a", "response": ""}, {"prompt": "b", "response": None}, {"prompt": "c"}]
    found = opened(tokenizer, settings(dataset=write(tmp_path / "a.jsonl", rows)))
    assert found.notes == [f"{tmp_path / 'a.jsonl'}: 3 with nothing to learn left out"]


def test_classes_are_in_their_order_or_that_of_the_saved_model(tokenizer, settings, tmp_path):
    rows = [{"text": f"text {i}", "label": [10, 9, 2][i % 3]} for i in range(30)]
    data = settings(dataset=write(tmp_path / "a.jsonl", rows), format="label")
    found = open_tuning_data(data, tokenizer)
    assert found.classes == ("2", "9", "10")
    assert {block["labels"] for block in blocks(found)} == {0, 1, 2}
    assert open_tuning_data(data, tokenizer, known_classes=["10", "2", "9", "1"]).classes == ("10", "2", "9", "1")


# ---- blocks ---------------------------------------------------------------------------------------------------------


def test_a_longer_one_is_refused_dropped_or_cut_as_is_said(tokenizer, settings, tmp_path):
    long = {"prompt": "Say it:", "response": "It is 3. " * 40}
    hopeless = {"prompt": "It is 3. " * 40, "response": "It is 3."}
    file = write(tmp_path / "a.jsonl", [*PAIRS, long, hopeless])
    with pytest.raises(BadInput) as error:
        opened(tokenizer, settings(dataset=file))
    assert all(word in str(error.value) for word in ("row 31", "block_size=96", "2 of 32 rows", "too_long"))
    dropped = opened(tokenizer, settings(dataset=file, too_long="drop"))
    assert len(dropped.train) + len(dropped.validation) == 30
    assert dropped.notes[0].endswith("2 too long left out")
    cut = opened(tokenizer, settings(dataset=file, too_long="cut"))
    assert cut.notes[0].endswith("1 too long left out, 1 cut")  # of which nothing would carry loss
    longest = max(blocks(cut), key=lambda block: len(block["input_ids"]))
    assert len(longest["input_ids"]) == len(longest["labels"]) == 96


def test_a_text_goes_on_in_further_blocks(tokenizer, settings, tmp_path):
    text = "It is 3. You are welcome. " * 40
    file = write(tmp_path / "a.jsonl", [{"text": text}, {"text": "x y"}])
    found = opened(tokenizer, settings(dataset=file, validation_dataset=file))
    parts = [block["input_ids"] for block in blocks(found)]
    assert max(map(len, parts)) == 96
    whole = [token for part in parts[:-1] for token in part]
    assert whole == [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]
    assert all(block["labels"] == [NO_LOSS, *block["input_ids"][1:]] for block in blocks(found))


def test_packing_loses_nothing_and_overfills_nothing():
    lengths = random.Random(0).choices(range(2, 50), k=300)
    pieces = [Piece(i, 0, length) for i, length in enumerate(lengths)]
    packed = pack(pieces, 64)
    assert sorted(piece for block in packed for piece in block) == pieces
    assert max(sum(piece.length for piece in block) for block in packed) <= 64
    assert len(packed) <= 1.02 * -(-sum(lengths) // 64)


def test_a_padded_batch_by_hand():
    batch = Collator(9)([{"input_ids": [1, 2, 3], "labels": [-100, 2, 3]}, {"input_ids": [4, 5], "labels": [-100, 5]}])
    assert batch["input_ids"].tolist() == [[1, 2, 3], [4, 5, 9]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 1, 0]]
    assert batch["labels"].tolist() == [[-100, 2, 3], [-100, 5, -100]]


def test_a_packed_batch_by_hand():
    one = {"input_ids": [1, 2, 3, 4], "labels": [-100, 2, -100, 4], "position_ids": [0, 1, 0, 1]}
    batch = Collator(9)([one, {"input_ids": [5, 6], "labels": [-100, 6], "position_ids": [0, 1]}])
    assert batch["input_ids"].tolist() == [[1, 2, 3, 4], [5, 6, 9, 9]]
    assert batch["position_ids"].tolist() == [[0, 1, 0, 1], [0, 1, 0, 1]]
    assert "attention_mask" not in batch  # by which transformers would take the row for one example


# ---- packed examples do not see each other --------------------------------------------------------------------------


@pytest.fixture
def model(base):
    return AutoModelForCausalLM.from_pretrained(base).eval()


@torch.no_grad()
def test_an_example_has_the_logits_that_it_has_alone_packed_or_padded(tokenizer, settings, tmp_path, model):
    file = write(tmp_path / "a.jsonl", [{"messages": conversation(i)} for i in range(24)])
    alone = opened(tokenizer, settings(dataset=file, validation_dataset=file))
    packed = opened(tokenizer, settings(dataset=file, validation_dataset=file, packing=True))
    assert len(packed.train) < len(alone.train) == packed.train.pieces
    size, total = len(packed.train), {}
    for found, of in ((alone, blocks(alone)), (packed, blocks(packed))):
        batch = Collator(0)(of)
        logits = model(**{k: v for k, v in batch.items() if k != "labels"}, use_cache=False).logits
        for row, pieces in enumerate(found.train.blocks):
            start = 0
            for piece in pieces:
                total.setdefault(piece.row, []).append(logits[row, start : start + piece.length])
                start += piece.length
    assert size > 1
    for one, other in total.values():
        assert torch.allclose(one, other, atol=1e-5)


class Forgetful(LlamaForCausalLM):
    """A model that takes positions and does nothing with them, as one that attends by a state of its own."""

    def forward(self, input_ids=None, position_ids=None, use_cache=None):
        return super().forward(input_ids=input_ids, use_cache=False)


class Closed(LlamaForCausalLM):
    def forward(self, input_ids=None, use_cache=None):
        return super().forward(input_ids=input_ids, use_cache=False)


def test_a_model_in_which_they_do_is_refused(model):
    device = torch.device("cpu")
    check_packing(model, 400, device)
    for kind in (Forgetful, Closed):
        with pytest.raises(BadInput, match=f"packing: in a {kind.__name__}"):
            check_packing(kind(model.config), 400, device)
