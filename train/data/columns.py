"""What a column may hold: texts, lists of texts, or the messages of conversations; and how each becomes one text."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from typing import Any

from transformers import PreTrainedTokenizerBase

from ..errors import BadInput

TEXT, LIST, MESSAGES = "text", "lists of texts", "messages"


def kind_of(values: Iterable[Any], column: str, where: str) -> str:
    """What the column holds, by its first value.

    Raises:
        BadInput: for a column that cannot be read as text, or that holds nothing at all.
    """
    empty = True
    for value in values:
        empty = False
        if value is None or value == []:
            continue
        kind = _kind(value)
        if kind is None:
            raise BadInput(_not_text(value, column, where))
        return kind
    if empty:
        raise BadInput(f"{where} holds no documents")
    raise BadInput(f"{where}: text_column={column!r} is empty in every row; choose another column")


def _kind(value: Any) -> str | None:
    if isinstance(value, str):
        return TEXT
    if isinstance(value, list) and all(isinstance(part, str) for part in value):
        return LIST
    if isinstance(value, list) and all(isinstance(part, dict) and {"role", "content"} <= part.keys() for part in value):
        return MESSAGES
    return None


def _not_text(value: Any, column: str, where: str) -> str:
    what = _words(value)
    return (
        f"{where}: text_column={column!r} holds {what}; a column can hold texts, lists of texts or messages with role "
        "and content: choose one with text_column"
    )


def _words(value: Any) -> str:
    if isinstance(value, bool):
        return "true or false"
    if isinstance(value, int | float):
        return "numbers"
    if isinstance(value, bytes):
        return "bytes"
    if isinstance(value, dict):
        return f"mappings with {', '.join(map(str, value))}"
    if isinstance(value, list) and value:
        return f"lists of {_words(next((part for part in value if not isinstance(part, str)), value[0]))}"
    return f"values of type {type(value).__name__}"


def as_text(values: Iterable[Any], kind: str, column: str, where: str) -> Iterator[str]:
    """Each value as one text: a list's parts joined by line breaks, messages as JSON (:func:`rendered` undoes it). A
    value that is missing is an empty text.

    Raises:
        BadInput: for a value of another kind than the first one.
    """
    for number, value in enumerate(values, 1):
        if value is None or value == []:
            yield ""
            continue
        if _kind(value) != kind:
            found = _kind(value) or _words(value)
            raise BadInput(f"{where}: text_column={column!r} holds {kind}, but in row {number} {found}")
        text = value if kind == TEXT else "\n".join(value) if kind == LIST else json.dumps(value, ensure_ascii=True)
        if not text.isascii():
            try:
                text.encode("utf-8")
            except UnicodeEncodeError:
                message = f"{where}: row {number} holds half a character (a lone surrogate); mend the file"
                raise BadInput(message) from None
        yield text


def rendered(text: str, kind: str, tokenizer: PreTrainedTokenizerBase, where: str) -> str:
    """The text that is trained on: messages through the tokenizer's chat template, anything else as it is.

    Raises:
        BadInput: for a tokenizer without a chat template, or messages that it refuses.
    """
    if kind != MESSAGES or not text:
        return text
    if not tokenizer.chat_template:
        raise BadInput(f"{where} holds messages, and the tokenizer has no chat template; choose one with tokenizer")
    try:
        chat = tokenizer.apply_chat_template(json.loads(text), tokenize=False)
    except Exception as error:  # a template raises what it likes
        raise BadInput(f"{where}: the tokenizer's chat template refuses it: {' '.join(str(error).split())}") from None
    assert isinstance(chat, str)
    return chat.removesuffix(tokenizer.eos_token or "")  # packing adds one
