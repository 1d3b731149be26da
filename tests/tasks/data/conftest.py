"""What the tests of the data door share."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest


@pytest.fixture
def no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Take away the data folder of the machine that runs the tests."""
    monkeypatch.delenv("ADASPLASH_DATA", raising=False)


@pytest.fixture
def make_files(tmp_path: Path) -> Callable[[dict[str, str | bytes]], Path]:
    """Return a function that writes files below a data root and returns that root."""

    def make(files: dict[str, str | bytes]) -> Path:
        root = tmp_path / "root"
        root.mkdir(exist_ok=True)
        for name, content in files.items():
            path = root / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return root

    return make
