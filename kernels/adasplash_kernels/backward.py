"""Gradients (AdaSplash, alg. 4 and 5): dS = U (dP - delta), dQ = scale dS K, dK = scale dS^T Q, dV = P^T dO.

Both kernels own what they write and add in a fixed order: no atomics, so gradients repeat bit for bit.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .inputs import open_sizes, pitch
from .launching import launched_by_key
from .mapping import alpha_slope, load_exponent, weights
from .scores import (
    dot,
    key_block_number,
    key_scores,
    load_keys,
    load_queries,
    load_rows,
    load_theta,
    load_tile,
    load_values,
    query_block_at,
    query_place,
    store_rows,
)
from .worklists.marks import mark_queries, masks_of_list, words_of_queries
from .worklists.pieces import block_and_part, part_of, store_part
from .worklists.walk import (
    key_list,
    keys_are_anothers,
    may_start,
    may_walk,
    members,
    next_tile,
    query_list,
    run,
    run_range,
)


class Upstream(NamedTuple):
    """What the forward pass left and what comes back.

    Attributes:
        theta: (B, H, N_q) float32.
        delta: (B, H, N_q) float32, dO . O2; the query kernel writes it, the key kernel reads it.
        d_out: (B, H, N_q, D), the last dimension contiguous.
        d_out_batch, d_out_head, d_out_row: its pitches, sealed (see inputs.py).
        ALIGNED: whether they are multiples of 8 elements.
    """

    theta: Any
    delta: Any
    d_out: Any
    d_out_batch: int
    d_out_head: int
    d_out_row: int
    ALIGNED: tl.constexpr


@triton.jit
def _load_d_out(x, size, up, batch, head, rows):
    base = up.d_out + batch * pitch(up.d_out_batch, up.ALIGNED) + head * pitch(up.d_out_head, up.ALIGNED)
    return load_rows(x, base, rows, pitch(up.d_out_row, up.ALIGNED), size.n_q)


@triton.jit
def _product(a, b):
    """Return a b^T."""
    return dot(a, tl.trans(b), tl.zeros((a.shape[0], b.shape[0]), tl.float32))


@triton.jit
def _grad_query(x, size, at, q, walk, up, out2, dq, d_alpha, masks, used):
    """Write dQ, delta and d_alpha for one block of queries."""
    a = load_exponent(x, size, at.head)
    base = at.head_index * size.n_q
    d_out = _load_d_out(x, size, up, at.batch, at.head, at.rows)
    delta = tl.sum(d_out.to(tl.float32) * load_rows(x, out2 + base * x.d, at.rows, x.d, size.n_q).to(tl.float32), 1)
    tl.store(up.delta + base + at.rows, delta, mask=at.rows < size.n_q)
    theta = load_theta(up.theta, size, at)

    if masks is not None:
        place, used_step = words_of_queries(x, size, at.head_index, at.index, masks, used)
        if x.LISTS != "rest":
            place = masks_of_list(x, size, at.head_index, at.index, masks)
    acc = tl.zeros((x.BLOCK_M, x.BLOCK_D), tl.float32)
    to_alpha = tl.zeros((x.BLOCK_M,), tl.float32)
    for part in tl.static_range(x.FIRST_PART, x.PARTS_END):
        begin, end = run_range(walk, x.LISTS)
        for number in range(begin, end):
            state, count = run(walk, number, x.LISTS, part, x.BLOCK_N)
            for i in range(count):
                tile, state = next_tile(walk, number, state, i, x.LISTS, part, x.BLOCK_N)
                k, v, raw = load_tile(x, size, at, q, walk, tile, part)
                p, u = weights(raw, size.scale, theta[:, None], a, x.ALPHA)
                if masks is not None:  # here, where few other numbers are in registers
                    mark_queries(x, size, tile, place, used_step, u, masks.KEYS, masks.SIDES)
                centred = _product(d_out, v) - delta[:, None]
                acc = dot((u * centred).to(k.dtype), k, acc)
                if d_alpha is not None:
                    to_alpha += tl.sum(centred * alpha_slope(p, u, a), 1)
    store_rows(x, dq + base * x.d, acc * size.scale, at.rows, size.n_q)
    if d_alpha is not None:
        tl.store(d_alpha + base + at.rows, to_alpha, mask=at.rows < size.n_q)


@launched_by_key
@triton.jit
def grad_query_kernel(x, size, up, out2, dq, d_alpha, masks, used):
    """Write dQ and delta for one block of queries of one head; d_alpha (B, H, N_q) by query unless it is None.

    With ``masks``, a ``Masks``, and ``used`` it notes there which queries use which keys (see worklists/marks.py).
    """
    size = open_sizes(x, size)
    head_index, index = query_place(x, size)
    if may_start(x, size, head_index, index):
        at = query_block_at(x, size, head_index, index)
        q, walk = load_queries(x, size, at), query_list(x, size, at)
        if may_walk(x, walk):
            _grad_query(x, size, at, q, walk, up, out2, dq, d_alpha, masks, used)


@triton.jit
def _load_once(base, rows, n_rows, other):
    """Load numbers (rows,), each by one thread.

    Where they are used every thread needs 16 of them, and Triton would have it load these itself; it does not look
    behind a sum.
    """
    return tl.sum(tl.load((base + rows)[:, None], mask=(rows < n_rows)[:, None], other=other), 1)


@triton.jit
def _store_key_value(x, size, at, dk, dv, acc_k, acc_v):
    base = at.head_index * size.n_k * x.d
    store_rows(x, dk + base, acc_k, at.rows, size.n_k)
    store_rows(x, dv + base, acc_v, at.rows, size.n_k)


@triton.jit
def _grad_key_value(x, size, at, part, up, dk, dv, pieces):
    """Write dK and dV for one block of keys, or a piece's sums of them."""
    before = 0
    k = load_keys(x, size, at, at.rows)
    v = load_values(x, size, at, at.rows)
    acc_k = tl.zeros((x.BLOCK_N, x.BLOCK_D), tl.float32)
    acc_v = tl.zeros((x.BLOCK_N, x.BLOCK_D), tl.float32)
    for group in range(size.groups):
        head = at.head + group
        a = load_exponent(x, size, head)
        q_base = x.q + at.batch * size.q_batch + head * size.q_head
        numbers = (at.batch * size.heads + head) * size.n_q
        walk = key_list(x, size, at, head)
        if pieces is not None:
            walk, before = part_of(walk, part, before)
        for kind in tl.static_range(x.FIRST_PART, x.PARTS_END):
            begin, end = run_range(walk, x.LISTS)
            for number in range(begin, end):
                state, count = run(walk, number, x.LISTS, kind, x.BLOCK_M)
                for i in range(count):
                    tile, state = next_tile(walk, number, state, i, x.LISTS, kind, x.BLOCK_M)
                    rows = members(walk, tile, x.BLOCK_M, x.LISTS)
                    q = load_rows(x, q_base, rows, size.q_row, size.n_q)
                    d_out = _load_d_out(x, size, up, at.batch, head, rows)
                    theta = _load_once(up.theta + numbers, rows, size.n_q, float("inf"))
                    delta = _load_once(up.delta + numbers, rows, size.n_q, 0.0)
                    raw = key_scores(x, size, at, head, q, k, walk, tile, kind)
                    # keys first, as the products below take them: what is in registers need not be turned round
                    p, u = weights(raw, size.scale, theta[None, :], a, x.ALPHA)
                    acc_v = dot(p.to(d_out.dtype), d_out, acc_v)
                    ds = u * (_product(v, d_out) - delta[None, :])
                    acc_k = dot(ds.to(q.dtype), q, acc_k)
    acc_k *= size.scale
    if pieces is None:
        _store_key_value(x, size, at, dk, dv, acc_k, acc_v)
    elif part.slot >= 0:
        store_part(x, pieces, part.slot, acc_k, acc_v)
    elif part.end > part.begin:
        _store_key_value(x, size, at, dk, dv, acc_k, acc_v)


@launched_by_key
@triton.jit
def grad_key_value_kernel(x, size, up, dk, dv, pieces):
    """Write dK and dV for one block of keys of one key-value head, summed over the query heads that share it.

    Args:
        pieces: None, or what says which walks are cut and takes the sums of their pieces (see worklists/pieces.py).
    """
    size = open_sizes(x, size)
    if x.LISTS == "rest":
        heads = size.launched // size.groups
        for number in range(tl.program_id(0), tl.cdiv(size.n_k, x.BLOCK_N) * heads, tl.num_programs(0)):
            at = key_block_number(x, size, number, heads)
            if not keys_are_anothers(x, size, at):
                _grad_key_value(x, size, at, None, up, dk, dv, None)
    else:
        at, part = block_and_part(x, size, pieces)
        if not keys_are_anothers(x, size, at):
            _grad_key_value(x, size, at, part, up, dk, dv, pieces)
