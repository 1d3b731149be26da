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
from ..scores import largest, load_queries, load_theta, query_block, row_max, threshold_scores
from ..worklists.walk import all_tiles, next_tile, query_list, run
from .lower_bound import rise
from .refine import store_passes, store_theta
from .settle import longer_step, newton_step, resolved_step, settled_step

_NEWTON_STEPS = tl.constexpr(4)  # more leave the number of survivors as it is, to four digits


@triton.jit
def _fold(x, size, at, q, walk, tile, maxima, GROUPS: tl.constexpr, PART: tl.constexpr):
    """Take a tile of keys into the maxima (BLOCK_M, GROUPS) of a block's queries."""
    raw = threshold_scores(x, size, at, q, walk, tile, PART)
    folded = largest(tl.reshape(raw, (x.BLOCK_M, x.BLOCK_N // GROUPS, GROUPS)), 1)
    return tl.maximum(maxima, folded, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _store_bound(x, size, at, maxima, a, floor_out):
    maxima = maxima * size.scale
    top = row_max(maxima)
    empty = top == float("-inf")
    floor = rise(maxima, 1.0, tl.where(empty, 0.0, top), a, _NEWTON_STEPS, x.ALPHA)
    floor -= 1e-6 * (1.0 + tl.abs(floor))
    store_theta(floor_out, size, at, tl.where(empty, float("inf"), floor))


@launched_by_key
@triton.jit
def bound_kernel(x, size, floor_out, GROUPS: tl.constexpr):
    """Write a lower bound of theta for one block of queries of one head.

    Args:
        floor_out: (B, H, N_q) float32; ``+inf`` for rows that see no key.
        GROUPS: maxima a query; x.BLOCK_N is a multiple.
    """
    size = open_sizes(x, size)
    at = query_block(x, size)
    q = load_queries(x, size, at)
    walk = all_tiles(at)
    maxima = tl.full((x.BLOCK_M, GROUPS), float("-inf"), tl.float32)
    for part in tl.static_range(x.FIRST_PART, x.PARTS_END):
        state, count = run(walk, 0, x.LISTS, part, x.BLOCK_N)
        for i in range(count):
            tile, _state = next_tile(walk, 0, state, i, x.LISTS, part, x.BLOCK_N)
            maxima = _fold(x, size, at, q, walk, tile, maxima, GROUPS, part)
    _store_bound(x, size, at, maxima, load_exponent(x, size, at.head), floor_out)


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
    at = query_block(x, size)
    q = load_queries(x, size, at)
    a = load_exponent(x, size, at.head)
    walk = query_list(x, size, at)
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
