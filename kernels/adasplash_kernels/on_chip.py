"""Short sequences: the scores of a block of queries are computed once and stay on chip until its output is there.

One kernel instead of three passes over the keys, for alpha = 1.5 and keys that one tile holds; short.py looks after
that. A program takes several blocks of queries of a head, one after the other, for which keys and values stay on chip
too.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .forward import store_outputs
from .inputs import open_sizes
from .launching import launched_by_key
from .scores import dot, load_keys, load_queries, load_slope, load_values, query_block_at, raw_scores, row_max
from .thresholds.refine import store_theta
from .thresholds.settle import newton_step

TOLERANCE = tl.constexpr(4e-6)  # by how much the weights of a query may miss a sum of 1


@triton.jit
def _all_scores(x, size, at, k, keys):
    """Return the scores (BLOCK_M, BLOCK_N) of all keys, before ``scale``; ``-inf`` where a query does not see a key."""
    slope = load_slope(x, size, at.batch, at.head)
    raw = raw_scores(x, load_queries(x, size, at), k, slope, at.position[:, None] - keys[None, :])
    return tl.where((keys[None, :] >= at.low[:, None]) & (keys[None, :] < at.high[:, None]), raw, float("-inf"))


@triton.jit
def _roots(height, rise):
    """Return u = [height - rise]_+, the roots of the weights."""
    return tl.maximum(height - rise[:, None], 0.0, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _solve(x, size, raw, max_iterations):
    """Return theta (BLOCK_M,), ``+inf`` for queries that see no key; and heights and rise for ``_roots``.

    Newton's steps rise from the largest score to theta.
    """
    top = row_max(raw) * size.scale
    empty = top == float("-inf")
    top = tl.where(empty, 0.0, top)
    # the largest score comes off first, in one multiply-add that rounds once
    height = (raw * size.scale - top[:, None]) * 0.5 + 1.0
    rise = tl.zeros_like(top)
    iteration = 0
    unfinished = 1
    while (unfinished > 0) & (iteration < max_iterations):
        u = _roots(height, rise)
        step = 0.5 * newton_step(tl.sum(u * u, 1), tl.sum(u, 1), 0.5, x.ALPHA)
        rise += step
        # a step e of theta leaves at most e^2 / 4 for each weight in the support
        again = step * step * x.BLOCK_N > TOLERANCE
        unfinished = tl.max((again & ~empty & (rise == rise)).to(tl.int32), 0)  # NaN must not hang
        iteration += 1
    rise = tl.where(empty, 0.0, rise)  # where nothing is seen the steps lead anywhere
    return tl.where(empty, float("inf"), top + 2.0 * rise), height, rise


@triton.jit
def _outputs(x, size, at, v, height, rise, out, out2):
    """Write O, and O2 unless it is None."""
    u = _roots(height, rise)
    acc = dot((u * u).to(v.dtype), v, tl.zeros((x.BLOCK_M, x.BLOCK_D), tl.float32))
    acc2 = acc
    u_sum = rise
    if out2 is not None:
        acc2 = dot(u.to(v.dtype), v, tl.zeros((x.BLOCK_M, x.BLOCK_D), tl.float32))
        u_sum = tl.sum(u, 1)
    store_outputs(x, size, at, out, out2, acc, acc2, u_sum)


@launched_by_key
@triton.jit(do_not_specialize=["max_iterations", "each"])
def on_chip_kernel(x, size, theta_out, out, out2, max_iterations, each):
    """Write theta (B, H, N_q) float32, O, and O2 unless it is None, both contiguous (B, H, N_q, D), for some blocks of
    queries of one head; x.BLOCK_N is no less than N_k.

    Args:
        each: blocks of queries that a program takes.
    """
    size = open_sizes(x, size)
    blocks = tl.cdiv(size.n_q, x.BLOCK_M)
    parts = tl.cdiv(blocks, each)
    head_index = tl.program_id(0) // parts
    first = tl.program_id(0) % parts * each
    keys = tl.arange(0, x.BLOCK_N)
    at = query_block_at(x, size, head_index, first)
    k = load_keys(x, size, at, keys)
    v = load_values(x, size, at, keys)
    for block in range(first, tl.minimum(first + each, blocks)):
        at = query_block_at(x, size, head_index, block)
        theta, height, rise = _solve(x, size, _all_scores(x, size, at, k, keys), max_iterations)
        store_theta(theta_out, size, at, theta)
        _outputs(x, size, at, v, height, rise, out, out2)
