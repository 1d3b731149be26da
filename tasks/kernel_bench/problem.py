"""What a system is asked to compute, and how it says that it cannot."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]


class NotMeasured(Exception):
    """A system cannot take this problem here; the message says why. The others are measured all the same."""


@dataclass(frozen=True)
class Problem:
    """Attention of q (b, h, n, d) over k and v (b, h_kv, n, d), scores scaled by ``1/sqrt(d)``.

    ``iterations`` is what the config gives the system's search for the threshold; None leaves it to the system.
    """

    b: int
    h: int
    h_kv: int
    n: int
    d: int
    dtype: torch.dtype
    causal: bool
    alpha: float
    device: torch.device
    iterations: int | None = None

    @property
    def grouped(self) -> bool:
        """Whether several query heads share a key head."""
        return self.h != self.h_kv

    @property
    def scale(self) -> float:
        """Factor on q.k."""
        return self.d**-0.5
