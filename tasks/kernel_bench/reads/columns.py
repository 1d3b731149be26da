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
    keys, rows = _seen_at_once(launch), launch.arguments[5]
    if rows is not None:
        listed, first, last = rows[..., 0], rows[..., 1], rows[..., 2]
        keys = keys - torch.where(listed < 0, 0, last - first - listed) * launch.block_n
    return Reads(q=len(keys) * launch.n, k=int(keys.sum()))


def _seen_at_once(launch: Launch) -> Tensor:
    """Return the keys in the tiles that the blocks of queries of this launch meet, (heads, blocks)."""
    from tasks.kernel_bench.reads.walks import seen_keys

    keys = seen_keys(launch, block_m=launch.block_m)
    return keys.expand(launch.programs // len(keys), -1)


def piece_rows(launch: Launch, owner: Tensor, taken: Tensor) -> int:
    """Return how many keys the programs of pieces load; those that are left over load the first block's.

    Args:
        owner: (key-value heads, room), the block of each piece; -1 for none.
        taken: (key-value heads, blocks), which blocks are this launch's; nothing is loaded for others.
    """
    block = owner.clamp_min(0).long()
    return int((taken.gather(1, block) * (launch.n - block * launch.block_n).clamp_max(launch.block_n)).sum())


def lengths(lists: Tensor, blocks: int) -> Tensor:
    """Return how many rows the list of each block names, (heads, blocks); -1 where there is none.

    Args:
        lists: (heads, numbers) int32: headers of the blocks, of which the first number is that, then entries.
    """
    from adasplash_kernels.worklists.walk import HEADER

    return lists[:, : blocks * HEADER.value].unflatten(1, (blocks, -1))[..., 0].long()
