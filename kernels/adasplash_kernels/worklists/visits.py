"""Which tiles of keys the pass that marks keys visits: those in which group maxima's bound leaves a score.

In trained models most tiles hold no score above the bound of any of a block's queries. The pass that finds the bound
sees that on its way: bounds only rise, and a tile without a score above a bound that is still too low has none above
the last one. It keeps one bit a tile, and lists the tiles whose bit is set, 32 tiles at a time.

A block of BLOCK queries, those that one program of ``emit_kernel`` takes, has a row of numbers: how many tiles it
lists, or -1 to visit all of them; the first tile of those that the bits are about, and the one past the last; nothing;
then the tiles. The bits are about the tiles that need no mask; the others are always visited.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .tiles import any_sign, either
from .walk import HEADER, INSIDE, Walk, run, set_bits


class Listing(NamedTuple):
    """What a program of the bound's pass lists tiles in and which tiles they are.

    Attributes:
        rows: (blocks of the program,) where their numbers go.
        there: (blocks of the program,) whether a block is one of its head.
        first, count: the tiles that need no mask.
    """

    rows: Any
    there: Any
    first: Any
    count: Any


@triton.jit
def listing_of(x, size, at, walk, visits, pitch, BLOCK: tl.constexpr):
    """Return the listing of a program's blocks of BLOCK queries."""
    each: tl.constexpr = x.BLOCK_M // BLOCK
    block = at.index * each + tl.arange(0, each)
    blocks = tl.cdiv(size.n_q, BLOCK)
    first, count = run(walk, 0, x.LISTS, INSIDE, x.BLOCK_N)
    return Listing(
        visits + ((at.head_index - size.first_head) * blocks + block) * pitch, block < blocks, first, count
    )  # fmt: skip


@triton.jit
def store_header(listing, listed):
    """Write the numbers before the tiles; ``listed`` is how many there are, (blocks of the program,)."""
    tl.store(listing.rows, listed, mask=listing.there)
    tl.store(listing.rows + 1, listing.first, mask=listing.there)
    tl.store(listing.rows + 2, listing.first + listing.count, mask=listing.there)


@triton.jit
def visited(listing, i):
    """Return the tile that the bound's pass visits as number ``i``: the first one, then from the last one backwards.

    All queries of a trained model look at the first keys, and at near ones more than at far ones.
    """
    return tl.where(i == 0, listing.first, listing.first + listing.count - i)


@triton.jit
def visit_walk(row, at, BLOCK: tl.constexpr):
    """Return the walk of a block of queries, inside it those tiles that its row is about, and how many it lists."""
    inner_first, inner_last = tl.load(row + 1), tl.load(row + 2)
    return Walk(0, at.first, at.last, inner_first * BLOCK, inner_last * BLOCK, -1), tl.load(row)


@triton.jit
def listed_tile(row, i):
    """Return the tile that a row lists as number ``i``."""
    return tl.load(row + HEADER + i)


@triton.jit
def no_bits(x, q, BLOCK: tl.constexpr):
    """Return the bits of no tile: a word for each row of a block, for 16-bit products one for each thread."""
    if q.dtype == tl.float32:
        words = tl.zeros((x.BLOCK_M // BLOCK, BLOCK), tl.int32)
    else:
        words = tl.zeros((x.BLOCK_M // BLOCK, 2 * BLOCK), tl.int32)
    return words


@triton.jit
def note_tile(words, x, size, q, maxima, edge, i, BLOCK: tl.constexpr):
    """Note whether a score of visit ``i`` is above its query's edge, for each block of BLOCK queries.

    The sign of a difference says so, and signs are put together two an instruction. Those of 16-bit products are put
    together as a thread holds them, (.., 2, .., GROUPS // 8, .., 2); what threads hold is put together once a word.

    Args:
        words: from ``no_bits``.
        maxima: of the tile's scores, (BLOCK_M, GROUPS) before ``scale``.
        edge: (BLOCK_M,); ``-inf`` for a query that every score is to count for.
    """
    short = (edge[:, None] - maxima * size.scale).to(tl.int32, bitcast=True)
    if q.dtype == tl.float32:
        signs = any_sign(short, 1)
    else:
        signs = tl.reshape(short, (x.BLOCK_M // 16, 2, 8, maxima.shape[1] // 8, 4, 2))
        signs = any_sign(any_sign(any_sign(signs, 5), 3), 1)
    return words | (((tl.reshape(signs, words.shape) >> 31) & 1) << (i % 32))


@triton.jit
def last_of_word(listing, i):
    """Tell whether the tiles whose bits are noted are to be listed after visit ``i``."""
    return (i % 32 == 31) | (i == listing.count - 1)


@triton.jit
def worth_listing(listing, listed, visits):
    """Tell whether it pays to go on: whether one of 16 tiles is left out, or too few of them are listed to tell."""
    most = tl.min(tl.where(listing.there, listed, visits), 0)
    return (visits % 32 != 0) | (16 * most < 15 * visits)


@triton.jit
def list_noted(listing, words, listed, i):
    """List those of the last visits, up to ``i`` and from the last multiple of 32 on, whose bit is set.

    Args:
        words: from ``note_tile``.
        listed: (blocks of the program,) how many tiles are listed already.

    Returns:
        How many are listed then.
    """
    word = tl.reduce(words, 1, either)
    bit = tl.arange(0, 32)[None, :]
    before = set_bits(word[:, None] & ((1 << bit) - 1))
    keep = (((word[:, None] >> bit) & 1) > 0) & listing.there[:, None]
    tile = visited(listing, i - i % 32 + bit)
    tl.store(listing.rows[:, None] + HEADER + listed[:, None] + before, tl.broadcast_to(tile, keep.shape), mask=keep)
    return listed + set_bits(word)
