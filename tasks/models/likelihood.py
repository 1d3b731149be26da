"""Log-likelihood of a continuation given its context under a causal language model, for many pairs at a time.

The rules are those of EleutherAI's lm-evaluation-harness (``TemplateLM._encode_pair`` and
``HFLM._loglikelihood_tokens``): context and continuation are encoded together, spaces that end a context go over to
the continuation, an empty context is the end-of-text token, and a context longer than the model's positions loses
its beginning.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel

from tasks.data.tokenizer import Tokenizer
from tasks.errors import DataError

Pair = tuple[list[int], list[int]]  # ids of a context, at least one, and of its continuation, at least one


@dataclass(frozen=True)
class Likelihood:
    """Natural logarithm of the continuation's probability, and whether greedy decoding yields just it."""

    log: float
    greedy: bool


@dataclass(frozen=True)
class _Window:
    """One pass of the model: ``ids`` without their last go in, the last ``scored`` of them are predicted."""

    pair: int
    ids: list[int]
    scored: int


def encode_pairs(tokenizer: Tokenizer, texts: Sequence[tuple[str, str]]) -> list[Pair]:
    """Encode each context and its continuation together, then part the ids where the context's end.

    Raises:
        DataError: no token is left for a continuation, as where the tokenizer merges it into the context.
    """
    parted = [_parted(context, continuation) for context, continuation in texts]
    wholes = _ids(tokenizer, [context + continuation for context, continuation in parted])
    contexts = list(dict.fromkeys(context for context, _ in parted if context))  # endings share theirs
    ids = dict(zip(contexts, _ids(tokenizer, contexts), strict=True))
    pairs = []
    for (context, continuation), whole in zip(parted, wholes, strict=True):
        first = ids[context] if context else []
        pairs.append((first or [tokenizer.separator_id], _not_empty(whole[len(first):], tokenizer, continuation)))
    return pairs


def _parted(context: str, continuation: str) -> tuple[str, str]:
    """Give the spaces that end a context to the continuation."""
    spaces = len(context) - len(context.rstrip())
    return (context[:-spaces], context[-spaces:] + continuation) if spaces else (context, continuation)


def _ids(tokenizer: Tokenizer, texts: list[str]) -> list[list[int]]:
    """Encode all texts in one call, which is spread over the cores and works out nothing but ids."""
    found = tokenizer.backend.backend_tokenizer.encode_batch_fast(texts, add_special_tokens=False)
    return [encoding.ids for encoding in found]


def _not_empty(ids: list[int], tokenizer: Tokenizer, text: str) -> list[int]:
    if not ids:
        raise DataError(f"tokenizer: {tokenizer.source} leaves no token for {text!r} after its context")
    return ids


@torch.no_grad()
def log_likelihoods(model: PreTrainedModel, pairs: Sequence[Pair], batch_tokens: int = 16_384) -> list[Likelihood]:
    """Score continuations, in any autocast that is on; sums are in float64.

    Sequences of like length share a batch, padded on the right: attention is causal, so that no token that counts
    sees the padding, and no mask is needed. A continuation longer than the model's positions, which the harness
    refuses, is scored in pieces of half of them, each after as much of what precedes it as fits.

    Args:
        model: a causal language model of transformers, on the device to use.
        pairs: ids of context and continuation.
        batch_tokens: padded tokens of a batch, unless one sequence alone has more.

    Returns:
        One result a pair, in their order.
    """
    positions = model.config.max_position_embeddings
    windows = [window for i, pair in enumerate(pairs) for window in _windows(i, pair, positions)]
    logs, greedy = [0.0] * len(pairs), [True] * len(pairs)
    for batch in _batches(windows, batch_tokens):
        for window, log, hit in zip(batch, *_score(model, batch), strict=True):
            logs[window.pair] += log
            greedy[window.pair] &= hit
    return [Likelihood(log, hit) for log, hit in zip(logs, greedy, strict=True)]


def _windows(pair: int, ids: Pair, positions: int) -> Iterator[_Window]:
    context, continuation = ids
    size = len(continuation) if len(continuation) <= positions else max(1, positions // 2)
    before = list(context)
    for start in range(0, len(continuation), size):
        piece = continuation[start:start + size]
        yield _Window(pair, (before + piece)[-(positions + 1):], len(piece))
        before += piece


def _batches(windows: list[_Window], batch_tokens: int) -> Iterator[list[_Window]]:
    batch: list[_Window] = []
    for window in sorted(windows, key=lambda w: -len(w.ids)):  # stable, so the batches are always the same
        if batch and (len(batch) + 1) * (len(batch[0].ids) - 1) > batch_tokens:
            yield batch
            batch = []
        batch.append(window)
    if batch:
        yield batch


def _score(model: PreTrainedModel, batch: list[_Window]) -> tuple[list[float], list[bool]]:
    width = len(batch[0].ids) - 1
    inputs = torch.tensor([w.ids[:-1] + [0] * (width + 1 - len(w.ids)) for w in batch], device=model.device)
    rows = [row for row, w in enumerate(batch) for _ in range(w.scored)]
    places = [len(w.ids) - 1 - w.scored + i for w in batch for i in range(w.scored)]
    targets = torch.tensor([w.ids[place + 1] for w, place in
                            zip((batch[row] for row in rows), places, strict=True)], device=model.device)  # fmt: skip
    hidden = model.base_model(input_ids=inputs, use_cache=False).last_hidden_state
    logits = model.get_output_embeddings()(hidden[rows, places]).float()  # only where something is predicted
    logs = -F.cross_entropy(logits, targets, reduction="none").double()
    hits = logits.argmax(-1) == targets
    owner = torch.tensor(rows, device=model.device)
    return _sums(logs, owner, len(batch)).tolist(), (_sums((~hits).double(), owner, len(batch)) == 0).tolist()


def _sums(values: Tensor, owner: Tensor, count: int) -> Tensor:
    return torch.zeros(count, dtype=values.dtype, device=values.device).index_add_(0, owner, values)
