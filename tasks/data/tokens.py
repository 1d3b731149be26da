"""Text as one long line of token ids on disk, and fixed windows cut from it.

A split is tokenised once into a ``.bin`` of uint16 or uint32 that is memory-mapped afterwards; a JSON sidecar
of the same name says what it is. Both are named by a hash of corpus, split, tokenizer and cap, so nothing
goes stale.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import re
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
import torch
from torch.utils.data import Dataset

from tasks.data.corpus import TextCorpus, check_split
from tasks.data.files import AtomicFile, write_atomically
from tasks.data.tokenizer import Tokenizer
from tasks.errors import DataError

FORMAT = 1
BATCH_CHARACTERS = 1 << 20  # encoded at once: enough to use the cores, little enough to hold
PIECE_CHARACTERS = 1 << 16  # longer documents are cut, so that several cores work on one
Progress = Callable[[int, int], None]

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class TokenFile:
    """Tokens on disk and what they are; the fields but ``path`` are the sidecar.

    Attributes:
        path: the ``.bin``.
        dtype: ``uint16`` or ``uint32``, little-endian.
        tokens: number of ids.
        largest: the largest id.
        documents: documents encoded; ``max_tokens`` may have cut off the last ones.
        vocab_size: number of ids the tokenizer has.
        split, max_tokens: what was asked for.
        corpus, corpus_fingerprint, tokenizer, tokenizer_fingerprint: sources and their fingerprints.
    """

    path: Path
    dtype: str
    tokens: int
    largest: int
    documents: int
    vocab_size: int
    split: str
    max_tokens: int | None
    corpus: str
    corpus_fingerprint: str
    tokenizer: str
    tokenizer_fingerprint: str
    format: int = FORMAT

    @classmethod
    def load(cls, path: Path) -> TokenFile:
        """Read and check the sidecar of the ``.bin`` at ``path``.

        Raises:
            DataError: there is no sidecar, it is not one, or the ``.bin`` is missing or has another length.
        """
        where = f"tokens: {path}"
        try:
            values = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
            found = cls(path=path, **values)
        except FileNotFoundError:
            raise DataError(f"{where}: no sidecar {path.with_suffix('.json').name}") from None
        except (OSError, ValueError, TypeError) as error:
            raise DataError(f"{where}: the sidecar is not readable: {error}") from error
        found._check(where)
        return found

    def _check(self, where: str) -> None:
        for name in ("tokens", "largest", "documents", "vocab_size", "format"):
            if not isinstance(getattr(self, name), int) or getattr(self, name) < 0:
                raise DataError(f"{where}: the sidecar's {name} is {getattr(self, name)!r}, not a count")
        if self.format != FORMAT or self.dtype not in ("uint16", "uint32"):
            raise DataError(f"{where}: format {self.format} of {self.dtype!r} is not understood")
        expected = self.tokens * np.dtype(self.dtype).itemsize
        actual = self.path.stat().st_size if self.path.is_file() else None
        if actual != expected:
            found = "is missing" if actual is None else f"has {actual} bytes"
            raise DataError(f"{where}: {found}, the sidecar says {expected}: truncated or overwritten")

    def open(self) -> np.ndarray:
        """Map the ids into memory, read-only; shape (tokens,), dtype ``dtype``."""
        little_endian = np.dtype(self.dtype).newbyteorder("<")
        return np.memmap(self.path, dtype=little_endian, mode="r", shape=(self.tokens,))


def tokenize_split(
    corpus: TextCorpus,
    split: str,
    tokenizer: Tokenizer,
    cache_dir: str | Path,
    *,
    max_tokens: int | None = None,
    progress: Progress | None = None,
) -> TokenFile:
    """Tokenise a split once; later calls with equal fingerprints re-use the file.

    Each document is followed by the tokenizer's end-of-text token. Text that looks like a special token is
    encoded as the text it is.

    Args:
        corpus: the documents.
        split: train, valid or test.
        tokenizer: how to encode them.
        cache_dir: the file goes to ``tokens/`` in it.
        max_tokens: stop there; None is all.
        progress: called with the documents and tokens written so far, after every batch.

    Raises:
        DataError: the split is empty, a token id does not fit the tokenizer's vocabulary, or the disk is full
            (no half file is left).
    """
    check_split(split)
    if max_tokens is not None and max_tokens < 1:
        raise DataError(f"max_tokens: got {max_tokens}, allowed is 1 or more, or null")
    wanted = {"split": split, "max_tokens": max_tokens,
              "corpus_fingerprint": corpus.fingerprint, "tokenizer_fingerprint": tokenizer.fingerprint}
    key = hashlib.sha256(json.dumps([FORMAT, wanted], sort_keys=True).encode()).hexdigest()
    path = Path(cache_dir) / "tokens" / f"{split}-{key[:20]}.bin"
    if path.with_suffix(".json").exists():
        try:
            found = TokenFile.load(path)
            if wanted.items() <= asdict(found).items():
                return found
            log.warning("%s belongs to other data; tokenising again", path)
        except DataError as error:
            log.warning("%s; tokenising again", error)
        path.with_suffix(".json").unlink(missing_ok=True)
    dtype = "uint16" if tokenizer.vocab_size <= 1 << 16 else "uint32"
    empty = TokenFile(path, dtype, tokens=0, largest=0, documents=0, vocab_size=tokenizer.vocab_size,
                      corpus=corpus.source, tokenizer=tokenizer.source, **wanted)
    result = _write(empty, corpus, tokenizer, progress)
    # The sidecar comes last: its presence says that the tokens are complete.
    sidecar = {k: v for k, v in asdict(result).items() if k != "path"}
    write_atomically(path.with_suffix(".json"), json.dumps(sidecar, indent=1).encode(), "cache_dir")
    return result


def _write(
    target: TokenFile, corpus: TextCorpus, tokenizer: Tokenizer, progress: Progress | None
) -> TokenFile:
    limit = target.max_tokens
    tokens = largest = documents = 0
    with AtomicFile(target.path, "cache_dir") as handle:
        for count, ids in _encode(corpus.documents(target.split), tokenizer):
            if limit is not None:
                ids = ids[: limit - tokens]
            if not len(ids):  # a piece of nothing but white space, to BERT
                continue
            largest = max(largest, int(ids.max()))
            if largest >= tokenizer.vocab_size:
                raise DataError(f"tokenizer: {tokenizer.source} produced the id {largest}, "
                                f"its vocabulary has {tokenizer.vocab_size}")
            handle.write(ids.astype(np.dtype(target.dtype).newbyteorder("<")).tobytes())
            tokens, documents = tokens + len(ids), documents + count
            if progress:
                progress(documents, tokens)
            if limit is not None and tokens >= limit:
                break
        if not tokens:
            raise DataError(f"data: the {target.split} split of {corpus.source} is empty")
    return dataclasses.replace(target, tokens=tokens, largest=largest, documents=documents)


def _encode(documents: Iterator[str], tokenizer: Tokenizer) -> Iterator[tuple[int, np.ndarray]]:
    """Yield (documents ended, their ids as int64) for about :data:`BATCH_CHARACTERS` of text at a time."""
    separator = tokenizer.separator_id
    # A copy, for its settings change: no truncation or padding, and "</s>" in a text is four characters.
    encoder = tokenizers.Tokenizer.from_str(tokenizer.backend.backend_tokenizer.to_str())
    encoder.no_truncation()
    encoder.no_padding()
    encoder.encode_special_tokens = True
    can_cut = _can_cut(encoder)
    batch: list[tuple[str, bool]] = []
    size = 0

    def encoded() -> tuple[int, np.ndarray]:
        ids: list[int] = []
        encodings = encoder.encode_batch_fast([text for text, _ in batch], add_special_tokens=False)
        for encoding, (_, is_last) in zip(encodings, batch, strict=True):
            ids += encoding.ids
            if is_last:
                ids.append(separator)
        return sum(is_last for _, is_last in batch), np.array(ids, dtype=np.int64)

    for document in documents:
        parts = _pieces(document, PIECE_CHARACTERS) if can_cut else [document]
        for i, part in enumerate(parts):
            batch.append((part, i == len(parts) - 1))
            size += len(part)
            if size >= BATCH_CHARACTERS:
                yield encoded()
                batch, size = [], 0
    if batch:
        yield encoded()


def _can_cut(encoder: tokenizers.Tokenizer) -> bool:
    """Tell whether a text cut before a space encodes like the whole.

    It does where words are split as GPT-2 and BERT do, not where a mark is put before every text.
    """
    left, right = "a few words", " and some more"

    def ids(text: str) -> list[int]:
        return encoder.encode(text, add_special_tokens=False).ids

    return ids(left + right) == ids(left) + ids(right)


def _pieces(text: str, size: int) -> list[str]:
    """Cut a long document between letter and space, where words begin whatever stands around them."""
    cuts, start = [], 0
    while start + size < len(text):
        place = re.compile(r"[A-Za-z](?= [A-Za-z])").search(text, start + size)
        if place is None:
            break
        cuts.append(text[start:place.end()])
        start = place.end()
    return [*cuts, text[start:]]


class TokenBlocks(Dataset[torch.Tensor]):
    """Windows of ``context + 1`` tokens, int64: all but the last are inputs, all but the first are targets.

    Neighbouring windows share one token, the last target of one being the first input of the next, so every
    token but the very first is a target exactly once. An incomplete window at the end is left out.

    Args:
        tokens: the tokenised split.
        context: inputs in a window.
        vocab_size: of the model; None leaves it unchecked.

    Raises:
        DataError: naming ``context`` where the split is too short for one window, or ``tokenizer`` where an
            id does not fit the model.
    """

    def __init__(self, tokens: TokenFile, context: int, vocab_size: int | None = None) -> None:
        if context < 1:
            raise DataError(f"context: got {context}, allowed is 1 or more")
        if tokens.tokens < context + 1:
            raise DataError(f"context: got {context}, but the {tokens.split} split of {tokens.corpus} has "
                            f"only {tokens.tokens} tokens; {context + 1} are needed")
        if vocab_size is not None and tokens.largest >= vocab_size:
            raise DataError(f"tokenizer: {tokens.tokenizer} uses the id {tokens.largest}, but the model's "
                            f"vocabulary has {vocab_size}")
        self.file, self.context = tokens, context
        self._ids: np.ndarray | None = None

    def __len__(self) -> int:
        return (self.file.tokens - 1) // self.context

    def __getitem__(self, index: int) -> torch.Tensor:
        if not 0 <= index < len(self):
            raise IndexError(f"window {index} of {len(self)}")
        if self._ids is None:
            self._ids = self.file.open()
        start = index * self.context
        return torch.from_numpy(self._ids[start:start + self.context + 1].astype(np.int64))

    def __getstate__(self) -> dict[str, Any]:
        # Worker processes map the file themselves; a pickled map would be a copy of all of it.
        return {**self.__dict__, "_ids": None}
