"""What every kernel is given: two named tuples, so that signatures stay short and say the same thing everywhere."""

from __future__ import annotations

from typing import Any, NamedTuple

import triton.language as tl

UNLIMITED = 2**30  # keys a query may see to its left or right when nothing limits it; sums with lengths fit int32


class Inputs(NamedTuple):
    """Tensors, pitches and compile-time choices. Triton compiles anew when one of them is None or aligned otherwise.

    Attributes:
        q, k, v: (B, H, N_q, D), (B, H_kv, N_k, D), (B, H_kv, N_k, D), the last dimension contiguous.
        scores: (B, H, N_q, N_k) scores before ``scale``, masked with ``-inf``, instead of q and k; or None.
        alpha: (1,) or (H,) float32, read where ALPHA is "any".
        slopes: ALiBi slopes (H,) or (B, H) float32, or None.
        starts, lengths: (B,) integers, the range of keys that are not padding, or None.
        query_spans, key_spans: (3, N_q) and (3, N_k) int32 of packed sequences (see spans.py), or None.
        query_tiles, key_tiles: bit masks of the tiles to visit (see worklists/tiles.py), or None for all.
        d: head dim.
        ALPHA: "1", "1.5", "2" or "any".
        EVEN_D: whether D is BLOCK_D, so that columns need no mask.
        BLOCK_D, BLOCK_M, BLOCK_N: columns, queries and keys of a tile.
    """

    q: Any
    k: Any
    v: Any
    scores: Any
    alpha: Any
    slopes: Any
    starts: Any
    lengths: Any
    query_spans: Any
    key_spans: Any
    query_tiles: Any
    key_tiles: Any
    q_batch: int
    q_head: int
    q_row: int
    k_batch: int
    k_head: int
    k_row: int
    v_batch: int
    v_head: int
    v_row: int
    slope_batch: int
    alpha_head: int
    d: int
    ALPHA: tl.constexpr
    EVEN_D: tl.constexpr
    BLOCK_D: tl.constexpr
    BLOCK_M: tl.constexpr
    BLOCK_N: tl.constexpr


class Sizes(NamedTuple):
    """Run-time numbers, never specialised: another length, window or scale compiles nothing.

    Attributes:
        heads: query heads H.
        groups: query heads per key-value head.
        n_q, n_k: numbers of queries and keys.
        left, right: keys a query sees before and after its own position.
        scale: factor on q.k.
    """

    heads: int
    groups: int
    n_q: int
    n_k: int
    left: int
    right: int
    scale: float
