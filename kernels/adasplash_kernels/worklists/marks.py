"""Which queries use a block of keys: the bits that lists of queries are made of (see columns.py).

The gradient of queries meets every weight. What it leaves of a tile is one bit a weight, in the order in which tensor
cores leave products in registers, so that a thread packs a word from weights of its own and no thread waits for
another. ``fold_kernel`` then puts together, for each block of keys, the words of those entries that lie in it; a list
is ascending, so they are neighbours. A block that visits all tiles has each block of keys in a tile of its own, and
folds it at once. Every word of the result belongs to one program, so none is written twice.

A tile of BLOCK_M x BLOCK_N weights makes (BLOCK_M / 16, 8, 4) words of BLOCK_N / 2 bits: word (w, r, c) holds queries
16 w + r in its lower half and 16 w + r + 8 in its upper one, and of each the keys 8 j + 2 c and 8 j + 2 c + 1, as
bits 2 j and 2 j + 1 of the half.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..inputs import open_sizes
from ..launching import launched_by_key
from .columns import WORD
from .walk import HEADER

_WORD = tl.constexpr(WORD)


@triton.jit
def _pack(u):
    """Pack which of (BLOCK_M, BLOCK_N) numbers are above zero or NaN, into words (BLOCK_M / 16, 8, 4) int32."""
    steps: tl.constexpr = u.shape[1] // 8
    u = tl.reshape(u, (u.shape[0] // _WORD, 2, 8, steps, 4, 2))
    half = tl.arange(0, 2)[None, :, None, None, None, None]
    step = tl.arange(0, steps)[None, None, None, :, None, None]
    side = tl.arange(0, 2)[None, None, None, None, None, :]
    bit = tl.full((1, 1, 1, 1, 1, 1), 1, tl.int32) << (half * steps + step) * 2 + side
    return tl.sum(tl.sum(tl.sum(tl.where(u <= 0.0, 0, bit), 5), 3), 1)


@triton.jit
def _queries(words, HALF: tl.constexpr):
    """Return which queries have a bit in words (n, 8, 4) of two halves of HALF bits: (n,) int16, one bit a query."""
    lower = tl.max(((words << (32 - HALF)) != 0).to(tl.int32), 2)
    upper = tl.max(((words >> HALF) != 0).to(tl.int32), 2)
    both = lower + upper * 256  # the second half of 16 queries
    return tl.sum(both << tl.arange(0, 8)[None, :], 1).to(tl.int16)


@triton.jit
def masks_of_list(x, size, head_index, index, masks):
    """Return where the words of a block's list start.

    A list starts anywhere in its pool. A tile more for each block before leaves room for tiles that are not full.

    Args:
        masks: (heads of this launch, tiles, BLOCK_M / 16, 8, 4) integers of BLOCK_N / 2 bits.
    """
    blocks = tl.cdiv(size.n_q, x.BLOCK_M)
    start = tl.load(x.query_tiles + head_index * size.query_lists + index * HEADER + 3)
    tiles = (size.query_lists - blocks * HEADER) // x.BLOCK_N + blocks
    tile = (head_index - size.first_head) * tiles + start // x.BLOCK_N + index
    return masks + tile * (2 * x.BLOCK_M)


def list_tiles(lists: int, blocks: int, block: int) -> int:
    """Return how many tiles there must be room for in a head.

    Args:
        lists: numbers of its lists of columns, headers and pool.
        blocks: lists.
        block: entries of a tile.
    """
    return (lists - blocks * HEADER.value) // block + blocks


@triton.jit
def words_of_queries(x, size, head_index, index, used):
    """Return where the words of a block of queries are for the first block of keys, and how far for the next.

    Args:
        used: (heads of this launch, key blocks, query blocks, BLOCK_M / 16) int16, one bit a query.
    """
    each: tl.constexpr = x.BLOCK_M // _WORD
    row = (head_index - size.first_head) * tl.cdiv(size.n_k, x.BLOCK_N)
    blocks = tl.cdiv(size.n_q, x.BLOCK_M)
    return used + (row * blocks + index) * each, blocks * each


@triton.jit
def mark_queries(x, walk, tile, masks, used, used_step, u):
    """Note which queries of a block use the keys of a tile: those whose u (BLOCK_M, BLOCK_N) is above zero or NaN.

    Args:
        masks: from ``masks_of_list``, for a block with a list.
        used, used_step: from ``words_of_queries``, for one without.
    """
    words = _pack(u)
    # stored in one dimension and in the order that threads have them in, so that none waits for another
    lane = tl.arange(0, 2 * x.BLOCK_M)
    if walk.count < 0:
        queries = tl.broadcast_to(_queries(words, x.BLOCK_N // 4)[:, None, None], words.shape)
        queries = tl.reshape(queries, (2 * x.BLOCK_M,))
        tl.store(used + tile.to(tl.int64) * used_step + lane // 32, queries, mask=lane % 32 == 0)
    else:
        flat = tl.reshape(words, (2 * x.BLOCK_M,)).to(masks.dtype.element_ty)
        tl.store(masks + tile * (2 * x.BLOCK_M) + lane, flat)


@triton.jit
def _below(entries, count, key):
    """Return how many of ``count`` ascending entries are below each key: the shape of ``key``, int32."""
    low = tl.zeros(key.shape, tl.int32)
    high = low + count
    longest = count
    while longest > 0:
        middle = (low + high) // 2
        less = (tl.load(entries + middle, mask=low < high, other=0) < key) & (low < high)
        low = tl.where(less, middle + 1, low)
        high = tl.where(less, high, middle)
        longest = longest // 2
    return low


@triton.jit
def _between(low, high, HALF: tl.constexpr):
    """Return which bits (n, 1, 4) of a tile's words are of entries in [low, high) (n,) of the tile."""
    column = 2 * tl.arange(0, 4)[None, :]
    low = low[:, None]
    high = tl.maximum(high[:, None], low)
    before = low // 8 * 2 + tl.minimum(tl.maximum(low % 8 - column, 0), 2)
    until = high // 8 * 2 + tl.minimum(tl.maximum(high % 8 - column, 0), 2)
    half = (1 << until) - (1 << before)
    return (half | (half << HALF))[:, None, :]


@launched_by_key
@triton.jit
def fold_kernel(x, size, masks, used, CHUNK: tl.constexpr):
    """Write the words of one block of queries for CHUNK blocks of keys, from its list and what was noted along it.

    Only words of key blocks that an entry lies in are written. A block of keys has at most as many entries as keys,
    and these lie in two tiles at most.

    Args:
        masks: (heads of this launch, tiles, BLOCK_M / 16, 8, 4), as ``mark_queries`` leaves them.
        used: (heads of this launch, key blocks, query blocks, BLOCK_M / 16) int16, one bit a query.
    """
    size = open_sizes(x, size)
    blocks = tl.cdiv(size.n_q, x.BLOCK_M)
    index = tl.program_id(0) % blocks
    chunks = tl.cdiv(tl.cdiv(size.n_k, x.BLOCK_N), CHUNK)
    chunk = tl.program_id(0) // blocks % chunks
    head_index = (size.first_head + tl.program_id(0) // blocks // chunks).to(tl.int64)
    lists = x.query_tiles + head_index * size.query_lists
    count = tl.load(lists + index * HEADER)
    if count > 0:
        entries = lists + blocks * HEADER + tl.load(lists + index * HEADER + 3)
        if tl.load(entries + count - 1) >= chunk * (CHUNK * x.BLOCK_N):
            half: tl.constexpr = x.BLOCK_N // 4
            block = chunk * CHUNK + tl.arange(0, CHUNK)
            limits = (block[:, None] + tl.arange(0, 2)[None, :]) * x.BLOCK_N
            low, high = tl.split(_below(entries, count, limits))
            tile = low // x.BLOCK_N
            low -= tile * x.BLOCK_N
            high -= tile * x.BLOCK_N
            place = tile.to(tl.int64)[:, None] * (2 * x.BLOCK_M) + tl.arange(0, 2 * x.BLOCK_M)[None, :]
            place += masks_of_list(x, size, head_index, index, masks)
            one = tl.load(place, mask=(low < high)[:, None], other=0).to(tl.int32)
            two = tl.load(place + 2 * x.BLOCK_M, mask=(high > x.BLOCK_N)[:, None], other=0).to(tl.int32)
            one = tl.reshape(one, (CHUNK, x.BLOCK_M // 2, 4)) & _between(low, tl.minimum(high, x.BLOCK_N), half)
            two = tl.reshape(two, (CHUNK, x.BLOCK_M // 2, 4)) & _between(0 * low, high - x.BLOCK_N, half)
            words = tl.reshape(one | two, (CHUNK * (x.BLOCK_M // _WORD), 8, 4))
            queries = tl.reshape(_queries(words, half), (CHUNK, x.BLOCK_M // _WORD))
            used, step = words_of_queries(x, size, head_index, index, used)
            place = used + block.to(tl.int64)[:, None] * step + tl.arange(0, x.BLOCK_M // _WORD)[None, :]
            tl.store(place, queries, mask=(low < high)[:, None])
