"""Kernel tests see every uninitialised element: ``torch.empty`` hands out NaN."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from column_cases import compactions, garbage  # noqa: F401  fixtures of the tests of lists of columns
from interpreter import better_interpreter  # noqa: F401  a fixture for every kernel test


@pytest.fixture(autouse=True)
def poisoned_empty(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Fill what ``torch.empty`` and ``torch.empty_like`` return with NaN, so that reading it shows."""
    empty, empty_like = torch.empty, torch.empty_like

    def poison(x: torch.Tensor) -> torch.Tensor:
        if not x.is_floating_point() or type(x) is not torch.Tensor:  # fake tensors hold nothing
            return x
        with torch.no_grad():
            return x.fill_(float("nan"))

    monkeypatch.setattr(torch, "empty", lambda *a, **k: poison(empty(*a, **k)))
    monkeypatch.setattr(torch, "empty_like", lambda *a, **k: poison(empty_like(*a, **k)))
    yield
