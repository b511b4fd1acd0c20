"""The tokenizer of a run: one given by name or path, or a byte-level BPE trained on the corpus and cached."""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from pathlib import Path

from huggingface_hub.constants import HF_HOME
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from ..errors import BadInput
from ..sources import tokenizer_of
from .corpus import Corpus

# Ids 0, 1, 2, where LLaMA configurations expect the last two.
PAD, BEGIN, END = "<pad>", "<s>", "</s>"
SMALLEST_VOCABULARY = 256 + 3  # every byte and the special tokens: no text is out of vocabulary
TRAINING_CHARACTERS = 100_000_000  # a BPE needs no more text than this


def get_tokenizer(
    name: str | None, corpus: Corpus, vocab_size: int, trust_remote_code: bool = False
) -> PreTrainedTokenizerBase:
    """The tokenizer ``name``, or a BPE of at most ``vocab_size`` entries for ``corpus``.

    Raises:
        BadInput: for a name that cannot be loaded, or more entries than the model's vocabulary has.
    """
    if name is None:
        if vocab_size < SMALLEST_VOCABULARY:
            raise BadInput(f"vocab_size {vocab_size} is below {SMALLEST_VOCABULARY}, the least a byte-level BPE needs")
        tokenizer = _cached_bpe(corpus, vocab_size)
    else:
        tokenizer = tokenizer_of("tokenizer", name, trust_remote_code)
    if len(tokenizer) > vocab_size:
        raise BadInput(
            f"tokenizer {name!r} has {len(tokenizer)} entries, more than the model's vocab_size {vocab_size}; "
            f'choose another tokenizer or set model_overrides: {{"vocab_size": {len(tokenizer)}}}'
        )
    return tokenizer


def _cached_bpe(corpus: Corpus, vocab_size: int) -> PreTrainedTokenizerBase:
    key = hashlib.sha256(f"{corpus.fingerprint} {vocab_size} {TRAINING_CHARACTERS}".encode()).hexdigest()[:16]
    cache = Path(HF_HOME) / "gracile" / "tokenizers"
    target = cache / key
    if not (target / "tokenizer.json").is_file():
        cache.mkdir(parents=True, exist_ok=True)
        staging = tempfile.mkdtemp(dir=cache)
        _train_bpe(corpus, vocab_size).save_pretrained(staging)
        try:
            os.rename(staging, target)  # whole or not at all, whoever else is at it
        except OSError:
            shutil.rmtree(staging)
    return PreTrainedTokenizerFast.from_pretrained(target)


def _train_bpe(corpus: Corpus, vocab_size: int) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[PAD, BEGIN, END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(corpus.texts(TRAINING_CHARACTERS), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token=PAD, bos_token=BEGIN, eos_token=END)
