"""The work list that leaves nothing out: every block the mask does not exclude as a whole.

A list answers two questions of the kernels: how many blocks there are to visit, and which positions the i-th one
holds. Positions are explicit vectors, so a list of gathered keys fits the same loops as this contiguous one.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def key_range(pid_m, n_q, n_k, key_start, key_end, CAUSAL: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Return the first key position (a multiple of BLOCK_N) and the number of key blocks of a query block."""
    first = (key_start // BLOCK_N) * BLOCK_N
    last = key_end
    if CAUSAL:
        last = tl.minimum(last, (pid_m + 1) * BLOCK_M + n_k - n_q)
    return first, tl.cdiv(tl.maximum(last - first, 0), BLOCK_N)


@triton.jit
def query_range(pid_n, n_q, n_k, CAUSAL: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Return the first query position (a multiple of BLOCK_M) and the number of query blocks of a key block."""
    first = 0
    if CAUSAL:
        first = (tl.maximum(pid_n * BLOCK_N - (n_k - n_q), 0) // BLOCK_M) * BLOCK_M
    return first, tl.cdiv(tl.maximum(n_q - first, 0), BLOCK_M)
