"""From scores to weights, tile by tile: p = [1 + a (s - theta)]_+^(1/a) with a = alpha - 1 (see reference.py).

``ALPHA`` picks the closed forms: "1" softmax, "1.5", "2" sparsemax; "any" works for all of [1, 2] through logarithms.
"""

from __future__ import annotations

import triton
import triton.language as tl

_LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def load_exponent(x, size, head):
    """Return a = alpha - 1 of a head; kept off zero, where the general form reaches softmax as a limit."""
    if x.ALPHA == "1":
        a = 0.0
    elif x.ALPHA == "1.5":
        a = 0.5
    elif x.ALPHA == "2":
        a = 1.0
    else:
        a = tl.minimum(tl.maximum(tl.load(x.alpha + head * size.alpha_head) - 1.0, 1e-6), 1.0)
    return a


@triton.jit
def log1p(t):
    """ln(1 + t) for t > -1 without cancellation near 0 (Kahan), from portable operations only."""
    w = 1.0 + t
    d = w - 1.0
    return tl.where(d == 0.0, t, tl.log(w) * (t / tl.where(d == 0.0, 1.0, d)))


@triton.jit
def weights(raw, scale, theta, a, ALPHA: tl.constexpr):
    """Return p and u = p^(2 - alpha) (zero outside the support) of scores ``s = scale raw``.

    The difference of score and threshold comes first, in one multiply-add that rounds once: where both are huge, a
    one that is added to either is lost.
    """
    y = raw * scale - theta
    if ALPHA == "1":
        p = tl.exp2(y * _LOG2_E)
        u = p
    elif ALPHA == "1.5":
        u = tl.maximum(0.5 * y + 1.0, 0.0, propagate_nan=tl.PropagateNan.ALL)
        p = u * u
    elif ALPHA == "2":
        p = tl.maximum(y + 1.0, 0.0, propagate_nan=tl.PropagateNan.ALL)
        u = tl.where(p > 0.0, 1.0, p)
    else:
        t = a * y
        outside = t <= -1.0  # false for NaN, which must reach the output
        log_p = log1p(tl.where(outside, 0.0, t)) / a
        p = tl.where(outside, 0.0, tl.exp(log_p))
        u = tl.where(outside, 0.0, tl.exp((1.0 - a) * log_p))
    return p, u


@triton.jit
def curvature(p, u, a, ALPHA: tl.constexpr):
    """Terms of d2f/dtheta2, which is (1 - a) sum p^(1 - 2a)."""
    if ALPHA == "1":
        w = p
    elif ALPHA == "1.5":
        w = tl.where(u > 0.0, 0.5, 0.0)
    elif ALPHA == "2":
        w = tl.zeros_like(p)
    else:
        # u^2 / p = p^(1 - 2a). It has no bound at the edge of the support for a > 1/2; the caller copes.
        w = tl.where(p > 0.0, (1.0 - a) * u * (u / tl.where(p > 0.0, p, 1.0)), 0.0)
    return w


@triton.jit
def norm_gap(total, a, ALPHA: tl.constexpr):
    """Return g = (T^a - 1) / a and T^(a-1): the norm of the weights, which is nearly linear in theta for a near 0."""
    if ALPHA == "1.5":
        root = tl.sqrt(total)
        g = 2.0 * (total - 1.0) / (root + 1.0)
        factor = 1.0 / root
    elif ALPHA == "2":
        g = total - 1.0
        factor = tl.full(total.shape, 1.0, tl.float32)
    else:
        log_total = tl.log(total)
        y = a * log_total
        series = log_total * (1.0 + y * (0.5 + y * (1 / 6 + y * (1 / 24))))
        power = tl.exp(y)
        g = tl.where(tl.abs(y) < 0.1, series, (power - 1.0) / tl.where(tl.abs(y) < 0.1, 1.0, a))
        factor = power / total
    return g, factor


@triton.jit
def alpha_slope(p, u, a):
    """p d ln p / d alpha at a fixed threshold: (p - u - p x) / a^2 with x = a ln p, -p (ln p)^2 / 2 as a -> 0.

    Summed against ``dP - delta`` it is the gradient to alpha (Correia et al. 2019, arranged to stay finite).
    """
    log_p = tl.log(tl.where(p > 0.0, p, 1.0))
    x = a * log_p
    series = 1 / 40320 - x * (1 / 362880 - x * (1 / 3628800))
    series = -0.5 + x * (1 / 6 - x * (1 / 24 - x * (1 / 120 - x * (1 / 720 - x * (1 / 5040 - x * series)))))
    return tl.where(tl.abs(x) < 1.0, p * log_p * log_p * series, (p - u - p * x) / (a * a))
