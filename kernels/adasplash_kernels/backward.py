"""Gradients (AdaSplash, alg. 4 and 5): dS = U (dP - delta), dQ = scale dS K, dK = scale dS^T Q, dV = P^T dO.

Both kernels own what they write and add in a fixed order: no atomics, so gradients repeat bit for bit.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .scores import dot, key_bounds, load_exponent, load_rows, query_block, score_tile, store_rows, weights
from .worklists.dense import key_range, query_range


@triton.jit(do_not_specialize=["n_q", "n_k"])
def grad_query_kernel(
    Q, K, V, Theta, Out2, DOut, Delta, DQ, Alpha, Starts, Lengths,
    stride_qb, stride_qh, stride_qn, stride_kb, stride_kh, stride_kn, stride_vb, stride_vh, stride_vn,
    stride_ob, stride_oh, stride_on,
    n_heads, groups, n_q, n_k, scale, alpha_stride,
    CAUSAL: tl.constexpr, PADDED: tl.constexpr, ALPHA: tl.constexpr,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Write dQ and delta = dO . O2 for one block of queries of one head."""
    pid_m, head_index, batch, head, rows = query_block(n_q, n_heads, BLOCK_M)
    batch64, head64, kv_head = batch.to(tl.int64), head.to(tl.int64), (head // groups).to(tl.int64)
    o_base = head_index.to(tl.int64) * n_q
    q = load_rows(Q + batch64 * stride_qb + head64 * stride_qh, rows, stride_qn, n_q, D, BLOCK_D)
    d_out = load_rows(DOut + batch64 * stride_ob + head64 * stride_oh, rows, stride_on, n_q, D, BLOCK_D)
    out2 = load_rows(Out2 + o_base * D, rows, D, n_q, D, BLOCK_D)
    delta = tl.sum(d_out.to(tl.float32) * out2.to(tl.float32), 1)
    tl.store(Delta + o_base + rows, delta, mask=rows < n_q)

    k_base = K + batch64 * stride_kb + kv_head * stride_kh
    v_base = V + batch64 * stride_vb + kv_head * stride_vh
    a = load_exponent(Alpha, head, alpha_stride, ALPHA)
    key_start, key_end = key_bounds(Starts, Lengths, batch, n_k, PADDED)
    theta = tl.load(Theta + o_base + rows, mask=rows < n_q, other=float("inf"))
    first, n_key_blocks = key_range(pid_m, n_q, n_k, key_start, key_end, CAUSAL, BLOCK_M, BLOCK_N)

    dq = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    for i in range(n_key_blocks):
        keys = first + i * BLOCK_N + tl.arange(0, BLOCK_N)
        k = load_rows(k_base, keys, stride_kn, n_k, D, BLOCK_D)
        v = load_rows(v_base, keys, stride_vn, n_k, D, BLOCK_D)
        s = score_tile(q, k, rows, keys, scale, n_q, n_k, key_start, key_end, CAUSAL)
        p, u = weights(s - theta[:, None], a, ALPHA)
        dp = dot(d_out, tl.trans(v), tl.zeros((BLOCK_M, BLOCK_N), tl.float32))
        ds = u * (dp - delta[:, None])
        dq = dot(ds.to(k.dtype), k, dq)
    store_rows(DQ + o_base * D, dq * scale, rows, D, n_q, D, BLOCK_D)


@triton.jit(do_not_specialize=["n_q", "n_k"])
def grad_key_value_kernel(
    Q, K, V, Theta, Delta, DOut, DK, DV, Alpha, Starts, Lengths,
    stride_qb, stride_qh, stride_qn, stride_kb, stride_kh, stride_kn, stride_vb, stride_vh, stride_vn,
    stride_ob, stride_oh, stride_on,
    n_kv_heads, groups, n_q, n_k, scale, alpha_stride,
    CAUSAL: tl.constexpr, PADDED: tl.constexpr, ALPHA: tl.constexpr,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Write dK and dV for one block of keys of one key-value head, summed over the query heads that share it."""
    n_blocks = tl.cdiv(n_k, BLOCK_N)
    kv_index = tl.program_id(0) // n_blocks
    pid_n = tl.program_id(0) % n_blocks  # the first keys are seen by the most causal rows
    batch, kv_head = kv_index // n_kv_heads, kv_index % n_kv_heads
    batch64, kv_head64 = batch.to(tl.int64), kv_head.to(tl.int64)
    keys = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    k = load_rows(K + batch64 * stride_kb + kv_head64 * stride_kh, keys, stride_kn, n_k, D, BLOCK_D)
    v = load_rows(V + batch64 * stride_vb + kv_head64 * stride_vh, keys, stride_vn, n_k, D, BLOCK_D)
    key_start, key_end = key_bounds(Starts, Lengths, batch, n_k, PADDED)
    first, n_query_blocks = query_range(pid_n, n_q, n_k, CAUSAL, BLOCK_M, BLOCK_N)

    dk = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    dv = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    for group in range(groups):
        head = kv_head * groups + group
        q_base = Q + batch64 * stride_qb + head.to(tl.int64) * stride_qh
        do_base = DOut + batch64 * stride_ob + head.to(tl.int64) * stride_oh
        row_base = (batch64 * n_kv_heads * groups + head) * n_q
        a = load_exponent(Alpha, head, alpha_stride, ALPHA)
        for i in range(n_query_blocks):
            rows = first + i * BLOCK_M + tl.arange(0, BLOCK_M)
            q = load_rows(q_base, rows, stride_qn, n_q, D, BLOCK_D)
            d_out = load_rows(do_base, rows, stride_on, n_q, D, BLOCK_D)
            theta = tl.load(Theta + row_base + rows, mask=rows < n_q, other=float("inf"))
            delta = tl.load(Delta + row_base + rows, mask=rows < n_q, other=0.0)
            s = score_tile(q, k, rows, keys, scale, n_q, n_k, key_start, key_end, CAUSAL)
            p, u = weights(s - theta[:, None], a, ALPHA)
            dv = dot(tl.trans(p.to(d_out.dtype)), d_out, dv)
            dp = dot(d_out, tl.trans(v), tl.zeros((BLOCK_M, BLOCK_N), tl.float32))
            ds = u * (dp - delta[:, None])
            dk = dot(tl.trans(ds.to(q.dtype)), q, dk)
    out_base = kv_index.to(tl.int64) * n_k * D
    store_rows(DK + out_base, dk * scale, keys, D, n_k, D, BLOCK_D)
    store_rows(DV + out_base, dv, keys, D, n_k, D, BLOCK_D)
