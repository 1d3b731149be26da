"""All gradients of short sequences in one kernel for Hopper's GPUs, in Gluon: see backward.py for what they are.

Two kernels, one by queries and one by keys, compute scores and dO V^T twice. Here a program takes all of a head: blocks
of keys one after the other, and with each all blocks of queries that see it. dK and dV of a block of keys are in
registers, dQ of all queries is in shared memory, which is what limits their number. As the two do, it adds in a fixed
order.

Tiles are (keys, queries), as dV = P^T dO and dK = dS^T Q take them from registers; dQ = dS K takes dS from shared
memory. A tile's first two products are under way while the one before it ends.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere.async_copy import commit_group, wait_group
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, warpgroup_mma, warpgroup_mma_wait

from .inputs import open_sizes, pitch
from .launching import launched_by_key
from .rows_gluon import copy_rows, load_rows, store_rows
from .spans import padding

_ALL = gl.constexpr(tl.PropagateNan.ALL)
# Triton 3.7 gave it another name
_barrier = gl.barrier if hasattr(gl, "barrier") else gl.thread_barrier


class Here(NamedTuple):
    """Shared memory.

    Attributes:
        k, v: (BLOCK_N, BLOCK_D), a block of keys and values.
        q, d_out: (2, BLOCK_M, BLOCK_D), blocks of queries and of dO, by turns.
        ds: (BLOCK_N, BLOCK_M), dS^T of a tile, before ``scale``.
        dq: (blocks, BLOCK_M, BLOCK_D) float32, dQ before ``scale``.
        theta, delta: (blocks, BLOCK_M) float32, half of the threshold, and dO . O2.
    """

    k: Any
    v: Any
    q: Any
    d_out: Any
    ds: Any
    dq: Any
    theta: Any
    delta: Any


class Head(NamedTuple):
    """Where the rows of a head start.

    Attributes:
        q, k, v, d_out: pointers.
        d_out_row: pitch of dO's rows.
        queries, keys: the head's first row in theta, O2 and dQ, and in dK and dV.
        start, end: the half-open range of keys that are not padding.
    """

    q: Any
    k: Any
    v: Any
    d_out: Any
    d_out_row: Any
    queries: Any
    keys: Any
    start: Any
    end: Any


@gluon.jit
def _copy_queries(x, size, here, head, block, LAYOUT: gl.constexpr):
    """Start copying a block of queries and its dO, as one group."""
    M: gl.constexpr = x.BLOCK_M
    rows = block * M + gl.arange(0, M, layout=gl.SliceLayout(1, LAYOUT))
    copy_rows(here.q.index(block % 2), head.q, rows, size.q_row, size.n_q, x.d, LAYOUT)
    copy_rows(here.d_out.index(block % 2), head.d_out, rows, head.d_out_row, size.n_q, x.d, LAYOUT)
    commit_group()


@gluon.jit
def _range(x, size, head, index):
    """Return the blocks of queries that a block of keys meets, half-open and one at the least."""
    M: gl.constexpr = x.BLOCK_M
    N: gl.constexpr = x.BLOCK_N
    blocks = gl.cdiv(size.n_q, M)
    key = index * N - (size.n_k - size.n_q)
    first = gl.minimum(gl.maximum(key - size.right, 0) // M, blocks - 1)
    last = gl.minimum(gl.maximum(key + N + size.left, 0), size.n_q)
    last = gl.cdiv(last, M)
    if (index * N >= head.end) | (index * N + N <= head.start):
        last = first
    if index == 0:  # which writes dQ of all queries, where others add
        first = 0
        last = blocks
    return first, gl.maximum(last, first + 1)


@gluon.jit
def _start(x, size, here, head, index, LAYOUT: gl.constexpr):
    """Start copying a block of keys and values and the first two blocks of queries that it meets, as two groups."""
    N: gl.constexpr = x.BLOCK_N
    first, last = _range(x, size, head, index)
    keys = index * N + gl.arange(0, N, layout=gl.SliceLayout(1, LAYOUT))
    copy_rows(here.k, head.k, keys, size.k_row, size.n_k, x.d, LAYOUT)
    copy_rows(here.v, head.v, keys, size.v_row, size.n_k, x.d, LAYOUT)
    _copy_queries(x, size, here, head, first, LAYOUT)
    if first + 1 < last:
        _copy_queries(x, size, here, head, first + 1, LAYOUT)
    else:
        commit_group()


@gluon.jit
def _two_products(x, here, block):
    """Start K Q^T and V dO^T (BLOCK_N, BLOCK_M)."""
    M: gl.constexpr = x.BLOCK_M
    N: gl.constexpr = x.BLOCK_N
    tile: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [gl.num_warps(), 1], [16, M, 16])
    zero = gl.zeros([N, M], gl.float32, tile)
    q = here.q.index(block % 2).permute((1, 0))
    d_out = here.d_out.index(block % 2).permute((1, 0))
    raw = warpgroup_mma(here.k, q, zero, use_acc=False, is_async=True)
    dp = warpgroup_mma(here.v, d_out, zero, use_acc=False, is_async=True)
    return raw, dp


@gluon.jit
def _masked(x, size, head, raw, index, block):
    """Put ``-inf`` where a query does not see a key."""
    M: gl.constexpr = x.BLOCK_M
    N: gl.constexpr = x.BLOCK_N
    shift = size.n_k - size.n_q
    key = index * N
    first = block * M + shift
    seen = (
        (head.start <= key) & (head.end >= key + N)
        & (first + M - 1 - size.left <= key) & (first + size.right >= key + N - 1)
    )  # fmt: skip
    if not seen:
        # counted from the block's first key; else they would be compared as 64 bits, which addresses made of keys are
        position = first - key + gl.arange(0, M, layout=gl.SliceLayout(0, raw.type.layout))
        keys = gl.arange(0, N, layout=gl.SliceLayout(1, raw.type.layout))
        low = gl.maximum(position - size.left, head.start - key)
        high = gl.minimum(position + size.right + 1, head.end - key)
        raw = gl.where((keys[:, None] >= low[None, :]) & (keys[:, None] < high[None, :]), raw, float("-inf"))
    return raw


@gluon.jit
def _tile(x, size, here, head, index, block, last, raw, dp, acc_k, acc_v, LAYOUT: gl.constexpr, MORE: gl.constexpr):
    """One tile: return dK and dV with it, and with MORE the products under way for the next block of queries."""
    M: gl.constexpr = x.BLOCK_M
    D: gl.constexpr = x.BLOCK_D
    tile: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [gl.num_warps(), 1], [16, M, 16])
    of_query: gl.constexpr = gl.SliceLayout(0, tile)
    results: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [gl.num_warps(), 1], [16, D, 16])
    operand: gl.constexpr = gl.DotOperandLayout(0, results, 2)
    queries: gl.constexpr = gl.NVMMADistributedLayout(
        [3, 0], [4, gl.num_warps() // 4], [16, D * 4 // gl.num_warps(), 16]
    )
    q, d_out = here.q.index(block % 2), here.d_out.index(block % 2)
    theta = here.theta.index(block).load(of_query)
    delta = here.delta.index(block).load(of_query)

    raw = _masked(x, size, head, raw, index, block)
    # as in mapping.py, in halves
    u = gl.maximum(raw * (0.5 * size.scale) - theta[None, :] + 1.0, 0.0, propagate_nan=_ALL)
    p = gl.convert_layout((u * u).to(q.dtype), operand)
    acc_v = warpgroup_mma(p, d_out, acc_v, is_async=True)
    ds = (u * (dp - delta[None, :])).to(q.dtype)
    here.ds.store(ds)
    ds = gl.convert_layout(ds, operand)
    acc_k = warpgroup_mma(ds, q, acc_k, is_async=True)
    wait_group(0)  # for the next queries; a barrier, too
    fence_async_shared()
    acc_q = warpgroup_mma(
        here.ds.permute((1, 0)), here.k, gl.zeros([M, D], gl.float32, queries), use_acc=False, is_async=True
    )
    if MORE:
        raw, dp = _two_products(x, here, block + 1)
        acc_v, acc_k, acc_q, p, ds = warpgroup_mma_wait(2, deps=[acc_v, acc_k, acc_q, p, ds])
    else:
        acc_v, acc_k, acc_q, p, ds = warpgroup_mma_wait(0, deps=[acc_v, acc_k, acc_q, p, ds])
    if index > 0:
        acc_q += here.dq.index(block).load(queries)
    _barrier()  # products have read ds and these queries, in all warps
    here.dq.index(block).store(acc_q)
    if MORE:
        if block + 2 < last:
            _copy_queries(x, size, here, head, block + 2, LAYOUT)
        # here and not in the next turn of the loop, for which the assembler would let every product run alone
        raw, dp = warpgroup_mma_wait(0, deps=[raw, dp])
    return raw, dp, acc_k, acc_v


@gluon.jit
def _block_of_keys(x, size, here, head, index, count, dk, dv, LAYOUT: gl.constexpr):
    """Write dK and dV of a block of keys, and add to dQ."""
    N: gl.constexpr = x.BLOCK_N
    D: gl.constexpr = x.BLOCK_D
    dtype: gl.constexpr = x.q.dtype.element_ty
    results: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [gl.num_warps(), 1], [16, D, 16])
    first, last = _range(x, size, head, index)
    acc_k = gl.zeros([N, D], gl.float32, results)
    acc_v = gl.zeros([N, D], gl.float32, results)
    wait_group(1)
    fence_async_shared()
    raw, dp = _two_products(x, here, first)
    raw, dp = warpgroup_mma_wait(0, deps=[raw, dp])
    for block in range(first, last - 1):
        raw, dp, acc_k, acc_v = _tile(
            x, size, here, head, index, block, last, raw, dp, acc_k, acc_v, LAYOUT, True
        )  # fmt: skip
    raw, dp, acc_k, acc_v = _tile(
        x, size, here, head, index, last - 1, last, raw, dp, acc_k, acc_v, LAYOUT, False
    )  # fmt: skip
    if index + 1 < count:
        _start(x, size, here, head, index + 1, LAYOUT)
    # through shared memory, so that rows are stored whole
    if D == x.BLOCK_M:
        stage = here.ds
    else:
        narrow: gl.constexpr = gl.NVMMASharedLayout(2 * D, element_bitwidth=16, rank=2)
        stage = here.ds._reinterpret(dtype, [N, D], narrow)
    rows = index * N + gl.arange(0, N, layout=gl.SliceLayout(1, LAYOUT))
    stage.store(acc_v.to(dtype))
    store_rows(dv + head.keys * x.d, rows, size.n_k, x.d, stage.load(LAYOUT), D, LAYOUT)
    stage.store((acc_k * size.scale).to(dtype))
    store_rows(dk + head.keys * x.d, rows, size.n_k, x.d, stage.load(LAYOUT), D, LAYOUT)


@gluon.jit
def _numbers(x, size, head, here, up, out2, QUERIES: gl.constexpr, LAYOUT: gl.constexpr):
    """Put theta and delta of all queries into shared memory."""
    D: gl.constexpr = x.BLOCK_D
    line: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    thetas = here.theta._reinterpret(gl.float32, [QUERIES], line)
    deltas = here.delta._reinterpret(gl.float32, [QUERIES], line)
    row = gl.arange(0, QUERIES, layout=gl.BlockedLayout([1], [32], [gl.num_warps()], [0]))
    theta = gl.load(up.theta + head.queries + row, mask=row < size.n_q, other=float("inf"))
    thetas.store(0.5 * theta)
    # asked for at once: nothing else is in registers yet
    rows = gl.arange(0, QUERIES, layout=gl.SliceLayout(1, LAYOUT))
    d_out = load_rows(head.d_out, rows, head.d_out_row, size.n_q, x.d, D, LAYOUT)
    mean = load_rows(out2 + head.queries * x.d, rows, x.d, size.n_q, x.d, D, LAYOUT)
    deltas.store(gl.sum(d_out.to(gl.float32) * mean.to(gl.float32), 1))


@gluon.jit
def _shared(x, QUERIES: gl.constexpr):
    M: gl.constexpr = x.BLOCK_M
    N: gl.constexpr = x.BLOCK_N
    D: gl.constexpr = x.BLOCK_D
    dtype: gl.constexpr = x.q.dtype.element_ty
    rows: gl.constexpr = gl.NVMMASharedLayout(2 * D, element_bitwidth=16, rank=2)
    tile: gl.constexpr = gl.NVMMASharedLayout(128, element_bitwidth=16, rank=2)
    wide: gl.constexpr = gl.SwizzledSharedLayout(4, 1, 8, [1, 0])
    line: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    return Here(
        gl.allocate_shared_memory(dtype, [N, D], rows),
        gl.allocate_shared_memory(dtype, [N, D], rows),
        gl.allocate_shared_memory(dtype, [2, M, D], rows),
        gl.allocate_shared_memory(dtype, [2, M, D], rows),
        gl.allocate_shared_memory(dtype, [N, M], tile),
        gl.allocate_shared_memory(gl.float32, [QUERIES // M, M, D], wide),
        gl.allocate_shared_memory(gl.float32, [QUERIES // M, M], line),
        gl.allocate_shared_memory(gl.float32, [QUERIES // M, M], line),
    )


@launched_by_key
@gluon.jit
def gradients_hopper_kernel(x, size, up, out2, dq, dk, dv, QUERIES: gl.constexpr):
    """Write dQ (B, H, N_q, D), dK and dV (B, H, N_k, D), contiguous, of one head; alpha = 1.5, on eight warps.

    Rows of q, k, v and dO start at multiples of 16 bytes, D is a multiple of 16 up to 64, and every head has its own
    keys.

    Args:
        up: an ``Upstream`` of backward.py; its delta is left alone.
        out2: (B, H, N_q, D) contiguous.
        QUERIES: no less than N_q.
    """
    size = open_sizes(x, size)
    D: gl.constexpr = x.BLOCK_D
    rows_of: gl.constexpr = gl.BlockedLayout([1, 8], [256 // D, D // 8], [gl.num_warps(), 1], [1, 0])
    head_index = gl.program_id(0)
    batch = (head_index // size.heads).to(gl.int64)
    number = (head_index % size.heads).to(gl.int64)
    start, end = padding(x, size, batch)
    head = Head(
        x.q + batch * size.q_batch + number * size.q_head,
        x.k + batch * size.k_batch + number * size.k_head,
        x.v + batch * size.v_batch + number * size.v_head,
        up.d_out + batch * pitch(up.d_out_batch, up.ALIGNED) + number * pitch(up.d_out_head, up.ALIGNED),
        pitch(up.d_out_row, up.ALIGNED),
        head_index.to(gl.int64) * size.n_q, head_index.to(gl.int64) * size.n_k, start, end,
    )  # fmt: skip
    here = _shared(x, QUERIES)
    _start(x, size, here, head, 0, rows_of)
    _numbers(x, size, head, here, up, out2, QUERIES, rows_of)
    count = gl.cdiv(size.n_k, x.BLOCK_N)
    for index in range(0, count):
        _block_of_keys(x, size, here, head, index, count, dk, dv, rows_of)
    for block in range(0, gl.cdiv(size.n_q, x.BLOCK_M)):
        value = here.dq.index(block).load(rows_of) * size.scale
        rows = block * x.BLOCK_M + gl.arange(0, x.BLOCK_M, layout=gl.SliceLayout(1, rows_of))
        store_rows(dq + head.queries * x.d, rows, size.n_q, x.d, value, D, rows_of)
