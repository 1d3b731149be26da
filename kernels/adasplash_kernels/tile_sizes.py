"""How many queries and keys a program of each kernel works on, picked by head dim and dtype alone."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
import triton

INTERPRETED = triton.knobs.runtime.interpret


@dataclass(frozen=True)
class Tiles:
    """Queries and keys a program works on at once, the warps that do it, and the most registers a thread may take."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int = 2
    registers: int | None = None


def choose_tiles(head_dim: int, dtype: torch.dtype) -> Tiles:
    """Pick tiles by head dim and dtype alone: a new length never compiles or tunes anything."""
    if INTERPRETED:  # small tiles make short test sequences cross tile borders
        return Tiles(16, 16, 1)
    if dtype == torch.float32:  # exact float32 products run on the plain cores; more of them a thread would spill
        return Tiles(32, 32, 8, 1)
    if head_dim <= 64:
        return Tiles(64, 64, 4, 3)
    if head_dim <= 128:
        return Tiles(64, 64, 4)
    return Tiles(64, 32, 8, 1)


def choose_row_tiles(n: int, alpha_by_row: bool = True) -> Tiles:
    """Pick tiles for thresholds of rows of ``n`` stored scores: wide, with several rows only if alpha is theirs all."""
    if INTERPRETED:
        return Tiles(1 if alpha_by_row else 4, 32, 1)
    # 15 counts times 4096 lanes is the most that the histogram's 16-bit sums hold
    width = min(4096, max(32, triton.next_power_of_2(n)))
    rows = 1 if alpha_by_row else max(1, min(32, 2048 // width))
    return Tiles(rows, width, max(1, min(8, rows * width // 512)))


@dataclass(frozen=True)
class ColumnTiles:
    """Tiles of the passes over all scores that lists of columns start with.

    Attributes:
        bound: of the pass that finds a bound.
        near: of the same for short sequences, where there are no lists.
        groups: maxima a query that it keeps; its keys are a multiple.
        emit: of the pass that marks keys; its queries are a multiple of a block's.
        solve: of the solve on the lists; its queries are those of a list.
        walk: of the output's pass along the lists; its queries are those of a list. One warp, where registers allow:
            what products leave in a warp it can multiply again without an exchange.
        grad: the same of the gradient of queries.
        grad_keys: of the gradients of keys and values along lists of queries; its keys are those of a list.
        rest: of the passes over all tiles for queries, or keys, without a list; they are a multiple of a list's.
        scan: of the solve on all keys, where there are no lists.
        share: the lists have room for a part of ``limits.ENTRIES`` each, one in so many.
    """

    bound: Tiles
    near: Tiles
    groups: int
    emit: Tiles
    solve: Tiles
    walk: Tiles
    grad: Tiles
    grad_keys: Tiles
    rest: Tiles
    scan: Tiles
    share: int = 1


def choose_column_tiles(head_dim: int, dtype: torch.dtype) -> ColumnTiles:
    """Pick tiles by head dim and dtype alone; many queries a tile where all keys are visited, since what these passes
    wait for is K, and few along lists, which are the shorter for it.

    Where registers are capped, two or three programs share a multiprocessor, and one's products hide what another
    does with its own; what spills is in the loop that masks (docs/performance.md).
    """
    return _column_tiles(64 if head_dim <= 64 else 128 if head_dim <= 128 else 256, dtype)  # no symbol for a cache


@lru_cache
def _column_tiles(head_dim: int, dtype: torch.dtype) -> ColumnTiles:
    rest = choose_tiles(head_dim, dtype)
    if INTERPRETED:
        coarse = Tiles(32, 32, 1)
        scan = Tiles(32, 16, 1)
        return ColumnTiles(coarse, coarse, 16, coarse, Tiles(16, 32, 1), rest, rest, rest, rest, scan)
    if dtype == torch.float32:
        return ColumnTiles(rest, rest, 32, *(rest,) * 7)
    if head_dim <= 64:
        bound, emit = Tiles(256, 64, 8, 3, 128), Tiles(128, 64, 4, 3, 128)
        near, narrow, turned = Tiles(128, 64, 4, 3, 128), Tiles(16, 32, 1), Tiles(32, 16, 1, 3)
        return ColumnTiles(bound, near, 32, emit, narrow, narrow, narrow, turned, rest, Tiles(64, 64, 4, 3), 2)
    if head_dim <= 128:
        bound, emit = Tiles(256, 64, 8, 3, 128), Tiles(128, 64, 4, 3)
        narrow, grad, turned, scan = Tiles(16, 32, 1), Tiles(16, 64, 2), Tiles(64, 16, 2), Tiles(128, 64, 8, 3, 128)
        return ColumnTiles(bound, bound, 32, emit, narrow, narrow, grad, turned, rest, scan, 2)
    wide = Tiles(128, 64, 8, 2)
    return ColumnTiles(wide, wide, 32, wide, *(rest,) * 5, wide)
