"""Histogram start (AdaSplash-2): one pass counts the scores near the top, which brackets tau within about a bin.

Eight bins reach down from the largest score as far as the support can, 1/a (at most _RANGE). Each lane of a tile holds
its own counters, eight of four bits in one 32-bit word, so counting is one shift and one add a score, with no exchange
between lanes; every 15 tiles, before they can overflow, they are added up by row. Counted at their bins' lower edges,
the scores have a threshold that is below tau and, where the bins cover the support, 0.25 to 1.25 bins below (scores are
placed to half a bin). Solving for it touches eight numbers a row and no key.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..inputs import open_sizes
from ..launching import launched_by_key
from ..mapping import load_exponent
from ..scores import load_queries, query_block, threshold_scores
from ..worklists.walk import all_tiles, mask_row, next_tile, run
from .lower_bound import rise
from .refine import bracket, highest_score, refine, store_passes, store_theta

_BINS = tl.constexpr(8)
_RANGE = tl.constexpr(14.0)  # e^-14 is below what float32 softmax resolves beside the largest weight
_NEWTON_STEPS = tl.constexpr(8)
# Between 2^22 and 2^23 floats are halves apart: adding this rounds to half bins and leaves them in the low bits.
_TO_HALVES = tl.constexpr(6291456.0)


@triton.jit
def _add_up(counters):
    """Add the lanes' counters up: (rows, lanes) words to (rows, bins) float32."""
    bins = tl.arange(0, _BINS)
    counts = tl.zeros((counters.shape[0], _BINS), tl.float32)
    for b in tl.static_range(_BINS // 2):
        # two counters a sum, 16 bits apart: 15 times the lanes of a row stays far below 2^16
        pair = tl.sum((counters >> (4 * b)) & 0x000F000F, 1)
        lower, upper = (pair & 0xFFFF).to(tl.float32), (pair >> 16).to(tl.float32)
        counts += tl.where(bins[None, :] == b, lower[:, None], 0.0)
        counts += tl.where(bins[None, :] == b + _BINS // 2, upper[:, None], 0.0)
    return counts


@triton.jit
def _count(x, size, at, q, top, width):
    """Return (rows, bins) how many scores lie in each bin: those of bin b are above ``top - (b + 1) width``."""
    counts = tl.zeros((x.BLOCK_M, _BINS), tl.float32)
    counters = tl.zeros((x.BLOCK_M, x.BLOCK_N), tl.uint32)
    in_bins = size.scale / width
    highest = top / width
    walk = all_tiles(at)
    for part in tl.static_range(x.FIRST_PART, x.PARTS_END):
        state, count = run(walk, 0, x.LISTS, part, x.BLOCK_N)
        for i in range(count):
            tile, _state = next_tile(walk, 0, state, i, x.LISTS, part, x.BLOCK_N)
            raw = threshold_scores(x, size, at, q, walk, tile, part)
            # half bins below the largest score, to the nearest: never a bin above the score's own lower edge
            below = (highest[:, None] - raw * in_bins) + _TO_HALVES
            inside = below < _TO_HALVES + _BINS  # false for NaN and for masked scores
            place = (below.to(tl.uint32, bitcast=True) & (2 * _BINS - 2)) << 1
            counters += tl.where(inside, tl.full(place.shape, 1, tl.uint32) << place, 0)
            if (i % 15 == 14) | (i == count - 1):  # four bits count to 15
                counts += _add_up(counters)
                counters = tl.zeros((x.BLOCK_M, x.BLOCK_N), tl.uint32)
    return counts


@launched_by_key
@triton.jit(do_not_specialize=["max_iterations"])
def histogram_kernel(x, size, theta_out, tiles_out, max_iterations, passes_out=None):
    """Write theta for one block of queries of one head, its marks and its passes unless these are None."""
    size = open_sizes(x, size)
    at = query_block(x, size)
    q = load_queries(x, size, at)
    a = load_exponent(x, size, at.head)
    top = highest_score(x, size, at, q)
    empty, low, high = bracket(x, size, at, top, a)
    width = tl.minimum(1.0 / tl.maximum(a, 1e-6), _RANGE) / (_BINS - 1)
    counts = _count(x, size, at, q, top, width)
    highest = tl.where(empty, 0.0, top)
    edges = highest[:, None] - (tl.arange(0, _BINS) + 1).to(tl.float32)[None, :] * width
    start = rise(edges, counts, highest - width, a, _NEWTON_STEPS, x.ALPHA)  # below tau: scores count as their edges
    low = tl.maximum(low, start - 1e-6 * (1.0 + tl.abs(start)))
    # scores sit anywhere in their bins: the middle of that range is the best guess, and Halley's step takes it on
    theta = tl.maximum(tl.minimum(start + 0.75 * width, high), low)
    marks = mask_row(x, size, at, tiles_out)
    theta, passes = refine(x, size, at, q, all_tiles(at), a, empty, low, high, theta, marks, max_iterations, True)
    store_theta(theta_out, size, at, theta)
    store_passes(passes_out, x, size, at, passes)
