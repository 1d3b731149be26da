"""Kernel tests see every uninitialised element."""

from __future__ import annotations

import zlib
from collections.abc import Iterator

import pytest
import torch
from column_cases import USUAL, compactions, garbage  # noqa: F401  fixtures of the tests of lists of columns
from interpreter import better_interpreter  # noqa: F401  a fixture for every kernel test
from poison import poison

from adasplash_kernels import limits
from adasplash_kernels.ahead import nothing_ahead

EMPTY = torch.empty, torch.empty_like


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Without a GPU, run one case in n of tests marked ``in_turn(n)``, chosen by name and so always the same.

    What the interpreter has no part in, eager attention, runs whole.
    """
    for item in items:
        turn = None if torch.cuda.is_available() else item.get_closest_marker("in_turn")
        if turn is None or item.callspec.params.get("method") == "eager":
            continue
        if zlib.crc32(item.name.encode()) % turn.args[0]:
            item.add_marker(pytest.mark.skip(reason=f"the interpreter runs one case in {turn.args[0]}, a GPU all"))


@pytest.fixture(autouse=True)
def poisoned_empty(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let what nobody wrote show; see poison.py."""
    assert (torch.empty, torch.empty_like) == EMPTY, "an earlier test left its own behind"
    poison(monkeypatch)


@pytest.fixture(autouse=True)
def lists_of_small_inputs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let inputs as small as those of tests have lists on a GPU too; benchmarks check what they time with its limit."""
    monkeypatch.setattr(limits, "DENSEST", USUAL)


@pytest.fixture(autouse=True)
def calls_run_once(request: pytest.FixtureRequest) -> Iterator[None]:
    """Do not go through calls to compile them first: many tests look at what a call launches."""
    if "compiled_ahead" in request.fixturenames:
        yield
        return
    with nothing_ahead():
        yield
