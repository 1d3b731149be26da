"""Text from a folder of plain files below the data root."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path

from tasks.data.corpus import TextCorpus, check_split, digest, hold_out
from tasks.data.files import read_jsonl, read_text
from tasks.data.specs import TextSpec
from tasks.errors import DataError

KEY = "data.local"
SUFFIXES = (".txt", ".jsonl")
NOT_TEXT = ("SOURCE", "README", "LICENSE", "LICENCE", "NOTICE")  # say what a folder holds, are no part of it
LARGEST_PIECE, SMALLEST_PIECE, PIECES = 8192, 256, 100


class LocalText(TextCorpus):
    """The text of one folder, split by the files that the config names or else by document hash.

    Raises:
        DataError: the folder holds no text files, a pattern matches nothing, or two splits share a file.
    """

    def __init__(self, data_root: Path, spec: TextSpec) -> None:
        self.source = f"local:{spec.local}"
        self._folder = data_root / str(spec.local)
        self._spec = spec
        self._by_split = {split: self._match(split, patterns) for split, patterns in spec.files.items()}
        self._refuse_shared_files()
        self._files = [] if self._by_split else self._all_files()

    def _match(self, split: str, patterns: tuple[str, ...]) -> list[Path]:
        files: dict[Path, None] = {}
        for pattern in patterns:
            found = sorted(p for p in self._folder.glob(pattern) if p.is_file())
            if not found:
                raise DataError(f"data.{split}_files: no file matches {pattern!r} in {self._folder}")
            files |= dict.fromkeys(found)
        return list(files)

    def _refuse_shared_files(self) -> None:
        owner: dict[Path, str] = {}
        for split, files in self._by_split.items():
            for path in files:
                if path in owner:
                    raise DataError(f"data.{split}_files: {path.name} is among data.{owner[path]}_files too")
                owner[path] = split

    def _all_files(self) -> list[Path]:
        files = sorted(p for p in self._folder.rglob("*")
                       if p.suffix in SUFFIXES and p.stem.upper() not in NOT_TEXT and p.is_file())
        if not files:
            raise DataError(f"{KEY}: no {' or '.join(SUFFIXES)} files in {self._folder}")
        return files

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 over the names and bytes of the files and over what decides the splits."""
        total = hashlib.sha256()
        held_out = None if self._by_split else self._spec.held_out
        total.update(json.dumps([self._spec.text_column, held_out, PIECES, LARGEST_PIECE]).encode())
        for split, files in (self._by_split or {"": self._files}).items():
            for path in files:
                try:
                    with path.open("rb") as handle:
                        content = hashlib.file_digest(handle, "sha256").hexdigest()
                except OSError as error:
                    raise DataError(f"{KEY}: {path} cannot be read: {error.strerror}") from error
                total.update(f"{split}\0{path.relative_to(self._folder).as_posix()}\0{content}\0".encode())
        return total.hexdigest()

    def documents(self, split: str) -> Iterator[str]:
        """Yield the documents of a split; one file at a time is in memory."""
        check_split(split)
        if not self._by_split:
            for text in self._all_documents():
                if self._held_out.get(digest(text), "train") == split:
                    yield text
        elif split in self._by_split:
            for path in self._by_split[split]:
                yield from self._read(path)
        else:
            raise DataError(f"data.{split}_files: missing, the config names files for "
                            f"{', '.join(self._by_split)} only")

    @cached_property
    def _held_out(self) -> dict[bytes, str]:
        digests = (digest(text) for text in self._all_documents())
        return hold_out(digests, self._spec.held_out, f"{KEY}: {self._folder}")

    def _all_documents(self) -> Iterator[str]:
        for path in self._files:
            if len(self._files) == 1 and path.suffix == ".txt":
                yield from filter(str.strip, cut(read_text(path, KEY)))
            else:
                yield from self._read(path)

    def _read(self, path: Path) -> Iterator[str]:
        if path.suffix != ".jsonl":
            text = read_text(path, KEY)
            if text.strip():
                yield text
            return
        column = self._spec.text_column
        for row in read_jsonl(path, KEY, [column]):
            if not isinstance(row[column], str):
                raise DataError(f"data.text_column: {path}: {column} holds {type(row[column]).__name__}, "
                                "expected a string")
            if row[column].strip():
                yield row[column]


def cut(text: str) -> Iterator[str]:
    """Cut one long text into contiguous pieces that join to the text again.

    A piece holds about a hundredth of the text, at most some 8 thousand characters, and ends at a blank line;
    where there is none near, at a line's end, then at a space.
    """
    size = max(SMALLEST_PIECE, min(LARGEST_PIECE, len(text) // PIECES))
    start = 0
    while start < len(text):
        end = len(text)
        for mark in ("\n\n", "\n", " "):
            found = text.find(mark, start + size, start + 2 * size)
            if found >= 0:
                end = found + len(mark)
                break
        else:
            end = min(end, start + 2 * size)
        yield text[start:end]
        start = end
