"""The dense path and row-wise entmax against the oracle, PyPI's entmax, and finite differences."""

from __future__ import annotations

import math

import entmax as published
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from adasplash_kernels import entmax, entmax_attention
from adasplash_kernels.reference import attention_reference, entmax_reference

ALPHAS = [1.0, 1.0001, 1.1, 1.25, 1.5, 1.75, 2.0]


def rows(n=40, seed=0, spread=3.0):
    return spread * torch.randn(6, n, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("alpha", ALPHAS)
@pytest.mark.parametrize("n", [1, 2, 40, 500])
def test_equals_the_oracle(alpha, n):
    x = rows(n)
    torch.testing.assert_close(entmax(x, alpha), entmax_reference(x, alpha), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(("alpha", "function"), [(1.5, published.entmax15), (2.0, published.sparsemax)])
def test_equals_the_published_package(alpha, function):
    torch.testing.assert_close(entmax(rows(), alpha), function(rows(), dim=-1), rtol=1e-9, atol=1e-12)


def test_bisection_of_the_published_package():
    expected = published.entmax_bisect(rows(), alpha=1.3, dim=-1, n_iter=80)
    torch.testing.assert_close(entmax(rows(), 1.3), expected, rtol=1e-9, atol=1e-12)


def test_alpha_one_is_softmax():
    torch.testing.assert_close(entmax(rows(), 1.0), rows().softmax(-1))
    torch.testing.assert_close(entmax(rows(), torch.tensor(1.0)), rows().softmax(-1), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("alpha", [1.0, 1.3, 1.5, 2.0])
def test_gradcheck(alpha):
    x = rows(7).requires_grad_()
    assert torch.autograd.gradcheck(lambda s: entmax(s, alpha), (x,))


@pytest.mark.parametrize("alpha", [1.05, 1.4, 1.5, 1.9])
def test_gradcheck_of_alpha(alpha):
    x, a = rows(7).requires_grad_(), torch.tensor(alpha, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda s, a: entmax(s, a), (x, a))


def test_gradient_to_alpha_near_one_is_the_limit():
    """d entmax / d alpha at 1, from the oracle's autograd, where the closed form of Correia et al. is 0/0."""
    x, weight = rows(9), rows(9, seed=1)
    exact = torch.tensor(1.0 + 1e-3, dtype=torch.float64, requires_grad=True)
    (entmax_reference(x, exact) * weight).sum().backward()
    alpha = torch.tensor(1.0 + 1e-3, dtype=torch.float64, requires_grad=True)
    (entmax(x, alpha) * weight).sum().backward()
    torch.testing.assert_close(alpha.grad, exact.grad, rtol=1e-6, atol=1e-9)


def test_alpha_per_head_gradient():
    q, k, v = (torch.randn(2, 3, 6, 4, dtype=torch.float64, requires_grad=True) for _ in range(3))
    alpha = torch.tensor([1.2, 1.5, 1.9], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda q, k, v, a: entmax_attention(q, k, v, alpha=a, causal=True, method="eager"), (q, k, v, alpha)
    )


@pytest.mark.parametrize("causal", [False, True])
def test_attention_equals_the_oracle(causal):
    q, k, v = (torch.randn(2, h, n, 8, dtype=torch.float64) for h, n in ((4, 9), (2, 13), (2, 13)))
    options = dict(alpha=1.5, causal=causal, key_starts=torch.tensor([0, 4]), key_lengths=torch.tensor([13, 11]))
    torch.testing.assert_close(entmax_attention(q, k, v, **options), attention_reference(q, k, v, **options))


def test_mask_by_hand():
    """Bottom-right causal: with 2 queries and 4 keys, query 0 sees keys 0..2 and query 1 all four."""
    q = torch.zeros(1, 1, 2, 1)
    v = torch.tensor([1.0, 10.0, 100.0, 1000.0]).reshape(1, 1, 4, 1)
    out = entmax_attention(q, torch.zeros(1, 1, 4, 1), v, causal=True).flatten()
    torch.testing.assert_close(out, torch.tensor([111 / 3, 1111 / 4]))
    first = entmax_attention(torch.zeros(1, 1, 4, 1), torch.zeros(1, 1, 2, 1), v[:, :, :2], causal=True).flatten()
    torch.testing.assert_close(first, torch.tensor([0.0, 0.0, 1.0, 5.5]))  # the first two see no key


def test_second_derivative_is_refused():
    x = rows().requires_grad_()
    p = entmax(x)
    (gradient,) = torch.autograd.grad(p.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiated twice"):
        (gradient.square().sum() + p.sum()).backward()


@settings(max_examples=60, deadline=None)
@given(
    scores=st.lists(st.floats(-50, 50), min_size=1, max_size=30),
    alpha=st.floats(1.0, 2.0),
    shift=st.floats(-100, 100),
)
def test_properties(scores, alpha, shift):
    x = torch.tensor(scores, dtype=torch.float64)
    p = entmax(x, alpha)
    assert abs(float(p.sum()) - 1) < 1e-9 and (p >= 0).all()
    order = x.argsort()
    assert (p[order].diff() >= -1e-12).all()  # a higher score never gets less
    torch.testing.assert_close(entmax(x + shift, alpha), p, rtol=1e-6, atol=1e-9)


def test_empty_rows_ties_and_infinities():
    x = torch.full((2, 5), -math.inf)
    x[1, 2] = 0.3
    for alpha in (1.0, 1.3, 1.5, 2.0):
        p = entmax(x, alpha)
        assert p[0].eq(0).all() and p[1].tolist() == [0, 0, 1, 0, 0]
        torch.testing.assert_close(entmax(torch.zeros(7), alpha), torch.full((7,), 1 / 7))
    x.requires_grad_()
    entmax(x).square().sum().backward()
    assert x.grad.eq(0).all()
    assert entmax(torch.tensor([0.0, math.nan, 1.0])).isnan().any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("dim", [0, 1, -1])
def test_dtype_and_dim(dtype, dim):
    x = rows().to(dtype)
    p = entmax(x, 1.5, dim=dim)
    assert p.dtype == dtype and p.shape == x.shape
    torch.testing.assert_close(p.double(), entmax_reference(x, 1.5, dim=dim), rtol=1e-2, atol=4e-3)
