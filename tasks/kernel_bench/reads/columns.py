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
    """Count the pass that finds a bound, and the one that marks keys: a tile of K is loaded once for all queries of a
    program."""
    from tasks.kernel_bench.reads.walks import seen_keys

    keys = seen_keys(launch, block_m=launch.block_m)
    heads = launch.programs // len(keys)
    return Reads(q=heads * launch.n, k=heads * int(keys.sum()))


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
