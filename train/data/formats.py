"""What a row of fine-tuning data can be, and how it becomes an example: tokens, and labels for those that carry loss.

messages    a conversation, through the chat template: the assistant's turns carry loss
prompt      a prompt and its response, as a conversation of two messages, or laid end to end: the response does
text        all of a text but its first token
label       a text and its class, for a model with a classification head
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerBase

from ..config.finetune_arguments import LABEL, MESSAGES, NO_TEMPLATE, PROMPT, TEXT, TunedDataArguments
from ..errors import BadInput
from .chat import ASSISTANT, NO_LOSS, Chat

Row = Mapping[str, Any]


class Example(NamedTuple):
    """Tokens and, of each, the label: itself, or NO_LOSS; of a classified text its class alone."""

    tokens: list[int]
    labels: list[int] | str


class Format(ABC):
    """How a row becomes an example.

    Attributes:
        name: as the key ``format`` has it.
        goes_on: whether what is longer than a block goes on in the next.
    """

    name: str
    goes_on = False

    def __init__(self, data: TunedDataArguments, tokenizer: PreTrainedTokenizerBase, where: str) -> None:
        self.data, self.tokenizer = data, tokenizer
        self.end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]

    @abstractmethod
    def encode(self, row: Row, where: str) -> Example | None:
        """The example of a row; None for one that is empty.

        Raises:
            BadInput: for a row that is not of this format.
        """

    def _begun(self, text: str) -> list[int]:
        """Tokens of a text with what the tokenizer puts before it, such as a token of the beginning, and no end."""
        tokens: list[int] = self.tokenizer(text, verbose=False)["input_ids"]
        return tokens[:-1] if self.end and tokens[-1:] == self.end else tokens


class Messages(Format):
    name = MESSAGES

    def __init__(self, data: TunedDataArguments, tokenizer: PreTrainedTokenizerBase, where: str) -> None:
        super().__init__(data, tokenizer, where)
        if data.chat_template == NO_TEMPLATE:
            raise BadInput(f"{where} holds messages, which chat_template {NO_TEMPLATE} has no way to lay end to end")
        self.chat = Chat(tokenizer, where)

    def encode(self, row: Row, where: str) -> Example | None:
        column = self.data.messages_column
        messages = row.get(column)
        if messages is None or messages == []:
            return None
        if not isinstance(messages, list) or not all(_is_message(message) for message in messages):
            raise BadInput(f"{where}: {column} must be a list of messages with role and content, both texts")
        if not any(message["role"] == ASSISTANT for message in messages):
            raise BadInput(f"{where}: no message has the role {ASSISTANT}, so that nothing would carry loss")
        tokens, labels = self.chat.encode(messages, where)
        return Example(tokens, labels)


def _is_message(message: Any) -> bool:
    return isinstance(message, dict) and all(isinstance(message.get(key), str) for key in ("role", "content"))


class PromptAndResponse(Format):
    name = PROMPT

    def __init__(self, data: TunedDataArguments, tokenizer: PreTrainedTokenizerBase, where: str) -> None:
        super().__init__(data, tokenizer, where)
        self.chat = None if data.chat_template == NO_TEMPLATE else Chat(tokenizer, where)

    def encode(self, row: Row, where: str) -> Example | None:
        parts = [_text(row, column, where) for column in self.data.prompt_column]
        prompt, response = "\n\n".join(part for part in parts if part), _text(row, self.data.response_column, where)
        if not response:
            return None
        if self.chat is not None:
            messages = [{"role": "user", "content": prompt}, {"role": ASSISTANT, "content": response}]
            return Example(*self.chat.encode(messages, where))
        seen = self._begun(prompt)
        said = self.tokenizer(response, add_special_tokens=False, verbose=False)["input_ids"] + self.end
        return Example(seen + said, [NO_LOSS] * len(seen) + said)


class Text(Format):
    name, goes_on = TEXT, True

    def encode(self, row: Row, where: str) -> Example | None:
        text = _text(row, self.data.text_column, where)
        if not text:
            return None
        tokens = self._begun(text) + self.end
        return Example(tokens, tokens)


class Labelled(Format):
    name = LABEL

    def encode(self, row: Row, where: str) -> Example | None:
        column = self.data.label_column
        text, label = _text(row, self.data.text_column, where), row.get(column)
        if not text or label is None or label == "":
            return None
        if not isinstance(label, (str, int)):
            raise BadInput(f"{where}: {column} must be a text or a whole number, got {label!r}")
        return Example(self.tokenizer(text, verbose=False)["input_ids"], str(label))


def _text(row: Row, column: str, where: str) -> str:
    """The text of a column; empty where it is missing."""
    value = row.get(column)
    if value is None:
        return ""
    if not isinstance(value, str):
        raise BadInput(f"{where}: {column} must be a text, got {type(value).__name__}: {str(value)[:40]!r}")
    return value


KINDS: dict[str, type[Format]] = {kind.name: kind for kind in (Messages, PromptAndResponse, Text, Labelled)}


def needed(name: str, data: TunedDataArguments) -> list[str]:
    """The columns that a row of this format has."""
    columns = {
        MESSAGES: [data.messages_column],
        PROMPT: [*data.prompt_column, data.response_column],
        TEXT: [data.text_column],
        LABEL: [data.text_column, data.label_column],
    }
    return columns[name]


def format_of(columns: Collection[str], data: TunedDataArguments, wanted: str | None, where: str) -> str:
    """The format of rows with these columns: the one that is wanted, or the first whose columns are there.

    Raises:
        BadInput: where its columns are not there.
    """
    found = ", ".join(columns) or "none"
    if wanted is not None:
        for column in needed(wanted, data):
            if column not in columns:
                raise BadInput(
                    f"{where} has no column {column!r}, which format {wanted} needs; columns are {found}: name them by "
                    f"{_keys_of(wanted)}"
                )
        return wanted
    for name in (MESSAGES, PROMPT, TEXT):
        if all(column in columns for column in needed(name, data)):
            return name
    keys = "; ".join(_keys_of(name) for name in (MESSAGES, PROMPT, TEXT))
    raise BadInput(f"{where} has columns {found}: none that are messages, a prompt and response or a text; name {keys}")


def _keys_of(name: str) -> str:
    keys = {
        MESSAGES: "messages_column",
        PROMPT: "prompt_column and response_column",
        TEXT: "text_column",
        LABEL: "text_column and label_column",
    }
    return keys[name]
