"""How kernels walk a work list: tiles come in runs, and every loop over a list is two loops, over runs and in a run.

Without a list there is one run, of all the tiles the mask of attention leaves, and it is walked in two parts: first the
tiles at the edges of the mask, then those inside, whose scores need none. They are loops of their own because what a
mask takes is in the way of the tiles inside even where it is skipped. A bit mask of tiles has a run a word, as long as
its set bits (see tiles.py). A list of columns has one run, of tiles gathered from the rows it names (see columns.py);
where row numbers fit into 16 bits, two entries share a number.
A new kind of list is a new branch of these functions.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

HEADER = tl.constexpr(4)  # numbers that a list of columns has before the pool of entries; see columns.py
EDGES, INSIDE, MIXED = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)  # parts; MIXED is all at once
_NOWHERE = tl.constexpr(1 << 30)  # past the end of every sequence


class Walk(NamedTuple):
    """A work list of one block.

    Attributes:
        start: where it is in memory, its entries for a list of columns; 0 without a list.
        first, last: tiles to visit, for a list of columns tiles of its entries.
        inner_low, inner_high: tiles between need no mask, counted in rows, or in entries.
        count: number of entries of a list of columns; -1 where there is none, which nobody walks along.
    """

    start: Any
    first: Any
    last: Any
    inner_low: Any
    inner_high: Any
    count: Any


@triton.jit
def all_tiles(at):
    """Return the walk of a block over every tile that the mask of attention leaves it."""
    return Walk(0, at.first, at.last, at.inner_low, at.inner_high, -1)


@triton.jit
def tile_list(start, at):
    """Return the walk of a block along its row of a bit mask of tiles."""
    return Walk(start, at.first, at.last, at.inner_low, at.inner_high, -1)


@triton.jit
def entry_place(head_lists, blocks, header, LISTS: tl.constexpr):
    """Return where the entries of a list of columns start: in the pool after a head's headers."""
    start = tl.load(header + 3)
    if LISTS == "columns16":
        start = start // 2  # which is even
    return head_lists + blocks * HEADER + start


@triton.jit
def load_entries(start, place, there, LISTS: tl.constexpr, OTHER: tl.constexpr):
    """Return entries of a list of columns by their place in it; OTHER where none is ``there``.

    Numbers of 16 bits are taken out of 32 here: smaller ones Triton does not fetch ahead.
    """
    if LISTS == "columns16":
        both = tl.load(start + (place >> 1), mask=there, other=0)
        found = tl.where(there, (both >> (place & 1) * 16) & 0xFFFF, OTHER)
    else:
        found = tl.load(start + place, mask=there, other=OTHER)
    return found


@triton.jit
def column_list(head_lists, blocks, at, BLOCK: tl.constexpr, LISTS: tl.constexpr):
    """Return the walk of a block along its list of columns; BLOCK is the size of a tile on the side they are of."""
    header = head_lists + at.index * HEADER
    count = tl.load(header)
    tiles = (count + BLOCK - 1) // BLOCK
    return Walk(
        entry_place(head_lists, blocks, header, LISTS), 0, tiles, tl.load(header + 1), tl.load(header + 2), count
    )  # fmt: skip


@triton.jit
def mask_row(x, size, at, tiles):
    """Return where the row of a block of queries starts in a bit mask of tiles; None without one."""
    if tiles is None:
        start = None
    else:
        row = at.head_index * tl.cdiv(size.n_q, x.BLOCK_M) + at.index
        start = tiles + row * tl.cdiv(tl.cdiv(size.n_k, x.BLOCK_N), 32)
    return start


@triton.jit
def query_list(x, size, at):
    """Return the walk of a block of queries."""
    if x.LISTS == "all" or x.LISTS == "rest":
        walk = all_tiles(at)
    elif x.LISTS == "tiles":
        walk = tile_list(mask_row(x, size, at, x.query_tiles), at)
    else:
        lists = x.query_tiles + at.head_index * size.query_lists
        walk = column_list(lists, tl.cdiv(size.n_q, x.LIST_M), at, x.BLOCK_N, x.LISTS)
    return walk


@triton.jit
def may_start(x, size, head_index, index):
    """Tell whether a block of queries may be this launch's: one for the rest takes those without a list alone.

    Of the lists that make one of its blocks all are there or none.
    """
    if x.LISTS == "rest":
        first = index * (x.BLOCK_M // x.LIST_M)
        own = tl.load(x.query_tiles + head_index.to(tl.int64) * size.query_lists + first * HEADER) < 0
    else:
        own = True
    return own


@triton.jit
def may_walk(x, walk):
    """Tell the same once the walk is known, which is loaded together with queries: one along lists takes those with a
    list alone."""
    if x.LISTS == "columns" or x.LISTS == "columns16":
        own = walk.count >= 0
    else:
        own = True
    return own


@triton.jit
def key_list(x, size, at, head):
    """Return the walk of a block of keys, along the queries of one of the heads that share them."""
    place = at.batch * size.heads + head - size.first_head
    if x.LISTS == "all" or x.LISTS == "rest":
        walk = all_tiles(at)
    elif x.LISTS == "tiles":
        row = place * tl.cdiv(size.n_k, x.BLOCK_N) + at.index
        walk = tile_list(x.key_tiles + row * tl.cdiv(tl.cdiv(size.n_q, x.BLOCK_M), 32), at)
    else:
        lists = x.key_tiles + place * size.key_lists
        walk = column_list(lists, tl.cdiv(size.n_k, x.LIST_N), at, x.BLOCK_M, x.LISTS)
    return walk


@triton.jit
def keys_are_anothers(x, size, at):
    """Tell whether a block of keys is another launch's: one goes along lists, one takes the rest, which are those where
    one of the heads that share a block has no list for it."""
    if x.LISTS == "columns" or x.LISTS == "columns16" or x.LISTS == "rest":
        first = at.index * (x.BLOCK_N // x.LIST_N)
        lists = x.key_tiles + (at.batch * size.heads + at.head - size.first_head) * size.key_lists + first * HEADER
        least = 0
        for group in range(size.groups):
            least = tl.minimum(least, tl.load(lists + group * size.key_lists))
        other = (least < 0) != (x.LISTS == "rest")
    else:
        other = False
    return other


@triton.jit
def run_range(walk, LISTS: tl.constexpr):
    """Return the first run and the one past the last."""
    if LISTS != "tiles":
        begin, end = 0, 1
    else:
        begin, end = walk.first // 32, (walk.last + 31) // 32
    return begin, end


@triton.jit
def _inner_tiles(walk, BLOCK: tl.constexpr):
    """Return the first tile and the one past the last that need no mask, within those to visit."""
    inner_first = tl.cdiv(tl.minimum(walk.inner_low, walk.last * BLOCK), BLOCK)
    inner_first = tl.maximum(inner_first, walk.first)
    inner_last = tl.minimum(tl.maximum(walk.inner_high // BLOCK, inner_first), walk.last)
    return tl.minimum(inner_first, inner_last), inner_last


@triton.jit
def stretch(walk, BLOCK: tl.constexpr, NUMBER: tl.constexpr):
    """Return the first tile and the one past the last of a stretch of a walk over all tiles, in ascending order: 0 is
    what comes before the tiles that need no mask, 1 these, 2 what comes after."""
    inner_first, inner_last = _inner_tiles(walk, BLOCK)
    if NUMBER == 0:
        begin, end = walk.first, inner_first
    elif NUMBER == 1:
        begin, end = inner_first, inner_last
    else:
        begin, end = inner_last, walk.last
    return begin, end


@triton.jit
def run(walk, number, LISTS: tl.constexpr, PART: tl.constexpr, BLOCK: tl.constexpr):
    """Return the state of a run and how many tiles of it are in a part.

    Args:
        BLOCK: size of a tile on the side that is walked along.
    """
    if LISTS != "tiles":
        inner_first, inner_last = _inner_tiles(walk, BLOCK)
        if PART == MIXED:
            state = walk.first
            count = walk.last - walk.first
        elif PART == INSIDE:
            state = inner_first
            count = inner_last - inner_first
        else:
            state = walk.first
            count = inner_first - walk.first + walk.last - inner_last
    else:
        state = tl.load(walk.start + number)
        count = set_bits(state)
    return state, count


@triton.jit
def next_tile(walk, number, state, i, LISTS: tl.constexpr, PART: tl.constexpr, BLOCK: tl.constexpr):
    """Return tile ``i`` of a part of a run, and the state after it.

    Where tiles follow one another it comes from the loop's own counter: Triton does not prefetch along a carried one.
    """
    if LISTS != "tiles":
        tile = state + i
        if PART == EDGES:
            inner_first, inner_last = _inner_tiles(walk, BLOCK)
            tile = tl.where(tile < inner_first, tile, tile + (inner_last - inner_first))
    else:
        bit, state = lowest_bit(state)
        tile = number * 32 + bit
    return tile, state


@triton.jit
def members(walk, tile, BLOCK: tl.constexpr, LISTS: tl.constexpr):
    """Return the rows of the other side that a tile stands for, past every end where there are none."""
    rows = tile * BLOCK + tl.arange(0, BLOCK)
    if LISTS == "columns" or LISTS == "columns16":
        rows = load_entries(walk.start, rows, rows < walk.count, LISTS, _NOWHERE)
    return rows


@triton.jit
def crosses_edge(walk, tile, BLOCK: tl.constexpr):
    """Tell whether a tile of a MIXED part may hold a pair that the mask of attention forbids."""
    return (tile * BLOCK < walk.inner_low) | ((tile + 1) * BLOCK > walk.inner_high)


@triton.jit
def lowest_bit(words):
    """Return which is the lowest set bit of int32 words, and the words without it; of zero some number, and zero."""
    lowest = words & -words
    # the exponent of a power of two as a float; the sign bit alone is -2^31, whose magnitude is read the same way
    return ((lowest.to(tl.float32).to(tl.int32, bitcast=True) >> 23) & 255) - 127, words ^ lowest


@triton.jit
def set_bits(word):
    """Return how many bits of int32 words are set."""
    word = word.to(tl.uint32, bitcast=True)
    word = word - ((word >> 1) & 0x55555555)
    word = (word & 0x33333333) + ((word >> 2) & 0x33333333)
    word = (word + (word >> 4)) & 0x0F0F0F0F
    return ((word * 0x01010101) >> 24).to(tl.int32)
