"""Which tokens of a conversation carry loss: by hand, by marks of a template, and where nobody can say."""

import pytest
from conversations import conversation

from gracile.train.data.chat import CHATML_END, NO_LOSS, TEMPLATES, Chat, set_template
from gracile.train.errors import BadInput

TWO_TURNS = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "What is 1 plus 2?"},
    {"role": "assistant", "content": "It is 3."},
    {"role": "user", "content": "Thanks!"},
    {"role": "assistant", "content": "You are welcome."},
]
SAYS = "<|assistant|>\n"
# Zephyr's again, with the marks of a template that says itself what is generated.
MARKED = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>\n' }}{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] + eos_token }}{% endgeneration %}{% else %}"
    "{{ message['content'] + eos_token }}{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)
OPEN = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"  # noqa: E501
FORGETFUL = "{% for m in messages %}{{ m['content'] if loop.last or m['role'] == 'user' else '' }}{% endfor %}"
REFUSING = "{{ raise_exception('roles must alternate') }}"


def encoded(tokenizer, template, messages=TWO_TURNS):
    tokenizer.chat_template = template
    return Chat(tokenizer, "dataset 'x'").encode(messages, "x.jsonl: row 1")


def said(tokenizer, labels):
    """The stretches of labels, as text."""
    found, now = [], []
    for label in [*labels, NO_LOSS]:
        if label != NO_LOSS:
            now.append(label)
        elif now:
            found.append(tokenizer.decode(now))
            now = []
    return found


def test_each_turn_of_the_assistant_carries_loss_with_its_end_token_and_nothing_else(tokenizer):
    tokens, labels = encoded(tokenizer, TEMPLATES["zephyr"])
    assert tokenizer.decode(tokens) == (
        "<|system|>\nBe brief.</s>\n<|user|>\nWhat is 1 plus 2?</s>\n<|assistant|>\nIt is 3.</s>\n"
        "<|user|>\nThanks!</s>\n<|assistant|>\nYou are welcome.</s>\n"
    )
    assert said(tokenizer, labels) == ["It is 3.</s>", "You are welcome.</s>"]
    assert all(label in (NO_LOSS, token) for token, label in zip(tokens, labels, strict=True))


def test_what_comes_before_an_answer_is_what_generation_begins_with(tokenizer):
    tokens, labels = encoded(tokenizer, TEMPLATES["zephyr"], TWO_TURNS[:3])
    first = next(i for i, label in enumerate(labels) if label != NO_LOSS)
    prompt = tokenizer.apply_chat_template(TWO_TURNS[:2], add_generation_prompt=True, return_dict=True)["input_ids"]
    assert tokens[:first] == list(prompt)


@pytest.mark.parametrize("number", range(4))
def test_marks_of_a_template_and_prefixes_say_the_same(tokenizer, number):
    messages = conversation(number)
    by_prefix = encoded(tokenizer, TEMPLATES["zephyr"], messages)
    assert encoded(tokenizer, MARKED, messages) == by_prefix
    assert Chat(tokenizer, "x").marks_turns


def test_a_last_turn_that_is_left_open_is_ended_by_the_tokenizers_end_token(tokenizer):
    tokens, labels = encoded(tokenizer, OPEN)
    assert said(tokenizer, labels) == ["It is 3.", "You are welcome.</s>"]
    assert tokens[-1] == labels[-1] == tokenizer.eos_token_id


def test_the_token_that_ends_a_turn_is_told(tokenizer):
    tokenizer.chat_template = TEMPLATES["zephyr"]
    assert Chat(tokenizer, "x").ends() == [tokenizer.eos_token_id]
    tokenizer.add_special_tokens({"additional_special_tokens": [CHATML_END]})
    set_template(tokenizer, "chatml")
    assert Chat(tokenizer, "x").ends() == [tokenizer.convert_tokens_to_ids(CHATML_END)]


@pytest.mark.parametrize(
    ("template", "words"),
    [
        (None, ["dataset 'x'", "chat_template", "zephyr", "chatml"]),
        (FORGETFUL, ["x.jsonl: row 1", "message 3", "generation"]),
        (REFUSING, ["x.jsonl: row 1", "roles must alternate"]),
    ],
    ids=["none", "no prefixes", "refused"],
)
def test_what_cannot_be_told_is_refused_in_one_line(tokenizer, template, words):
    with pytest.raises(BadInput) as error:
        encoded(tokenizer, template)
    assert all(word in str(error.value) for word in words)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("given", "words"), [("chatml", [CHATML_END, "zephyr"]), ("zefyr", ["zefyr", "zephyr"])])
def test_a_template_by_name_must_be_known_and_its_end_a_token(tokenizer, given, words):
    with pytest.raises(BadInput) as error:
        set_template(tokenizer, given)
    assert all(word in str(error.value) for word in words)


def test_a_template_of_a_file(tokenizer, tmp_path):
    (tmp_path / "own.jinja").write_text(MARKED, encoding="utf-8")
    set_template(tokenizer, str(tmp_path / "own.jinja"))
    assert tokenizer.chat_template == MARKED
