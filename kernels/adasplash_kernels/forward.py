"""Output of the forward pass: O = P V, and O2 = (U V) / (sum U), which the backward pass needs (AdaSplash, alg. 3)."""

from __future__ import annotations

import triton
import triton.language as tl

from .scores import dot, key_bounds, load_exponent, load_rows, query_block, score_tile, store_rows, weights
from .worklists.dense import key_range


@triton.jit(do_not_specialize=["n_q", "n_k"])
def output_kernel(
    Q, K, V, Theta, Out, Out2, Alpha, Starts, Lengths,
    stride_qb, stride_qh, stride_qn, stride_kb, stride_kh, stride_kn, stride_vb, stride_vh, stride_vn,
    n_heads, groups, n_q, n_k, scale, alpha_stride,
    CAUSAL: tl.constexpr, PADDED: tl.constexpr, ALPHA: tl.constexpr, NEED_OUT2: tl.constexpr,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Write O (and O2) for one block of queries of one head, both contiguous (B, H, N_q, D)."""
    pid_m, head_index, batch, head, rows = query_block(n_q, n_heads, BLOCK_M)
    kv_head = (head // groups).to(tl.int64)
    q = load_rows(Q + batch.to(tl.int64) * stride_qb + head.to(tl.int64) * stride_qh, rows, stride_qn, n_q, D, BLOCK_D)
    k_base = K + batch.to(tl.int64) * stride_kb + kv_head * stride_kh
    v_base = V + batch.to(tl.int64) * stride_vb + kv_head * stride_vh
    a = load_exponent(Alpha, head, alpha_stride, ALPHA)
    key_start, key_end = key_bounds(Starts, Lengths, batch, n_k, PADDED)
    theta = tl.load(Theta + head_index.to(tl.int64) * n_q + rows, mask=rows < n_q, other=float("inf"))
    first, n_key_blocks = key_range(pid_m, n_q, n_k, key_start, key_end, CAUSAL, BLOCK_M, BLOCK_N)

    out = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    out2 = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    u_sum = tl.zeros((BLOCK_M,), tl.float32)
    for i in range(n_key_blocks):
        keys = first + i * BLOCK_N + tl.arange(0, BLOCK_N)
        k = load_rows(k_base, keys, stride_kn, n_k, D, BLOCK_D)
        v = load_rows(v_base, keys, stride_vn, n_k, D, BLOCK_D)
        s = score_tile(q, k, rows, keys, scale, n_q, n_k, key_start, key_end, CAUSAL)
        p, u = weights(s - theta[:, None], a, ALPHA)
        out = dot(p.to(v.dtype), v, out)
        if NEED_OUT2:
            out2 = dot(u.to(v.dtype), v, out2)
            u_sum += tl.sum(u, 1)

    o_base = head_index.to(tl.int64) * n_q * D
    store_rows(Out + o_base, out, rows, D, n_q, D, BLOCK_D)
    if NEED_OUT2:
        out2 = out2 / tl.where(u_sum == 0.0, 1.0, u_sum)[:, None]  # an empty row keeps its zeros
        store_rows(Out2 + o_base, out2, rows, D, n_q, D, BLOCK_D)
