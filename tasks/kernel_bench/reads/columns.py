"""Lists of columns: how their kernels read, and how long the lists are.

The bound and the bits of keys come from passes over all keys for large blocks of queries, which share what is loaded of
K.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from tasks.kernel_bench.reads.tally import Reads

if TYPE_CHECKING:
    from tasks.kernel_bench.reads.launches import Launch


def all_keys_at_once(launch: Launch) -> Reads:
    """Count the pass that finds a bound: a tile of K is loaded once for all queries of a program."""
    keys = _seen_at_once(launch)
    return Reads(q=len(keys) * launch.n, k=int(keys.sum()))


def listed_tiles_at_once(launch: Launch) -> Reads:
    """Count the pass that marks keys: likewise, but for the tiles of K that the bound's pass has left out."""
    keys, rows = _seen_at_once(launch), launch.arguments[6]
    if rows is not None:
        listed, first, last = rows[..., 0], rows[..., 1], rows[..., 2]
        keys = keys - torch.where(listed < 0, 0, last - first - listed) * launch.block_n
    return Reads(q=len(keys) * launch.n, k=int(keys.sum()))


def _seen_at_once(launch: Launch) -> Tensor:
    """Return the keys in the tiles that the blocks of queries of this launch meet, (heads, blocks)."""
    from tasks.kernel_bench.reads.walks import seen_keys

    keys = seen_keys(launch, block_m=launch.block_m)
    return keys.expand(launch.programs // len(keys), -1)


def piece_rows(launch: Launch, owner: Tensor) -> int:
    """Return how many keys the programs of pieces load; those that are left over load the first block's.

    Args:
        owner: (key-value heads, room), the block of each piece; -1 for none.
    """
    start = owner.clamp_min(0) * launch.block_n
    return int((launch.n - start).clamp_max(launch.block_n).sum())


def listed_rows(lists: Tensor, blocks: int, seen: Tensor) -> Tensor:
    """Return how many rows the lists of each block name, or ``seen`` where a block has none and visits all.

    Args:
        lists: (heads, numbers) int32: headers of the blocks, of which the first number is the length of the list or
            -1, then entries.
        seen: (heads, blocks).
    """
    from adasplash_kernels.worklists.walk import HEADER

    length = lists[:, : blocks * HEADER.value].unflatten(1, (blocks, -1))[..., 0].long()
    return torch.where(length < 0, seen, length)
