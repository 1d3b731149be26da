"""Which queries use a block of keys: the bits that lists of queries are made of (see columns.py).

The gradient of queries meets every weight. What it leaves of a tile is one bit a weight, in the order in which tensor
cores leave products in registers, so that a thread packs a word from weights of its own and no thread waits for
another. ``scatter_kernel`` then sets, for each bit, that of its query in the row of the block of keys that its entry
lies in. A block that visits all tiles has whole blocks of keys in a tile, and writes those rows at once.

A tile of BLOCK_M x BLOCK_N weights, whose keys SIDES warps share, makes (BLOCK_M / 16, SIDES, 8, 4) words of
BLOCK_N / 2 / SIDES bits: word (w, s, r, c) holds queries 16 w + r in its lower half and 16 w + r + 8 in its upper one,
and of each the keys 8 (SIDES j + s) + 2 c and the one after, as bits 2 j and 2 j + 1 of the half.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from ..inputs import open_sizes, opened
from ..launching import launched_by_key
from .columns import WORD
from .walk import HEADER, entry_place, load_entries, lowest_bit

_WORD = tl.constexpr(WORD)


@triton.jit
def _pack(u, SIDES: tl.constexpr):
    """Pack which of (BLOCK_M, BLOCK_N) numbers are above zero or NaN, into words (BLOCK_M / 16, SIDES, 8, 4) int32."""
    steps: tl.constexpr = u.shape[1] // 8 // SIDES
    u = tl.reshape(u, (u.shape[0] // _WORD, 2, 8, steps, SIDES, 4, 2))
    half = tl.arange(0, 2)[None, :, None, None, None, None, None]
    step = tl.arange(0, steps)[None, None, None, :, None, None, None]
    second = tl.arange(0, 2)[None, None, None, None, None, None, :]
    bit = tl.full((1, 1, 1, 1, 1, 1, 1), 1, tl.int32) << (half * steps + step) * 2 + second
    words = tl.sum(tl.sum(tl.sum(tl.where(u <= 0.0, 0, bit), 6), 3), 1)
    return tl.permute(words, (0, 2, 1, 3))


@triton.jit
def _queries(words, HALF: tl.constexpr):
    """Return which queries have a bit in words (n, 8, 4) of two halves of HALF bits: (n,) int16, one bit a query."""
    lower = tl.max(((words << (32 - HALF)) != 0).to(tl.int32), 2)
    upper = tl.max(((words >> HALF) != 0).to(tl.int32), 2)
    both = lower + upper * 256  # the second half of 16 queries
    return tl.sum(both << tl.arange(0, 8)[None, :], 1).to(tl.int16)


class Masks(NamedTuple):
    """Where the words of the heads of a launch are: of some in one place, of the next in another.

    What is noted is used up before dK and dV are written, and lies there as far as it fits.

    Attributes:
        first, second, third: (heads, tiles, BLOCK_M / 16, SIDES, 8, 4) integers of BLOCK_N / 2 / SIDES bits.
        in_first, in_second: the heads of the first place, and of the second, sealed (see inputs.py).
        tiles: room for so many in a head, sealed.
        before: heads with lists of queries together with these, sealed, that earlier launches have done.
        words: of a block of keys, one bit a query, sealed.
        KEYS: of a block.
        SIDES: warps that share the keys of a tile.
    """

    first: Any
    second: Any
    third: Any
    in_first: int
    in_second: int
    tiles: int
    before: int
    words: int
    KEYS: tl.constexpr
    SIDES: tl.constexpr


@triton.jit
def masks_of_list(x, size, head_index, index, masks):
    """Return where the words of a block's list start.

    A list starts anywhere in its pool. A tile more for each block before leaves room for tiles that are not full.
    """
    in_first, in_second = opened(masks.in_first), opened(masks.in_second)
    place = head_index - size.first_head
    if place < in_first:
        base = masks.first
    elif place < in_first + in_second:
        base = masks.second
        place -= in_first
    else:
        base = masks.third
        place -= in_first + in_second
    start = tl.load(x.query_tiles + head_index * size.query_lists + index * HEADER + 3)
    tile = place * opened(masks.tiles) + start // x.BLOCK_N + index
    return base + tile * (2 * x.BLOCK_M * masks.SIDES)


def list_tiles(pool: int, blocks: int, block: int) -> int:
    """Return how many tiles there must be room for in a head.

    Args:
        pool: entries of its lists of columns together, at the most.
        blocks: lists.
        block: entries of a tile.
    """
    return pool // block + blocks


@triton.jit
def words_of_queries(x, size, head_index, index, masks, used):
    """Return where the words of a block of queries are for the first block of keys, and how far for the next.

    Args:
        masks: a ``Masks``.
        used: (heads before this launch and of it, key blocks, words) int16, one bit a query.
    """
    row = (head_index - size.first_head + opened(masks.before)) * tl.cdiv(size.n_k, masks.KEYS)
    step = opened(masks.words)
    return used + row * step + index * (x.BLOCK_M // _WORD), step


@triton.jit
def mark_queries(x, size, tile, place, used_step, u, KEYS: tl.constexpr, SIDES: tl.constexpr):
    """Note which queries of a block use the keys of a tile: those whose u (BLOCK_M, BLOCK_N) is above zero or NaN.

    Args:
        place: from ``masks_of_list``, along lists; from ``words_of_queries`` in the launch for the rest, whose tiles
            are of whole blocks of keys.
        used_step: from ``words_of_queries``.
        KEYS, SIDES: as in ``Masks``.
    """
    key_blocks = tl.cdiv(size.n_k, KEYS)
    # stored in one dimension and in the order that threads have them in, so that none waits for another
    lane = tl.arange(0, 2 * x.BLOCK_M)
    if x.LISTS == "rest":
        words = tl.reshape(_pack(u, 1), (x.BLOCK_M // _WORD, 8, 4))
        each: tl.constexpr = KEYS // 4  # bits of a block of keys, in each half
        half: tl.constexpr = x.BLOCK_N // 4
        for i in tl.static_range(x.BLOCK_N // KEYS):
            of_block = (words >> i * each) & ((2**each - 1) * (2**half + 1))
            queries = tl.broadcast_to(_queries(of_block, half)[:, None, None], words.shape)
            queries = tl.reshape(queries, (2 * x.BLOCK_M,))
            row = tile.to(tl.int64) * (x.BLOCK_N // KEYS) + i
            there = (lane % 32 == 0) & (row < key_blocks)
            tl.store(place + row * used_step + lane // 32, queries, mask=there)
    else:
        lane = tl.arange(0, 2 * x.BLOCK_M * SIDES)
        flat = tl.reshape(_pack(u, SIDES), lane.shape).to(place.dtype.element_ty)
        tl.store(place + tile * lane.shape[0] + lane, flat)


@launched_by_key
@triton.jit
def scatter_kernel(x, size, masks, used, PARTS: tl.constexpr):
    """Set the bits of the queries that use a block of keys, from what was noted along one block's list.

    A program takes every PARTS-th tile of the list, and a set bit of each word at a time: there are few. Bits are only
    ever set, so the order in which programs come does not matter.

    Args:
        masks: a ``Masks``, as ``mark_queries`` leaves them.
        used: those of ``words_of_queries``, seen as int32.
    """
    size = open_sizes(x, size)
    blocks = tl.cdiv(size.n_q, x.BLOCK_M)
    number = tl.program_id(0) // PARTS
    index = number % blocks
    head_index = (size.first_head + number // blocks).to(tl.int64)
    lists = x.query_tiles + head_index * size.query_lists
    count = tl.load(lists + index * HEADER)
    entries = entry_place(lists, blocks, lists + index * HEADER, x.LISTS)
    first, used_step = words_of_queries(x, size, head_index, index, masks, 0)
    places = masks_of_list(x, size, head_index, index, masks)
    SIDES: tl.constexpr = masks.SIDES
    KEYS: tl.constexpr = masks.KEYS
    half: tl.constexpr = x.BLOCK_N // 4 // SIDES
    every: tl.constexpr = 2 ** (2 * half) - 1
    lane = tl.arange(0, 2 * x.BLOCK_M * SIDES)
    for tile in range(tl.program_id(0) % PARTS, tl.cdiv(count, x.BLOCK_N), PARTS):
        words = tl.load(places + tile * lane.shape[0] + lane).to(tl.int32)
        if half < 16:
            words = words & every
        while tl.max((words != 0).to(tl.int32), 0) > 0:
            bit, rest = lowest_bit(words)
            step = bit % half // 2 * SIDES + lane // 32 % SIDES
            entry = tile * x.BLOCK_N + step * 8 + lane % 4 * 2 + bit % 2
            there = (words != 0) & (entry < count)  # past the end of a list rows of NaN have bits
            key = load_entries(entries, entry, there, x.LISTS, 0)
            place = first + (key // KEYS).to(tl.int64) * used_step + lane // (32 * SIDES)
            query = tl.where(there, bit // half * 8 + lane % 32 // 4 + (place & 1).to(tl.int32) * _WORD, 0)
            tl.atomic_or(used + place // 2, 1 << query, mask=there, sem="relaxed")
            words = rest
