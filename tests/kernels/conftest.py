"""Kernel tests see every uninitialised element."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from column_cases import compactions, garbage  # noqa: F401  fixtures of the tests of lists of columns
from interpreter import better_interpreter  # noqa: F401  a fixture for every kernel test
from poison import poison

from adasplash_kernels.ahead import nothing_ahead

EMPTY = torch.empty, torch.empty_like


@pytest.fixture(autouse=True)
def poisoned_empty(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let what nobody wrote show; see poison.py."""
    assert (torch.empty, torch.empty_like) == EMPTY, "an earlier test left its own behind"
    poison(monkeypatch)


@pytest.fixture(autouse=True)
def calls_run_once(request: pytest.FixtureRequest) -> Iterator[None]:
    """Do not go through calls to compile them first: many tests look at what a call launches."""
    if "compiled_ahead" in request.fixturenames:
        yield
        return
    with nothing_ahead():
        yield
