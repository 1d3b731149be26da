"""The dense path and row-wise entmax against the oracle, PyPI's entmax, and finite differences."""

from __future__ import annotations

import itertools
import math

import entmax as published
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import check_against_oracle, gradients

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


def qkv(n_q, n_k, *, batch=1, seed=0):
    """Float64 queries of two heads, keys and values of one."""
    generator = torch.Generator().manual_seed(seed)
    shapes = ((2, n_q), (1, n_k), (1, n_k))
    return tuple(torch.randn(batch, h, n, 3, dtype=torch.float64, generator=generator) for h, n in shapes)


SLOPES = torch.tensor([0.5, -0.1])
PACKED = dict(cu_seqlens_q=torch.tensor([0, 3, 3, 5, 6]), cu_seqlens_k=torch.tensor([0, 2, 3, 6, 6]))
RULES = {
    "none": dict(),
    "causal": dict(causal=True),
    "window": dict(window=2),
    "alibi": dict(alibi_slopes=SLOPES),
    "alibi by sequence, causal window": dict(alibi_slopes=torch.tensor([[0.5, -0.1], [0.3, 0]]), causal=True, window=3),
    "padding": dict(causal=True, window=4, key_starts=torch.tensor([0, 3]), key_lengths=torch.tensor([7, 5])),
    "packed": PACKED,
    "packed, all": dict(causal=True, window=2, alibi_slopes=SLOPES, **PACKED),
    "packed, queries and keys alike": dict(alibi_slopes=SLOPES[None], cu_seqlens_q=torch.tensor([0, 2, 2, 6]).int()),
}
by_rule = pytest.mark.parametrize("rule", RULES.values(), ids=RULES.keys())


def inputs(rule, **options):
    """Return what fits a rule: two sequences of 5 queries and 7 keys, or 7 packed tokens, one of them past the end."""
    return qkv(7, 7, **options) if "cu_seqlens_q" in rule else qkv(5, 7, batch=2, **options)


def eager(q, k, v, **options):
    return entmax_attention(q, k, v, method="eager", **options)


@by_rule
@pytest.mark.parametrize("alpha", [1.0, 1.3, 1.5, 2.0])
def test_attention_equals_the_oracle(rule, alpha):
    tensors, options = inputs(rule), dict(rule, alpha=alpha, scale=0.7)
    upstream = inputs(rule, seed=1)[0]
    found = gradients(lambda *x: eager(*x, **options), tensors, upstream)
    exact = gradients(lambda *x: attention_reference(*x, **options), tensors, upstream)
    for a, b in zip(found, exact, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


@by_rule
@pytest.mark.parametrize(
    "alpha", [1.5, torch.tensor(1.7), torch.tensor([1.25, 1.9])], ids=["1.5", "scalar", "per head"]
)
def test_attention_gradcheck(rule, alpha):
    """Against finite differences, to alpha as well where it is a tensor."""
    leaves = [x.requires_grad_() for x in inputs(rule)]
    if isinstance(alpha, torch.Tensor):
        leaves.append(alpha.double().requires_grad_())
    assert torch.autograd.gradcheck(lambda q, k, v, alpha=alpha: eager(q, k, v, alpha=alpha, **rule), leaves)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("spread", "n_k", "rule"), [
    (30, 7, dict(causal=True)),  # large scores
    (1, 1000, dict(alibi_slopes=torch.tensor([0.3, 0.1]), key_lengths=torch.tensor([7, 5]))),  # all keys are far away
])  # fmt: skip
def test_scores_are_float32_for_half_precision(dtype, spread, n_k, rule):
    """Scores, or distances, rounded to the inputs' precision would cost more than the roundings of the result."""
    q, k, v = (x.to(dtype) for x in qkv(5, n_k, batch=2))
    check_against_oracle(eager, lambda *x, **o: attention_reference(*x, **o).to(dtype), spread * q, k, v, **rule)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("rule", [{}, dict(window=2), dict(alibi_slopes=SLOPES)], ids=["none", "window", "alibi"])
@pytest.mark.parametrize("alpha", [1.5, torch.tensor([1.1, 2.0])], ids=["1.5", "per head"])
def test_packed_sequences_equal_the_same_one_by_one(causal, rule, alpha):
    """Outputs and gradients; tokens past the end, queries without keys and keys without queries have none."""
    cu_q, cu_k = [0, 4, 4, 9, 11], [0, 6, 7, 10, 10]
    packed = dict(cu_seqlens_q=torch.tensor(cu_q), cu_seqlens_k=torch.tensor(cu_k))
    tensors, upstream, options = qkv(13, 12), qkv(13, 12, seed=1)[0], dict(rule, causal=causal, alpha=alpha)
    found = gradients(lambda *x: eager(*x, **options, **packed), tensors, upstream)
    expected = [torch.zeros_like(x) for x in (tensors[0], *tensors)]
    for queries, keys in zip(*(itertools.starmap(slice, itertools.pairwise(x)) for x in (cu_q, cu_k)), strict=True):
        if keys.start == keys.stop:
            continue
        q, k, v = tensors[0][:, :, queries], tensors[1][:, :, keys], tensors[2][:, :, keys]
        alone = gradients(lambda *x: eager(*x, **options), (q, k, v), upstream[:, :, queries])
        for whole, part, where in zip(expected, alone, (queries, queries, keys, keys), strict=True):
            whole[:, :, where] = part
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


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
