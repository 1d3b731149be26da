"""The solvers in PyTorch against the kernels, update by update, and against values worked out by hand."""

from __future__ import annotations

from dataclasses import replace
from itertools import islice

import pytest
import torch

import adasplash_kernels.launch  # noqa: F401 - registers the methods
from adasplash_kernels.eager import masked_scores, solve_theta
from adasplash_kernels.masks import AttentionMask
from tasks.kernel_bench.solver_math import vector_jacobian, weights
from tasks.kernel_bench.solvers import KERNEL_BINS, SOLVERS, columns


def rows_of(count, n, scale=1.0, seed=0):
    return scale * torch.randn(count, n, generator=torch.Generator().manual_seed(seed))


def by_kernel(method, scores, alpha, updates):
    """Theta of rows of scores after so many updates, by the kernels of adasplash_kernels."""
    from adasplash_kernels.dispatch import kernel_alpha
    from adasplash_kernels.problem import Problem
    from adasplash_kernels.thresholds import THRESHOLDS
    from adasplash_kernels.tile_sizes import choose_row_tiles

    number, kind = kernel_alpha(alpha, scores.device)
    nothing = scores.new_empty(1)
    q, k = nothing.expand(1, 1, len(scores), 1), nothing.expand(1, 1, scores.shape[1], 1)
    tiles = replace(choose_row_tiles(scores.shape[1], False), block_m=1)  # a row a block: it stops when it is done
    problem = Problem(q, k, k, number, kind, 1.0, scores=scores, tiles=tiles)
    found = THRESHOLDS[method].solve(problem, max_iterations=updates)
    return (found[0] if isinstance(found, tuple) else found).reshape(-1)


def resolution(theta):
    """A few units in the last place of float32, at the size of a threshold."""
    return 4 * 2**-23 * theta.abs().clamp_min(1)


@pytest.mark.parametrize(("alpha", "scale"), [(1.5, 1.0), (1.5, 6.0), (2.0, 6.0), (1.25, 1.0)])
@pytest.mark.parametrize("method", ["adasplash", "adasplash2"])
def test_the_same_theta_as_the_kernel_after_every_update(method, scale, alpha, device):
    scores = rows_of(2, 50, scale).to(device)
    ours = SOLVERS[method](scores, alpha, KERNEL_BINS)
    moved = []
    for updates, theta in enumerate(islice(ours, 5)):
        kernel = by_kernel(method, scores, alpha, updates)
        assert ((theta - kernel).abs() <= resolution(kernel)).all(), (updates, theta - kernel)
        moved.append(kernel)
    assert len({tuple(theta.tolist()) for theta in moved}) > 1  # it had something to follow


def test_columns_as_in_attention(device):
    """Small causal attention: bound, list and solve of the kernels against the translation on its scores."""
    from adasplash_kernels.problem import Problem
    from adasplash_kernels.thresholds import THRESHOLDS
    from adasplash_kernels.tile_sizes import INTERPRETED, choose_column_tiles

    generator = torch.Generator().manual_seed(1)
    q, k = (2 * torch.randn(1, 1, 40, 16, generator=generator).to(device) for _ in range(2))
    scores = masked_scores(q, k, scale=0.25, mask=AttentionMask(causal=True))[0, 0]
    groups = choose_column_tiles(16, torch.float32).groups
    assert groups == (16 if INTERPRETED else 32)
    problem = Problem(q, k, k, torch.tensor([1.5], device=device), "1.5", 0.25, right=0)
    for updates, theta in enumerate(islice(columns(scores, 1.5, groups=groups), 4)):
        kernel = THRESHOLDS["columns"].solve(problem, max_iterations=updates)[0].reshape(-1)
        assert ((theta - kernel).abs() <= resolution(kernel)).all(), updates


def test_columns_bound_from_below_by_hand():
    """Every second score: maxima 0 and -1/2. Alpha 2: their tau is -3/4 and theta 1/4."""
    scores = torch.tensor([[0.0, -0.5, -0.25, -9.0]], dtype=torch.float64)
    bound = next(columns(scores, 2.0, groups=2))
    assert float(bound) == pytest.approx(0.25 - 1.25e-6, abs=1e-12)  # less the margin 1e-6 (1 + |theta|)


def test_bisection_by_hand():
    """Two equal scores, alpha 2: the bracket of tau is [-1, -1/2], the root its upper end. Halved twice: -5/8."""
    thetas = list(islice(SOLVERS["bisection_torch"](torch.zeros(1, 2), 2.0, 2), 3))
    assert [float(t) for t in thetas] == [0.0, 0.25, 0.375]


def test_bisection_is_that_of_dense(device):
    from tasks.kernel_bench.dense import entmax_by_bisection

    scores = rows_of(4, 50).to(device)
    for updates, theta in enumerate(islice(SOLVERS["bisection_torch"](scores, 1.5, 2), 8)):
        p, _ = weights(scores.double(), theta, 0.5)
        expected = entmax_by_bisection(scores, 1.5, updates)
        assert torch.allclose((p / p.sum(-1, keepdim=True)).float(), expected, atol=1e-6)


@pytest.mark.parametrize("alpha", [1.5, 2.0, 1.2])
@pytest.mark.parametrize("name", SOLVERS)
def test_every_solver_gets_there(name, alpha):
    scores = rows_of(20, 300, 3.0).double()
    last = list(islice(SOLVERS[name](scores, alpha, 16), 61))[-1]
    assert torch.allclose(last, solve_theta(scores, alpha)[:, 0], atol=2e-7)


@pytest.mark.parametrize("name", ["columns", "bisection_torch"])
def test_from_below(name):
    scores = rows_of(20, 300).double()
    exact = solve_theta(scores, 1.5)[:, 0]
    thetas = list(islice(SOLVERS[name](scores, 1.5, 2), 6))
    assert all((t <= exact + 1e-12).all() for t in thetas)
    assert all((b >= a - 1e-12).all() for a, b in zip(thetas, thetas[1:], strict=False))


@pytest.mark.parametrize("bins", [2, 3, 64])
def test_more_bins_start_closer(bins):
    """Scores count to half a bin: the start, raised by 3/4 of a bin, is at most that far from theta."""
    scores = rows_of(50, 400).double()
    start = next(SOLVERS["adasplash2"](scores, 1.5, bins))
    width = 2 / (bins - 1)
    assert ((start - solve_theta(scores, 1.5)[:, 0]).abs() <= 0.75 * width + 1e-5).all()


def test_rows_see_different_numbers_of_keys():
    scores = rows_of(6, 12).double()
    scores[torch.arange(12) > torch.arange(6)[:, None]] = -torch.inf
    exact = torch.stack([solve_theta(scores[i, : i + 1], 1.5)[0] for i in range(6)])
    for name in SOLVERS:
        last = list(islice(SOLVERS[name](scores, 1.5, 8), 50))[-1]
        assert torch.allclose(last, exact, atol=2e-7), name


def test_vector_jacobian_is_the_derivative():
    scores = rows_of(2, 9).double().requires_grad_()
    upstream = rows_of(2, 9, seed=1).double()
    from adasplash_kernels.reference import entmax_reference

    (expected,) = torch.autograd.grad(entmax_reference(scores, 1.5), scores, upstream)
    _, u = weights(scores.detach(), solve_theta(scores.detach(), 1.5)[:, 0], 0.5)
    assert torch.allclose(vector_jacobian(u, upstream), expected, atol=1e-9)
