"""A bit mask of tiles, one bit each: which pairs of a query block and a key block hold a weight (AdaSplash, sec. 3.2).

The mask of a query block is a row of 32-bit words, one bit a key block. The gradients of keys and values walk the
transposed mask: a row for each key block, one bit a query block.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..launching import launched_by_key
from ..scores import row_max

WORD = 32
_INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


def words(blocks: int) -> int:
    """Return how many words hold one bit a block."""
    return -(-blocks // WORD)


@triton.jit
def either(a, b):
    """Combine words of flags in a reduction."""
    return a | b


@triton.jit
def any_sign(numbers, AXIS: tl.constexpr):
    """Return numbers whose sign bit is set where it is in some int32 along an axis."""
    if _INTERPRETED:  # it reduces by a function of ours only slowly
        signs = tl.min(numbers, AXIS)
    else:
        signs = tl.reduce(numbers, AXIS, either)
    return signs


@triton.jit
def mark_tile(marks, word, raw, scale, edge, tile, last):
    """Note by row whether a score of the tile exceeds the row's edge; write a word once 32 tiles are through.

    Rows are put together only once a word: that exchange between warps is what a mask costs.
    """
    highest = row_max(raw) * scale
    possible = (~(highest <= edge)).to(tl.int32)  # true for NaN, which must reach the output
    word = word | (possible << (tile % 32))
    if (tile % 32 == 31) | (tile == last - 1):
        tl.store(marks + tile // 32, tl.reduce(word, 0, either))
        word = tl.zeros_like(word)
    return word


@launched_by_key
@triton.jit(do_not_specialize=["rows", "cols", "row_words", "col_words"])
def _transpose_kernel(tiles, out, rows, cols, row_words, col_words):
    """Transpose one 32 x 32 square of bits of a (rows, cols) mask."""
    squares = row_words * col_words
    head = (tl.program_id(0) // squares).to(tl.int64)
    square = tl.program_id(0) % squares
    i, j = square // row_words, square % row_words
    lane = tl.arange(0, 32)
    word = tl.load(tiles + (head * rows + i * 32 + lane) * row_words + j, mask=i * 32 + lane < rows, other=0)
    bits = (word[:, None] >> lane[None, :]) & 1
    turned = tl.reduce(bits << lane[:, None], 0, either)
    tl.store(out + (head * cols + j * 32 + lane) * col_words + i, turned, mask=j * 32 + lane < cols)


def transpose(tiles: Tensor, cols: int) -> Tensor:
    """Transpose a mask.

    Args:
        tiles: (heads, rows, words(cols)) int32.
        cols: how many bits of a row count.

    Returns:
        (heads, cols, words(rows)) int32.
    """
    heads, rows, row_words = tiles.shape
    out = torch.empty(heads, cols, words(rows), dtype=torch.int32, device=tiles.device)
    _transpose_kernel[(heads * row_words * words(rows),)](tiles, out, rows, cols, row_words, words(rows), num_warps=1)
    return out
