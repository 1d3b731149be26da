"""The tiles that thresholds mark: every one that holds a weight, and no other where scores keep their distance."""

from __future__ import annotations

import math

import pytest
import torch
from calls import KERNELS, positions, stretch, tile_mask
from hard_rows import ALPHAS, GENERAL, both_alphas, computed, hard_rows, resolution, solve
from maximum import maximum_drops_nan  # noqa: F401
from torch import Tensor

from adasplash_kernels.problem import Problem
from adasplash_kernels.thresholds import THRESHOLDS
from adasplash_kernels.tile_sizes import Tiles, choose_tiles

by_method = pytest.mark.parametrize("method", [m for m in KERNELS if THRESHOLDS[m].lists == "tiles"])


def occupied(scores: Tensor, edges: Tensor, tiles: Tiles) -> Tensor:
    """Return which tiles of (heads, rows, n) scores hold one above its row's edge."""
    above = scores > edges[..., None]
    rows, keys = above.shape[1:]
    above = torch.nn.functional.pad(above, (0, -keys % tiles.block_n, 0, -rows % tiles.block_m))
    return above.unflatten(-1, (-1, tiles.block_n)).unflatten(-3, (-1, tiles.block_m)).any(-1).any(-2)


SPARSE = ["normal x 1", "normal x 10", "ties", "one ahead", "across the edge", "geometric", "normal x 1000"]


@by_method
@pytest.mark.parametrize(("alpha", "kind"), [x for x in ALPHAS if x[0] > 1.1])
@pytest.mark.parametrize("max_iterations", [2, 3, 40])
def test_every_tile_with_a_weight_is_marked(device, method, alpha, kind, max_iterations):
    """By the threshold that is returned, solved to the end or not."""
    exact, tensor = both_alphas(alpha, kind, device)
    rows = hard_rows(45 * stretch(device), exact)
    rows = torch.cat([rows[name] for name in SPARSE])
    scores = torch.cat((rows, rows[:2] - 3))[None].to(device)
    problem = computed(scores, tensor, kind)
    theta, marks = solve(method, problem, max_iterations=max_iterations)
    # a score no further above its edge than rounding has no weight to speak of
    edges = theta[0].double() - 1 / (exact - 1) + resolution(scores)
    holding = occupied(scores.double(), edges, problem.tiles)
    assert marks.dtype == torch.int32 and holding.any(-1).all()
    assert not (holding & ~tile_mask(marks, problem.key_blocks)).any()


@by_method
@pytest.mark.parametrize("alpha", [1.25, 1.5, 2.0])
def test_no_other_tile_is_marked(device, method, alpha):
    """A few keys a row hold all weights, in tiles of their own choice; the others are out of reach by far."""
    tiles = choose_tiles(16, torch.float32)
    n = 33 * tiles.block_n + 5  # more than one word, the last tile not full
    scores = -20 + 0.1 * torch.rand(1, 16, n, generator=torch.Generator().manual_seed(3))
    chosen = [0, 7, 31, 32, 33]
    for tile in chosen:
        scores[:, ::3, tile * tiles.block_n + 4] = 0.001 * tile
    scores[:, 1::3, 2 * tiles.block_n] = scores[:, 2::3, 3 * tiles.block_n] = 0
    expected = torch.zeros(1, 1, 34, dtype=torch.bool)
    expected[..., [*chosen, 2, 3]] = True
    kind = {1.5: "1.5", 2.0: "2"}.get(alpha, GENERAL)
    _, marks = solve(method, computed(scores.to(device), torch.full((1,), alpha, device=device), kind))
    assert marks.shape == (1, 1, 2)
    assert torch.equal(tile_mask(marks, 34).cpu(), expected)


@by_method
def test_softmax_marks_nothing(device, method):
    """Its weights have no zeros; without a mask all tiles are walked."""
    problem = computed(torch.zeros(1, 16, 20, device=device), torch.ones(1, device=device), "1")
    assert solve(method, problem)[1] is None


@pytest.mark.usefixtures("maximum_drops_nan")
@by_method
@pytest.mark.parametrize("keys", ["low scores beside it", "hidden keys beside it"])
def test_nan_is_marked(device, method, keys):
    """Its weight is NaN and must be met to reach the output, even in a tile that holds no other weight."""
    tiles = choose_tiles(16, torch.float32)
    q = torch.ones(1, 1, 16, 16, device=device)
    k = torch.full((1, 1, 4 * tiles.block_n, 16), -10.0, device=device)
    k[:, :, : tiles.block_n] = torch.rand(tiles.block_n, 1, device=device)
    bad = 2 * tiles.block_n + 3
    k[:, :, bad, 5] = math.nan
    padding = {}
    if keys == "hidden keys beside it":
        padding = {"key_starts": positions(device, bad), "key_lengths": positions(device, bad + 1)}
    problem = Problem(q, k, k, torch.full((1,), 1.5, device=device), "1.5", 1.0, **padding)
    assert tile_mask(solve(method, problem)[1], 4)[0, 0, 2]
