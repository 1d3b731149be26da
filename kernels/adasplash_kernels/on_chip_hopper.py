"""The kernel of on_chip.py for Hopper's GPUs, in Gluon: one or two groups of four warps hold the scores of 64 queries.

Triton gives every warp rows of queries where one product follows another, for which 64 queries are enough for four
warps, and 256 keys are what their registers hold. Here two groups have half of 512 keys each, and their rows are those
of two blocks of queries: the first is the block with the even keys, the second the same with the odd ones. So weights
go into the second product from registers, and what is left is to add up both groups' results in shared memory. For up
to 256 keys there is one group.

A program takes several blocks of queries of a head, one after the other. Keys and values stay in shared memory.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere.async_copy import commit_group, wait_group
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, warpgroup_mma, warpgroup_mma_wait

from .inputs import open_sizes
from .launching import launched_by_key
from .on_chip import TOLERANCE
from .rows_gluon import copy_rows, load_rows, store_rows
from .spans import padding
from .warpgroups import larger, larger_of_both, my_group, sums_of_both

_ALL = gl.constexpr(tl.PropagateNan.ALL)


class Here(NamedTuple):
    """Shared memory.

    Attributes:
        q: (groups x BLOCK_M, BLOCK_D), the queries once for each group.
        k, v: (groups, keys, BLOCK_D).
        out, out2: the results on their way out: with one group (BLOCK_M, BLOCK_D) in the dtype of q, else
            (groups x BLOCK_M, BLOCK_D) float32.
        sums, others: two times (groups x BLOCK_M,) float32 in each, for what groups add up, taken by turns so that no
            one waits until all have read; with one group nothing that is used.
        flags: (groups x BLOCK_M,) int32, whether a query's solve goes on.
    """

    q: Any
    k: Any
    v: Any
    out: Any
    out2: Any
    sums: Any
    others: Any
    flags: Any


class Place(NamedTuple):
    """Which head, and what its queries see.

    Attributes:
        group: of warps.
        base: the head's first row in theta, O and O2.
        start, end: the half-open range of keys that are not padding.
    """

    group: Any
    base: Any
    start: Any
    end: Any


@gluon.jit
def _add2(a, b, c, d):
    return a + c, b + d


@gluon.jit
def _newton(total, slope):
    """Newton's step on the norm of the weights (see thresholds/settle.py), in halves of theta."""
    root = gl.sqrt(gl.maximum(total, 1e-30))
    return gl.fdiv((total - 1.0) * root, (root + 1.0) * gl.maximum(slope, 1e-30))


@gluon.jit
def _roots(height, rise):
    """Return u = [height - rise]_+, the roots of the weights."""
    return gl.maximum(height - rise[:, None], 0.0, propagate_nan=_ALL)


@gluon.jit
def _step(height, rise, like, places, QUERIES: gl.constexpr):
    """Return Newton's step for all scores of a query, or some; the result as ``like`` is laid out."""
    u = _roots(height, gl.convert_layout(rise, gl.SliceLayout(1, height.type.layout)))
    total, slope = gl.reduce((u * u, u), 1, _add2)
    total, slope = gl.convert_layout(total, like.type.layout), gl.convert_layout(slope, like.type.layout)
    return _newton(*sums_of_both(total, slope, places, QUERIES))


@gluon.jit
def _rough_step(height, rise, places, KEYS: gl.constexpr, QUERIES: gl.constexpr):
    """Return about the same for all KEYS scores of a query, for an instruction a score less.

    With v = max(height, rise) the sums of u = v - rise and of its square follow from those of v and of its square. That
    cancels badly where ``rise`` is far from 0.
    """
    above = gl.maximum(height, rise[:, None], propagate_nan=_ALL)
    squares, plain = gl.reduce((above * above, above), 1, _add2)
    squares, plain = sums_of_both(squares, plain, places, QUERIES)
    slope = plain - KEYS * rise
    return _newton(squares - rise * (plain + slope), slope)


@gluon.jit
def _scores(x, size, here, at, block, N: gl.constexpr, LAYOUT: gl.constexpr):
    """Return scores (groups x BLOCK_M, N) before ``scale``, ``-inf`` where a query does not see a key."""
    M: gl.constexpr = x.BLOCK_M
    GROUPS: gl.constexpr = gl.num_warps() // 4
    k = here.k.index(at.group).slice(0, N)
    raw = warpgroup_mma(here.q, k.permute((1, 0)), gl.zeros([GROUPS * M, N], gl.float32, LAYOUT), use_acc=False)
    shift = size.n_k - size.n_q
    first = block * M + shift
    seen = (
        (at.start == 0) & (at.end >= GROUPS * N) & (first + M - 1 <= size.left) & (first + size.right >= GROUPS * N - 1)
    )
    if not seen:
        place = gl.arange(0, GROUPS * M, layout=gl.SliceLayout(1, LAYOUT))
        position = block * M + place % M + shift
        low = gl.maximum(position - size.left, at.start)
        high = gl.maximum(gl.minimum(position + size.right + 1, at.end), 0)
        before = GROUPS - 1 - place // M  # column i of group g is key GROUPS i + g
        low = (low + before) // GROUPS
        high = (high + before) // GROUPS
        columns = gl.arange(0, N, layout=gl.SliceLayout(0, LAYOUT))
        raw = gl.where((columns[None, :] >= low[:, None]) & (columns[None, :] < high[:, None]), raw, float("-inf"))
    return raw


@gluon.jit
def _solve(x, size, here, raw, max_iterations):
    """Return theta (groups x BLOCK_M,), ``+inf`` for queries that see no key; and heights and rise for ``_roots``.

    The largest of every 8 scores, which one thread holds, are a part of all scores, so that their threshold is a lower
    bound of that of all (see thresholds/group_maxima.py).
    """
    M: gl.constexpr = x.BLOCK_M
    N: gl.constexpr = raw.shape[1]
    KEYS: gl.constexpr = gl.num_warps() // 4 * N
    rows: gl.constexpr = gl.SliceLayout(1, raw.type.layout)
    maxima = gl.reshape(gl.reduce(gl.reshape(raw, [raw.shape[0], N // 64, 8, 8]), 2, larger), [raw.shape[0], N // 8])
    some: gl.constexpr = gl.SliceLayout(1, maxima.type.layout)
    top = gl.convert_layout(gl.reduce(maxima, 1, larger), rows) * size.scale
    top = larger_of_both(top, here.others[0], M)
    empty = top == float("-inf")
    top = gl.where(empty, 0.0, top)
    # the largest score comes off first, in one multiply-add that rounds once
    height = (maxima * size.scale - gl.convert_layout(top, some)[:, None]) * 0.5 + 1.0
    bound = _step(height, gl.convert_layout(gl.zeros_like(top), some), top, here.sums, M)
    bound += _step(height, gl.convert_layout(bound, some), top, here.others, M)
    bound = gl.maximum(bound - 1e-6, 0.0, propagate_nan=_ALL)
    height = (raw * size.scale - top[:, None]) * 0.5 + (1.0 - bound)[:, None]
    rise = _rough_step(height, gl.zeros_like(top), here.sums, KEYS, M)
    rise += _rough_step(height, rise, here.others, KEYS, M)
    iteration = 2
    unfinished = 1
    while (unfinished > 0) & (iteration < max_iterations):
        step = _step(height, rise, top, here.sums, M)
        rise += step
        # a step e of theta leaves at most e^2 / 4 for each weight in the support
        again = step * step * KEYS > TOLERANCE
        # all warps read what all have written, which takes one barrier; NaN must not hang
        all_rows: gl.constexpr = gl.BlockedLayout([raw.shape[0] // 32], [32], [gl.num_warps()], [0])
        here.flags.store((again & (empty == 0) & (rise == rise)).to(gl.int32))
        unfinished = gl.max(here.flags.load(all_rows), 0)
        iteration += 1
    rise = gl.where(empty, 0.0, rise)  # where nothing is seen the steps lead anywhere
    return gl.where(empty, float("inf"), top + 2.0 * (bound + rise)), height, rise


@gluon.jit
def _outputs(x, size, here, at, block, height, rise, out, out2, LAYOUT: gl.constexpr):
    """Write O, and O2 unless it is None.

    Args:
        LAYOUT: (rows, BLOCK_D) as copied.
    """
    M: gl.constexpr = x.BLOCK_M
    D: gl.constexpr = x.BLOCK_D
    N: gl.constexpr = height.shape[1]
    ROWS: gl.constexpr = height.shape[0]
    WARPS: gl.constexpr = gl.num_warps()
    dtype: gl.constexpr = x.q.dtype.element_ty
    results: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, D, 16])
    operand: gl.constexpr = gl.DotOperandLayout(0, results, 2)
    given: gl.constexpr = LAYOUT if WARPS == 4 else gl.BlockedLayout([1, 4], [128 // D, D // 4], [WARPS, 1], [1, 0])
    queries = block * M + gl.arange(0, M, layout=gl.SliceLayout(1, given))
    v = here.v.index(at.group).slice(0, N)
    wait_group(0)  # for the values, the first time
    fence_async_shared()
    zero = gl.zeros([ROWS, D], gl.float32, results)
    u = _roots(height, rise)
    p = gl.convert_layout((u * u).to(dtype), operand)
    acc = warpgroup_mma(p, v, zero, use_acc=False, is_async=True)
    if out2 is not None:
        slope = gl.sum(u, 1)
        root = gl.convert_layout(u.to(dtype), operand)
        acc2 = warpgroup_mma(root, v, zero, use_acc=False, is_async=True)
        acc, p = warpgroup_mma_wait(1, deps=[acc, p])
    else:
        acc, p = warpgroup_mma_wait(0, deps=[acc, p])
    # while the second product is under way
    here.out.store(acc.to(here.out.dtype))
    if WARPS == 4:
        store_rows(out + at.base * x.d, queries, size.n_q, x.d, here.out.load(given), D, given)
    else:
        if out2 is not None:
            here.sums[0].store(slope)
        both = here.out.slice(0, M).load(given) + here.out.slice(M, M).load(given)
        store_rows(out + at.base * x.d, queries, size.n_q, x.d, both, D, given)
    if out2 is not None:
        acc2, root = warpgroup_mma_wait(0, deps=[acc2, root])
        if WARPS == 4:
            slope = gl.convert_layout(slope, gl.SliceLayout(1, results))
            here.out2.store((acc2 * _inverse(slope)[:, None]).to(here.out2.dtype))
            store_rows(out2 + at.base * x.d, queries, size.n_q, x.d, here.out2.load(given), D, given)
        else:
            of_row: gl.constexpr = gl.SliceLayout(1, given)
            here.out2.store(acc2)
            slope = here.sums[0].slice(0, M).load(of_row) + here.sums[0].slice(M, M).load(of_row)
            both = here.out2.slice(0, M).load(given) + here.out2.slice(M, M).load(given)
            store_rows(out2 + at.base * x.d, queries, size.n_q, x.d, both * _inverse(slope)[:, None], D, given)


@gluon.jit
def _inverse(slope):
    """Return 1 / sum u; 1 where there are no weights."""
    return gl.fdiv(1.0, gl.where(slope == 0.0, 1.0, slope))


@gluon.jit
def _block(x, size, here, at, block, theta_out, out, out2, max_iterations, N: gl.constexpr, LAYOUT: gl.constexpr):
    """One block of queries, whose first N keys in each group are all that it sees."""
    M: gl.constexpr = x.BLOCK_M
    scores: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [gl.num_warps(), 1], [16, N, 16])
    raw = _scores(x, size, here, at, block, N, scores)
    theta, height, rise = _solve(x, size, here, raw, max_iterations)
    place = gl.arange(0, raw.shape[0], layout=gl.SliceLayout(1, scores))
    row = block * M + place % M
    gl.store(theta_out + at.base + row, theta, mask=(row < size.n_q) & (place < M))
    _outputs(x, size, here, at, block, height, rise, out, out2, LAYOUT)


@gluon.jit
def _shared(x, N: gl.constexpr):
    """Return what a program needs of shared memory, for N keys a group."""
    M: gl.constexpr = x.BLOCK_M
    D: gl.constexpr = x.BLOCK_D
    GROUPS: gl.constexpr = gl.num_warps() // 4
    dtype: gl.constexpr = x.q.dtype.element_ty
    rows: gl.constexpr = gl.NVMMASharedLayout(2 * D if D < 64 else 128, element_bitwidth=16, rank=2)
    q = gl.allocate_shared_memory(dtype, [GROUPS * M, D], rows)
    k = gl.allocate_shared_memory(dtype, [GROUPS, N, D], rows)
    v = gl.allocate_shared_memory(dtype, [GROUPS, N, D], rows)
    if GROUPS == 1:
        out = gl.allocate_shared_memory(dtype, [M, D], rows)
        out2 = gl.allocate_shared_memory(dtype, [M, D], rows)
        sums = (out, out)
        others = sums
    else:
        wide: gl.constexpr = gl.SwizzledSharedLayout(4, 1, 8, [1, 0])
        line: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
        out = gl.allocate_shared_memory(gl.float32, [GROUPS * M, D], wide)
        out2 = gl.allocate_shared_memory(gl.float32, [GROUPS * M, D], wide)
        sums = (
            gl.allocate_shared_memory(gl.float32, [GROUPS * M], line),
            gl.allocate_shared_memory(gl.float32, [GROUPS * M], line),
        )
        others = (
            gl.allocate_shared_memory(gl.float32, [GROUPS * M], line),
            gl.allocate_shared_memory(gl.float32, [GROUPS * M], line),
        )
    flags = gl.allocate_shared_memory(gl.int32, [GROUPS * M], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    return Here(q, k, v, out, out2, sums, others, flags)


@gluon.jit
def _copy(place, base, rows, pitch, n_rows, d, LAYOUT: gl.constexpr, WHOLE: gl.constexpr):
    """Put rows of a matrix into shared memory, with WHOLE at some time before ``wait_group`` is over; what lies outside
    becomes zero."""
    if WHOLE:
        copy_rows(place, base, rows, pitch, n_rows, d, LAYOUT)
    else:
        place.store(load_rows(base, rows, pitch, n_rows, d, place.shape[1], LAYOUT))


@gluon.jit
def _keep_keys(x, size, here, k_base, v_base, LAYOUT: gl.constexpr, WHOLE: gl.constexpr):
    """Load all keys into shared memory; the values are on their way there, which ``_outputs`` waits for."""
    GROUPS: gl.constexpr = here.k.shape[0]
    keys = GROUPS * gl.arange(0, here.k.shape[1], layout=gl.SliceLayout(1, LAYOUT))
    for group in gl.static_range(GROUPS):
        _copy(here.k.index(group), k_base, keys + group, size.k_row, size.n_k, x.d, LAYOUT, WHOLE)
    commit_group()
    for group in gl.static_range(GROUPS):
        _copy(here.v.index(group), v_base, keys + group, size.v_row, size.n_k, x.d, LAYOUT, WHOLE)
    commit_group()
    wait_group(1)


@gluon.jit
def _keep_queries(here, q, M: gl.constexpr):
    """Put a block of queries into shared memory, once for each group."""
    for group in gl.static_range(gl.num_warps() // 4):
        here.q.slice(group * M, M).store(q)
    fence_async_shared()


@launched_by_key
@gluon.jit(do_not_specialize=["max_iterations", "each"])
def on_chip_hopper_kernel(
    x, size, theta_out, out, out2, max_iterations, each, NARROW: gl.constexpr, WHOLE: gl.constexpr
):
    """As ``on_chip_kernel``, for alpha = 1.5, on four warps for up to 256 keys, else on eight.

    Args:
        each: blocks of queries that a program takes.
        NARROW: whether the first blocks of a head may see the first half of the keys alone, which is then faster.
        WHOLE: whether D is a multiple of 16 and all rows of k and v start at multiples of 16 bytes, so that they may
            be copied in the background.
    """
    size = open_sizes(x, size)
    M: gl.constexpr = x.BLOCK_M
    D: gl.constexpr = x.BLOCK_D
    N: gl.constexpr = x.BLOCK_N // (gl.num_warps() // 4)
    rows_of: gl.constexpr = gl.BlockedLayout([1, 8], [256 // D, D // 8], [gl.num_warps(), 1], [1, 0])
    blocks = gl.cdiv(size.n_q, M)
    parts = gl.cdiv(blocks, each)
    head_index = gl.program_id(0) // parts
    first = gl.program_id(0) % parts * each
    last = gl.minimum(first + each, blocks)
    batch = (head_index // size.heads).to(gl.int64)
    head = (head_index % size.heads).to(gl.int64)
    kv_head = head // size.groups
    start, end = padding(x, size, batch)
    at = Place(my_group(), head_index.to(gl.int64) * size.n_q, start, end)
    q_base = x.q + batch * size.q_batch + head * size.q_head
    rows = gl.arange(0, M, layout=gl.SliceLayout(1, rows_of))
    q = load_rows(q_base, first * M + rows, size.q_row, size.n_q, x.d, D, rows_of)
    here = _shared(x, N)
    k_base = x.k + batch * size.k_batch + kv_head * size.k_head
    _keep_keys(x, size, here, k_base, x.v + batch * size.v_batch + kv_head * size.v_head, rows_of, WHOLE)
    wide = first
    if NARROW:
        wide = (x.BLOCK_N // 2 - size.right - (size.n_k - size.n_q)) // M
        wide = gl.minimum(gl.maximum(wide, first), last)
        for block in range(first, wide):
            _keep_queries(here, q, M)
            q = load_rows(q_base, (block + 1) * M + rows, size.q_row, size.n_q, x.d, D, rows_of)
            _block(x, size, here, at, block, theta_out, out, out2, max_iterations, N // 2, rows_of)
    for block in range(wide, last):
        _keep_queries(here, q, M)
        q = load_rows(q_base, (block + 1) * M + rows, size.q_row, size.n_q, x.d, D, rows_of)  # while this one is solved
        _block(x, size, here, at, block, theta_out, out, out2, max_iterations, N, rows_of)
