"""Rows of the other side that blocks of queries, and of keys, visit: all that they see, or what their lists leave.

The results are (heads, blocks) int64, counted for all blocks at once. A last partial tile counts its real rows.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tasks.kernel_bench.reads import columns
from tasks.kernel_bench.reads.launches import Launch


def seen_keys(launch: Launch, block_m: int | None = None) -> Tensor:
    """Return (blocks,) the keys in the tiles that each block of ``block_m`` queries meets."""
    block_m, n = block_m or launch.block_m, launch.n
    end = torch.arange(block_m, n + block_m, block_m, device=launch.x.q.device).clamp(max=n)  # one past the last query
    if not launch.causal:
        end = torch.full_like(end, n)
    return (-(-end // launch.block_n) * launch.block_n).clamp(max=n)


def seen_queries(launch: Launch) -> Tensor:
    """Return (blocks,) the queries in the tiles that each block of keys meets."""
    start = torch.arange(0, launch.n, launch.block_n, device=launch.x.q.device)
    return launch.n - (start // launch.block_m * launch.block_m if launch.causal else torch.zeros_like(start))


def visited_keys(launch: Launch) -> Tensor:
    """Return the keys that each block of queries of this launch visits on one walk along its list."""
    heads = launch.programs // launch.query_blocks
    own = slice(launch.first_head, launch.first_head + heads)
    seen = seen_keys(launch).expand(heads, -1)
    kind = launch.x.LISTS.value
    if kind == "all":
        return seen
    if kind == "tiles":
        return marked_rows(launch.x.query_tiles[own], launch.key_blocks, launch.block_n, launch.n)
    return columns.listed_rows(launch.x.query_tiles[own], launch.query_blocks, seen)


def visited_queries(launch: Launch, heads: int) -> Tensor:
    """Return the queries that each block of keys of this launch visits, by query head; lists start with the first."""
    seen = seen_queries(launch).expand(heads, -1)
    kind = launch.x.LISTS.value
    if kind == "all":
        return seen
    if kind == "tiles":
        return marked_rows(launch.x.key_tiles, launch.query_blocks, launch.block_m, launch.n)
    return columns.listed_rows(launch.x.key_tiles, launch.key_blocks, seen)


def marked_rows(tiles: Tensor, blocks: int, size: int, n: int) -> Tensor:
    """Return how many rows the marked blocks of a bit mask of tiles hold.

    Args:
        tiles: (heads, rows, words) int32, one bit a block of the other side.
        blocks: of the other side, of ``size`` rows each among ``n``.

    Returns:
        (heads, rows) int64.
    """
    bits = (tiles[..., None] >> torch.arange(32, device=tiles.device)) & 1
    real = torch.full((blocks,), size, device=tiles.device)
    real[-1] = n - (blocks - 1) * size
    return (bits.flatten(2)[..., :blocks] * real).sum(-1)
