"""What launches are given that depends on numbers alone, worked out once: calls of the same shapes come again."""

from __future__ import annotations

from functools import lru_cache

import torch
import triton
import triton.language as tl

from .inputs import Sizes, sealed


@lru_cache(maxsize=1024)
def own_strides(shape: torch.Size, strides: tuple[int, ...]) -> tuple[int, ...]:
    """Return the strides of batch, head and row; 0 where there is one only and its stride may be anything."""
    return tuple(stride if size > 1 else 0 for size, stride in zip(shape[:3], strides[:3], strict=True))


@lru_cache(maxsize=1024)
def multiples_of_8(*pitches: tuple[int, ...]) -> tl.constexpr:
    """Tell kernels whether all of these pitches, by tensor, are multiples of 8 elements."""
    return tl.constexpr(all(pitch % 8 == 0 for each in pitches for pitch in each))


@lru_cache(maxsize=1024)
def sealed_sizes(*numbers: float) -> Sizes:
    """Return the run-time numbers sealed, the last of them, the scale, as it is (see inputs.py)."""
    *integers, scale = numbers
    return Sizes(*map(sealed, integers), float(scale))  # 1 is not 1.0 to a kernel, but it is to a cache


@lru_cache
def block_d(head_dim: int) -> int:
    """Return the columns of a tile for a head dim."""
    return max(16, triton.next_power_of_2(head_dim))


@lru_cache(typed=True)  # True is not 1 to a kernel
def constant(value: bool | int | float | str) -> tl.constexpr:
    """Return a compile-time constant."""
    return tl.constexpr(value)
