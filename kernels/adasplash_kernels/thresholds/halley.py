"""Halley-bisection (AdaSplash, algorithm 1): a bracket of the root, Halley's step where it stays inside.

With ``theta`` in units of scores (see reference.py) the paper's bracket ``[max z - 1, max z - n^(1-alpha)]`` reads
``[max s, max s + (1 - n^(-a)) / a]``, and Halley's and bisection's iterates are the same points. Each iteration is
one pass over the keys, which recomputes the scores tile by tile instead of storing them.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..scores import key_bounds, load_exponent, load_rows, query_block, score_tile, weights
from ..worklists.dense import key_range


@triton.jit
def _curvature(p, u, a, ALPHA: tl.constexpr):
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
def _next_theta(theta, low, high, total, slope, curve):
    """One Halley-bisection step; returns the new iterate, the narrowed bracket and the error it found."""
    f = total - 1.0
    low = tl.where(f >= 0.0, theta, low)
    high = tl.where(f <= 0.0, theta, high)
    newton = f / tl.maximum(slope, 1e-30)
    halley = 2.0 * f * slope / tl.maximum(2.0 * slope * slope - f * curve, 1e-30)
    # A weight at the very edge of the support can make the curvature so large that Halley's step all but stops
    # while the error is still there; the midpoint is the better guess then, as it is outside the bracket.
    stalled = tl.abs(halley) < 0.5 * tl.abs(newton)
    candidate = theta + halley
    middle = 0.5 * (low + high)
    use_middle = stalled | (candidate < low) | (candidate > high)
    error = tl.minimum(tl.abs(newton), high - low)
    return tl.where(use_middle, middle, candidate), low, high, error


@triton.jit(do_not_specialize=["n_q", "n_k", "max_iterations"])
def halley_kernel(
    Q, K, Theta, Alpha, Starts, Lengths,
    stride_qb, stride_qh, stride_qn, stride_kb, stride_kh, stride_kn,
    n_heads, groups, n_q, n_k, scale, alpha_stride, max_iterations,
    CAUSAL: tl.constexpr, PADDED: tl.constexpr, ALPHA: tl.constexpr,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Write theta for one block of queries of one head; ``+inf`` for rows that may see no key."""
    pid_m, head_index, batch, head, rows = query_block(n_q, n_heads, BLOCK_M)
    q = load_rows(Q + batch.to(tl.int64) * stride_qb + head.to(tl.int64) * stride_qh, rows, stride_qn, n_q, D, BLOCK_D)
    k_base = K + batch.to(tl.int64) * stride_kb + (head // groups).to(tl.int64) * stride_kh
    a = load_exponent(Alpha, head, alpha_stride, ALPHA)
    key_start, key_end = key_bounds(Starts, Lengths, batch, n_k, PADDED)
    first, n_key_blocks = key_range(pid_m, n_q, n_k, key_start, key_end, CAUSAL, BLOCK_M, BLOCK_N)

    top = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    for i in range(n_key_blocks):
        keys = first + i * BLOCK_N + tl.arange(0, BLOCK_N)
        k = load_rows(k_base, keys, stride_kn, n_k, D, BLOCK_D)
        s = score_tile(q, k, rows, keys, scale, n_q, n_k, key_start, key_end, CAUSAL)
        top = tl.maximum(top, tl.max(s, 1), propagate_nan=tl.PropagateNan.ALL)

    empty = top == float("-inf")
    low = tl.where(empty, 0.0, top)
    seen = tl.zeros((BLOCK_M,), tl.int32) + (key_end - key_start)
    if CAUSAL:
        seen = tl.minimum(seen, rows + (n_k - n_q) + 1 - key_start)
    log_n = tl.log(tl.maximum(seen, 1).to(tl.float32))
    x = a * log_n
    # (1 - e^(-x)) / a, by its series where the difference would cancel
    width = tl.where(x < 1e-3, log_n * (1.0 - 0.5 * x), (1.0 - tl.exp(-x)) / tl.where(x < 1e-3, 1.0, a))
    high = low + width * 1.000001 + 1e-6 + tl.abs(low) * 1e-6
    low = low - tl.abs(low) * 1e-6
    theta = 0.5 * (low + high)

    # Past this error the step just taken leaves less than float32 resolves: Halley's error is cubic in it.
    tolerance = tl.maximum(1e-6, 5e-7 * tl.abs(low))
    iteration = 0
    unfinished = 1
    while (unfinished > 0) & (iteration < max_iterations):
        total = tl.zeros((BLOCK_M,), tl.float32)
        slope = tl.zeros((BLOCK_M,), tl.float32)
        curve = tl.zeros((BLOCK_M,), tl.float32)
        for i in range(n_key_blocks):
            keys = first + i * BLOCK_N + tl.arange(0, BLOCK_N)
            k = load_rows(k_base, keys, stride_kn, n_k, D, BLOCK_D)
            s = score_tile(q, k, rows, keys, scale, n_q, n_k, key_start, key_end, CAUSAL)
            p, u = weights(s - theta[:, None], a, ALPHA)
            total += tl.sum(p, 1)
            slope += tl.sum(u, 1)
            curve += tl.sum(_curvature(p, u, a, ALPHA), 1)
        theta, low, high, error = _next_theta(theta, low, high, total, slope, curve)
        # NaN compares false and so counts as finished: it must never hang.
        unfinished = tl.max(((error > tolerance) & (rows < n_q) & (~empty)).to(tl.int32), 0)
        iteration += 1

    theta = tl.where(empty, float("inf"), theta)
    tl.store(Theta + head_index.to(tl.int64) * n_q + rows, theta, mask=rows < n_q)
