"""What every kernel is given: two named tuples, so that signatures stay short and say the same thing everywhere."""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

UNLIMITED = 2**29  # keys a query may see to its left or right when nothing limits it; sums with lengths fit int32


class Inputs(NamedTuple):
    """Tensors and compile-time choices. Triton compiles anew when a tensor is None or a constant changes.

    Attributes:
        q, k, v: (B, H, N_q, D), (B, H_kv, N_k, D), (B, H_kv, N_k, D), the last dimension contiguous.
        scores: (B, H, N_q, N_k) scores before ``scale``, masked with ``-inf``, instead of q and k; or None.
        alpha: (1,) or (H,) float32, read where ALPHA is "any"; may be None elsewhere.
        slopes: ALiBi slopes (H,) or (B, H) float32, or None.
        starts, lengths: (B,) integers, the range of keys that are not padding, or None.
        query_spans, key_spans: (3, N_q) and (3, N_k) int32 of packed sequences (see spans.py), or None.
        query_tiles, key_tiles: work lists, or None to visit all tiles: bit masks of tiles (see worklists/tiles.py) or
            lists of columns (see worklists/columns.py).
        LISTS: which of these they are: "all", "tiles", "columns", "columns16" with entries of 16 bits, or "rest" for
            all tiles of those queries, or keys, that have no list of columns.
        FIRST_PART, PARTS_END: the parts in which a kernel goes through a block's tiles (see worklists/walk.py).
        d: head dim.
        ALPHA: "1", "1.5", "2" or "any".
        EVEN_D: whether D is BLOCK_D, so that columns need no mask.
        ALIGNED: whether every pitch is a multiple of 8 elements, so that rows load 16 bytes at a time.
        BLOCK_D, BLOCK_M, BLOCK_N: columns, queries and keys of a tile.
        LIST_M, LIST_N: queries that share a list of columns, and keys that share one of queries.
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
    d: int
    LISTS: tl.constexpr
    FIRST_PART: tl.constexpr
    PARTS_END: tl.constexpr
    ALPHA: tl.constexpr
    EVEN_D: tl.constexpr
    ALIGNED: tl.constexpr
    BLOCK_D: tl.constexpr
    BLOCK_M: tl.constexpr
    BLOCK_N: tl.constexpr
    LIST_M: tl.constexpr
    LIST_N: tl.constexpr


class Sizes(NamedTuple):
    """Run-time numbers: another length, pitch, window or scale compiles nothing.

    Attributes:
        heads: query heads H.
        groups: query heads per key-value head.
        n_q, n_k: numbers of queries and keys.
        left, right: keys a query sees before and after its own position.
        slope_batch, alpha_head: pitches of the slopes and of alpha; 0 where all share one.
        q_batch, q_head, q_row, k_batch, ..., v_row: pitches in elements.
        query_lists, key_lists: pitches of a head's lists of columns.
        first_head: the head, counted over the batch, that the grid starts with.
        launched: query heads of a launch for the rest of the keys, whose programs take several blocks each; else 0.
        scale: factor on q.k.
    """

    heads: int
    groups: int
    n_q: int
    n_k: int
    left: int
    right: int
    slope_batch: int
    alpha_head: int
    q_batch: int
    q_head: int
    q_row: int
    k_batch: int
    k_head: int
    k_row: int
    v_batch: int
    v_head: int
    v_row: int
    query_lists: int
    key_lists: int
    first_head: int
    launched: int
    scale: float


def sealed(number: int) -> int:
    """Return a number as an odd one above 1.

    Triton compiles anew for integers that are 1 or multiples of 16, also in tuples, where ``do_not_specialize`` does
    not reach. These are neither.
    """
    return 2 * number + 3


@triton.jit
def opened(number):
    """Return the number that was sealed."""
    return (number - 3) >> 1


@triton.jit
def pitch(number, ALIGNED: tl.constexpr):
    """Return a pitch that was sealed, so that the compiler sees whether it is a multiple of 8."""
    if ALIGNED:
        value = ((number - 3) >> 4) * 8
    else:
        value = opened(number)
    return value


@triton.jit
def open_sizes(x, size):
    """Return the sizes as they are; every kernel starts with it."""
    return Sizes(
        opened(size.heads), opened(size.groups), opened(size.n_q), opened(size.n_k), opened(size.left),
        opened(size.right), opened(size.slope_batch), opened(size.alpha_head),
        pitch(size.q_batch, x.ALIGNED), pitch(size.q_head, x.ALIGNED), pitch(size.q_row, x.ALIGNED),
        pitch(size.k_batch, x.ALIGNED), pitch(size.k_head, x.ALIGNED), pitch(size.k_row, x.ALIGNED),
        pitch(size.v_batch, x.ALIGNED), pitch(size.v_head, x.ALIGNED), pitch(size.v_row, x.ALIGNED),
        opened(size.query_lists), opened(size.key_lists), opened(size.first_head), opened(size.launched),
        size.scale,
    )  # fmt: skip
