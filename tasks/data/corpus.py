"""What every source of text hands out, and how documents are held out where a source has no splits."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator

from tasks.errors import DataError

SPLITS = ("train", "valid", "test")


class TextCorpus(ABC):
    """Documents in three splits that share no document.

    Attributes:
        source: which source this is, for example ``local:lm/wikitext2``,
            ``hub:HuggingFaceFW/fineweb:sample-10BT`` or ``embedded:lm``.
        skipped: one sentence for each source that the config names before this one and that could not serve.
    """

    source: str
    skipped: tuple[str, ...] = ()

    @property
    @abstractmethod
    def fingerprint(self) -> str:
        """SHA-256 (hex) of everything that decides the documents and their splits."""

    @abstractmethod
    def documents(self, split: str) -> Iterator[str]:
        """Yield the documents of ``train``, ``valid`` or ``test``, always in the same order.

        Raises:
            DataError: the source has no such split, or a document cannot be read.
        """


def check_split(split: str) -> None:
    """Raise ValueError unless ``split`` is train, valid or test: a slip in our code, not in a config."""
    if split not in SPLITS:
        raise ValueError(f"split: got {split!r}, allowed are {', '.join(SPLITS)}")


def digest(text: str) -> bytes:
    """Return the SHA-256 of a document; equal documents land in the same split because of it."""
    return hashlib.sha256(text.encode()).digest()


def hold_out(digests: Iterable[bytes], share: float, where: str) -> dict[bytes, str]:
    """Choose held-out documents by hash: the lowest hashes are the test split, the next ones the valid split.

    Ranking, rather than comparing each hash with a threshold, gives small corpora splits of the size asked
    for.

    Args:
        digests: one hash a document; repeated documents count once.
        share: of the distinct documents, for each of valid and test; at least one each.
        where: config key and corpus that the message begins with.

    Returns:
        ``valid`` or ``test`` for each held-out hash; what is not in it is train.

    Raises:
        DataError: fewer than three distinct documents.
    """
    ranked = sorted(set(digests))
    if len(ranked) < len(SPLITS):
        raise DataError(f"{where}: {len(ranked)} distinct documents, holding out takes at least 3")
    count = min(max(1, round(share * len(ranked))), (len(ranked) - 1) // 2)
    return dict.fromkeys(ranked[:count], "test") | dict.fromkeys(ranked[count:2 * count], "valid")
