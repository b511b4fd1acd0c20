"""Texts to examples of one length: packed end to end, or one text an example, padded."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from transformers import PreTrainedTokenizerBase

Example = dict[str, list[int]]


class Packing:
    """Examples of exactly ``block_size`` tokens from texts, each text closed by the end token.

    Packed, texts lie end to end, and the last one's end, less than a block, is left out. Otherwise an example holds
    one text, padded; a longer one goes on in further examples.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, block_size: int, packed: bool = True) -> None:
        self.tokenizer, self.block_size, self.packed = tokenizer, block_size, packed
        self.end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
        self.padding = next((i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id) if i is not None), 0)
        self.rest: list[int] = []

    def add(self, text: str) -> Iterator[Example]:
        """The examples that ``text`` completes."""
        if not text:
            return
        size = self.block_size
        self.rest += self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"] + self.end
        tokens, whole = self.rest, len(self.rest) - len(self.rest) % size
        self.rest = tokens[whole:] if self.packed else []
        for start in range(0, whole if self.packed else len(tokens), size):
            block = tokens[start : start + size]
            if self.packed:
                yield {"input_ids": block}
            elif len(block) > 1:  # one to see and one to predict
                missing = size - len(block)
                mask = [1] * len(block) + [0] * missing
                yield {"input_ids": block + [self.padding] * missing, "attention_mask": mask}


def pack(
    texts: Iterable[str], tokenizer: PreTrainedTokenizerBase, block_size: int, packed: bool = True
) -> Iterator[Example]:
    """The examples of ``texts`` (:class:`Packing`)."""
    packing = Packing(tokenizer, block_size, packed)
    for text in texts:
        yield from packing.add(text)
