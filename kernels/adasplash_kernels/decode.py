"""A few queries against a long cache of keys, without gradients: the scores are stored and the keys split.

One program a head would leave most of the GPU idle. Here the keys are cut into pieces: every piece's scores are
written out, the thresholds are solved on the stored scores, a row a program, and every piece adds up its part of the
output. The scores of a few queries are small beside the keys they come from, and values are read only where a weight
is not zero.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .inputs import open_sizes
from .launch import threshold
from .launching import launched_by_key
from .mapping import load_exponent, weights
from .problem import Problem
from .scores import dot, load_keys, load_slope, load_values, raw_scores
from .spans import query_span
from .tile_sizes import INTERPRETED, choose_row_tiles

MAX_QUERIES = 16
_MAX_ROWS = 64  # queries times the heads that share keys: they are one tile
_MIN_KEYS = 32 if INTERPRETED else 1024
_PIECES = 512  # programs to spread the output over; a few for each multiprocessor of a large GPU
_KEYS = 32 if INTERPRETED else 128
_WIDEST = 4096  # scores of a row that are looked at together: the same for every length, which then compiles nothing


def suits(problem: Problem) -> bool:
    """Whether a call without gradients is better computed this way."""
    rows = problem.q.shape[2] * (problem.q.shape[1] // problem.k.shape[1])
    few = problem.q.shape[2] <= MAX_QUERIES and rows <= _MAX_ROWS
    return few and problem.k.shape[2] >= _MIN_KEYS and problem.cu_seqlens_q is None


class Piece(NamedTuple):
    """The queries of all heads that share keys, as rows of one tile, and a piece of the keys.

    Attributes:
        batch, kv_head: int64.
        number: which piece.
        there: rows that exist.
        head: (rows,) int64.
        query: (rows,) positions among the queries.
        line: (rows,) int64, the row's place in (B, H, N_q).
    """

    batch: Any
    kv_head: Any
    number: Any
    there: Any
    head: Any
    query: Any
    line: Any


@triton.jit
def _piece(x, size, n_pieces, ROWS: tl.constexpr):
    kv_heads = size.heads // size.groups
    owner = tl.program_id(0) // n_pieces
    batch = (owner // kv_heads).to(tl.int64)
    kv_head = (owner % kv_heads).to(tl.int64)
    row = tl.arange(0, ROWS)
    there = row < size.groups * size.n_q
    head = kv_head * size.groups + tl.where(there, row // size.n_q, 0)
    query = tl.where(there, row % size.n_q, 0)
    line = (batch * size.heads + head) * size.n_q + query
    return Piece(batch, kv_head, tl.program_id(0) % n_pieces, there, head, query, line)


@launched_by_key
@triton.jit(do_not_specialize=["n_pieces"])
def _scores_kernel(x, size, scores, n_pieces, ROWS: tl.constexpr, KEYS: tl.constexpr):
    """Write the masked scores, before ``scale``, of all queries against one tile of keys."""
    size = open_sizes(x, size)
    at = _piece(x, size, n_pieces, ROWS)
    cols = tl.arange(0, x.BLOCK_D)
    offsets = at.batch * size.q_batch + at.head * size.q_head + at.query * size.q_row
    q = tl.load(x.q + offsets[:, None] + cols[None, :], mask=at.there[:, None] & (cols < x.d)[None, :], other=0.0)
    keys = at.number * KEYS + tl.arange(0, KEYS)
    k = load_keys(x, size, at, keys)
    low, high, position = query_span(x, size, at.batch, at.query)
    slope = load_slope(x, size, at.batch, at.head)
    raw = raw_scores(x, q, k, slope[:, None], position[:, None] - keys[None, :])
    seen = (keys[None, :] >= low[:, None]) & (keys[None, :] < high[:, None])
    keep = at.there[:, None] & (keys < size.n_k)[None, :]
    tl.store(scores + at.line[:, None] * size.n_k + keys[None, :], tl.where(seen, raw, float("-inf")), mask=keep)


@launched_by_key
@triton.jit(do_not_specialize=["n_pieces", "tiles_each"])
def _output_kernel(x, size, scores, theta_in, parts, n_pieces, tiles_each, ROWS: tl.constexpr, KEYS: tl.constexpr):
    """Write one piece's part of O, (pieces, B, H, N_q, D) float32."""
    size = open_sizes(x, size)
    at = _piece(x, size, n_pieces, ROWS)
    theta = tl.load(theta_in + at.line, mask=at.there, other=float("inf"))[:, None]
    a = load_exponent(x, size, at.head[:, None])
    acc = tl.zeros((ROWS, x.BLOCK_D), tl.float32)
    for tile in range(at.number * tiles_each, (at.number + 1) * tiles_each):
        keys = tile * KEYS + tl.arange(0, KEYS)
        keep = at.there[:, None] & (keys < size.n_k)[None, :]
        raw = tl.load(scores + at.line[:, None] * size.n_k + keys[None, :], mask=keep, other=float("-inf"))
        p, _u = weights(raw, size.scale, theta, a, x.ALPHA)
        if tl.sum(tl.sum(p, 1), 0) != 0.0:  # true for NaN
            v = load_values(x, size, at, keys)
            acc = dot(p.to(v.dtype), v, acc)
    cols = tl.arange(0, x.BLOCK_D)
    kv_heads = size.heads // size.groups
    batches = tl.num_programs(0) // (n_pieces * kv_heads)
    line = at.number.to(tl.int64) * batches * size.heads * size.n_q + at.line
    keep = at.there[:, None] & (cols < x.d)[None, :]
    tl.store(parts + line[:, None] * x.d + cols[None, :], acc, mask=keep)


def decode(problem: Problem, method: str) -> tuple[Tensor, Tensor]:
    """Return O in parts, one for each piece of the keys, (pieces, B, H, N_q, D) float32, and theta (B, H, N_q)
    float32."""
    q, k = problem.q, problem.k
    (batch, heads, n_q, head_dim), (_, kv_heads, n_k, _) = q.shape, k.shape
    inputs, sizes = problem.inputs(), problem.sizes()
    rows = max(16, triton.next_power_of_2(n_q * heads // kv_heads))
    n_tiles = triton.cdiv(n_k, _KEYS)
    scores = torch.empty(batch, heads, n_q, n_k, dtype=torch.float32, device=q.device)
    _scores_kernel[(batch * kv_heads * n_tiles,)](inputs, sizes, scores, n_tiles, rows, _KEYS, num_warps=4)
    theta, _ = threshold(method, replace(problem, scores=scores, tiles=choose_row_tiles(_WIDEST)))
    tiles_each = max(1, n_tiles * batch * kv_heads // _PIECES)
    n_pieces = triton.cdiv(n_tiles, tiles_each)
    parts = torch.empty(n_pieces, batch, heads, n_q, head_dim, dtype=torch.float32, device=q.device)
    grid = (batch * kv_heads * n_pieces,)
    _output_kernel[grid](inputs, sizes, scores, theta, parts, n_pieces, tiles_each, rows, _KEYS, num_warps=4)
    return parts, theta
