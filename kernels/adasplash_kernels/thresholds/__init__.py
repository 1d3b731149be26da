"""How the threshold of each query is found: one module a method, and the table that names them.

A new method is one function: it takes a ``launch.Problem`` and returns theta (B, H, N_q) float32, computed in any way.
Registered under a name, it is a ``method`` of ``entmax_attention``:

    @register("mine")
    def mine(problem): ...

A method that also leaves a bit mask of the tiles that hold weights says so, and returns theta and the mask.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..launch import Problem


@dataclass(frozen=True)
class Threshold:
    """A way to find thresholds.

    Attributes:
        solve: ``problem -> theta``, or ``problem -> (theta, tiles)`` if it marks tiles.
        marks_tiles: whether it leaves a bit mask (B * H, query blocks, words) int32; see worklists/tiles.py.
    """

    solve: Callable[[Problem], Any]
    marks_tiles: bool = False


THRESHOLDS: dict[str, Threshold] = {}


def register(name: str, *, marks_tiles: bool = False) -> Callable[[Callable], Callable]:
    """Return a decorator that makes a function the method ``name``.

    Raises:
        ValueError: the name is taken.
    """
    if name in THRESHOLDS or name in ("auto", "eager"):
        raise ValueError(f"name: {name!r} is taken")

    def keep(solve: Callable) -> Callable:
        THRESHOLDS[name] = Threshold(solve, marks_tiles)
        return solve

    return keep
