"""Output of the forward pass: O = P V, and O2 = (U V) / (sum U), which the backward pass needs (AdaSplash, alg. 3)."""

from __future__ import annotations

import triton
import triton.language as tl

from .inputs import open_sizes
from .launching import launched_by_key
from .mapping import load_exponent, weights
from .scores import dot, load_queries, load_theta, load_tile, query_block_at, query_place, store_rows
from .thresholds.refine import store_passes, store_theta
from .thresholds.settle import newton_step, settled_step
from .worklists.walk import may_start, may_walk, next_tile, query_list, run, run_range


@triton.jit
def _visit(x, size, at, q, walk, theta, a, U: tl.constexpr, TOTAL: tl.constexpr):
    """Walk a list once: return P V, and what is asked for of U V and sum u, and of sum p; else zeros."""
    acc = tl.zeros((x.BLOCK_M, x.BLOCK_D), tl.float32)
    acc2 = tl.zeros((x.BLOCK_M, x.BLOCK_D), tl.float32)
    u_sum = tl.zeros((x.BLOCK_M,), tl.float32)
    total = tl.zeros((x.BLOCK_M,), tl.float32)
    for part in tl.static_range(x.FIRST_PART, x.PARTS_END):
        begin, end = run_range(walk, x.LISTS)
        for number in range(begin, end):
            state, count = run(walk, number, x.LISTS, part, x.BLOCK_N)
            for i in range(count):
                tile, state = next_tile(walk, number, state, i, x.LISTS, part, x.BLOCK_N)
                _k, v, raw = load_tile(x, size, at, q, walk, tile, part)
                p, u = weights(raw, size.scale, theta[:, None], a, x.ALPHA)
                if TOTAL:
                    total += tl.sum(p, 1)  # before the products, so that p need not outlive them
                acc = dot(p.to(v.dtype), v, acc)
                if U:
                    acc2 = dot(u.to(v.dtype), v, acc2)
                    u_sum += tl.sum(u, 1)
    return acc, acc2, u_sum, total


@triton.jit
def store_outputs(x, size, at, out, out2, acc, acc2, u_sum):
    """Write O, and O2 unless it is None."""
    base = at.head_index * size.n_q * x.d
    store_rows(x, out + base, acc, at.rows, size.n_q)
    if out2 is not None:
        acc2 = acc2 / tl.where(u_sum == 0.0, 1.0, u_sum)[:, None]  # an empty row keeps its zeros
        store_rows(x, out2 + base, acc2, at.rows, size.n_q)


@triton.jit
def _output(x, size, at, q, walk, theta_ref, out, out2, settle, passes_out):
    """Write O and O2 for one block of queries."""
    a = load_exponent(x, size, at.head)
    theta = load_theta(theta_ref, size, at)
    if settle is None:
        acc, acc2, u_sum, _total = _visit(x, size, at, q, walk, theta, a, out2 is not None, False)
        store_outputs(x, size, at, out, out2, acc, acc2, u_sum)
        store_passes(passes_out, x, size, at, 1)
    else:
        count = load_theta(settle.count, size, at)
        step = tl.zeros((x.BLOCK_M,), tl.float32)
        acc = tl.zeros((x.BLOCK_M, x.BLOCK_D), tl.float32)
        acc2 = tl.zeros((x.BLOCK_M, x.BLOCK_D), tl.float32)
        u_sum = tl.zeros((x.BLOCK_M,), tl.float32)
        number = 0
        unsettled = 1
        while (unsettled > 0) & (number < settle.PASSES):  # once, but for rows that are harder than they looked
            acc, acc2, u_sum, total = _visit(x, size, at, q, walk, theta, a, True, True)
            # finite for rows that see no key, whose theta stays +inf and allows for any step
            step = newton_step(total, u_sum, a, x.ALPHA)
            again = tl.abs(step) > settled_step(theta, total, u_sum, count, a, x.ALPHA, settle.EPS)
            theta += step
            unsettled = tl.max((again & (theta == theta)).to(tl.int32), 0)  # NaN must not hang
            number += 1
        store_theta(theta_ref, size, at, theta)
        store_outputs(x, size, at, out, out2, acc - step[:, None] * acc2, acc2, u_sum)
        store_passes(passes_out, x, size, at, number)


@launched_by_key
@triton.jit
def output_kernel(x, size, theta_ref, out, out2, settle, passes_out=None):
    """Write O, and O2 unless it is None, both contiguous (B, H, N_q, D), for one block of queries of one head.

    Args:
        theta_ref: (B, H, N_q) float32; with ``settle``, which is None or as in thresholds/settle.py, a step short of
            the thresholds that replace them.
        passes_out: see ``store_passes``.
    """
    size = open_sizes(x, size)
    head_index, index = query_place(x, size)
    if may_start(x, size, head_index, index):
        at = query_block_at(x, size, head_index, index)
        q, walk = load_queries(x, size, at), query_list(x, size, at)
        if may_walk(x, walk):
            _output(x, size, at, q, walk, theta_ref, out, out2, settle, passes_out)
