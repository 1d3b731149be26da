"""The safeguarded solve that every method ends with: Halley's step inside a bracket, else its midpoint.

Each iteration is one pass over the keys, which recomputes the scores tile by tile instead of storing them. With
``theta`` in units of scores (see reference.py) Halley's and bisection's iterates are the paper's (AdaSplash, alg. 1).
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..mapping import curvature, norm_gap, weights
from ..scores import row_max, threshold_scores
from ..worklists.tiles import mark_tile
from ..worklists.walk import EDGES, INSIDE, all_tiles, next_tile, run, stretch

MAX_ITERATIONS = 40  # bisection alone would need about 30; Halley's steps need 2 to 6


@triton.jit
def highest_score(x, size, at, q):
    """Return the largest score of each query, in one pass over the keys; ``-inf`` for rows that see none."""
    walk = all_tiles(at)
    top = tl.full((x.BLOCK_M,), float("-inf"), tl.float32)
    for part in tl.static_range(x.FIRST_PART, x.PARTS_END):
        state, count = run(walk, 0, x.LISTS, part, x.BLOCK_N)
        for i in range(count):
            tile, _state = next_tile(walk, 0, state, i, x.LISTS, part, x.BLOCK_N)
            raw = threshold_scores(x, size, at, q, walk, tile, part)
            top = tl.maximum(top, row_max(raw), propagate_nan=tl.PropagateNan.ALL)
    return top * size.scale


@triton.jit
def bracket(x, size, at, top, a):
    """Return which rows are empty and the a-priori bracket [max s, max s + (1 - n^(-a)) / a] (AdaSplash, sec. 3.1)."""
    empty = top == float("-inf")
    low = tl.where(empty, 0.0, top)
    log_n = tl.log(tl.maximum(at.high - at.low, 1).to(tl.float32))
    reduction = a * log_n
    # (1 - e^(-x)) / a, by its series where the difference would cancel: ties sit at this very end of the bracket
    small = reduction < 0.25
    y = -reduction
    series = 1.0 + y * (1 / 2 + y * (1 / 6 + y * (1 / 24 + y * (1 / 120 + y * (1 / 720)))))
    width = tl.where(small, log_n * series, (1.0 - tl.exp(y)) / tl.where(small, 1.0, a))
    slack = tl.abs(low) * 2e-7
    return empty, low - slack, low + width * 1.000001 + 1e-6 + slack


@triton.jit
def _step(theta, low, high, total, slope, curve, a, tolerance, ALPHA: tl.constexpr, NORM: tl.constexpr):
    """One update: the new iterate, the narrowed bracket, whether that was all, and how far the next step may reach."""
    f = total - 1.0
    low = tl.where(f >= 0.0, theta, low)
    high = tl.where(f <= 0.0, theta, high)
    slope = tl.maximum(slope, 1e-30)
    if NORM or ALPHA == "1":  # softmax is where the norm makes one step exact
        total = tl.maximum(total, 1e-30)
        g, factor = norm_gap(total, a, ALPHA)
        newton = g / (factor * slope)
        bend = curve - (1.0 - a) * slope * (slope / total)
        halley = 2.0 * g * slope / tl.maximum(2.0 * factor * slope * slope - g * bend, 1e-30)
    else:
        newton = f / slope
        halley = 2.0 * f * slope / tl.maximum(2.0 * slope * slope - f * curve, 1e-30)
    # A weight at the very edge of the support can make the curvature so large that Halley's step all but stops
    # while the error is still there; the midpoint is the better guess then, as it is at and outside the bracket's ends.
    candidate = theta + halley
    use_middle = (tl.abs(halley) < 0.5 * tl.abs(newton)) | (candidate <= low) | (candidate >= high)
    width = high - low
    error = tl.minimum(tl.abs(newton), width)
    # Halley's error is cubic, a quarter of the step times the square of this; beyond, the step says little.
    bend_ratio = error * curve / slope
    bent = (bend_ratio > 0.03) & (error > 1e-6)
    # What the next step may still take away: eight times that estimate. A guess, which ``refine`` checks.
    reach = tl.where(use_middle, 0.5 * width, error * tl.minimum(2.0 * bend_ratio * bend_ratio, 1.0) + tolerance)
    error = tl.where(bent, width, error)
    # The last step may end at an end of the bracket, where the solution may be. The others must not: between two
    # ends that send each other's step back they would go on for ever.
    nearest = tl.where(candidate < low, low, tl.where(candidate > high, high, candidate))  # NaN stays
    settled = ~(error > tolerance)  # true for NaN, which must never hang
    guess = tl.where(settled, nearest, tl.where(use_middle, 0.5 * (low + high), candidate))
    return guess, low, high, settled, reach


@triton.jit
def last_step(a, ALPHA: tl.constexpr):
    """Return how large a step may be that needs no other after it, as far as changes of the support go.

    A weight that enters or leaves the support on the way is at most (a step)^(1/a), and there may be 10^5 of them tied:
    1e-5 keeps their sum below 1e-6 for alpha = 1.5, and for alpha = 2 nothing but float32's resolution would.
    """
    if ALPHA == "1":
        step = 1e-3
    elif ALPHA == "1.5":
        step = 1e-5
    elif ALPHA == "2":
        step = 1e-6
    else:
        step = tl.maximum(tl.minimum(tl.exp(-24.4 * a) / a, 1e-3), 1e-6)
    return step


@triton.jit
def refine(x, size, at, q, walk, a, empty, low, high, theta, marks, max_iterations, NORM: tl.constexpr):
    """Return theta of a block of queries, solved from a start inside a bracket, and the number of passes that took.

    Theta is ``+inf`` for empty rows.

    Args:
        walk: over all tiles, which hold every score that may be in the support.
        marks: this block's row of the bit mask of tiles, written on the way: a tile is marked if a score in it may
            be in the support. None for no mask.
        NORM: step on the norm of the weights (AdaSplash-2) or on their sum, as AdaSplash does.
    """
    tolerance = tl.maximum(last_step(a, x.ALPHA), 1.2e-7 * tl.abs(low))  # what is left is below float32's resolution
    reach = high - low
    real = (at.rows < size.n_q) & (~empty)
    floor = theta
    iteration = 0
    unfinished = 1
    while (unfinished > 0) & (iteration < max_iterations):
        total = tl.zeros((x.BLOCK_M,), tl.float32)
        slope = tl.zeros((x.BLOCK_M,), tl.float32)
        curve = tl.zeros((x.BLOCK_M,), tl.float32)
        # Marks must hold for the theta that comes out of this pass: they allow for a step down of ``reach``.
        floor = theta - reach
        if x.ALPHA == "1":
            edge = tl.full((x.BLOCK_M,), float("-inf"), tl.float32)
        else:
            edge = floor - 1.0 / a - 4e-7 * (tl.abs(floor) + 1.0 / a)
        word = tl.zeros((x.BLOCK_M,), tl.int32)
        for number in tl.static_range(3):  # in ascending order, as words of marks are
            begin, end = stretch(walk, x.BLOCK_N, number)
            for tile in range(begin, end):
                raw = threshold_scores(x, size, at, q, walk, tile, INSIDE if number == 1 else EDGES)
                p, u = weights(raw, size.scale, theta[:, None], a, x.ALPHA)
                total += tl.sum(p, 1)
                slope += tl.sum(u, 1)
                curve += tl.sum(curvature(p, u, a, x.ALPHA), 1)
                if marks is not None:
                    if iteration > 0:  # the first pass is never the last, and its ``reach`` says little
                        word = mark_tile(marks, word, raw, size.scale, edge, tile, walk.last)
        theta, low, high, settled, reach = _step(theta, low, high, total, slope, curve, a, tolerance, x.ALPHA, NORM)
        again = ~settled
        if marks is not None:
            again = again | (theta < floor) | (iteration == 0)
        unfinished = tl.max((again & real).to(tl.int32), 0)
        iteration += 1
    if marks is not None:
        theta = tl.where(theta < floor, floor, theta)  # only if the iterations ran out: the marks stay a superset
    return tl.where(empty, float("inf"), theta), iteration


@triton.jit
def store_theta(theta_out, size, at, theta):
    """Write the thresholds (B, H, N_q) of a block of queries."""
    tl.store(theta_out + at.head_index * size.n_q + at.rows, theta, mask=at.rows < size.n_q)


@triton.jit
def store_passes(passes_out, x, size, at, passes):
    """Write the passes of a block's solve over its keys, (B * H, query blocks) int32; nothing if there is no such
    tensor, as in every call but those that count."""
    if passes_out is not None:
        tl.store(passes_out + at.head_index * tl.cdiv(size.n_q, x.BLOCK_M) + at.index, passes)
