"""Passes over all keys that do little more than multiply: the bound, and the lists of columns that follow from it.

What such a pass waits for is K, so that its blocks have many queries. Tiles at the edges of the mask of attention and
tiles inside are two loops, since a loop that may mask needs twice the registers.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from ..scores import load_keys, load_slope, raw_scores


class Sweep(NamedTuple):
    """The tiles of keys that a block of queries meets.

    Attributes:
        first: the first of all.
        inner_first, inner_last: those between need no mask.
        edges: how many tiles need one.
    """

    first: Any
    inner_first: Any
    inner_last: Any
    edges: Any


@triton.jit
def sweep(x, at):
    """Return the tiles of a block of queries."""
    inner_first = tl.cdiv(tl.minimum(at.inner_low, at.last * x.BLOCK_N), x.BLOCK_N)
    inner_first = tl.maximum(inner_first, at.first)
    inner_last = tl.minimum(tl.maximum(at.inner_high // x.BLOCK_N, inner_first), at.last)
    inner_first = tl.minimum(inner_first, inner_last)
    return Sweep(at.first, inner_first, inner_last, inner_first - at.first + at.last - inner_last)


@triton.jit
def edge_tile(tiles, i):
    """Return tile ``i`` of those that need a mask."""
    before = tiles.inner_first - tiles.first
    return tl.where(i < before, tiles.first + i, tiles.inner_last + i - before)


@triton.jit
def sweep_scores(x, size, at, q, tile, MASKED: tl.constexpr, KEYS_FIRST: tl.constexpr):
    """Scores of a tile before ``scale``, (queries, keys) or (keys, queries).

    Args:
        MASKED: whether some query may not see some of these keys; those scores are ``-inf``.
    """
    keys = tile * x.BLOCK_N + tl.arange(0, x.BLOCK_N)
    k = load_keys(x, size, at, keys)
    slope = load_slope(x, size, at.batch, at.head)
    if KEYS_FIRST:
        key, position, low, high = keys[:, None], at.position[None, :], at.low[None, :], at.high[None, :]
        raw = raw_scores(x, k, q, slope, position - key)
    else:
        key, position, low, high = keys[None, :], at.position[:, None], at.low[:, None], at.high[:, None]
        raw = raw_scores(x, q, k, slope, position - key)
    if MASKED:
        raw = tl.where((key >= low) & (key < high), raw, float("-inf"))
    return raw
