"""Passes over all keys for two neighbouring blocks of queries at once, which share every tile of K that is loaded.

These passes do little more than multiply, so that what they wait for is K: two blocks halve that. Tiles at the edges of
the mask of attention and tiles inside are two loops, since a loop that may mask needs twice the registers.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from ..scores import load_keys, load_queries, load_slope, query_block_at, raw_scores


class Pair(NamedTuple):
    """Two blocks of queries of one head and the tiles of keys they meet.

    Attributes:
        one, two: the blocks; the second may have no rows.
        q_one, q_two: their queries (BLOCK_M, BLOCK_D).
        first, inner_first, inner_last, last: tiles of keys; those from inner_first to inner_last need no mask.
        edges: how many tiles need one.
    """

    one: Any
    two: Any
    q_one: Any
    q_two: Any
    first: Any
    inner_first: Any
    inner_last: Any
    edges: Any


@triton.jit
def query_pair(x, size):
    """Return this program's pair; pairs with the longest causal rows come first."""
    n_pairs = tl.cdiv(size.n_q, 2 * x.BLOCK_M)
    head_index = size.first_head + tl.program_id(0) // n_pairs
    index = n_pairs - 1 - tl.program_id(0) % n_pairs
    one = query_block_at(x, size, head_index, 2 * index)
    two = query_block_at(x, size, head_index, 2 * index + 1)
    first = tl.where(one.first < one.last, one.first, two.first)
    first = tl.where(two.first < two.last, tl.minimum(first, two.first), first)
    last = tl.maximum(one.last, two.last)
    inner_low = tl.minimum(tl.maximum(one.inner_low, two.inner_low), last * x.BLOCK_N)
    inner_high = tl.minimum(one.inner_high, two.inner_high)
    inner_first = tl.maximum(tl.cdiv(inner_low, x.BLOCK_N), first)
    inner_last = tl.minimum(tl.maximum(inner_high // x.BLOCK_N, inner_first), last)
    inner_first = tl.minimum(inner_first, inner_last)
    edges = inner_first - first + last - inner_last
    return Pair(one, two, load_queries(x, size, one), load_queries(x, size, two), first, inner_first, inner_last, edges)


@triton.jit
def edge_tile(pair, i):
    """Return tile ``i`` of those that need a mask."""
    before = pair.inner_first - pair.first
    return tl.where(i < before, pair.first + i, pair.inner_last + i - before)


@triton.jit
def pair_keys(x, size, pair, tile):
    """Return a tile's keys and their rows of K (BLOCK_N, BLOCK_D)."""
    keys = tile * x.BLOCK_N + tl.arange(0, x.BLOCK_N)
    return keys, load_keys(x, size, pair.one, keys)


@triton.jit
def pair_scores(x, size, at, q, k, keys, MASKED: tl.constexpr, KEYS_FIRST: tl.constexpr):
    """Scores of one block of a pair before ``scale``, (queries, keys) or (keys, queries).

    Args:
        MASKED: whether some query may not see some of these keys; those scores are ``-inf``.
    """
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
