"""Output of the forward pass: O = P V, and O2 = (U V) / (sum U), which the backward pass needs (AdaSplash, alg. 3)."""

from __future__ import annotations

import triton
import triton.language as tl

from .inputs import open_sizes
from .mapping import load_exponent, weights
from .scores import dot, load_queries, load_theta, load_tile, query_block, store_rows
from .worklists.walk import next_tile, query_list, run, run_range


@triton.jit
def output_kernel(x, size, theta_in, out, out2):
    """Write O, and O2 unless it is None, for one block of queries of one head, both contiguous (B, H, N_q, D)."""
    size = open_sizes(x, size)
    at = query_block(x, size)
    q = load_queries(x, size, at)
    a = load_exponent(x, size, at.head)
    theta = load_theta(theta_in, size, at)
    walk = query_list(x, size, at)
    acc = tl.zeros((x.BLOCK_M, x.BLOCK_D), tl.float32)
    acc2 = tl.zeros((x.BLOCK_M, x.BLOCK_D), tl.float32)
    u_sum = tl.zeros((x.BLOCK_M,), tl.float32)
    begin, end = run_range(walk, x.LISTS)
    for number in range(begin, end):
        state, count = run(walk, number, x.LISTS)
        for i in range(count):
            tile, state = next_tile(walk, number, state, i, x.LISTS)
            _keys, _k, v, raw = load_tile(x, size, at, q, walk, tile)
            p, u = weights(raw, size.scale, theta[:, None], a, x.ALPHA)
            acc = dot(p.to(v.dtype), v, acc)
            if out2 is not None:
                acc2 = dot(u.to(v.dtype), v, acc2)
                u_sum += tl.sum(u, 1)

    base = at.head_index * size.n_q * x.d
    store_rows(x, out + base, acc, at.rows, size.n_q)
    if out2 is not None:
        acc2 = acc2 / tl.where(u_sum == 0.0, 1.0, u_sum)[:, None]  # an empty row keeps its zeros
        store_rows(x, out2 + base, acc2, at.rows, size.n_q)
