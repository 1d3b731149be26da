"""Checks of single settings: each raises ValueError with a message that begins with the key (see schema.py)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def at_least(minimum: float, **values: float) -> None:
    """Refuse values below a minimum, and NaN."""
    for name, value in values.items():
        if not value >= minimum:  # NaN is not
            raise ValueError(f"{name}: got {value}, allowed is {minimum} or more")


def above_zero(**values: float) -> None:
    """Refuse values that are not above zero, and NaN."""
    for name, value in values.items():
        if not value > 0:
            raise ValueError(f"{name}: got {value}, allowed is a number above 0")


def distinct(name: str, values: Sequence[Any]) -> None:
    """Refuse an empty list, and one with a value twice."""
    if not values or len(set(values)) != len(values):
        raise ValueError(f"{name}: got {list(values)}, allowed is one or more, each once")
