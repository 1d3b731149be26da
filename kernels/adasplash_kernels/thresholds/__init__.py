"""How the threshold of each query is found: one module a method, and the table that names them.

A new method is one function: it takes a ``Problem`` and returns theta (B, H, N_q) float32, computed in any way.
Registered under a name, it is a ``method`` of ``entmax_attention``:

    @register("mine")
    def mine(problem): ...

A method that also leaves work lists says which, and returns theta and the lists, one a block of queries.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from ..problem import Problem


@dataclass(frozen=True)
class Threshold:
    """A way to find thresholds.

    Attributes:
        solve: ``problem -> theta``, or ``problem -> (theta, lists)`` if it leaves lists; they may be None.
        lists: what it leaves: "tiles", a bit mask (B * H, query blocks, words) int32 of those that hold weights, see
            worklists/tiles.py; "columns", (B * H, query blocks, entries) int32, see worklists/columns.py; or nothing.
        approach: ``problem -> (theta, lists, settle)`` with thetas a step short, for calls where the output's pass may
            take that step (see settle.py); None if there is no such thing.
        replayed: whether calls may be played from a record (see replays.py): what these functions do follows from
            shapes and numbers alone, and they launch no kernels but those under ``@launched_by_key``.
        on_chip: whether short sequences are to take the kernel that does all at once instead (see on_chip.py).
    """

    solve: Callable[[Problem], Any]
    lists: Literal["tiles", "columns"] | None = None
    approach: Callable[[Problem], Any] | None = None
    replayed: bool = False
    on_chip: bool = False


THRESHOLDS: dict[str, Threshold] = {}


def register(
    name: str,
    *,
    lists: Literal["tiles", "columns"] | None = None,
    approach: Callable[[Problem], Any] | None = None,
    replayed: bool = False,
    on_chip: bool = False,
) -> Callable[[Callable], Callable]:
    """Return a decorator that makes a function the method ``name``; the rest as for ``Threshold``.

    Raises:
        ValueError: the name is taken.
    """
    if name in THRESHOLDS or name in ("auto", "eager"):
        raise ValueError(f"name: {name!r} is taken")

    def keep(solve: Callable) -> Callable:
        THRESHOLDS[name] = Threshold(solve, lists, approach, replayed, on_chip)
        return solve

    return keep
