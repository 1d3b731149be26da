"""Thresholds and the bounds they are found between, on hard rows of scores, against float64."""

from __future__ import annotations

import math
from typing import NamedTuple

import pytest
import torch
import triton
import triton.language as tl
from calls import KERNELS, stretch
from hard_rows import (
    ALPHAS,
    FEW_ALPHAS,
    GENERAL,
    both_alphas,
    check_theta,
    computed,
    exact_theta,
    hard_rows,
    resolution,
    solve,
    stacked,
    stored,
)
from maximum import maximum_drops_nan  # noqa: F401
from torch import Tensor

from adasplash_kernels import tile_sizes
from adasplash_kernels.inputs import open_sizes
from adasplash_kernels.mapping import load_exponent
from adasplash_kernels.scores import query_block
from adasplash_kernels.thresholds import THRESHOLDS, register
from adasplash_kernels.thresholds.histogram import _BINS, _NEWTON_STEPS, _RANGE, _count
from adasplash_kernels.thresholds.lower_bound import rise
from adasplash_kernels.thresholds.refine import MAX_ITERATIONS, bracket, highest_score
from adasplash_kernels.tile_sizes import Tiles, choose_row_tiles

by_method = pytest.mark.parametrize("method", KERNELS)
by_alpha = pytest.mark.parametrize(("alpha", "kind"), ALPHAS)
by_few_alphas = pytest.mark.parametrize(("alpha", "kind"), FEW_ALPHAS)
ONE_BLOCK = Tiles(64, 256, 4)  # all rows, all scores: the interpreter's time goes by operations, not by numbers
ONE_ROW = Tiles(1, 256, 4)


@by_method
@by_alpha
def test_theta_of_stored_scores(device, method, alpha, kind):
    exact, tensor = both_alphas(alpha, kind, device)
    for n in (200, 4097) if device == "cuda" else (200,):
        scores, names = stacked(hard_rows(n, exact), device)
        theta, marks = solve(method, stored(scores, tensor, kind, ONE_BLOCK if n <= 256 else choose_row_tiles(n)))
        assert marks is None
        check_theta(theta.flatten(), scores, exact, names)


HARDEST = ["normal x 0.1", "normal x 10", "ties", "two levels", "geometric", "across the edge"]


@by_method
@pytest.mark.parametrize(("alpha", "kind"), [(1.25, GENERAL), (1.5, "1.5"), (2.0, "2")])
def test_each_row_alone_is_solved_to_the_end(device, method, alpha, kind):
    """Rows that share a program share its iterations: here no other row helps one on that stops too soon."""
    exact, tensor = both_alphas(alpha, kind, device)
    rows = hard_rows(120, exact)
    scores, names = stacked({name: rows[name] for name in HARDEST}, device)
    theta, _ = solve(method, stored(scores, tensor, kind, ONE_ROW))
    check_theta(theta.flatten(), scores, exact, names)


@by_method
@pytest.mark.parametrize("alpha", [1.1, 1.25, 1.4, 1.5])
def test_one_score_out_of_reach_of_the_others(device, method, alpha):
    """Its threshold is the lower end of the bracket, where a step past the end must not leave the solution halfway."""
    kind = "1.5" if alpha == 1.5 else GENERAL
    exact, tensor = both_alphas(alpha, kind, device)
    for n in (2, 12, 17, 25, 128, 250):
        scores = torch.where(torch.arange(n, device=device) == n // 2, 0.0, -math.inf)[None]
        theta, _ = solve(method, stored(scores, tensor, kind, ONE_ROW))
        check_theta(theta.flatten(), scores, exact, [f"one of {n}"])


@by_method
@pytest.mark.in_turn(2)
@pytest.mark.parametrize(("alpha", "kind"), [(1.25, GENERAL), (1.5, "1.5"), (2.0, "2")])
@pytest.mark.parametrize("shift", [0.0, 300.0])
def test_a_crowd_inside_the_edge(device, method, alpha, kind, shift):
    """All scores but one are tied where the support ends: that they enter or leave it must not be the last step.

    Nor may steps go to and fro across their entry for ever: the last but one iterate is as good as the last.
    """
    exact, tensor = both_alphas(alpha, kind, device)
    inside = torch.logspace(-4, -0.3, 16, device=device)[:, None]
    for n in (250, 65536) if device == "cuda" else (250,):
        scores = torch.where(torch.arange(n, device=device) == 0, 0.0, (inside - 1) / (exact - 1)) + shift
        problem = stored(scores, tensor, kind, ONE_ROW if n <= 256 else choose_row_tiles(n))
        for max_iterations in (MAX_ITERATIONS - 1, MAX_ITERATIONS):
            theta, _ = solve(method, problem, max_iterations=max_iterations)
            check_theta(theta.flatten(), scores, exact, [f"{float(x):.2g} inside the edge" for x in inside])


@by_method
@pytest.mark.parametrize("n", [1, 2, 31, 32, 33])
def test_theta_of_few_scores(device, method, n):
    for alpha, kind in ((1.5, "1.5"), (1.75, GENERAL)):
        exact, tensor = both_alphas(alpha, kind, device)
        scores, names = stacked(hard_rows(n, exact), device)
        theta, _ = solve(method, stored(scores, tensor, kind, ONE_BLOCK))
        check_theta(theta.flatten(), scores, exact, names)


@by_method
@by_few_alphas
def test_theta_of_computed_scores(device, method, alpha, kind):
    exact, tensor = both_alphas(alpha, kind, device)
    rows = hard_rows(50 * stretch(device), exact)
    chosen = ["normal x 1", "normal x 1000", "ties", "one ahead"]
    mixed = torch.cat([rows[name].repeat(2, 1) for name in chosen]).to(device)
    scores = torch.stack((mixed, mixed.flip(0)), 1).reshape(1, 16, -1)
    scores[:, ::2] *= 0.7
    theta, _ = solve(method, computed(scores, tensor, kind))
    check_theta(theta.flatten(), scores[0], exact, [f"row {i}" for i in range(16)])


@by_method
@by_few_alphas
def test_few_iterations_suffice(device, method, alpha, kind):
    """Bisection alone would need about 25."""
    exact, tensor = both_alphas(alpha, kind, device)
    rows = hard_rows(150, exact)
    scores, names = stacked({name: rows[name] for name in ("normal x 0.1", "normal x 1", "normal x 10")}, device)
    theta, _ = solve(method, stored(scores, tensor, kind, ONE_BLOCK), max_iterations=7)
    check_theta(theta.flatten(), scores, exact, names)


class Bounds(NamedTuple):
    """What is known of thresholds before they are solved for, by row; ``counts`` by row and bin."""

    top: Tensor
    low: Tensor
    high: Tensor
    width: Tensor
    start: Tensor
    counts: Tensor


@triton.jit
def _bounds_kernel(x, size, out, counts_out):
    """Write top, low, high, bin width and the histogram's lower bound (5, rows), and its counts (rows, bins)."""
    size = open_sizes(x, size)
    at = query_block(x, size)
    a = load_exponent(x, size, at.head)
    top = highest_score(x, size, at, 0.0)
    _empty, low, high = bracket(x, size, at, top, a)
    width = tl.minimum(1.0 / tl.maximum(a, 1e-6), _RANGE) / (_BINS - 1)
    counts = _count(x, size, at, 0.0, top, width)
    edges = top[:, None] - (tl.arange(0, _BINS) + 1).to(tl.float32)[None, :] * width
    start = rise(edges, counts, top - width, a, _NEWTON_STEPS, x.ALPHA)
    there = at.rows < size.n_q
    tl.store(out + at.rows, top, mask=there)
    tl.store(out + size.n_q + at.rows, low, mask=there)
    tl.store(out + 2 * size.n_q + at.rows, high, mask=there)
    tl.store(out + 3 * size.n_q + at.rows, tl.zeros_like(top) + width, mask=there)
    tl.store(out + 4 * size.n_q + at.rows, start, mask=there)
    places = at.rows[:, None] * _BINS + tl.arange(0, _BINS)[None, :]
    tl.store(counts_out + places, counts, mask=there[:, None])


def bounds(scores: Tensor, alpha: Tensor, kind: str, tiles: Tiles) -> Bounds:
    """Return the bounds of (rows, n) scores, in float64."""
    problem = stored(scores, alpha, kind, tiles)
    out = torch.empty(5, len(scores), device=scores.device)
    counts = torch.empty(len(scores), _BINS.value, device=scores.device)
    _bounds_kernel[problem.query_grid()](problem.inputs(), problem.sizes(), out, counts, **problem.options)
    return Bounds(*out.double(), counts.double())


@by_alpha
def test_bounds_hold_theta(device, alpha, kind):
    """The bracket, always; the histogram's lower bound, which is also close where its bins cover the support.

    A score is counted at the lower edge of the bin that it rounds to: a quarter to one and a quarter bins below it.
    """
    exact, tensor = both_alphas(alpha, kind, device)
    rows = hard_rows(200, exact)
    del rows["none seen"]
    scores, names = stacked(rows, device)
    found = bounds(scores, tensor, kind, Tiles(64, 64, 4))
    theta, slack = exact_theta(scores, exact), resolution(scores)
    assert torch.equal(found.top, scores.double().amax(-1))
    covered = exact - 1 >= 1 / _RANGE.value
    if covered:
        assert (_BINS.value * found.width >= 1 / (exact - 1)).all()
    for i, name in enumerate(names):
        assert found.low[i] <= theta[i] + slack[i] and theta[i] <= found.high[i] + slack[i], name
        assert found.start[i] <= theta[i] + slack[i], name
        assert not covered or theta[i] - found.start[i] <= 1.25 * found.width[i] + slack[i], name


@pytest.mark.parametrize("equal", [False, True], ids=["normal", "all in one bin"])
@pytest.mark.parametrize("tiles", [Tiles(8, 8, 1), Tiles(8, 32, 1), Tiles(8, 512, 4)], ids=["63", "16", "1"])
def test_every_score_near_the_top_is_counted(device, tiles, equal):
    """To within the rounding of a score's bin, in more tiles than a counter of four bits can count a score each."""
    scores = torch.randn(6, 500, generator=torch.Generator().manual_seed(1)).to(device)
    scores = torch.zeros_like(scores) if equal else torch.where(scores > 1.9, -math.inf, scores)
    found = bounds(scores, torch.full((1,), 1.5, device=device), "1.5", tiles)
    below = (found.top[:, None] - scores.double()) / found.width[:, None]
    for b, counted in enumerate(found.counts.cumsum(-1).T):
        edge = b + 0.75  # scores round to half bins
        assert ((below < edge - 1e-4).sum(-1) <= counted).all() and (counted <= (below < edge + 1e-4).sum(-1)).all()


def test_the_widest_row_tiles_do_not_overflow_the_sums(device, monkeypatch):
    """Fifteen tiles and one of the widest that rows get on a GPU, with all scores in a bin of either half of a word."""
    monkeypatch.setattr(tile_sizes, "INTERPRETED", False)
    width = choose_row_tiles(10**9).block_n
    alpha, tiles = torch.full((1,), 1.3, device=device), Tiles(1, width, 8)
    for bin_of_most in (0, 6):
        scores = torch.zeros(1, 16 * width, device=device)
        scores[0, -1] = (bin_of_most + 0.25) / 0.3 / 7
        counts = bounds(scores, alpha, GENERAL, tiles).counts[0]
        assert counts[bin_of_most] == 16 * width - (bin_of_most > 0) and counts.sum() == 16 * width


@pytest.mark.usefixtures("maximum_drops_nan")
@by_method
@pytest.mark.parametrize(("alpha", "kind"), [(1.0, "1"), (1.3, GENERAL), (1.5, "1.5"), (2.0, "2")])
def test_nan_among_the_scores_is_nan(device, method, alpha, kind):
    """Beside high scores or low ones, alone among hidden keys, or all of a row; no other row is touched."""
    exact, tensor = both_alphas(alpha, kind, device)
    scores = torch.randn(6, 70, generator=torch.Generator().manual_seed(0))
    scores[1, 20], scores[2, 35:], scores[3] = math.nan, math.nan, math.nan
    scores[4] = -math.inf
    scores[4, 60] = math.nan
    theta = solve(method, stored(scores.to(device), tensor, kind, ONE_BLOCK))[0].flatten()
    assert theta[1:5].isnan().all()
    check_theta(theta[[0, 5]], scores[[0, 5]].to(device), exact, ["first", "last"])


@pytest.mark.parametrize("name", [*KERNELS, "auto", "eager"])
def test_names_are_given_once(name):
    before = dict(THRESHOLDS)
    for lists in (None, "tiles", "columns"):
        with pytest.raises(ValueError, match=f"name: '{name}' is taken"):
            register(name, lists=lists)
    assert before == THRESHOLDS


@pytest.mark.parametrize("lists", [None, "tiles", "columns"])
def test_a_registered_function_is_kept_as_it_is(lists):
    def function(problem):
        raise AssertionError("registering does not call it")

    try:
        assert register("mine", lists=lists)(function) is function
        assert THRESHOLDS["mine"].solve is function and THRESHOLDS["mine"].lists is lists
        with pytest.raises(ValueError, match="name: 'mine' is taken"):
            register("mine")
    finally:
        THRESHOLDS.pop("mine", None)
