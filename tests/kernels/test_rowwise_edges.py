"""The edges of row-wise entmax by kernels: rows without a choice, bad numbers, nothing to do, compilation, refusals."""

from __future__ import annotations

import functools
import math

import pytest
import torch
from calls import KERNELS
from maximum import maximum_drops_nan  # noqa: F401
from rowwise_oracle import check, random_scores, results
from torch import Tensor

from adasplash_kernels import entmax
from adasplash_kernels.dispatch import METHODS, kernel_alpha
from adasplash_kernels.reference import entmax_reference

by_method = pytest.mark.parametrize("method", KERNELS)
by_kinds = pytest.mark.parametrize("alpha", [1.0, 1.3, 1.5, 2.0, "tensor"])


def one_alpha(alpha: float | str, device: str, rows: int) -> float | Tensor:
    """Return a number, or for "tensor" an alpha of 1.4 for each row, which takes its own way through the kernels."""
    return torch.full((rows, 1), 1.4, device=device, requires_grad=True) if alpha == "tensor" else alpha


@pytest.mark.in_turn(2)
@by_method
@by_kinds
def test_rows_without_a_choice(device, method, alpha):
    """Nothing to choose, one entry to choose, equal ones: alone, among hidden ones, or out of reach of the others."""
    n, inf = 37, math.inf
    x = torch.full((5, n), -inf, device=device)
    x[1, 35] = -1e4
    x[2], x[3, 3:35], x[4] = 7.0, -300.0, -3.0
    x[4, [1, 35]] = 60.0
    expected = torch.zeros(5, n, device=device, dtype=torch.float64)
    expected[1, 35], expected[2], expected[3, 3:35], expected[4, [1, 35]] = 1, 1 / n, 1 / 32, 0.5
    alpha = one_alpha(alpha, device, 5)
    torch.testing.assert_close(entmax_reference(x, alpha.detach() if isinstance(alpha, Tensor) else alpha), expected)
    check(method, x, alpha)
    upstream = random_scores(device, 5, n)
    p, dx, *d_alpha = results(lambda x, a: entmax(x, a, method=method), x, alpha, upstream)
    assert (p[x == -inf] == 0).all() and (dx[0] == 0).all()
    assert (dx[1].abs() <= 4 * 2**-23 * upstream[1].abs()).all()  # u dP / u is dP but for its rounding
    assert all((y[0] == 0).all() for y in d_alpha)


@pytest.mark.in_turn(2)
@by_method
@by_kinds
@pytest.mark.parametrize("size", [1e4, 1e6, 1e8, 1e20])
def test_huge_scores(device, method, alpha, size):
    check(method, size * random_scores(device, 3, 40), one_alpha(alpha, device, 3))


@pytest.mark.in_turn(2)
@pytest.mark.usefixtures("maximum_drops_nan")
@by_method
@by_kinds
def test_bad_scores_stay_in_their_row(device, method, alpha):
    """NaN makes all of its row NaN, and so does +inf but for zeros; the rows beside them are as ever."""
    x = random_scores(device, 7, 40)
    clean, upstream = x.clone(), random_scores(device, 7, 40)
    x[1, 5], x[3], x[6, 39] = math.nan, math.nan, math.inf
    x[5] = -math.inf
    x[5, 3] = math.nan
    call = functools.partial(results, lambda x, a: entmax(x, a, method=method), alpha=one_alpha(alpha, device, 7),
                             upstream=upstream)  # fmt: skip
    found, expected = call(x), call(clean)
    fine = torch.tensor([0, 2, 4], device=device)
    for a, b in zip(found, expected, strict=True):
        assert a[[1, 3, 5]].isnan().all() and a[6].isnan().any()
        torch.testing.assert_close(a[fine], b[fine])
    p = found[0][6]
    assert p[39].isnan() and (p.isnan() | (p == 0)).all()


@by_method
@pytest.mark.parametrize("wrt", ["x", "alpha"])
def test_second_derivative_is_refused(device, method, wrt):
    x = random_scores(device, 3, 10).requires_grad_()
    alpha = torch.tensor(1.4, device=device, requires_grad=True)
    p = entmax(x, alpha, method=method)
    (gradient,) = torch.autograd.grad(p.square().sum(), x if wrt == "x" else alpha, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiated twice"):
        (gradient.square().sum() + p.sum()).backward()  # must not drop the first term silently


@pytest.mark.in_turn(2)
@by_method
@pytest.mark.parametrize(("alpha", "dtype"), [(1.5, torch.float16), ("tensor", torch.float32)])
def test_custom_ops_are_well_formed(device, method, alpha, dtype):
    from adasplash_kernels.rowwise_ops import entmax_backward_op, entmax_op

    x = random_scores(device, 2, 9, dtype=dtype)
    alpha, kind = kernel_alpha(one_alpha(alpha, device, 2), x.device)
    alpha = alpha if alpha is None else alpha.detach()
    for grad in (False, True):
        leaf = x.clone().requires_grad_(grad)
        own_alpha = alpha if alpha is None else alpha.clone().requires_grad_(grad)
        torch.library.opcheck(entmax_op, (leaf, own_alpha, kind, method))
    p, theta = entmax_op(x, alpha, kind, method)
    for need_alpha in {False, alpha is not None}:
        torch.library.opcheck(entmax_backward_op, (x, alpha, theta, torch.ones_like(p), kind, need_alpha))


@pytest.mark.in_turn(2)
@by_method
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("alpha", [1.5, "tensor"])
def test_compiles_whole_with_dynamic_lengths(device, method, backend, alpha):
    def step(x, alpha):
        return entmax(x, alpha, dim=0, method=method).square().sum()

    torch.compiler.reset()
    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend=backend)
    for rows, n in ((4, 19), (3, 23)):
        x = random_scores(device, n, rows)
        upstream = torch.ones((), device=device)
        own = one_alpha(alpha, device, rows)
        for a, b in zip(results(compiled, x, own, upstream), results(step, x, own, upstream), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


@by_method
@pytest.mark.parametrize("shape", [(0, 5), (3, 0, 4)])
def test_no_rows(device, method, shape):
    x = torch.empty(shape, device=device, requires_grad=True)
    p = entmax(x, 1.5, method=method)
    assert p.shape == x.shape and p.dtype == x.dtype
    (gradient,) = torch.autograd.grad(p.sum(), x)
    assert gradient.shape == x.shape


@by_method
def test_one_value_of_the_same_row_alone_or_among_others(device, method):
    """Rows that share a program share nothing else."""
    x = random_scores(device, 5, 50)
    together = entmax(x, 1.3, method=method)
    for i in range(5):
        torch.testing.assert_close(entmax(x[i], 1.3, method=method), together[i], rtol=1e-5, atol=1e-6)


def test_wrong_arguments(device):
    x = random_scores(device, 2, 5)
    with pytest.raises(ValueError, match="method: got 'newton', allowed are " + ", ".join(METHODS)):
        entmax(x, method="newton")
    for method in KERNELS:
        with pytest.raises(ValueError, match=f"x: got torch.float64, allowed with method '{method}'"):
            entmax(x.double(), method=method)
        with pytest.raises(ValueError, match="alpha: got shape"):
            entmax(x, torch.ones(5, device=device), method=method)
        with pytest.raises(ValueError, match="dim: got 2"):
            entmax(x, dim=2, method=method)
        with pytest.raises(ValueError, match="x: dimension -1 has size 0"):
            entmax(x[:, :0], method=method)


def test_auto_takes_a_kernel_on_cuda_alone(device, monkeypatch):
    from adasplash_kernels import rowwise

    called = []
    run = rowwise._run_kernels
    monkeypatch.setattr(rowwise, "_run_kernels", lambda *a: called.append(a[-1]) or run(*a))
    entmax(random_scores(device, 2, 5))
    entmax(random_scores(device, 2, 5, dtype=torch.float64))
    assert called == (["adasplash2"] if device == "cuda" else [])
