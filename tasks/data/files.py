"""Files read with errors that name file and line, and files written whole or not at all."""

from __future__ import annotations

import contextlib
import errno
import glob
import json
import os
import socket
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

from tasks.errors import DataError


def read_text(path: Path, key: str) -> str:
    """Return a UTF-8 text file with line ends as ``\\n`` and without a byte-order mark.

    Raises:
        DataError: beginning with the config ``key``: the file cannot be read, or names the line that is not
            UTF-8.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise DataError(f"{key}: {path} cannot be read: {error.strerror}") from error
    return _decode(data, path, key).replace("\r\n", "\n").replace("\r", "\n")


def _decode(data: bytes, path: Path, key: str, first_line: int = 1) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = first_line + data[: error.start].count(b"\n")
        raise DataError(f"{key}: {path}:{line}: not UTF-8 text (byte 0x{data[error.start]:02x})") from error


def read_jsonl(path: Path, key: str, columns: Sequence[str] = ()) -> Iterator[dict[str, Any]]:
    """Yield the objects of a JSON-lines file one at a time; blank lines are passed over.

    Args:
        path: the file.
        key: the config key that messages begin with.
        columns: names that every object must hold.

    Raises:
        DataError: naming file and line, where a line is not UTF-8, not JSON, not an object, or lacks a
            column.
    """
    try:
        with path.open("rb") as handle:
            for number, line in enumerate(handle, 1):
                if line.strip():
                    yield _json_row(_decode(line, path, key, number), f"{key}: {path}:{number}", columns)
    except OSError as error:
        raise DataError(f"{key}: {path} cannot be read: {error.strerror}") from error


def _json_row(line: str, where: str, columns: Sequence[str]) -> dict[str, Any]:
    try:
        row = json.loads(line)
        if "\\ud" in line.lower():  # an escape may stand for half a character, which no tokenizer takes
            json.dumps(row, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise DataError(f"{where}: holds half of a surrogate pair, which is not text") from error
    except ValueError as error:
        raise DataError(f"{where}: broken JSON: {error}") from error
    if not isinstance(row, dict):
        raise DataError(f"{where}: holds {type(row).__name__}, each line must be a JSON object")
    check_columns(row, columns, where)
    return row


def check_columns(row: dict[str, Any], columns: Sequence[str], where: str) -> None:
    """Raise a DataError that lists the columns present and wanted, if ``row`` lacks one."""
    if missing := [c for c in columns if c not in row]:
        raise DataError(f"{where}: no column {', '.join(missing)}; present are {', '.join(row) or 'none'}")


class AtomicFile:
    """A binary file that appears under its name only once it is complete.

    What is written goes to a temporary name beside it; leaving the ``with`` block without an error flushes it
    to the disk and renames it. A full disk, an error or an interruption leaves no file. A process killed
    outright leaves its temporary file, which the next writer on the same host removes.

    Raises:
        DataError: beginning with ``key``: the folder cannot be written, or the disk is full.
    """

    def __init__(self, path: Path, key: str) -> None:
        self.path, self.key, self.written = path, key, 0
        self._prefix = f".{path.name}.{socket.gethostname()}."
        self._temporary = path.with_name(f"{self._prefix}{os.getpid()}.tmp")
        self._handle: BinaryIO | None = None

    def __enter__(self) -> AtomicFile:
        with self._named_errors():
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._remove_leftovers()
            self._handle = self._temporary.open("wb")
        return self

    def write(self, data: bytes) -> None:
        """Append ``data``; raises DataError where the disk is full."""
        assert self._handle is not None, "write inside the with block"
        with self._named_errors():
            self._handle.write(data)
        self.written += len(data)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._handle is not None
        try:
            with self._named_errors():
                if kind is None:
                    self._handle.flush()
                    os.fsync(self._handle.fileno())
                    self._handle.close()
                    os.replace(self._temporary, self.path)
        finally:
            with contextlib.suppress(OSError):  # closing flushes, which fails once more on a full disk
                self._handle.close()
            self._temporary.unlink(missing_ok=True)

    @contextlib.contextmanager
    def _named_errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise DataError(f"{self.key}: {self.path} not written: {self._reason(error)}") from error

    def _reason(self, error: OSError) -> str:
        if error.errno == errno.ENOSPC:
            return f"no space left on the disk of {self.path.parent} (after {self.written / 2**20:.1f} MiB)"
        if error.errno == errno.EDQUOT:
            return f"the disk quota of {self.path.parent} is used up (after {self.written / 2**20:.1f} MiB)"
        return error.strerror or str(error)

    def _remove_leftovers(self) -> None:
        """Remove temporary files of this host's processes that no longer run; other hosts' are left."""
        for leftover in self.path.parent.glob(f"{glob.escape(self._prefix)}*.tmp"):
            owner = leftover.name[len(self._prefix):-len(".tmp")]
            if owner.isdigit() and not _is_running(int(owner)):
                leftover.unlink(missing_ok=True)


def _is_running(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # somebody else's process
        return True
    return True


def write_atomically(path: Path, data: bytes, key: str) -> None:
    """Write a whole file through :class:`AtomicFile`."""
    with AtomicFile(path, key) as handle:
        handle.write(data)
