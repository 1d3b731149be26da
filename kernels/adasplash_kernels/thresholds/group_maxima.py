"""Thresholds from group maxima: a bound that most scores fail, then a solve on the few that pass it.

The threshold of a subset of the scores is a lower bound of the threshold of all (f is a sum of non-negative terms), and
a score that is not above a lower bound is not in the support. The subset here is the maxima of GROUPS groups of a
query's scores, every GROUPS-th key: one elementwise maximum a score, with no exchange between lanes. It holds nearly
all of the support, so the bound is nearly the threshold. See worklists/columns.py for the lists that follow from it.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..inputs import open_sizes
from ..launching import launched_by_key
from ..mapping import load_exponent, weights
from ..scores import (
    largest,
    load_queries,
    load_theta,
    query_block,
    query_block_at,
    query_place,
    row_max,
    threshold_scores,
)
from ..worklists.visits import (
    last_of_word,
    list_noted,
    listing_of,
    no_bits,
    note_tile,
    store_header,
    visited,
    worth_listing,
)
from ..worklists.walk import INSIDE, all_tiles, may_start, may_walk, next_tile, query_list, run
from .lower_bound import lowest_score, rise
from .refine import store_passes, store_theta
from .settle import longer_step, newton_step, resolved_step, settled_step

_NEWTON_STEPS = tl.constexpr(4)  # more leave the number of survivors as it is, to four digits
# The bound is raised after 2 tiles, and each time that they are 4 times as many: it takes as long as three tiles do.
_RAISED_AT, _RAISED_NEXT = tl.constexpr(2), tl.constexpr(4)


@triton.jit
def _fold(x, size, at, q, walk, tile, GROUPS: tl.constexpr, PART: tl.constexpr):
    """Return the maxima (BLOCK_M, GROUPS) of a tile of keys, of scores before ``scale``."""
    raw = threshold_scores(x, size, at, q, walk, tile, PART)
    return largest(tl.reshape(raw, (x.BLOCK_M, x.BLOCK_N // GROUPS, GROUPS)), 1)


@triton.jit
def _both(maxima, folded):
    return tl.maximum(maxima, folded, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _climbed(x, size, maxima, start, a, STEPS: tl.constexpr):
    """Return a lower bound (BLOCK_M,) from one (-inf for none) and maxima so far; ``-inf`` if there is no score yet."""
    maxima = maxima * size.scale
    start = _both(row_max(maxima), start)
    none = start == float("-inf")
    floor = rise(maxima, 1.0, tl.where(none, 0.0, start), a, STEPS, x.ALPHA)
    floor -= 1e-6 * (1.0 + tl.abs(floor))
    return tl.where(none, float("-inf"), floor)


@triton.jit
def _inside(x, size, at, q, walk, maxima, a, listing, GROUPS: tl.constexpr, BLOCK: tl.constexpr):
    """Take the tiles that need no mask into the maxima, and list those with a score above the bound so far.

    Where nearly all of the first tiles are listed, the others are taken without a look at the bound.

    Returns:
        The maxima, the bound, and how many tiles each block lists; -1 if they are to be visited without a list.
    """
    words = no_bits(x, q, BLOCK)
    listed = tl.zeros((x.BLOCK_M // BLOCK,), tl.int32)
    floor = tl.full((x.BLOCK_M,), float("-inf"), tl.float32)
    edge = floor
    begin = 0
    end = tl.minimum(listing.count, _RAISED_AT)
    while begin < end:
        for i in range(begin, end):
            folded = _fold(x, size, at, q, walk, visited(listing, i), GROUPS, INSIDE)
            words = note_tile(words, x, size, q, folded, edge, i, BLOCK)
            maxima = _both(maxima, folded)
            if last_of_word(listing, i):
                listed = list_noted(listing, words, listed, i)
                words = tl.zeros_like(words)
        begin = end
        end = tl.where(worth_listing(listing, listed, end), tl.minimum(end * _RAISED_NEXT, listing.count), end)
        if begin < end:
            floor = _climbed(x, size, maxima, floor, a, 1)
            edge = lowest_score(floor - 1e-6 * (1.0 + tl.abs(floor)), a)
    for i in range(end, listing.count):
        maxima = _both(maxima, _fold(x, size, at, q, walk, visited(listing, i), GROUPS, INSIDE))
    return maxima, floor, tl.where(end < listing.count, -1, listed)


@launched_by_key
@triton.jit(do_not_specialize=["pitch"])
def bound_kernel(x, size, floor_out, visits, pitch, GROUPS: tl.constexpr, BLOCK: tl.constexpr):
    """Write a lower bound of theta for one block of queries of one head, and which tiles may hold a score above it.

    Args:
        floor_out: (B, H, N_q) float32; ``+inf`` for rows that see no key.
        visits: (heads of this launch, blocks of BLOCK queries, pitch) int32, or None not to list tiles; see visits.py.
        GROUPS: maxima a query; x.BLOCK_N is a multiple.
        BLOCK: queries whose tiles are listed together; x.BLOCK_M is a multiple.
    """
    size = open_sizes(x, size)
    at = query_block(x, size)
    q = load_queries(x, size, at)
    a = load_exponent(x, size, at.head)
    walk = all_tiles(at)
    maxima = tl.full((x.BLOCK_M, GROUPS), float("-inf"), tl.float32)
    for part in tl.static_range(x.FIRST_PART, x.PARTS_END if visits is None else INSIDE):
        state, count = run(walk, 0, x.LISTS, part, x.BLOCK_N)
        for i in range(count):
            tile, _state = next_tile(walk, 0, state, i, x.LISTS, part, x.BLOCK_N)
            maxima = _both(maxima, _fold(x, size, at, q, walk, tile, GROUPS, part))
    if visits is None:
        floor = _climbed(x, size, maxima, float("-inf"), a, _NEWTON_STEPS)
    else:
        listing = listing_of(x, size, at, walk, visits, pitch, BLOCK)
        maxima, before, listed = _inside(x, size, at, q, walk, maxima, a, listing, GROUPS, BLOCK)
        floor = _climbed(x, size, maxima, float("-inf"), a, _NEWTON_STEPS)
        floor = tl.where(before > floor, before, floor)  # four steps from the start may be short of more on the way
        spoilt = tl.max(tl.reshape((floor != floor).to(tl.int32), (x.BLOCK_M // BLOCK, BLOCK)), 1)
        store_header(listing, tl.where(spoilt > 0, -1, listed))
    store_theta(floor_out, size, at, tl.where(floor == float("-inf"), float("inf"), floor))


@triton.jit
def _rise(x, size, at, q, walk, floor_in, theta_out, settle, max_iterations, passes_out):
    """Write theta for one block of queries."""
    a = load_exponent(x, size, at.head)
    theta = load_theta(floor_in, size, at)
    empty = theta == float("inf")
    theta = tl.where(empty, 0.0, theta)
    most = tl.full((x.BLOCK_M,), float("inf"), tl.float32)
    iteration = 0
    unfinished = 1
    while (unfinished > 0) & (iteration < max_iterations):
        total = tl.zeros((x.BLOCK_M,), tl.float32)
        slope = tl.zeros((x.BLOCK_M,), tl.float32)
        held = tl.zeros((x.BLOCK_M,), tl.float32)
        for part in tl.static_range(x.FIRST_PART, x.PARTS_END):
            state, count = run(walk, 0, x.LISTS, part, x.BLOCK_N)
            for i in range(count):
                tile, _state = next_tile(walk, 0, state, i, x.LISTS, part, x.BLOCK_N)
                raw = threshold_scores(x, size, at, q, walk, tile, part)
                p, u = weights(raw, size.scale, theta[:, None], a, x.ALPHA)
                total += tl.sum(p, 1)
                slope += tl.sum(u, 1)
                if settle is not None:
                    held += tl.sum(tl.minimum(u * 1e30, 1.0), 1)
        step = newton_step(total, slope, a, x.ALPHA)
        if settle is None:
            again = tl.abs(step) > resolved_step(theta, a, x.ALPHA)
        else:
            most = tl.where(step < 0.0, most, held)  # the support grows again on the way back
            step, left = longer_step(step, total, slope, held)
            again = left > settled_step(theta, total, slope, most, a, x.ALPHA, settle.EPS)
        theta += step
        # NaN must not hang: it is not always in the step, since a GPU's maximum drops it
        unfinished = tl.max((again & ~empty & (theta == theta)).to(tl.int32), 0)
        iteration += 1
    store_theta(theta_out, size, at, tl.where(empty, float("inf"), theta))
    if settle is not None:
        store_theta(settle.count, size, at, most)
    store_passes(passes_out, x, size, at, iteration)


@launched_by_key
@triton.jit(do_not_specialize=["max_iterations"])
def listed_kernel(x, size, floor_in, theta_out, settle, max_iterations, passes_out=None):
    """Write theta for one block of queries of one head, solved on its list of columns from a lower bound.

    Newton's steps on the norm of the weights rise to theta and never pass it (see lower_bound.py): no bracket is
    needed. One pass over the list a step.

    Args:
        floor_in: (B, H, N_q) float32, the bound; ``+inf`` for rows that see no key.
        settle: None, or what says when to stop a step short of theta and takes the number of weights (see settle.py).
        passes_out: see ``store_passes``.
    """
    size = open_sizes(x, size)
    head_index, index = query_place(x, size)
    if may_start(x, size, head_index, index):
        at = query_block_at(x, size, head_index, index)
        q, walk = load_queries(x, size, at), query_list(x, size, at)
        if may_walk(x, walk):
            _rise(x, size, at, q, walk, floor_in, theta_out, settle, max_iterations, passes_out)
