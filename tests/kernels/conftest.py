"""Kernel tests see every uninitialised element."""

from __future__ import annotations

import contextlib
import zlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from calls import USUAL
from column_cases import compactions, garbage  # noqa: F401  fixtures of the tests of lists of columns
from interpreter import better_interpreter  # noqa: F401  a fixture for every kernel test
from poison import poison

from adasplash_kernels import limits
from adasplash_kernels.ahead import nothing_ahead
from adasplash_kernels.launching import Launch, listening

EMPTY = torch.empty, torch.empty_like


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Without a GPU, run one case in n of tests marked ``in_turn(n)``, and any with a value that none of those has.

    Names decide which, so they are always the same. What the interpreter has no part in, eager attention, runs whole.
    """
    if torch.cuda.is_available():
        return
    tests: dict[str, list[Any]] = {}
    for item in items:
        thinned = item.get_closest_marker("in_turn") and not item.get_closest_marker("gpu")
        if thinned and item.callspec.params.get("method") != "eager":
            tests.setdefault(item.nodeid.split("[")[0], []).append(item)
    for cases in tests.values():
        n, seen = cases[0].get_closest_marker("in_turn").args[0], set()
        for place, item in enumerate(sorted(cases, key=lambda item: zlib.crc32(item.name.encode()))):
            values = {(name, str(value)) for name, value in item.callspec.params.items()}
            if place * n >= len(cases) and values <= seen:
                item.add_marker(pytest.mark.skip(reason=f"the interpreter runs one case in {n}, a GPU all"))
            seen |= values


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


@pytest.fixture
def names_launched() -> Iterator[list[str]]:
    """The names of the kernels that this thread launches."""
    names: list[str] = []

    @contextlib.contextmanager
    def note(launch: Launch) -> Iterator[None]:
        names.append(launch.kernel.__name__)
        yield

    with listening(note):
        yield names
