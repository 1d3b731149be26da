"""Uninitialised memory that shows: ``torch.empty`` hands out NaN, and integers that differ from call to call."""

from __future__ import annotations

import contextlib
import functools
import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

_counter = itertools.count(1)


@contextlib.contextmanager
def poisoned() -> Iterator[None]:
    """Let ``torch.empty`` and ``torch.empty_like`` fill what they return, so that what was never written shows.

    NaN reaches whatever reads it. An integer no one writes differs between two calls, which is how ``opcheck`` finds
    that an op's output is not a function of its inputs; as a row number it is past every end.
    """

    with pytest.MonkeyPatch.context() as patch:
        poison(patch)
        yield


def poison(patch: pytest.MonkeyPatch) -> None:
    """Do so until the patch is undone.

    In a test that is pytest's own: what else it replaces then comes off before this does, and is not put back after.
    """
    for name in ("empty", "empty_like"):
        patch.setattr(torch, name, _filling(getattr(torch, name)))


def _filling(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
    @functools.wraps(make)  # torch.compile asks a function for its name
    def filled(*args: Any, **options: Any) -> Tensor:
        x = make(*args, **options)
        if torch.compiler.is_compiling() or type(x) is not Tensor or x.dtype == torch.bool:  # fake ones hold nothing
            return x
        value = math.nan if x.is_floating_point() or x.is_complex() else torch.iinfo(x.dtype).max - next(_counter) % 97
        return x.detach().fill_(value).requires_grad_(x.requires_grad)

    return filled
