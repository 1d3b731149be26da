"""Row-wise entmax by kernels against the float64 oracle and the published package; interpreted or compiled."""

from __future__ import annotations

import functools
from collections.abc import Callable

import entmax as published
import pytest
import torch
from calls import KERNELS, stretch
from rowwise_oracle import check, random_scores, results
from torch import Tensor

from adasplash_kernels import entmax

by_method = pytest.mark.parametrize("method", KERNELS)
HALVES = [torch.float16, torch.bfloat16]


def learned(*values: float, shape: tuple[int, ...] = ()) -> Callable[[str], Tensor]:
    """Return a maker of an alpha that requires grad."""
    return lambda device: torch.tensor(values).reshape(shape).to(device).requires_grad_()


NUMBERS = [1.0, 1.001, 1.25, 1.5, 1.75, 2.0]
TENSORS = {
    "a scalar": learned(1.3),
    "one element": learned(1.6, shape=(1, 1, 1)),
    "by row": learned(1.0, 1.2, 1.6, 2.0, shape=(2, 2, 1)),
    "by first dimension": learned(1.25, 1.8, shape=(2, 1, 1)),
    "by last dimension but one": learned(1.1, 1.5, shape=(2, 1)),
}


@pytest.mark.in_turn(2)
@by_method
@pytest.mark.parametrize("alpha", NUMBERS)
@pytest.mark.parametrize("spread", [0.1, 3.0, 1000.0])
def test_numbers(device, method, alpha, spread):
    check(method, random_scores(device, 4, 45 * stretch(device), spread=spread), alpha)


@by_method
@pytest.mark.parametrize("alpha", TENSORS.values(), ids=TENSORS.keys())
def test_tensors(device, method, alpha):
    check(method, random_scores(device, 2, 2, 35 * stretch(device)), alpha(device))


@by_method
@pytest.mark.parametrize("kind", ["half", "double", "an expanded view", "does not require grad"])
def test_tensors_of_other_kinds(device, method, kind):
    alpha = torch.tensor([[1.25], [1.75]], device=device)
    if kind == "an expanded view":
        alpha = alpha[:1].expand(2, 1)
    alpha = alpha.to({"half": torch.float16, "double": torch.float64}.get(kind, torch.float32))
    check(method, random_scores(device, 2, 20), alpha.requires_grad_(kind != "does not require grad"))


@pytest.mark.in_turn(2)
@by_method
@pytest.mark.parametrize("n", [1, 2, 31, 32, 33, 100, pytest.param(1000, marks=pytest.mark.gpu),
                               pytest.param(5000, marks=pytest.mark.gpu)])  # fmt: skip
def test_lengths(device, method, n):
    x = random_scores(device, 5, n)
    check(method, x, 1.5)
    check(method, x[:2], torch.tensor([[1.3], [1.7]], device=device, requires_grad=True))


@by_method
@pytest.mark.parametrize("rows", [1, 4, 5, pytest.param(1025, marks=pytest.mark.gpu)])
def test_numbers_of_rows(device, method, rows):
    check(method, random_scores(device, rows, 20), 1.5)


@pytest.mark.in_turn(2)
@by_method
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("alpha", [1.0, 1.5, learned(1.3), learned(1.2, 1.9, shape=(2, 1))])
def test_half_precision(device, method, dtype, alpha):
    x = random_scores(device, 2, 50 * stretch(device), dtype=dtype)
    check(method, x, alpha(device) if callable(alpha) else alpha)


@pytest.mark.in_turn(2)
@by_method
@pytest.mark.parametrize("dim", [0, 1, -1])
def test_dims(device, method, dim):
    x = random_scores(device, 4, 2, 3)
    check(method, x, 1.5, dim)
    others = [n for i, n in enumerate(x.shape) if i != dim % 3]
    alpha = torch.linspace(1.1, 2, others[1]).to(device).reshape(1, -1, 1).requires_grad_()
    check(method, x, alpha, dim)


@by_method
def test_one_dimension(device, method):
    check(method, random_scores(device, 40), 1.5)
    check(method, random_scores(device, 40), torch.tensor(1.4, device=device, requires_grad=True))


@by_method
def test_strides_do_not_matter(device, method):
    wide = random_scores(device, 4, 24)
    upstream = random_scores(device, 4, 12)
    for x in (wide[:, ::2], wide[:, 12:], wide[:, :12].T.contiguous().T, wide[:1, :12].expand(4, 12)):
        call = functools.partial(results, lambda x, a: entmax(x, a, method=method), alpha=1.5)
        for found, expected in zip(call(x, upstream=upstream), call(x.contiguous(), upstream=upstream), strict=True):
            assert torch.equal(found, expected)
        # gradients that come back with strides of their own, or without memory, such as that of a sum
        for back in (upstream.T.contiguous().T, upstream[:, :1].expand(4, 12)):
            assert torch.equal(call(x, upstream=back)[1], call(x, upstream=back.contiguous())[1])


def as_published(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda x, alpha, dim: function(x, dim=dim)


PUBLISHED = {
    "entmax15": (as_published(published.entmax15), 1.5),
    "sparsemax": (as_published(published.sparsemax), 2.0),
    "entmax_bisect": (lambda x, alpha, dim: published.entmax_bisect(x, alpha, dim, n_iter=80), learned(1.3)),
    "entmax_bisect by row": (
        lambda x, alpha, dim: published.entmax_bisect(x, alpha, dim, n_iter=80), learned(1.2, 1.4, 1.8, shape=(3, 1)),
    ),
}  # fmt: skip


@by_method
@pytest.mark.parametrize("name", PUBLISHED)
def test_the_published_package(device, method, name):
    """Another oracle, with gradients of its own."""
    function, alpha = PUBLISHED[name]
    check(method, random_scores(device, 3, 40 * stretch(device)), alpha(device) if callable(alpha) else alpha,
          oracle=function)  # fmt: skip
