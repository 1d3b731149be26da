"""Kernel tests see every uninitialised element."""

from __future__ import annotations

import pytest
import torch
from column_cases import compactions, garbage  # noqa: F401  fixtures of the tests of lists of columns
from interpreter import better_interpreter  # noqa: F401  a fixture for every kernel test
from poison import poison

EMPTY = torch.empty, torch.empty_like


@pytest.fixture(autouse=True)
def poisoned_empty(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let what nobody wrote show; see poison.py."""
    assert (torch.empty, torch.empty_like) == EMPTY, "an earlier test left its own behind"
    poison(monkeypatch)
