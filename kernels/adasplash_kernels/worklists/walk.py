"""How kernels walk a work list: tiles come in runs, and every loop over a list is two loops, over runs and in a run.

Without a list there is one run, of all the tiles the mask of attention leaves. A bit mask has a run a word, as long as
its set bits. A new kind of list is a new branch of ``run_range``, ``run`` and ``next_tile``.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def query_list(x, size, at, tiles):
    """Return where the list of a block of queries starts; None without a list."""
    if tiles is None:
        start = None
    else:
        row = at.head_index * tl.cdiv(size.n_q, x.BLOCK_M) + at.index
        start = tiles + row * tl.cdiv(tl.cdiv(size.n_k, x.BLOCK_N), 32)
    return start


@triton.jit
def key_list(x, size, at, head):
    """Return where the list of a block of keys starts, for one of the query heads that share them."""
    if x.key_tiles is None:
        start = None
    else:
        row = (at.batch * size.heads + head) * tl.cdiv(size.n_k, x.BLOCK_N) + at.index
        start = x.key_tiles + row * tl.cdiv(tl.cdiv(size.n_q, x.BLOCK_M), 32)
    return start


@triton.jit
def run_range(tiles, first, last):
    """Return the first run and the one past the last, of a block that meets tiles ``first`` to ``last``."""
    if tiles is None:
        begin, end = 0, 1
    else:
        begin, end = first // 32, (last + 31) // 32
    return begin, end


@triton.jit
def run(tiles, number, first, last):
    """Return the state of a run and how many tiles it has."""
    if tiles is None:
        state = first
        count = last - first
    else:
        state = tl.load(tiles + number)
        count = _set_bits(state)
    return state, count


@triton.jit
def next_tile(tiles, number, state, i):
    """Return tile ``i`` of a run, and the state after it.

    Without a list it comes from the loop's own counter: Triton does not prefetch along a carried one.
    """
    if tiles is None:
        tile = state + i
    else:
        lowest = state & -state
        # the exponent of a power of two as a float; the sign bit alone is -2^31, whose magnitude is read the same way
        tile = number * 32 + ((lowest.to(tl.float32).to(tl.int32, bitcast=True) >> 23) & 255) - 127
        state = state ^ lowest
    return tile, state


@triton.jit
def _set_bits(word):
    word = word.to(tl.uint32, bitcast=True)
    word = word - ((word >> 1) & 0x55555555)
    word = (word & 0x33333333) + ((word >> 2) & 0x33333333)
    word = (word + (word >> 4)) & 0x0F0F0F0F
    return ((word * 0x01010101) >> 24).to(tl.int32)
