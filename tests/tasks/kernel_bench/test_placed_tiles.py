"""Inputs with chosen empty tiles: the support is where it was placed, at every level, and nowhere else."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from adasplash_kernels.reference import entmax_reference
from tasks.kernel_bench.placed_tiles import (
    code_dimensions,
    codes,
    draw_queries_and_keys,
    group_tiles,
    groups_and_picks,
    nearness,
    noise_deviation,
    pick_groups,
)

N, D, TILE = 256, 16, (16, 16)  # 16 tiles a side, 8 dimensions for codes: from 87.5 % on there are more groups
LEVELS = (50, 72.5, 86, 90, 100)


def weights(q: Tensor, k: Tensor, alpha: float) -> Tensor:
    """Attention's weights in float64, from the oracle."""
    return entmax_reference(q.double() @ k.double().mT * q.shape[-1] ** -0.5, alpha)


def occupied(p: Tensor, tile: tuple[int, int]) -> Tensor:
    return p.gt(0).unflatten(-1, (-1, tile[1])).unflatten(-3, (-1, tile[0])).any(-1).any(-2)


@pytest.mark.parametrize(
    ("level", "key_tiles", "dimensions", "groups", "picks"),
    [
        (50, 512, 32, 32, 16.0),
        (95, 512, 32, 32, 1.6),
        (97.5, 512, 32, 40, 1.0),  # fewer than one group in 32: more groups
        (99, 512, 32, 100, 1.0),
        (100, 512, 32, 512, 1.0),  # a tile a row, the fewest there can be
        (0, 512, 32, 32, 32.0),
        (50, 4, 8, 4, 2.0),
        (99, 4, 8, 4, 1.0),
    ],
)
def test_groups_and_picks_by_hand(level, key_tiles, dimensions, groups, picks):
    found = groups_and_picks(level, key_tiles, dimensions)
    assert found == (groups, pytest.approx(picks))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("level", LEVELS)
def test_the_support_fills_the_placed_tiles_and_no_others(level, dtype):
    q, k, placed = draw_queries_and_keys(level, (1, 1, 1, N, D), TILE, 1.5, seed=5)
    p = weights(q.to(dtype), k.to(dtype), 1.5)
    assert torch.equal(occupied(p, TILE), placed)
    assert p.gt(0).sum(-1).min() >= 1
    reachable = min(level, 100 * (1 - TILE[1] / N))
    assert 100 * (1 - placed.double().mean()) == pytest.approx(reachable, abs=2)


def test_more_asked_for_is_more():
    measured = [float(draw_queries_and_keys(level, (1, 1, 1, N, D), TILE, 1.5, seed=0)[2].double().mean())
                for level in LEVELS]  # fmt: skip
    assert measured == sorted(set(measured), reverse=True) and len(measured) == len(LEVELS)


@pytest.mark.parametrize("alpha", [1.2, 2.0])
def test_other_alphas_and_oblong_tiles(alpha):
    q, k, placed = draw_queries_and_keys(80, (1, 1, 1, 128, 16), (8, 32), alpha, seed=1)
    assert placed.shape == (1, 1, 16, 4)
    assert torch.equal(occupied(weights(q, k, alpha), (8, 32)), placed)


def test_codes_that_are_near_each_other_get_a_wider_gap():
    """128 groups of one tile with 8 dimensions for codes, half of all codes that there are."""
    q, k, placed = draw_queries_and_keys(100, (1, 1, 1, 1024, 16), (64, 8), 1.5, seed=1)
    assert torch.equal(occupied(weights(q, k, 1.5), (64, 8)), placed) and int(placed.sum()) == 16
    without_noise = q[0, 0, ::64, :8] @ k[0, 0, ::8, :8].T * 16**-0.5
    inside, outside = without_noise[placed[0, 0]], without_noise[~placed[0, 0]]
    assert outside.max() >= inside.min() / 2
    assert inside.min() - outside.max() >= 1 / (1.5 - 1) + 8 * noise_deviation(torch.tensor(8.0), 1.5)


def test_about_half_of_the_pairs_in_placed_tiles_have_a_weight():
    for level in (50, 80):
        q, k, placed = draw_queries_and_keys(level, (1, 1, 1, N, D), TILE, 1.5, seed=2)
        share = weights(q, k, 1.5).gt(0).sum() / (placed.sum() * TILE[0] * TILE[1])
        assert 0.45 < share < 0.6


def test_noise_by_hand():
    """Half of m normal scores: m (s/2)^2 / 2 = 1 for alpha 1.5, m s E[x_+] = m s / sqrt(2 pi) = 1 for alpha 2."""
    keys = torch.tensor([16.0, 4096.0])
    torch.testing.assert_close(noise_deviation(keys, 1.5), (8 / keys).sqrt())
    torch.testing.assert_close(noise_deviation(keys, 2.0), math.sqrt(2 * math.pi) / keys)


def test_the_seed_decides():
    shape = (1, 1, 1, 128, 16)
    first, again, other = (draw_queries_and_keys(60, shape, TILE, 1.5, seed=s) for s in (3, 3, 4))
    for a, b, c in zip(first, again, other, strict=True):
        assert torch.equal(a, b) and not torch.equal(a, c)


def test_heads_differ_and_those_that_share_keys_fit_them():
    q, k, placed = draw_queries_and_keys(60, (2, 4, 2, 128, 16), TILE, 1.5, seed=0)
    assert len({tuple(tiles.flatten().tolist()) for tiles in placed.flatten(0, 1)}) == 8
    assert torch.equal(occupied(weights(q, k.repeat_interleave(2, 1), 1.5), TILE), placed)


def test_tiles_lie_everywhere_and_rows_have_equal_work():
    generator = torch.Generator().manual_seed(0)
    group = group_tiles(64, 16, generator)
    assert group.bincount().tolist() == [4] * 16 and not torch.equal(group, torch.arange(64) % 16)
    tiles = pick_groups(2.4, 64, 16, generator)[:, group]
    per_row = tiles.sum(-1)
    assert set(per_row.tolist()) == {8, 12} and int((per_row == 12).sum()) == round(0.4 * 64)
    quarters = tiles.unflatten(0, (4, 16)).unflatten(2, (4, 16)).float().mean((1, 3))
    assert quarters.min() > 0.05 and quarters.max() < 0.3


def test_codes():
    found = codes(40, 16, torch.Generator().manual_seed(0))
    assert found.abs().eq(1).all() and found.shape == (40, 16)
    torch.testing.assert_close(found[:16] @ found[:16].T, 16 * torch.eye(16))
    assert 0 < nearness(found) < 0.8 and nearness(found[:16]) == 0 and nearness(found[:1]) == 0
    assert [code_dimensions(d) for d in (4, 16, 48, 64, 128, 256)] == [2, 8, 16, 32, 64, 128]


def test_too_few_dimensions():
    assert len(codes(4, 2, torch.Generator())) == 4
    with pytest.raises(ValueError, match="d: 2 dimensions for codes are too few for 5 groups"):
        codes(5, 2, torch.Generator())
