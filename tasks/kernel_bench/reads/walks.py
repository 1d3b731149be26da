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
    if kind == "rest":
        return seen * taken_queries(launch)
    return columns.lengths(launch.x.query_tiles[own], launch.query_blocks).clamp_min(0)


def taken_queries(launch: Launch) -> Tensor:
    """Return which blocks of queries this launch takes, (heads, blocks) bool: along lists those that have one, and
    those that have none in a launch for the rest."""
    heads = launch.programs // launch.query_blocks
    return _taken(launch, launch.x.query_tiles, launch.first_head, heads, launch.block_m, launch.x.LIST_M.value)


def taken_keys(launch: Launch, heads: int) -> Tensor:
    """Return the same of blocks of keys, (query heads / groups, blocks); all heads that share a block have lists there,
    or it is one of the rest."""
    own = _taken(launch, launch.x.key_tiles, 0, heads, launch.block_n, launch.x.LIST_N.value)
    by_key_head = own.unflatten(0, (-1, launch.groups))
    return by_key_head.any(1) if launch.x.LISTS.value == "rest" else by_key_head.all(1)


def _taken(launch: Launch, lists: Tensor, first: int, heads: int, block: int, of_list: int) -> Tensor:
    """Return which blocks of ``block`` rows of some heads are this launch's, where lists are of ``of_list`` rows."""
    blocks, kind = -(-launch.n // block), launch.x.LISTS.value
    if kind not in ("columns", "columns16", "rest"):
        return torch.ones(heads, blocks, dtype=torch.bool, device=launch.x.q.device)
    found = columns.lengths(lists[first : first + heads], -(-launch.n // of_list))[:, :: block // of_list]
    return found < 0 if kind == "rest" else found >= 0


def rows_of(launch: Launch, taken: Tensor, block: int) -> int:
    """Return how many rows the blocks of ``block`` rows that are taken (heads, blocks) hold."""
    start = torch.arange(0, launch.n, block, device=taken.device)
    return int((taken * (launch.n - start).clamp_max(block)).sum())


def visited_queries(launch: Launch, heads: int) -> Tensor:
    """Return the queries that each block of keys of this launch visits, by query head; lists start with the first."""
    seen = seen_queries(launch).expand(heads, -1)
    kind = launch.x.LISTS.value
    if kind == "all":
        return seen
    if kind == "tiles":
        return marked_rows(launch.x.key_tiles, launch.query_blocks, launch.block_m, launch.n)
    taken = taken_keys(launch, heads).repeat_interleave(launch.groups, 0)
    return taken * (seen if kind == "rest" else columns.lengths(launch.x.key_tiles, launch.key_blocks))


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
