"""Which keys a query sees, and which queries see a key: always one interval.

Causal attention, windows, padding and packed sequences all leave each query a contiguous range of keys, and each key
a contiguous range of queries. Every kernel masks by these two numbers a row and needs no other rule.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def padding(x, size, batch):
    """Return the half-open range of keys of a sequence that are not padding."""
    start = 0
    end = size.n_k
    if x.starts is not None:
        start = tl.minimum(tl.maximum(tl.load(x.starts + batch), 0), size.n_k).to(tl.int32)
    if x.lengths is not None:
        end = tl.minimum(tl.maximum(tl.load(x.lengths + batch), 0), size.n_k).to(tl.int32)
    return start, end


@triton.jit
def packed_span(spans, index, count):
    """Read low, high and shift of rows (of a (3, count) table); rows past the end have an empty span."""
    there = index < count
    low = tl.load(spans + index, mask=there, other=0)
    high = tl.load(spans + count + index, mask=there, other=0)
    shift = tl.load(spans + 2 * count + index, mask=there, other=0)
    return low, high, shift


@triton.jit
def query_span(x, size, batch, rows):
    """Return, by query, the half-open range of keys it sees, and its position among the keys."""
    if x.query_spans is not None:
        low, high, shift = packed_span(x.query_spans, rows, size.n_q)
        position = rows + shift
    else:
        start, end = padding(x, size, batch)
        position = rows + (size.n_k - size.n_q)
        low = tl.maximum(position - size.left, start)
        high = tl.where(rows < size.n_q, tl.minimum(position + size.right + 1, end), 0)
    return low, high, position


@triton.jit
def key_span(x, size, batch, keys):
    """Return, by key, the half-open range of queries that see it, and its position among the queries."""
    if x.key_spans is not None:
        low, high, shift = packed_span(x.key_spans, keys, size.n_k)
        position = keys - shift
    else:
        start, end = padding(x, size, batch)
        position = keys - (size.n_k - size.n_q)
        low = tl.maximum(position - size.right, 0)
        high = tl.minimum(position + size.left + 1, size.n_q)
        high = tl.where((keys >= start) & (keys < end), high, 0)
    return low, high, position


@triton.jit
def tile_range(low, high, BLOCK: tl.constexpr):
    """Return the first tile and the one past the last that any of the spans reaches; equal if all are empty."""
    none = low >= high
    first = tl.min(tl.where(none, 2147483647, low), 0) // BLOCK
    last = (tl.max(tl.where(none, 0, high), 0) + BLOCK - 1) // BLOCK
    return tl.minimum(first, last), last


@triton.jit
def inner_range(low, high):
    """Return the range that all of the spans share: tiles inside it need no mask. Empty if any span is."""
    none = low >= high
    return tl.max(tl.where(none, 2147483647, low), 0), tl.min(tl.where(none, 0, high), 0)


def packed_spans(
    cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, n_q: int, n_k: int, left: int, right: int
) -> tuple[Tensor, Tensor]:
    """Work out the spans of packed sequences, once a call and without waiting for the device.

    Args:
        cu_seqlens_q, cu_seqlens_k: (S + 1,) cumulative lengths from 0.
        n_q, n_k: numbers of packed queries and keys.
        left, right: keys a query sees before and after its own position, within its sequence.

    Returns:
        (3, n_q) and (3, n_k) int32: the range of keys a query sees (of queries that see a key), as low and high,
        and the shift from a query's index to its position among the keys, the same for all of a sequence.
    """
    cu_q, cu_k = cu_seqlens_q.long(), cu_seqlens_k.long()

    def rows(count: int, cu: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        index = torch.arange(count, device=cu.device)
        # a token past the last sequence finds no start above it and falls into an empty one
        sequence = torch.searchsorted(cu, index, right=True) - 1
        inside = sequence < cu.shape[0] - 1
        return index, sequence.clamp(0, cu.shape[0] - 2), inside

    def table(low: Tensor, high: Tensor, shift: Tensor, inside: Tensor) -> Tensor:
        return torch.stack((low, torch.where(inside, high, 0), shift)).to(torch.int32)

    query, sequence, inside = rows(n_q, cu_q)
    shift = cu_k[sequence + 1] - cu_q[sequence + 1]  # the last query of a sequence is at its last key
    position = query + shift
    low = torch.maximum(position - left, cu_k[sequence])
    high = torch.minimum(position + right + 1, cu_k[sequence + 1])
    by_query = table(low, high, shift, inside)

    key, sequence, inside = rows(n_k, cu_k)
    shift = cu_k[sequence + 1] - cu_q[sequence + 1]
    position = key - shift
    low = torch.maximum(position - right, cu_q[sequence])
    high = torch.minimum(position + left + 1, cu_q[sequence + 1])
    return by_query, table(low, high, shift, inside)
