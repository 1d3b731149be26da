"""Climbing towards a threshold from below, on numbers that are at hand: no key is touched."""

from __future__ import annotations

import triton
import triton.language as tl

from ..mapping import norm_gap, weights


@triton.jit
def lowest_score(theta, a):
    """Return the score that the support is above at the least, for a threshold or a lower bound of it."""
    # a few units in the last place lower: products may round differently from one pass to the next
    return theta - 1.0 / a - 4e-7 * (tl.abs(theta) + 1.0 / a)


@triton.jit
def rise(scores, counts, theta, a, STEPS: tl.constexpr, ALPHA: tl.constexpr):
    """Return a better lower bound of the threshold of each row of scores, from one (rows,).

    Newton's steps on the norm of the weights climb to the threshold and never pass it, so that any number of them
    leaves a lower bound.

    Args:
        scores: (rows, n) float32.
        counts: how often each score counts, (rows, n) float32 or a number.
    """
    for _ in tl.static_range(STEPS):
        p, u = weights(scores, 1.0, theta[:, None], a, ALPHA)
        gap, factor = norm_gap(tl.maximum(tl.sum(counts * p, 1), 1.0), a, ALPHA)
        theta += gap / (factor * tl.maximum(tl.sum(counts * u, 1), 1e-30))
    return theta
