"""FlashAttention-2 and attention from stored scores, by loops over their tiles: what cannot be instrumented.

Tiles whose pairs the causal mask all hides are left out where the algorithm leaves them out.
"""

from __future__ import annotations

from collections.abc import Iterator

from tasks.kernel_bench.problem import NotMeasured, Problem
from tasks.kernel_bench.reads.tally import FORWARD, Reads, Tally

Tile = tuple[int, int]

# Queries by keys, up to a head dimension: what the CUDA code of FlashAttention-2 (Dao-AILab/flash-attention,
# csrc/flash_attn/src/flash_{fwd,bwd}_launch_template.h) takes without dropout on A100 and H100.
FLASH_TILES: dict[int, dict[str, Tile]] = {
    64: {"forward": (128, 128), "backward": (128, 128)},
    128: {"forward": (128, 64), "backward": (64, 128)},
}
DENSE_TILE: Tile = (128, 128)  # a choice: the library picks the tile of a matrix product by its own rules


def flash(problem: Problem, which: str) -> Tally:
    """FlashAttention-2 (Dao 2023): algorithm 1 forward, algorithm 2 backward, each query head by itself.

    Forward, a block of queries loads itself once, and K and V tile by tile. Backward, a block of keys loads its K and
    V once, and Q (and dO, not counted) tile by tile.
    """
    tiles = next((t for d, t in FLASH_TILES.items() if problem.d <= d), None)
    if tiles is None:
        raise NotMeasured(f"tiles of FlashAttention-2 are written down up to d = {max(FLASH_TILES)}")
    block_m, block_n = tiles[which]
    tally = _tally(problem, tiles[which])
    for _head in range(problem.b * problem.h):
        if which == FORWARD:
            for start, queries in _blocks(problem.n, block_m):
                end = min(start + block_m, problem.n) if problem.causal else problem.n
                keys = sum(rows for _, rows in _blocks(problem.n, block_n, last=end))
                tally.add("forward", Reads(q=queries, k=keys, v=keys))
        else:
            for start, keys in _blocks(problem.n, block_n):
                first = start // block_m * block_m if problem.causal else 0
                queries = sum(rows for _, rows in _blocks(problem.n, block_m, first=first))
                tally.add("backward", Reads(q=queries, k=keys, v=keys))
    return tally


def dense(problem: Problem, which: str) -> Tally:
    """Stored scores: products of whole matrices, one program a tile of the result, nothing skipped.

    Iterations of the threshold read the stored scores, and no row of K. A tile of S = Q K^T loads its queries and its
    keys; a block of O = P V or dQ = dS K goes through all keys, a block of dK = dS^T Q through all queries, and a tile
    of dP = dO V^T loads its rows of V. dV = P^T dO reads none of the three.
    """
    n, (block_m, block_n) = problem.n, DENSE_TILE
    tally = _tally(problem, DENSE_TILE)
    for _head in range(problem.b * problem.h):
        for _, queries in _blocks(n, block_m):
            for _, keys in _blocks(n, block_n):
                if which == FORWARD:
                    tally.add("S = Q K^T", Reads(q=queries, k=keys))
                    tally.add("O = P V", Reads(v=keys))
                else:
                    tally.add("dP = dO V^T", Reads(v=keys))
                    tally.add("dQ = dS K", Reads(k=keys))
                    tally.add("dK = dS^T Q", Reads(q=queries))
    return tally


def _tally(problem: Problem, tile: Tile) -> Tally:
    return Tally(*tile, blocks=problem.b * problem.h * -(-problem.n // tile[0]))


def _blocks(n: int, size: int, first: int = 0, last: int | None = None) -> Iterator[tuple[int, int]]:
    """Yield the start and the real rows of each block from row ``first`` up to the one that holds row ``last - 1``."""
    for start in range(first, n if last is None else last, size):
        yield start, min(size, n - start)
