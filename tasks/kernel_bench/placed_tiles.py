"""Inputs whose support fills chosen tiles of the attention matrix and no others, for a block sparsity asked for.

Scores are q.k, of rank d, so that a random subset of the tiles cannot simply be given high scores. Instead

- key tiles fall at random into groups of equal size (one tile more or less), each with a code: a vector of signs;
- every query tile picks groups at random, as many as the level allows, and carries the sum of their codes.

Codes take D dimensions, the largest power of two up to d/2. Up to D groups have orthogonal codes (rows of a Hadamard
matrix), so a query scores ``a`` with every key of the groups it picked and 0 with all others. Fewer tiles than one
group in D takes more groups than there are orthogonal codes: each query tile then picks one group, and codes are rows
of Hadamard matrices with other signs, drawn to be far from each other. Either way ``a`` leaves a gap that entmax
cannot bridge, and all this is exact in bfloat16.

The d - D other dimensions hold Gaussian noise, which makes the scores within the placed tiles differ from pair to
pair. Its size falls with the number of placed keys, so that about half of the pairs in the placed tiles have a weight
above zero, whatever the level. So every placed tile is occupied, every other one is empty, and no row is without keys.

The most that can be asked for, 100 %, is one group of one tile for each query tile: 1 - tile / n is empty.

What this favours: an empty tile is empty by far (no method visits one in vain because of a loose threshold), and query
tiles have equal amounts of work. What it does not: placed tiles are scattered, so that nearly every larger tile holds
one of them until very few are left (the share of empty 64x64 tiles is about the 16th power of that of 16x16 ones).
"""

from __future__ import annotations

import itertools
import math

import torch
from torch import Tensor

_DEVIATIONS = 8  # of the noise, that the gap leaves on top of what entmax needs
_DRAWS = 64  # of signs, among which those of the next Hadamard matrix are chosen


def code_dimensions(d: int) -> int:
    """Return how many of the d dimensions hold codes: a power of two, at most half of them."""
    return 1 << (d // 2).bit_length() - 1


def groups_and_picks(level: float, key_tiles: int, dimensions: int) -> tuple[int, float]:
    """Return the number of groups, and how many of them a query tile picks on average (1 or more).

    Args:
        level: percentage of empty tiles asked for.
        key_tiles: tiles along the keys.
        dimensions: of the codes: up to so many groups are orthogonal, and may be picked together.
    """
    share, most = 1 - level / 100, min(key_tiles, dimensions)
    if share * most >= 1:
        return most, share * most
    return (min(key_tiles, round(1 / share)) if share > 0 else key_tiles), 1.0


def group_tiles(key_tiles: int, groups: int, generator: torch.Generator) -> Tensor:
    """Return the group of each key tile, (key_tiles,), at random; groups differ by one tile at most."""
    return (torch.arange(key_tiles) % groups)[torch.randperm(key_tiles, generator=generator)]


def pick_groups(picks: float, query_tiles: int, groups: int, generator: torch.Generator) -> Tensor:
    """Return which groups each query tile picks, (query_tiles, groups) bool: ``picks`` on average, or one more or less.

    The placed tiles are ``picked[:, group]``.
    """
    one_more = round((picks - math.floor(picks)) * query_tiles)
    count = math.floor(picks) + (torch.randperm(query_tiles, generator=generator) < one_more).long()
    rank = torch.rand(query_tiles, groups, generator=generator).argsort(-1).argsort(-1)
    return rank < count[:, None]


def codes(groups: int, dimensions: int, generator: torch.Generator) -> Tensor:
    """Return (groups, dimensions) of 1 and -1, the first ``dimensions`` of them orthogonal to each other.

    Raises:
        ValueError: two groups would share a code: there are too few dimensions for so many.
    """
    hadamard = torch.ones(1, 1)
    while len(hadamard) < dimensions:  # Sylvester's construction
        hadamard = torch.cat([hadamard.repeat(1, 2), torch.cat([hadamard, -hadamard], 1)])
    found = hadamard
    while len(found) < groups:
        signs = torch.randint(0, 2, (_DRAWS, 1, dimensions), generator=generator) * 2.0 - 1
        drawn = hadamard * signs
        nearest = (drawn @ found.T).amax((1, 2))
        found = torch.cat([found, drawn[nearest.argmin()]])
    found = found[:groups]
    if groups > 1 and nearness(found) >= 1:
        raise ValueError(f"d: {dimensions} dimensions for codes are too few for {groups} groups of keys")
    return found


def nearness(codes: Tensor) -> float:
    """Return the largest product of two codes over that of one with itself; 0 if there are no two."""
    products = (codes @ codes.T).fill_diagonal_(-math.inf)
    return max(0.0, float(products.max()) / codes.shape[1])


def noise_deviation(keys: Tensor, alpha: float) -> Tensor:
    """Return the standard deviation of Gaussian scores at which half of ``keys`` of them are in entmax's support.

    It is the one whose threshold is the mean: ``keys * E[((alpha - 1) s x)_+ ^ p] = 1`` with ``p = 1 / (alpha - 1)``
    and x standard normal, of which ``E[x_+ ^ p] = 2 ^ (p/2) Gamma((p + 1) / 2) / (2 sqrt(pi))``.
    """
    p = 1 / (alpha - 1)
    log_moment = p / 2 * math.log(2) + math.lgamma((p + 1) / 2) - math.log(2 * math.sqrt(math.pi))
    return torch.exp(-(keys.log() + log_moment) / p) * p


def draw_queries_and_keys(
    level: float, shape: tuple[int, int, int, int, int], tile: tuple[int, int], alpha: float, seed: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Draw q and k of the module's docstring, each head with a placement of its own.

    Args:
        level: percentage of empty tiles asked for, 0 to 100.
        shape: (b, h, h_kv, n, d), n a multiple of both sides of ``tile``, d 4 or more.
        tile: queries by keys.
        alpha: above 1 to 2.
        seed: of everything drawn.

    Returns:
        q (b, h, n, d) and k (b, h_kv, n, d) in float32 on the CPU, and the tiles that their support, at a scale of
        ``1 / sqrt(d)``, occupies, (b, h, n / tile[0], n / tile[1]) bool.

    Raises:
        ValueError: d is too small for the level: two groups of keys would share a code.
    """
    b, h, h_kv, n, d = shape
    generator = torch.Generator().manual_seed(seed)
    dimensions, scale = code_dimensions(d), d**-0.5
    query_tiles, key_tiles, sharing = n // tile[0], n // tile[1], h // h_kv
    groups, picks = groups_and_picks(level, key_tiles, dimensions)
    code = codes(groups, dimensions, generator)
    widest = float(noise_deviation(torch.tensor(float(tile[1])), alpha))
    gap = (1 / (alpha - 1) + _DEVIATIONS * widest) / (1 - nearness(code))
    amplitude = 2.0 ** math.ceil(math.log2(gap / (scale * dimensions)))  # a power of two: products with signs are exact

    q, k = torch.empty(b, h, n, d), torch.empty(b, h_kv, n, d)
    placed = torch.empty(b, h, query_tiles, key_tiles, dtype=torch.bool)
    for batch, key_head in itertools.product(range(b), range(h_kv)):
        group = group_tiles(key_tiles, groups, generator)
        noise = torch.randn(n, d - dimensions, generator=generator)
        k[batch, key_head] = torch.cat([code[group].repeat_interleave(tile[1], 0), noise], 1)
        for head in range(key_head * sharing, (key_head + 1) * sharing):
            picked = pick_groups(picks, query_tiles, groups, generator)
            tiles = placed[batch, head] = picked[:, group]
            deviation = noise_deviation(tile[1] * tiles.sum(-1).float(), alpha) / (scale * (d - dimensions) ** 0.5)
            noise = deviation.repeat_interleave(tile[0])[:, None] * torch.randn(n, d - dimensions, generator=generator)
            signal = amplitude * (picked.float() @ code).repeat_interleave(tile[0], 0)
            q[batch, head] = torch.cat([signal, noise], 1)
    return q, k, placed
