"""The pieces every kernel shares: a block of queries or keys, rows of a matrix, and one tile of masked scores."""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .spans import inner_range, key_span, query_span, tile_range
from .worklists.walk import EDGES, MIXED, crosses_edge, members

_INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)
_CACHE = tl.constexpr(2**25)  # bytes of two matrices that programs read at a time, to be found in a GPU's second cache


class Block(NamedTuple):
    """A block of queries (of keys) of one head, and where the other side's tiles are that it meets.

    Attributes:
        index: which block of its head.
        batch, head, kv_head: int64.
        head_index: the head counted over the batch (the key-value head, for keys), int64.
        rows: positions in the sequence.
        low, high: the half-open range of the other side that each row meets (see spans.py).
        position: each row's place on the other side.
        first, last: tiles of the other side that the block meets.
        inner_low, inner_high: the range that all rows meet.
    """

    index: Any
    batch: Any
    head: Any
    kv_head: Any
    head_index: Any
    rows: Any
    low: Any
    high: Any
    position: Any
    first: Any
    last: Any
    inner_low: Any
    inner_high: Any


@triton.jit
def rank_and_head(x, number, blocks, heads, rows):
    """Return which block of its head a program takes, 0 for the longest, and which head.

    Blocks of equal rank of several heads come before those of the next rank, so that none of the longest is still at
    work when all others are done. As many heads are taken together as the second cache holds.

    Args:
        number: the program's, among ``blocks`` for each of ``heads``.
        rows: that each head reads of two matrices (rows, d), those that it shares counted in part.
    """
    fit = tl.full((), _CACHE // (4 * x.BLOCK_D), tl.int32)
    together = tl.maximum(fit // tl.maximum(rows, 1), 1)
    first = number // (blocks * together) * together
    together = tl.minimum(together, heads - first)
    number -= first * blocks
    return number // together, first + number % together


@triton.jit
def query_place(x, size):
    """Return this program's head, counted over the batch, and which of its blocks of queries; the last blocks come
    first, since causal rows are longest there."""
    blocks = tl.cdiv(size.n_q, x.BLOCK_M)
    rank, head = rank_and_head(x, tl.program_id(0), blocks, tl.num_programs(0) // blocks, size.n_k // size.groups)
    return size.first_head + head, blocks - 1 - rank


@triton.jit
def query_block(x, size):
    """Return this program's block of queries."""
    head_index, index = query_place(x, size)
    return query_block_at(x, size, head_index, index)


@triton.jit
def query_block_at(x, size, head_index, index):
    """Return a block of queries of a head counted over the batch."""
    batch = head_index // size.heads
    head = head_index % size.heads
    rows = index * x.BLOCK_M + tl.arange(0, x.BLOCK_M)
    low, high, position = query_span(x, size, batch, rows)
    first, last = tile_range(low, high, x.BLOCK_N)
    inner_low, inner_high = inner_range(low, high)
    return Block(
        index, batch.to(tl.int64), head.to(tl.int64), (head // size.groups).to(tl.int64), head_index.to(tl.int64),
        rows, low, high, position, first, last, inner_low, inner_high,
    )  # fmt: skip


@triton.jit
def key_block(x, size):
    """Return this program's block of keys; the first blocks come first, since the most causal rows see them."""
    return key_block_number(x, size, tl.program_id(0), tl.num_programs(0) // tl.cdiv(size.n_k, x.BLOCK_N))


@triton.jit
def key_block_number(x, size, number, heads):
    """Return the block of keys that comes as number ``number`` where so many key-value heads are launched."""
    index, head = rank_and_head(x, number, tl.cdiv(size.n_k, x.BLOCK_N), heads, size.n_q * size.groups)
    return key_block_at(x, size, size.first_head // size.groups + head, index)


@triton.jit
def key_block_at(x, size, head_index, index):
    """Return a block of keys of a key-value head counted over the batch; its ``head`` is the first of the query heads
    that share them."""
    kv_heads = size.heads // size.groups
    batch = head_index // kv_heads
    kv_head = head_index % kv_heads
    rows = index * x.BLOCK_N + tl.arange(0, x.BLOCK_N)
    low, high, position = key_span(x, size, batch, rows)
    first, last = tile_range(low, high, x.BLOCK_M)
    inner_low, inner_high = inner_range(low, high)
    return Block(
        index, batch.to(tl.int64), (kv_head * size.groups).to(tl.int64), kv_head.to(tl.int64),
        head_index.to(tl.int64), rows, low, high, position, first, last, inner_low, inner_high,
    )  # fmt: skip


@triton.jit
def dot(a, b, acc):
    """acc + a b with float32 accumulation; float32 inputs are multiplied as float32, not as TF32."""
    if _INTERPRETED:  # the interpreter multiplies bfloat16 as the integers it stores them in
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision="ieee")


@triton.jit
def _larger(a, b):
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def largest(raw, AXIS: tl.constexpr):
    """Return the largest score along an axis; NaN if there is one."""
    if _INTERPRETED:  # it reduces by a function of ours only slowly
        top = tl.where(tl.max((raw != raw).to(tl.int32), AXIS) > 0, float("nan"), tl.max(raw, AXIS))
    else:
        top = tl.reduce(raw, AXIS, _larger)
    return top


@triton.jit
def row_max(raw):
    """Return the largest score of each row; NaN if there is one."""
    return largest(raw, 1)


@triton.jit
def load_rows(x, base, rows, pitch, n_rows):
    """Load (rows, BLOCK_D) from a matrix; out-of-range rows and columns are zero."""
    cols = tl.arange(0, x.BLOCK_D)
    # 64-bit offsets: a row index times a pitch of heads x head dim passes 2^31 for long packed sequences.
    offsets = rows.to(tl.int64)[:, None] * pitch + cols[None, :]
    keep = (rows < n_rows)[:, None]
    if not x.EVEN_D:
        keep = keep & (cols < x.d)[None, :]
    return tl.load(base + offsets, mask=keep, other=0.0)


@triton.jit
def store_rows(x, base, value, rows, n_rows):
    """Store (rows, BLOCK_D) in a contiguous matrix, in its dtype, leaving out-of-range rows and columns alone."""
    cols = tl.arange(0, x.BLOCK_D)
    offsets = rows.to(tl.int64)[:, None] * x.d + cols[None, :]
    keep = (rows < n_rows)[:, None]
    if not x.EVEN_D:
        keep = keep & (cols < x.d)[None, :]
    tl.store(base + offsets, value.to(base.dtype.element_ty), mask=keep)


@triton.jit
def load_queries(x, size, at):
    """Load the queries (BLOCK_M, BLOCK_D) of a block; where scores are stored there are none."""
    if x.scores is None:
        q = load_rows(x, x.q + at.batch * size.q_batch + at.head * size.q_head, at.rows, size.q_row, size.n_q)
    else:
        q = 0.0
    return q


@triton.jit
def load_keys(x, size, at, keys):
    """Load rows of K (keys, BLOCK_D) for a block of queries or keys."""
    return load_rows(x, x.k + at.batch * size.k_batch + at.kv_head * size.k_head, keys, size.k_row, size.n_k)


@triton.jit
def load_values(x, size, at, keys):
    """Load rows of V (keys, BLOCK_D) for a block of queries or keys."""
    return load_rows(x, x.v + at.batch * size.v_batch + at.kv_head * size.v_head, keys, size.v_row, size.n_k)


@triton.jit
def load_slope(x, size, batch, head):
    """Return the ALiBi slope of a head (of each, for a tensor of heads), before ``scale``; 0 without slopes."""
    if x.slopes is None:
        slope = head * 0.0
    else:
        slope = tl.load(x.slopes + batch * size.slope_batch + head) / size.scale
    return slope


@triton.jit
def raw_scores(x, q, k, slope, distance):
    """Scores (queries, keys) in float32 before ``scale``, with ALiBi's term where there are slopes; turned round, if q
    and k change places."""
    raw = dot(q, tl.trans(k), tl.zeros((q.shape[0], k.shape[0]), tl.float32))
    if x.slopes is not None:
        raw -= slope * tl.abs(distance).to(tl.float32)
    return raw


@triton.jit
def _hidden(walk, tile, raw, low, high, BLOCK: tl.constexpr, LISTS: tl.constexpr, AXIS: tl.constexpr):
    rows = members(walk, tile, BLOCK, LISTS)  # again, so that no other tile pays for it
    rows = tl.expand_dims(rows, 1 - AXIS)
    seen = (rows >= tl.expand_dims(low, AXIS)) & (rows < tl.expand_dims(high, AXIS))
    return tl.where(seen, raw, float("-inf"))


@triton.jit
def _mask(walk, tile, raw, low, high, PART: tl.constexpr, BLOCK: tl.constexpr, LISTS: tl.constexpr, AXIS: tl.constexpr):
    """Put ``-inf`` where the mask of attention forbids a pair of a tile, unless its part says that there is none.

    Args:
        low, high: what each row of the block sees, along the axis that is not AXIS, which is the tile's.
    """
    if PART == MIXED:
        if crosses_edge(walk, tile, BLOCK):
            raw = _hidden(walk, tile, raw, low, high, BLOCK, LISTS, AXIS)
    elif PART == EDGES:
        raw = _hidden(walk, tile, raw, low, high, BLOCK, LISTS, AXIS)
    return raw


@triton.jit
def query_scores(x, size, at, q, k, walk, tile, PART: tl.constexpr):
    """One tile of scores for a block of queries, before ``scale``; ``-inf`` where a query does not see a key."""
    if x.slopes is None:
        raw = raw_scores(x, q, k, 0.0, 0)
    else:
        keys = members(walk, tile, x.BLOCK_N, x.LISTS)
        slope = load_slope(x, size, at.batch, at.head)
        raw = raw_scores(x, q, k, slope, at.position[:, None] - keys[None, :])
    return _mask(walk, tile, raw, at.low, at.high, PART, x.BLOCK_N, x.LISTS, 1)


@triton.jit
def scores_by_key(x, size, at, q, walk, tile, PART: tl.constexpr):
    """The same turned round, (keys, queries), from the keys of a tile."""
    keys = members(walk, tile, x.BLOCK_N, x.LISTS)
    slope = load_slope(x, size, at.batch, at.head)
    raw = raw_scores(x, load_keys(x, size, at, keys), q, slope, at.position[None, :] - keys[:, None])
    return _mask(walk, tile, raw, at.low, at.high, PART, x.BLOCK_N, x.LISTS, 0)


@triton.jit
def load_tile(x, size, at, q, walk, tile, PART: tl.constexpr):
    """Return a tile's rows of K and V for a block of queries, and its scores."""
    keys = members(walk, tile, x.BLOCK_N, x.LISTS)
    k = load_keys(x, size, at, keys)
    v = load_values(x, size, at, keys)
    return k, v, query_scores(x, size, at, q, k, walk, tile, PART)


@triton.jit
def key_scores(x, size, at, head, q, k, walk, tile, PART: tl.constexpr):
    """One tile of scores (keys, queries) for a block of keys that meets a tile of queries of ``head``, likewise."""
    if x.slopes is None:
        raw = raw_scores(x, k, q, 0.0, 0)
    else:
        queries = members(walk, tile, x.BLOCK_M, x.LISTS)
        slope = load_slope(x, size, at.batch, head)
        raw = raw_scores(x, k, q, slope, queries[None, :] - at.position[:, None])
    return _mask(walk, tile, raw, at.low, at.high, PART, x.BLOCK_M, x.LISTS, 1)


@triton.jit
def threshold_scores(x, size, at, q, walk, tile, PART: tl.constexpr):
    """One tile of scores for finding thresholds: computed from q and k, or read where they are stored."""
    keys = members(walk, tile, x.BLOCK_N, x.LISTS)
    if x.scores is None:
        raw = query_scores(x, size, at, q, load_keys(x, size, at, keys), walk, tile, PART)
    else:
        row = (at.head_index * size.n_q + at.rows)[:, None] * size.n_k
        keep = (at.rows < size.n_q)[:, None] & (keys < size.n_k)[None, :]
        raw = tl.load(x.scores + row + keys[None, :], mask=keep, other=float("-inf")).to(tl.float32)
    return raw


@triton.jit
def load_theta(theta, size, at):
    """Load the thresholds of a block of queries; ``+inf``, which makes weights zero, past the end."""
    return tl.load(theta + at.head_index * size.n_q + at.rows, mask=at.rows < size.n_q, other=float("inf"))
