import pytest

from gracile.train.config.arguments import DataArguments
from gracile.train.data import tokenizer as module
from gracile.train.data.corpus import open_corpus
from gracile.train.data.tokenizer import get_tokenizer
from gracile.train.errors import BadInput


@pytest.fixture(scope="module")
def opened(corpus):
    return open_corpus(DataArguments(dataset=str(corpus)))


def test_trained_bpe_round_trips_any_text(opened):
    tokenizer = get_tokenizer(None, opened, 600)
    assert len(tokenizer) == 600
    for text in ("def f(x):\n\treturn x  # ünï ↦ 🙂\r\n", " leading and trailing ", "\x00\x7f"):
        assert tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"]) == text
    assert (tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id) == (0, 1, 2)


def test_trained_bpe_is_cached(opened, monkeypatch):
    first = get_tokenizer(None, opened, 700)
    monkeypatch.setattr(module, "_train_bpe", lambda *_: pytest.fail("trained again"))
    assert get_tokenizer(None, opened, 700).get_vocab() == first.get_vocab()


def test_a_saved_tokenizer_loads_by_path(opened, tmp_path):
    get_tokenizer(None, opened, 600).save_pretrained(tmp_path / "tok")
    assert len(get_tokenizer(str(tmp_path / "tok"), opened, 600)) == 600
    with pytest.raises(BadInput, match=r"600 entries.*vocab_size 599"):
        get_tokenizer(str(tmp_path / "tok"), opened, 599)


def test_bad_tokenizers(opened):
    with pytest.raises(BadInput, match="vocab_size 100 is below 259"):
        get_tokenizer(None, opened, 100)
    with pytest.raises(BadInput, match="nobody/nothing"):
        get_tokenizer("nobody/nothing", opened, 600)
