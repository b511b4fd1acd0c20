"""Conversations to tokens, through a chat template, and which of the tokens carry loss: those of the assistant's turns.

A template that marks what is generated (``{% generation %}``) is taken at its word. Otherwise each turn is found by
rendering the conversation up to it, once with the prompt for the turn and once with the turn: both must be prefixes of
the whole conversation, or nobody can say which of its tokens are the turn's. White space after a turn carries no loss,
the end token before it does; a last turn that the template leaves open is ended by the tokenizer's own end token.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from ...validation import nearest
from ..config.finetune_arguments import NO_TEMPLATE
from ..errors import BadInput

NO_LOSS = -100
ASSISTANT = "assistant"
Message = dict[str, Any]

_TURN = "{{{{ {begin} + message['role'] + {between} + message['content'] + {end} + '\\n' }}}}"
_LOOP = "{{% for message in messages %}}{turn}{{% endfor %}}{{% if add_generation_prompt %}}{prompt}{{% endif %}}"


def _template(begin: str, between: str, end: str) -> str:
    turn = _TURN.format(begin=repr(begin), between=repr(between), end=end)
    return _LOOP.format(turn=turn, prompt=f"{{{{ {begin + ASSISTANT + between!r} }}}}")


# Templates by name. Zephyr's ends a turn with the tokenizer's own end token, ChatML's with one that it must have.
CHATML_END = "<|im_end|>"
TEMPLATES = {
    "zephyr": _template("<|", "|>\n", "eos_token"),
    "chatml": _template("<|im_start|>", "\n", repr(CHATML_END)),
}


def set_template(tokenizer: PreTrainedTokenizerBase, given: str | None) -> None:
    """Give ``tokenizer`` the template that ``chat_template`` names: a file's, or one of ``TEMPLATES``.

    Raises:
        BadInput: for a name of neither, a file that cannot be read, or a template whose end token is not there.
    """
    if given is None or given == NO_TEMPLATE:
        return
    path = Path(given).expanduser()
    if path.is_file():
        try:
            tokenizer.chat_template = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise BadInput(f"chat_template {given!r} cannot be read: {' '.join(str(error).split())}") from None
        return
    if given not in TEMPLATES:
        names = (*TEMPLATES, NO_TEMPLATE)
        raise BadInput(f"chat_template {given!r} is neither a file nor a name; {nearest(given, names)}")
    if given == "chatml" and len(tokenizer.encode(CHATML_END, add_special_tokens=False)) != 1:
        raise BadInput(
            f"chat_template chatml ends a turn with {CHATML_END}, which is no token of this tokenizer; zephyr ends it "
            "with the tokenizer's own end token"
        )
    tokenizer.chat_template = TEMPLATES[given]


class Chat:
    """A tokenizer and its chat template.

    Raises:
        BadInput: for a tokenizer without a template, or one that cannot say which characters a token is of.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, where: str) -> None:
        self.tokenizer = tokenizer
        if not tokenizer.chat_template:
            names = " or ".join(TEMPLATES)
            raise BadInput(
                f"{where} needs a chat template, and the tokenizer has none; give chat_template, a file or {names} (or "
                f"{NO_TEMPLATE}, for prompt and response laid end to end)"
            )
        self.marks_turns = re.search(r"\{%-?\s*generation\s*-?%\}", str(tokenizer.chat_template)) is not None
        if not self.marks_turns and not tokenizer.is_fast:
            raise BadInput(
                f"{where}: this tokenizer has no fast form, which says of what characters a token is; give another "
                "tokenizer, or a chat_template with {% generation %}"
            )
        self.special = {*tokenizer.all_special_ids, *getattr(tokenizer, "added_tokens_decoder", {})}

    def encode(self, messages: Sequence[Message], where: str) -> tuple[list[int], list[int]]:
        """The tokens of a conversation, and as labels those that carry loss, NO_LOSS in place of the others.

        Raises:
            BadInput: for messages that the template refuses, or turns that cannot be found.
        """
        if self.marks_turns:
            return self._by_marks(messages, where)
        whole = self._rendered(messages, where)
        found = self.tokenizer(whole, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        tokens, labels = list(found["input_ids"]), [NO_LOSS] * len(found["input_ids"])
        last: int | None = None
        for start, end in self._turns(messages, whole, where):
            turn = [
                i for i, (a, b) in enumerate(found["offset_mapping"]) if b > a and b > start and a < end and b <= end
            ]
            while turn and whole[slice(*found["offset_mapping"][turn[-1]])].isspace():
                turn.pop()
            for i in turn:
                labels[i] = tokens[i]
            last = turn[-1] if turn else None
        open_end = messages[-1]["role"] == ASSISTANT and last is not None and tokens[last] not in self.special
        if open_end and self.tokenizer.eos_token_id is not None:
            tokens, labels = tokens[: last + 1], labels[: last + 1]  # type: ignore[operator]
            return [*tokens, self.tokenizer.eos_token_id], [*labels, self.tokenizer.eos_token_id]
        return tokens, labels

    def ends(self) -> list[int]:
        """The token that ends the assistant's turn, if one does."""
        turn = [{"role": "user", "content": "1"}, {"role": ASSISTANT, "content": "2"}]
        _, labels = self.encode(turn, "the chat template")
        last = next((label for label in reversed(labels) if label != NO_LOSS), NO_LOSS)
        return [last] if last in self.special else []

    def _by_marks(self, messages: Sequence[Message], where: str) -> tuple[list[int], list[int]]:
        try:
            found: Any = self.tokenizer.apply_chat_template(
                list(messages), tokenize=True, return_dict=True, return_assistant_tokens_mask=True
            )
        except Exception as error:  # a template raises what it likes
            raise self._refused(error, where) from None
        tokens = list(found["input_ids"])
        return tokens, [token if own else NO_LOSS for token, own in zip(tokens, found["assistant_masks"], strict=True)]

    def _turns(self, messages: Sequence[Message], whole: str, where: str) -> list[tuple[int, int]]:
        """Where the assistant's turns begin and end in the rendered conversation."""
        turns = []
        for i, message in enumerate(messages):
            if message["role"] != ASSISTANT:
                continue
            before = self._rendered(messages[:i], where, prompt=True)
            after = self._rendered(messages[: i + 1], where)
            if not (whole.startswith(after) and after.startswith(before)):
                raise BadInput(
                    f"{where}: the chat template renders message {i + 1} otherwise when more follow, so its tokens "
                    "cannot be told from others; give a chat_template that marks turns with {% generation %}, or "
                    "conversations of one turn"
                )
            turns.append((len(before), len(after)))
        return turns

    def _rendered(self, messages: Sequence[Message], where: str, prompt: bool = False) -> str:
        try:
            return str(self.tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=prompt))
        except Exception as error:  # a template raises what it likes
            raise self._refused(error, where) from None

    @staticmethod
    def _refused(error: Exception, where: str) -> BadInput:
        return BadInput(f"{where}: the chat template refuses it: {' '.join(str(error).split())}")
