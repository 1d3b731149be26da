"""How many tiles of the attention matrix hold no weight above zero: a property of the inputs."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from adasplash_kernels import support_map
from tasks.kernel_bench.inputs import Tensors
from tasks.kernel_bench.problem import Problem
from tasks.kernel_bench.settings import CAUSAL_HALF

MOST_PAIRS = 2**32  # of queries and keys, over all heads looked at: about ten seconds on a GPU


@dataclass(frozen=True)
class Sparsity:
    """Percentage of empty tiles by tile size (queries, keys), and the heads over which it was counted."""

    percent: dict[tuple[int, int], float]
    heads: int


def heads_to_count(problem: Problem) -> int:
    """Return how many heads of the first sequence are looked at: as many as :data:`MOST_PAIRS` allows, at least one."""
    return max(1, min(problem.h, MOST_PAIRS // problem.n**2))


def measure_sparsity(problem: Problem, tensors: Tensors, tiles: set[tuple[int, int]], over: str) -> Sparsity:
    """Count empty tiles of the exact support.

    Args:
        tiles: sizes, queries by keys; a last partial tile counts like any other.
        over: ``whole_square`` counts every tile, also those that the causal mask hides (they are empty);
            ``causal_half`` those of which it shows at least one pair.
    """
    q, k = tensors.q.detach(), tensors.k.detach()
    finest = tuple(math.gcd(*sizes) for sizes in zip(*tiles, strict=True))
    group, heads = problem.h // problem.h_kv, heads_to_count(problem)
    empty = dict.fromkeys(tiles, 0)
    total = dict.fromkeys(tiles, 0)
    for head in range(heads):  # one at a time: the scores of a band of queries are stored
        own = slice(head, head + 1), slice(head // group, head // group + 1)
        occupied = support_map(q[:1, own[0]], k[:1, own[1]], alpha=problem.alpha, causal=problem.causal,
                               tile=finest).occupancy[0, 0]  # fmt: skip
        for tile in tiles:
            coarse = _coarser(occupied, tile[0] // finest[0], tile[1] // finest[1])
            counted = _seen(coarse, tile) if over == CAUSAL_HALF else torch.ones_like(coarse)
            empty[tile] += int((counted & ~coarse).sum())
            total[tile] += int(counted.sum())
    return Sparsity({tile: 100 * empty[tile] / total[tile] for tile in tiles}, heads)


def _coarser(occupied: Tensor, rows: int, columns: int) -> Tensor:
    """Merge rows x columns neighbouring tiles into one, occupied if any of them is."""
    padded = torch.nn.functional.pad(occupied, (0, -occupied.shape[1] % columns, 0, -occupied.shape[0] % rows))
    return padded.unflatten(1, (-1, columns)).unflatten(0, (-1, rows)).any(-1).any(1)


def _seen(tiles: Tensor, tile: tuple[int, int]) -> Tensor:
    """Mark tiles with a pair on or below the diagonal: the first key is not after the last query."""
    rows, columns = (torch.arange(size, device=tiles.device) for size in tiles.shape)
    return columns * tile[1] <= rows[:, None] * tile[0] + tile[0] - 1
