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
from ..mapping import load_exponent, norm_gap, weights
from ..scores import largest, load_queries, load_theta, query_block, row_max, threshold_scores
from ..worklists.pairs import edge_tile, pair_keys, pair_scores, query_pair
from ..worklists.walk import query_list
from .lower_bound import rise
from .refine import last_step, store_passes, store_theta

_NEWTON_STEPS = tl.constexpr(4)  # more leave the number of survivors as it is, to four digits


@triton.jit
def _fold(x, size, at, q, k, keys, maxima, GROUPS: tl.constexpr, MASKED: tl.constexpr):
    """Take a tile of keys into the maxima (BLOCK_M, GROUPS) of a block's queries."""
    raw = pair_scores(x, size, at, q, k, keys, MASKED, False)
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


@triton.jit
def bound_kernel(x, size, floor_out, GROUPS: tl.constexpr):
    """Write a lower bound of theta for two blocks of queries of one head.

    Args:
        floor_out: (B, H, N_q) float32; ``+inf`` for rows that see no key.
        GROUPS: maxima a query; x.BLOCK_N is a multiple.
    """
    size = open_sizes(x, size)
    pair = query_pair(x, size)
    a = load_exponent(x, size, pair.one.head)
    one = tl.full((x.BLOCK_M, GROUPS), float("-inf"), tl.float32)
    two = tl.full((x.BLOCK_M, GROUPS), float("-inf"), tl.float32)
    for i in range(pair.edges):
        keys, k = pair_keys(x, size, pair, edge_tile(pair, i))
        one = _fold(x, size, pair.one, pair.q_one, k, keys, one, GROUPS, True)
        two = _fold(x, size, pair.two, pair.q_two, k, keys, two, GROUPS, True)
    for tile in range(pair.inner_first, pair.inner_last):
        keys, k = pair_keys(x, size, pair, tile)
        one = _fold(x, size, pair.one, pair.q_one, k, keys, one, GROUPS, False)
        two = _fold(x, size, pair.two, pair.q_two, k, keys, two, GROUPS, False)
    _store_bound(x, size, pair.one, one, a, floor_out)
    _store_bound(x, size, pair.two, two, a, floor_out)


@triton.jit(do_not_specialize=["max_iterations"])
def listed_kernel(x, size, floor_in, theta_out, max_iterations, passes_out=None):
    """Write theta for one block of queries of one head, solved on its list of columns from a lower bound.

    Newton's steps on the norm of the weights rise to theta and never pass it (see lower_bound.py): no bracket is
    needed, and no curvature. One pass over the list a step.

    Args:
        floor_in: (B, H, N_q) float32, the bound; ``+inf`` for rows that see no key.
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
    tolerance = tl.maximum(last_step(a, x.ALPHA), 1.2e-7 * tl.abs(theta))  # what is left is below float32's resolution
    iteration = 0
    unfinished = 1
    while (unfinished > 0) & (iteration < max_iterations):
        total = tl.zeros((x.BLOCK_M,), tl.float32)
        slope = tl.zeros((x.BLOCK_M,), tl.float32)
        for tile in range(walk.first, walk.last):
            p, u = weights(threshold_scores(x, size, at, q, walk, tile), size.scale, theta[:, None], a, x.ALPHA)
            total += tl.sum(p, 1)
            slope += tl.sum(u, 1)
        # not clamped at zero: the last step may take back what rounding added to an earlier one
        gap, factor = norm_gap(tl.maximum(total, 1e-30), a, x.ALPHA)
        step = gap / (factor * tl.maximum(slope, 1e-30))
        theta += step
        unfinished = tl.max(((tl.abs(step) > tolerance) & ~empty).to(tl.int32), 0)  # false for NaN, which must not hang
        iteration += 1
    store_theta(theta_out, size, at, tl.where(empty, float("inf"), theta))
    store_passes(passes_out, x, size, at, iteration)
