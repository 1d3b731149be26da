"""Writing rendered files: whole or not at all, and not when nothing changed."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from tasks.errors import UserError


def write_if_changed(path: Path, content: bytes | str) -> Path:
    """Put ``content`` at ``path`` and return ``path``; text is stored as UTF-8.

    A file that holds these bytes already is left alone, so version control and viewers stay quiet. Otherwise
    a neighbour is written and moved over it: a reader never sees half a file.

    Raises:
        UserError: the folder cannot be written or the disk is full; the file is as it was before.
    """
    data = content.encode() if isinstance(content, str) else content
    try:
        if path.is_file() and path.read_bytes() == data:
            return path
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    except OSError as error:
        raise UserError(f"{path}: cannot be written: {error.strerror}") from error
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            os.fchmod(file.fileno(), 0o644)  # mkstemp makes files only their owner may read
        os.replace(name, path)
    except OSError as error:
        raise UserError(f"{path}: cannot be written: {error.strerror}") from error
    finally:
        Path(name).unlink(missing_ok=True)  # there only if something, an interrupt too, came in between
    return path
