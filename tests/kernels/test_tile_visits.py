"""Which tiles the pass that marks keys visits: lists of columns are those that it makes when it visits all tiles."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from calls import random_qkv
from column_cases import ANY, CASES, Setting, names, setting
from hard_rows import computed
from torch import Tensor

from adasplash_kernels import launch, limits
from adasplash_kernels import problem as problems
from adasplash_kernels.problem import Problem
from adasplash_kernels.tile_sizes import ColumnTiles, Tiles, choose_column_tiles
from adasplash_kernels.worklists.walk import HEADER

pytestmark = pytest.mark.usefixtures("garbage")


@pytest.fixture
def visited(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Tensor, Tensor | None]]:
    """Overhear the bound of each launch, and the rows of tiles to visit that it leaves."""
    found, bound = [], launch._bound
    monkeypatch.setattr(limits, "DENSEST", ANY)

    def spy(problem: Problem, tiles: Tiles, floor: Tensor, visits: Tensor | None = None, *chunk: int) -> None:
        bound(problem, tiles, floor, visits, *chunk)
        found.append((floor.clone(), visits if visits is None else visits.clone()))

    monkeypatch.setattr(launch, "_bound", spy)
    return found


@pytest.fixture
def half_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the bound take two blocks at once, as it does on a GPU."""

    def halved(head_dim: int, dtype: torch.dtype) -> ColumnTiles:
        tiles = choose_column_tiles(head_dim, dtype)
        return replace(tiles, emit=Tiles(16, 32, 1)) if limits.INTERPRETED else tiles

    monkeypatch.setattr(problems, "choose_column_tiles", halved)


def listed(visits: Tensor) -> list[list[list[int] | None]]:
    """Return by head and block which tiles are listed, in order; None where all are to be visited."""
    return [
        [None if row[0] < 0 else row[HEADER.value : HEADER.value + row[0]] for row in head] for head in visits.tolist()
    ]


def lists_of(problem: Problem) -> Tensor:
    return launch._lists(problem, torch.empty(problem.q.shape[:3], device=problem.q.device))


def check_same_lists(problem: Problem, monkeypatch: pytest.MonkeyPatch, visited: list) -> Tensor:
    """Compare bound and lists with those of a call that visits all tiles; return the rows of visits."""
    visited.clear()
    lists = lists_of(problem)
    with monkeypatch.context() as context:
        context.setattr(limits, "LIST_TILES", False)
        assert torch.equal(lists, lists_of(problem))
    (floor, visits), (expected, nothing) = visited
    assert nothing is None
    slack = 2e-6 if floor.is_cuda else 0.0  # two kernels, which may round differently
    torch.testing.assert_close(floor, expected, rtol=slack, atol=slack, equal_nan=True)
    return visits


def longer(case: str, device: str, dtype: torch.dtype) -> Setting:
    """Return a case with many keys, most of them far from every query, so that there is something to skip.

    Tile 5 is near and needs no mask for the second of two blocks of the causal case, but does for the first.
    """
    changes = {"heads": min(CASES[case].heads, 2), "kv_heads": 1}
    if not CASES[case].positions:
        changes |= {"n_q": 41, "n_k": 230, "batch": 1}
    if CASES[case].window:
        changes |= {"n_k": 330, "window": 290}
    if CASES[case].slopes:
        changes["slopes"] = (0.05, 0.1)
    at = setting(case, device, dtype, spread=4.0, **changes)
    n_k = at.problem.k.shape[2]
    tile = torch.arange(n_k, device=device) // (64 if device == "cuda" else 32)
    far = (tile % 3 != 0) & (tile != 5)
    k = torch.where(far[:, None], 0.2 * at.problem.k, at.problem.k)
    return at._replace(problem=replace(at.problem, k=k))


@pytest.mark.parametrize(
    ("case", "dtype"),  # the bits of 16-bit products are put together in another way
    [*((case, torch.float32) for case in CASES if case != "packed, causal"), ("causal window", torch.float16)],
)
@pytest.mark.usefixtures("half_blocks")
def test_lists_are_those_of_all_tiles(device, monkeypatch, visited, case, dtype):
    at = longer(case, device, dtype)
    visits = check_same_lists(at.problem, monkeypatch, visited)
    if not CASES[case].positions:
        inside = (visits[..., 2] - visits[..., 1]).sum()
        skipped = inside - visits[..., 0].sum()
        assert (visits[..., 0] >= 0).all() and inside > 0 and skipped > 0.1 * inside


def block_tiles(device: str, dtype: torch.dtype = torch.float32) -> tuple[int, int]:
    """Return how many queries and keys a listed block and a tile have, of head dim 16."""
    tiles = choose_column_tiles(16, dtype)
    return tiles.emit.block_m, tiles.bound.block_n


def made(device: str, tiles: int, peaks: dict[int, float], alpha: str = "1.5", blocks: int = 1) -> Problem:
    """Return a problem of blocks of queries and so many tiles whose scores are 0, but for a key of some tiles.

    A second block sees every score halved.
    """
    rows, keys = block_tiles(device)
    scores = torch.zeros(blocks * rows, tiles * keys)
    for tile, value in peaks.items():
        scores[:, tile * keys + 5] = value
    scores[rows:] /= 2
    numbers = torch.full((1,), {"1.5": 1.5, "2": 2.0, "any": 1.25}[alpha])
    return computed(scores[None].to(device), numbers.to(device), alpha)


def test_tiles_are_listed_as_they_are_visited(device, monkeypatch, visited):
    """The first and the last always, since no bound is known yet; then those with a score above what is known by then.

    In scores theta is at least the largest so far, 10, and the edge 2 below; the largest of all shows last. Tile 3 is
    visited after 32 others, whose bits fill a word.
    """
    problem = made(device, 40, {0: 10.0, 17: 9.5, 30: 7.0, 9: 8.6, 3: 30.0, 2: 20.0}, blocks=2)
    visits = check_same_lists(problem, monkeypatch, visited)
    assert visits.shape[1] == 2 and (visits[0, :, 1:3] == torch.tensor([0, 40], device=device)).all()
    ((first, second),) = listed(visits)
    assert first == [0, 39, 17, 9, 3, 2]
    assert second == [0, 39, 30, 17, 9, 3, 2]  # 3.5 is within 2 of 5, 7 not within 2 of 10


@pytest.mark.parametrize("alpha", ["1.5", "2", "any"])
def test_skips_with_every_alpha(device, monkeypatch, visited, alpha):
    visits = check_same_lists(made(device, 12, {0: 20.0, 6: 19.5}, alpha), monkeypatch, visited)
    assert listed(visits)[0][0] == [0, 11, 6]


@pytest.mark.parametrize(("tiles", "left"), [(32, True), (33, False)])
def test_no_list_where_it_would_name_nearly_all(device, monkeypatch, visited, tiles, left):
    """That shows after 32 tiles, and the rest is taken without a look at the bound, which it raises."""
    visits = check_same_lists(made(device, tiles, {1: 30.0}), monkeypatch, visited)
    every = [0, *range(tiles - 1, 0, -1)]
    assert listed(visits) == [[every if left else None]]


@pytest.mark.parametrize(("missing", "left"), [(3, True), (2, False)])
def test_how_many_are_nearly_all(device, monkeypatch, visited, missing, left):
    """30 of the first 32 visits, which are of tile 0 and of tiles 33 to 3."""
    problem = made(device, 34, {i: 50.0 for i in range(34) if not 5 <= i < 5 + missing})
    ((tiles,),) = listed(check_same_lists(problem, monkeypatch, visited))
    assert (tiles is not None) == left and (not left or len(tiles) == 34 - missing)


@pytest.mark.parametrize(("place", "dtype"), [("key", torch.float32), ("query", torch.float16)])
@pytest.mark.usefixtures("half_blocks")
@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
def test_blocks_with_nan_visit_all_tiles(device, monkeypatch, visited, dtype, place):
    """And list all keys; others are as ever."""
    rows, keys = problems.choose_column_tiles(16, dtype).emit.block_m, block_tiles(device, dtype)[1]
    q, k, v = random_qkv(device, 4 * rows, 5 * keys, heads=2, kv_heads=2, dtype=dtype, spread=5.0)
    if place == "key":
        k[0, 0, 2 * keys + 3, 2] = math.nan
    else:
        q[0, 0, 2 * rows + 3, 2] = math.nan
    problem = Problem(q, k, v, torch.full((1,), 2.0, device=device), "2", 0.5)
    lists = lists_of(problem)
    visits = visited[0][1]
    spoilt = torch.zeros(2, 4, dtype=torch.bool, device=device)
    spoilt[0, slice(None) if place == "key" else 2] = True
    assert torch.equal(visits[..., 0] < 0, spoilt)
    found = names(lists, problem.lists, 5 * keys)
    each = problem.lists // 4
    bad = torch.zeros(2, problem.lists, dtype=torch.bool, device=device)
    bad[0, slice(None) if place == "key" else 2 * each + 3 // problem.listed.tiles.block_m] = True
    assert torch.equal(found.all(2), bad)
    check_same_lists(problem, monkeypatch, visited)


def test_heads_in_chunks_have_visits_of_their_own(device, monkeypatch, visited):
    at = longer("causal, more queries", device, torch.float32)
    q, k = at.problem.q, at.problem.k.repeat(2, 1, 1, 1)
    problem = replace(at.problem, q=torch.cat((q, 0.5 * q)), k=k, v=k)
    whole = lists_of(problem)
    monkeypatch.setattr(limits, "WORKSPACE", 1)
    assert torch.equal(lists_of(problem), whole)
    (_, visits), *chunks = visited
    assert len(visits) == 4 and [len(x) for _, x in chunks] == [2, 2]
    assert listed(visits) == [x for _, rows in chunks for x in listed(rows)]
