"""Text as one long line of token ids on disk, and fixed windows cut from it.

A split is tokenised once into a ``.bin`` of uint16 or uint32 that is memory-mapped afterwards, a long one into
several (see tasks/data/shards.py); a JSON sidecar of the same name says what it is, and that it is complete. All are
named by a hash of corpus, split, tokenizer and cap, so nothing goes stale.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import itertools
import json
import logging
import re
import time
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
from tasks.data.shards import Reached, ShardedIds, last_reached, shard_lengths, shard_path
from tasks.data.tokenizer import Tokenizer
from tasks.errors import DataError

FORMAT = 1
BATCH_CHARACTERS = 1 << 20  # encoded at once: enough to use the cores, little enough to hold
PIECE_CHARACTERS = 1 << 16  # longer documents are cut, so that several cores work on one
SHARD_TOKENS = 100_000_000  # ids in a file: what an interrupted tokenisation loses at most
_POLL_SECONDS = 1.0
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
        documents: documents that end within the tokens; ``max_tokens`` may have cut off one more.
        vocab_size: number of ids the tokenizer has.
        split, max_tokens: what was asked for.
        corpus, corpus_fingerprint, tokenizer, tokenizer_fingerprint: sources and their fingerprints.
        shard_tokens: ids in each file but the last; 0 is all in one.
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
    shard_tokens: int = 0

    @classmethod
    def load(cls, path: Path) -> TokenFile:
        """Read and check the sidecar of the ``.bin`` at ``path``.

        Raises:
            DataError: there is no sidecar, it is not one, or a ``.bin`` is missing or has another length.
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
        for name in ("tokens", "largest", "documents", "vocab_size", "format", "shard_tokens"):
            if not isinstance(getattr(self, name), int) or getattr(self, name) < 0:
                raise DataError(f"{where}: the sidecar's {name} is {getattr(self, name)!r}, not a count")
        if self.format != FORMAT or self.dtype not in ("uint16", "uint32"):
            raise DataError(f"{where}: format {self.format} of {self.dtype!r} is not understood")
        for path, tokens in self._shards():
            expected = tokens * np.dtype(self.dtype).itemsize
            actual = path.stat().st_size if path.is_file() else None
            if actual != expected:
                shard = "" if path == self.path else f"shard {path.name} "
                found = "is missing" if actual is None else f"has {actual} bytes"
                raise DataError(f"{where}: {shard}{found}, the sidecar says {expected}: truncated or overwritten")

    def _shards(self) -> list[tuple[Path, int]]:
        lengths = shard_lengths(self.tokens, self.shard_tokens)
        return [(shard_path(self.path, i), length) for i, length in enumerate(lengths)]

    def open(self) -> np.ndarray | ShardedIds:
        """Map the ids into memory, read-only; ``tokens`` ids of dtype ``dtype``, to be sliced."""
        little_endian = np.dtype(self.dtype).newbyteorder("<")
        maps = [np.memmap(path, dtype=little_endian, mode="r", shape=(tokens,)) for path, tokens in self._shards()]
        return maps[0] if len(maps) == 1 else ShardedIds(maps)


def tokenize_split(
    corpus: TextCorpus,
    split: str,
    tokenizer: Tokenizer,
    cache_dir: str | Path,
    *,
    max_tokens: int | None = None,
    progress: Progress | None = None,
) -> TokenFile:
    """Tokenise a split once; later calls with equal fingerprints re-use the files.

    Each document is followed by the tokenizer's end-of-text token. Text that looks like a special token is
    encoded as the text it is.

    One that was interrupted goes on behind its last whole file of :data:`SHARD_TOKENS` and ends with the same bytes.
    The documents before are read once more, as any source can do, but not encoded, which is what takes long; the one
    that the border cuts is encoded again.

    Args:
        corpus: the documents.
        split: train, valid or test.
        tokenizer: how to encode them.
        cache_dir: the file goes to ``tokens/`` in it.
        max_tokens: stop there; None is all.
        progress: called with the documents and tokens written so far, after every batch.

    Raises:
        DataError: the split is empty, a token id does not fit the tokenizer's vocabulary, or the disk is full
            (whole files stay, no half one does).
    """
    path, wanted = _place(corpus, split, tokenizer, cache_dir, max_tokens)
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
                      corpus=corpus.source, tokenizer=tokenizer.source, shard_tokens=SHARD_TOKENS, **wanted)
    result = _write(empty, corpus, tokenizer, wanted, progress)
    # The sidecar comes last: its presence says that the tokens are complete.
    sidecar = {k: v for k, v in asdict(result).items() if k != "path"}
    write_atomically(path.with_suffix(".json"), json.dumps(sidecar, indent=1).encode(), "cache_dir")
    return result


def wait_for_split(
    corpus: TextCorpus, split: str, tokenizer: Tokenizer, cache_dir: str | Path, *, max_tokens: int | None = None
) -> TokenFile:
    """Return what :func:`tokenize_split` of the same arguments writes in another process, once it is complete."""
    path, wanted = _place(corpus, split, tokenizer, cache_dir, max_tokens)
    log.info("waiting for another process to write %s", path)
    while True:
        with contextlib.suppress(DataError):  # not there yet; or damaged, which the other process mends
            found = TokenFile.load(path)
            if wanted.items() <= asdict(found).items():
                return found
        time.sleep(_POLL_SECONDS)


def _place(
    corpus: TextCorpus, split: str, tokenizer: Tokenizer, cache_dir: str | Path, max_tokens: int | None
) -> tuple[Path, dict[str, Any]]:
    """Return the path of a tokenised split and what its sidecar must say."""
    check_split(split)
    if max_tokens is not None and max_tokens < 1:
        raise DataError(f"max_tokens: got {max_tokens}, allowed is 1 or more, or null")
    wanted = {"split": split, "max_tokens": max_tokens,
              "corpus_fingerprint": corpus.fingerprint, "tokenizer_fingerprint": tokenizer.fingerprint}
    key = hashlib.sha256(json.dumps([FORMAT, wanted], sort_keys=True).encode()).hexdigest()
    return Path(cache_dir) / "tokens" / f"{split}-{key[:20]}.bin", wanted


def _write(
    target: TokenFile, corpus: TextCorpus, tokenizer: Tokenizer, wanted: dict[str, Any], progress: Progress | None
) -> TokenFile:
    """Write the shards that are not there yet."""
    dtype = np.dtype(target.dtype).newbyteorder("<")
    reached = last_reached(target.path, target.shard_tokens, dtype.itemsize, wanted)
    batches = _rest(target, reached, corpus, tokenizer)
    ids = ends = np.empty(0, dtype=np.int64)
    for index in itertools.count(reached.tokens // target.shard_tokens):
        if index and not len(ids):  # the text may end where the last shard does
            if (batch := next(batches, None)) is None:
                break
            ids, ends = batch
        shard, room = shard_path(target.path, index), target.shard_tokens
        with AtomicFile(shard, "cache_dir") as handle:
            while room:
                if not len(ids):
                    if (batch := next(batches, None)) is None:
                        break
                    ids, ends = batch
                part, inside = ids[:room], ends <= room
                handle.write(part.astype(dtype).tobytes())
                reached = reached.after(part, ends[inside])
                ids, ends, room = ids[len(part):], ends[~inside] - len(part), room - len(part)
                if progress:
                    progress(reached.documents, reached.tokens)
            if not reached.tokens:
                raise DataError(f"data: the {target.split} split of {corpus.source} is empty")
        if room:
            break
        reached.note(shard, wanted)
    return dataclasses.replace(target, tokens=reached.tokens, largest=reached.largest, documents=reached.documents)


def _rest(
    target: TokenFile, reached: Reached, corpus: TextCorpus, tokenizer: Tokenizer
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield (ids, ends) as :func:`_encode` does: those after what is reached, up to ``max_tokens``."""
    left = None if target.max_tokens is None else target.max_tokens - reached.tokens
    if left == 0:
        return
    written = reached.partial  # ids of the first document that are in a whole shard
    for ids, ends in _encode(itertools.islice(corpus.documents(target.split), reached.documents, None), tokenizer):
        cut = min(written, len(ids))
        written -= cut
        ids, ends = ids[cut:][:left], ends - cut
        ends = ends[ends <= len(ids)]
        if not len(ids):  # already written; or a piece of nothing but white space, to BERT
            continue
        if (largest := int(ids.max())) >= tokenizer.vocab_size:
            raise DataError(f"tokenizer: {tokenizer.source} produced the id {largest}, "
                            f"its vocabulary has {tokenizer.vocab_size}")
        yield ids, ends
        if left is not None:
            left -= len(ids)
            if not left:
                return


def _encode(documents: Iterator[str], tokenizer: Tokenizer) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield (ids, ends), both int64, for about :data:`BATCH_CHARACTERS` of text at a time.

    ``ends`` counts the ids up to the end of each document that ends among them.
    """
    separator = tokenizer.separator_id
    # A copy, for its settings change: no truncation or padding, and "</s>" in a text is four characters.
    encoder = tokenizers.Tokenizer.from_str(tokenizer.backend.backend_tokenizer.to_str())
    encoder.no_truncation()
    encoder.no_padding()
    encoder.encode_special_tokens = True
    can_cut = _can_cut(encoder)
    batch: list[tuple[str, bool]] = []
    size = 0

    def encoded() -> tuple[np.ndarray, np.ndarray]:
        ids: list[int] = []
        ends: list[int] = []
        encodings = encoder.encode_batch_fast([text for text, _ in batch], add_special_tokens=False)
        for encoding, (_, is_last) in zip(encodings, batch, strict=True):
            ids += encoding.ids
            if is_last:
                ids.append(separator)
                ends.append(len(ids))
        return np.array(ids, dtype=np.int64), np.array(ends, dtype=np.int64)

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
        self._ids: np.ndarray | ShardedIds | None = None

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
