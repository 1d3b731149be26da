"""Kernel tests see every uninitialised element."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from column_cases import compactions, garbage  # noqa: F401  fixtures of the tests of lists of columns
from interpreter import better_interpreter  # noqa: F401  a fixture for every kernel test
from poison import poisoned


@pytest.fixture(autouse=True)
def poisoned_empty() -> Iterator[None]:
    """Let what nobody wrote show; see poison.py."""
    with poisoned():
        yield
