"""A byte-level BPE trained in seconds, for machines that have no other tokenizer."""

from __future__ import annotations

from collections.abc import Iterable

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from tasks.errors import DataError

SPECIAL = ["<s>", "<pad>", "</s>", "<mask>"]


def train(documents: Iterable[str], vocab_size: int) -> Tokenizer:
    """Train GPT-2's kind of tokenizer with RoBERTa's special tokens; equal text gives equal merges.

    Args:
        documents: the text.
        vocab_size: number of ids, 256 bytes and the four special tokens included.

    Raises:
        DataError: the text is too short for so many merges.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=SPECIAL, show_progress=False,
                                  initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    tokenizer.train_from_iterator(documents, trainer)
    if (reached := tokenizer.get_vocab_size()) != vocab_size:
        raise DataError(f"tokenizer.vocab_size: got {vocab_size}, the embedded text yields only {reached}")
    ends = [(token, tokenizer.token_to_id(token)) for token in ("<s>", "</s>")]
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A </s> $B:1 </s>:1", special_tokens=ends)
    return tokenizer
