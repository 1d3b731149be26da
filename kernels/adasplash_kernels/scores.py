"""The pieces every kernel shares: loading rows, one tile of masked scores, and the weights of a tile."""

from __future__ import annotations

import triton
import triton.language as tl

_INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def dot(a, b, acc):
    """acc + a b with float32 accumulation; float32 inputs are multiplied as float32, not as TF32."""
    if _INTERPRETED:  # the interpreter multiplies bfloat16 as the integers it stores them in
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision="ieee")


@triton.jit
def query_block(n_q, n_heads, BLOCK_M: tl.constexpr):
    """Return this program's block of queries: its index, its head counted over the batch, batch, head, positions.

    The last blocks come first: causal rows are longest there, and starting with them evens out the end.
    """
    n_blocks = tl.cdiv(n_q, BLOCK_M)
    head_index = tl.program_id(0) // n_blocks
    pid_m = n_blocks - 1 - tl.program_id(0) % n_blocks
    rows = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    return pid_m, head_index, head_index // n_heads, head_index % n_heads, rows


@triton.jit
def load_rows(base, rows, stride_row, n_rows, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Load (rows, BLOCK_D) from a matrix of row pitch ``stride_row``; out-of-range rows and columns are zero."""
    cols = tl.arange(0, BLOCK_D)
    # 64-bit offsets: a row index times a pitch of heads x head dim passes 2^31 for long packed sequences.
    offsets = rows.to(tl.int64)[:, None] * stride_row + cols[None, :]
    keep = (rows < n_rows)[:, None]
    if BLOCK_D != D:
        keep = keep & (cols < D)[None, :]
    return tl.load(base + offsets, mask=keep, other=0.0)


@triton.jit
def store_rows(base, value, rows, stride_row, n_rows, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Store (rows, BLOCK_D) in the matrix's own dtype, leaving out-of-range rows and columns alone."""
    cols = tl.arange(0, BLOCK_D)
    offsets = rows.to(tl.int64)[:, None] * stride_row + cols[None, :]
    keep = (rows < n_rows)[:, None]
    if BLOCK_D != D:
        keep = keep & (cols < D)[None, :]
    tl.store(base + offsets, value.to(base.dtype.element_ty), mask=keep)


@triton.jit
def key_bounds(starts, lengths, batch, n_k, PADDED: tl.constexpr):
    """Return the half-open range of keys that are not padding in a sequence."""
    start = 0
    end = n_k
    if PADDED:
        start = tl.maximum(tl.load(starts + batch), 0).to(tl.int32)
        end = tl.minimum(tl.load(lengths + batch), n_k).to(tl.int32)
    return start, end


@triton.jit
def score_tile(q, k, rows, keys, scale, n_q, n_k, key_start, key_end, CAUSAL: tl.constexpr):
    """Scaled scores (rows, keys) in float32, ``-inf`` where the mask forbids the pair."""
    s = dot(q, tl.trans(k), tl.zeros((rows.shape[0], keys.shape[0]), tl.float32)) * scale
    keep = ((keys >= key_start) & (keys < key_end))[None, :]
    if CAUSAL:
        keep = keep & (keys[None, :] <= rows[:, None] + (n_k - n_q))
    return tl.where(keep, s, float("-inf"))


@triton.jit
def log1p(t):
    """ln(1 + t) for t > -1 without cancellation near 0 (Kahan), from portable operations only."""
    w = 1.0 + t
    d = w - 1.0
    return tl.where(d == 0.0, t, tl.log(w) * (t / tl.where(d == 0.0, 1.0, d)))


@triton.jit
def weights(y, a, ALPHA: tl.constexpr):
    """Return p and u = p^(2 - alpha) (zero outside the support) for ``y = s - theta`` and ``a = alpha - 1``.

    ALPHA picks the closed forms: "1" softmax, "1.5", "2" sparsemax; "any" works for all through logarithms.
    """
    if ALPHA == "1":
        p = tl.exp(y)
        u = p
    elif ALPHA == "1.5":
        u = tl.maximum(1.0 + 0.5 * y, 0.0, propagate_nan=tl.PropagateNan.ALL)
        p = u * u
    elif ALPHA == "2":
        p = tl.maximum(1.0 + y, 0.0, propagate_nan=tl.PropagateNan.ALL)
        u = tl.where(p > 0.0, 1.0, p)
    else:
        t = a * y
        outside = t <= -1.0  # false for NaN, which must reach the output
        log_p = log1p(tl.where(outside, 0.0, t)) / a
        p = tl.where(outside, 0.0, tl.exp(log_p))
        u = tl.where(outside, 0.0, tl.exp((1.0 - a) * log_p))
    return p, u


@triton.jit
def load_exponent(alpha, head, alpha_stride, ALPHA: tl.constexpr):
    """Return a = alpha - 1 of a head; kept off zero, where the general form reaches softmax as a limit."""
    if ALPHA == "1":
        a = 0.0
    elif ALPHA == "1.5":
        a = 0.5
    elif ALPHA == "2":
        a = 1.0
    else:
        a = tl.minimum(tl.maximum(tl.load(alpha + head * alpha_stride).to(tl.float32) - 1.0, 1e-6), 1.0)
    return a
