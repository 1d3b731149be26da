"""The data keys of a config. Each class checks itself; its ValueErrors begin with the key they speak of."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import PurePosixPath

from tasks.data.corpus import SPLITS

SOURCES = ("local", "hub", "embedded")


def _check_sources(sources: tuple[str, ...], local: str | None, hub: object | None) -> None:
    if not sources:
        raise ValueError(f"sources: empty, name at least one of {', '.join(SOURCES)}")
    for i, source in enumerate(sources):
        if source not in SOURCES:
            raise ValueError(f"sources[{i}]: got {source!r}, allowed are {', '.join(SOURCES)}")
        if source in sources[:i]:
            raise ValueError(f"sources[{i}]: {source!r} is named twice")
    if "local" in sources and not local:
        raise ValueError("local: missing, sources names local; expected a folder below the data root")
    if "hub" in sources and not hub:
        raise ValueError("hub: missing, sources names hub")
    if local is not None and (PurePosixPath(local).is_absolute() or ".." in PurePosixPath(local).parts):
        raise ValueError(f"local: got {local!r}, allowed is a relative path below the data root without '..'")


@dataclass(frozen=True)
class HubSpec:
    """A text dataset of the Hugging Face hub.

    Attributes:
        path: repository, for example ``HuggingFaceFW/fineweb``.
        name: configuration of the dataset, for example ``sample-10BT``.
        revision: branch, tag or commit; null is the newest. The commit found goes into the fingerprint.
        splits: our split (train, valid, test) to theirs.
        text_column: the column that holds the documents.
        streaming: read over the network document by document instead of downloading the dataset first.
        max_documents: at most this many documents of each split; null is all.
        held_out: documents that valid and test each take from the head of theirs for ``train`` when
            ``splits`` does not name them. Counted from the head, not chosen by hash, so that a stream needs
            no full pass.
    """

    path: str
    name: str | None = None
    revision: str | None = None
    splits: dict[str, str] = field(default_factory=lambda: {"train": "train"})
    text_column: str = "text"
    streaming: bool = True
    max_documents: int | None = None
    held_out: int = 1000

    def __post_init__(self) -> None:
        parts = self.path.split("/")
        if len(parts) > 2 or not all(parts) or self.path.startswith("."):
            raise ValueError(f"path: got {self.path!r}, allowed is a repository: owner/name or name")
        if not self.splits:
            raise ValueError("splits: empty, name the dataset's split for train, valid or test")
        for split in self.splits:
            if split not in SPLITS:
                raise ValueError(f"splits.{split}: unknown key, allowed are {', '.join(SPLITS)}")
        if self.max_documents is not None and self.max_documents < 1:
            raise ValueError(f"max_documents: got {self.max_documents}, allowed is 1 or more, or null")
        if self.held_out < 0:
            raise ValueError(f"held_out: got {self.held_out}, allowed is 0 or more")


@dataclass(frozen=True)
class TextSpec:
    """Language-modelling text: which sources are tried in which order, and what each is called there.

    Attributes:
        sources: among local, hub, embedded; the first that can serve is used.
        local: folder below the data root, for example ``lm/wikitext2``; of its files, ``.txt`` are one
            document each and ``.jsonl`` hold one a line. A folder with a single ``.txt`` is cut into
            contiguous documents.
        train_files, valid_files, test_files: names or patterns inside the folder, each file being one
            document; none given: documents are held out by hash. A split left out while another is given does
            not exist.
        text_column: the field of ``.jsonl`` files that holds the document.
        held_out: share of a local folder's documents for each of valid and test, when held out by hash.
        hub: the dataset on the Hugging Face hub.
    """

    sources: tuple[str, ...]
    local: str | None = None
    train_files: tuple[str, ...] | None = None
    valid_files: tuple[str, ...] | None = None
    test_files: tuple[str, ...] | None = None
    text_column: str = "text"
    held_out: float = 0.05
    hub: HubSpec | None = None

    def __post_init__(self) -> None:
        _check_sources(self.sources, self.local, self.hub)
        for split, patterns in self.files.items():
            if not patterns:
                raise ValueError(f"{split}_files: empty, name at least one file or leave the key out")
            for i, pattern in enumerate(patterns):
                path = PurePosixPath(pattern)
                if not pattern or path.is_absolute() or ".." in path.parts:
                    raise ValueError(f"{split}_files[{i}]: got {pattern!r}, allowed are patterns in it")
        if not 0 < self.held_out < 0.5:
            raise ValueError(f"held_out: got {self.held_out}, allowed is above 0 and below 0.5")

    @property
    def files(self) -> dict[str, tuple[str, ...]]:
        """The patterns given, by split; empty when documents are to be held out by hash."""
        named = zip(SPLITS, (self.train_files, self.valid_files, self.test_files), strict=True)
        return {split: patterns for split, patterns in named if patterns is not None}


@dataclass(frozen=True)
class ItemSpec:
    """Items of a benchmark: which sources are tried in which order, and what each is called there.

    Attributes:
        sources: among local and hub; nothing embedded stands for a benchmark.
        local: folder below the data root whose ``.jsonl`` files hold an item a line, for example ``eval/hellaswag``.
        hub: the dataset on the Hugging Face hub; ``splits`` says which of its splits is ``test``.
        max_items: only the first so many; null is all.
    """

    sources: tuple[str, ...]
    local: str | None = None
    hub: HubSpec | None = None
    max_items: int | None = None

    def __post_init__(self) -> None:
        if "embedded" in self.sources:
            raise ValueError("sources: got 'embedded', allowed are local, hub")
        _check_sources(self.sources, self.local, self.hub)
        if self.hub is not None and "test" not in self.hub.splits:
            raise ValueError("hub.splits: names no split for test")
        if self.max_items is not None and self.max_items < 1:
            raise ValueError(f"max_items: got {self.max_items}, allowed is 1 or more, or null")


@dataclass(frozen=True)
class TokenizerSpec:
    """A tokenizer: which sources are tried in which order, and what each is called there.

    Attributes:
        sources: among local, hub, embedded; the first that can serve is used.
        local: folder below the data root, for example ``tokenizers/gpt2``.
        hub: repository on the Hugging Face hub, for example ``gpt2``.
        vocab_size: of the byte-level BPE trained on the embedded text, its four special tokens included.
    """

    sources: tuple[str, ...]
    local: str | None = None
    hub: str | None = None
    vocab_size: int = 4096

    def __post_init__(self) -> None:
        _check_sources(self.sources, self.local, self.hub)
        if self.vocab_size < 300:
            raise ValueError(f"vocab_size: got {self.vocab_size}, allowed is 300 or more: "
                             "256 bytes, 4 special tokens and some merges")
