"""Every kernel that a call of the package launches, seen from outside: on which heads, with which tiles and lists.

While it watches, stand-ins take the place of the kernels that ``adasplash_kernels.launch`` names: they launch them as
they would have been launched, and then report. Nothing is derived from how the launching code works.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

_ENDING = "_kernel"


@dataclass(frozen=True)
class Launch:
    """One launch of a kernel, after it ran. Attention is causal or not, over whole sequences of one length.

    Attributes:
        kernel: its name without the ending.
        programs: how many there were.
        arguments: what it was given; but for kernels that look at lists alone, inputs and sizes come first.
        passes: (B * H, query blocks) int32, passes of a solve over its keys; None where nothing is solved.
    """

    kernel: str
    programs: int
    arguments: tuple[Any, ...]
    passes: Tensor | None = None

    @property
    def x(self) -> Any:
        """Tensors, block sizes and work lists (``adasplash_kernels.inputs.Inputs``)."""
        return self.arguments[0]

    @property
    def n(self) -> int:
        """Queries, and keys, of a head."""
        return self.x.q.shape[2]

    @property
    def causal(self) -> bool:
        """Whether a query sees no key after its own position."""
        return _opened(self.arguments[1].right) == 0

    @property
    def first_head(self) -> int:
        """The query head, counted over the batch, that the grid starts with."""
        return _opened(self.arguments[1].first_head)

    @property
    def key_heads(self) -> int:
        """Of this launch, whose programs take a block of keys each, or in a launch for the rest several."""
        return _opened(self.arguments[1].launched) // self.groups or self.programs // self.key_blocks

    @property
    def block_m(self) -> int:
        """Queries of a tile."""
        return self.x.BLOCK_M.value

    @property
    def block_n(self) -> int:
        """Keys of a tile."""
        return self.x.BLOCK_N.value

    @property
    def query_blocks(self) -> int:
        """Of a head."""
        return -(-self.n // self.block_m)

    @property
    def key_blocks(self) -> int:
        """Of a head."""
        return -(-self.n // self.block_n)

    @property
    def groups(self) -> int:
        """Query heads that share a head of keys."""
        return self.x.q.shape[1] // self.x.k.shape[1]


@contextmanager
def watched(report: Callable[[Launch], None], solving: Collection[str]) -> Iterator[None]:
    """Report every launch from now on.

    Args:
        solving: kernels (without the ending) that can say how many passes over its keys a block took.
    """
    from adasplash_kernels import launch
    from adasplash_kernels.ahead import nothing_ahead

    kernels = {name: kernel for name, kernel in vars(launch).items() if name.endswith(_ENDING)}
    try:
        for name, kernel in kernels.items():
            short = name.removesuffix(_ENDING)
            setattr(launch, name, _StandIn(short, kernel, report, short in solving))
        with nothing_ahead():  # a call that only compiles goes the same way
            yield
    finally:
        for name, kernel in kernels.items():
            setattr(launch, name, kernel)


@dataclass(frozen=True)
class _StandIn:
    name: str
    kernel: Any
    report: Callable[[Launch], None]
    solves: bool

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        def run(*arguments: Any, **options: Any) -> None:
            launch = Launch(self.name, grid[0], arguments)
            if self.solves:
                q = launch.x.q
                shape = (q.shape[0] * q.shape[1], launch.query_blocks)
                passes = torch.zeros(shape, dtype=torch.int32, device=q.device)
                launch = Launch(self.name, grid[0], arguments, passes)
                options["passes_out"] = passes
            self.kernel[grid](*arguments, **options)
            self.report(launch)

        return run


def _opened(number: int) -> int:
    """Undo ``adasplash_kernels.inputs.sealed``."""
    return (number - 3) >> 1
