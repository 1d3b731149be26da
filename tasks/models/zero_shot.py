"""Zero-shot scores of a causal language model: choosing among endings, and guessing a last word."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PreTrainedModel

from tasks.data.items import Choice, LastWord
from tasks.data.tokenizer import Tokenizer
from tasks.models.likelihood import encode_pairs, log_likelihoods


@dataclass(frozen=True)
class ChoiceScore:
    """Shares of items, 0 to 1.

    Attributes:
        accuracy_norm: the right ending has the highest log-likelihood a character: lm-eval's ``acc_norm``.
        accuracy: it has the highest log-likelihood: ``acc``.
        items: how many.
    """

    accuracy_norm: float
    accuracy: float
    items: int


@dataclass(frozen=True)
class LastWordScore:
    """``accuracy``, 0 to 1: greedy decoding yields the word; ``perplexity`` of the words, all their tokens together."""

    accuracy: float
    perplexity: float
    items: int


def choose_endings(
    model: PreTrainedModel, tokenizer: Tokenizer, items: Sequence[Choice], batch_tokens: int = 16_384
) -> ChoiceScore:
    """Score every ending, a space before it, after its context.

    The sum of its tokens' log-probabilities is divided by the ending's length in characters (not bytes, not tokens,
    and without the space): ``ConfigurableTask.process_results`` of lm-eval divides by ``len(choice)``. Of endings that
    tie the first is chosen, as numpy's argmax does there.
    """
    pairs = encode_pairs(tokenizer, [(item.context, f" {ending}") for item in items for ending in item.endings])
    found = iter(log_likelihoods(model, pairs, batch_tokens))
    right = right_norm = 0
    for item in items:
        logs = [next(found).log for _ in item.endings]
        norms = [log / len(ending) for log, ending in zip(logs, item.endings, strict=True)]
        right += logs.index(max(logs)) == item.label
        right_norm += norms.index(max(norms)) == item.label
    return ChoiceScore(right_norm / len(items), right / len(items), len(items))


def guess_last_words(
    model: PreTrainedModel, tokenizer: Tokenizer, items: Sequence[LastWord], batch_tokens: int = 16_384
) -> LastWordScore:
    """Score the last word of each passage after the rest of it; perplexity is exp of minus the mean over words."""
    pairs = encode_pairs(tokenizer, [(item.context, item.word) for item in items])
    found = log_likelihoods(model, pairs, batch_tokens)
    mean = math.fsum(f.log for f in found) / len(items)
    return LastWordScore(sum(f.greedy for f in found) / len(items), math.exp(-mean), len(items))
