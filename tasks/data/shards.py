"""A long line of token ids kept in several files of equal length, written one after the other.

A shard appears under its name once it is whole; a note beside it then says how far the documents had been read, so
that an interrupted tokenisation goes on behind the last whole shard.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np

from tasks.data.files import write_atomically

log = logging.getLogger(__name__)


def shard_path(path: Path, index: int) -> Path:
    """Return where shard ``index`` of the ids at ``path`` lies; the first one has the name itself."""
    return path if index == 0 else path.with_name(f"{path.stem}-{index:05d}{path.suffix}")


def shard_lengths(tokens: int, shard_tokens: int) -> list[int]:
    """Return how many ids each shard holds: ``shard_tokens``, the last one what is left; 0 is all in one."""
    if not shard_tokens:
        return [tokens]
    whole, rest = divmod(tokens, shard_tokens)
    return [shard_tokens] * whole + [rest] * bool(rest)


@dataclass(frozen=True)
class Reached:
    """How far a split has been tokenised.

    Attributes:
        tokens: ids so far.
        largest: the largest id so far.
        documents: documents that have ended.
        partial: ids of the document after these.
    """

    tokens: int = 0
    largest: int = 0
    documents: int = 0
    partial: int = 0

    def after(self, ids: np.ndarray, ends: np.ndarray) -> Reached:
        """Return what is reached with more ``ids``; ``ends`` counts the ids up to the end of each document in them."""
        partial = len(ids) - int(ends[-1]) if len(ends) else self.partial + len(ids)
        return replace(self, tokens=self.tokens + len(ids), largest=max(self.largest, int(ids.max(initial=0))),
                       documents=self.documents + len(ends), partial=partial)

    def note(self, shard: Path, wanted: dict[str, object]) -> None:
        """Write down, beside a whole shard, what is reached at its end, and of which text (``wanted``)."""
        data = json.dumps({**asdict(self), "wanted": wanted}, indent=1).encode()
        write_atomically(_note_path(shard), data, "cache_dir")


def _note_path(shard: Path) -> Path:
    return shard.with_suffix(".reached.json")


def last_reached(path: Path, shard_tokens: int, itemsize: int, wanted: dict[str, object]) -> Reached:
    """Return what the whole shards at ``path`` hold, counted up to the first that is missing, damaged or of another
    text."""
    reached, index = Reached(), 0
    while (found := _read_note(shard_path(path, index), wanted)) is not None:
        shard = shard_path(path, index)
        size = shard.stat().st_size if shard.is_file() else None
        if size != shard_tokens * itemsize:
            log.warning("%s is damaged or of another length; tokenising again from there", shard)
            break
        reached, index = found, index + 1
    return reached


def _read_note(shard: Path, wanted: dict[str, object]) -> Reached | None:
    try:
        values = json.loads(_note_path(shard).read_text(encoding="utf-8"))
        if values.pop("wanted") != wanted or not all(isinstance(v, int) and v >= 0 for v in values.values()):
            raise ValueError("it belongs to other data")
        return Reached(**values)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        log.warning("%s cannot be used: %s", _note_path(shard), error)
        return None


class ShardedIds:
    """Ids in several arrays, sliced as if they were one."""

    def __init__(self, shards: Sequence[np.ndarray]) -> None:
        self._shards = list(shards)
        self._starts = np.cumsum([0, *map(len, shards)])

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __getitem__(self, wanted: slice) -> np.ndarray:
        start, stop, step = wanted.indices(len(self))
        if step != 1:
            raise ValueError(f"step: got {step}, allowed is 1")
        first = int(np.searchsorted(self._starts, start, side="right")) - 1
        parts = []
        for shard, begin in zip(self._shards[first:], self._starts[first:].tolist(), strict=False):
            if begin >= stop:
                break
            parts.append(shard[max(start - begin, 0):stop - begin])
        return parts[0] if len(parts) == 1 else np.concatenate([*parts, self._shards[0][:0]])

    def tolist(self) -> list[int]:
        """Return all ids."""
        return self[:].tolist()
