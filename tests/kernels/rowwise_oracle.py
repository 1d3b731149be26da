"""Row-wise entmax against a float64 oracle, within the error budget of attention (see ``oracle.py``)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from oracle import LOWEST_ALPHA, ROUNDINGS
from rounding import Solved, rounding_costs
from torch import Tensor

from adasplash_kernels import entmax
from adasplash_kernels.reference import entmax_reference


def random_scores(device: str, *shape: int, spread: float = 2.0, dtype: torch.dtype = torch.float32) -> Tensor:
    return (spread * torch.randn(shape, generator=torch.Generator().manual_seed(shape[-1]))).to(device, dtype)


def results(function: Callable[..., Tensor], x: Tensor, alpha: Any, upstream: Tensor) -> tuple[Tensor, ...]:
    """Return the weights, their gradient to x and, if it asks for one, to alpha."""
    leaves = [x.detach().requires_grad_()]
    if isinstance(alpha, Tensor) and alpha.requires_grad:
        alpha = alpha.detach().requires_grad_()
        leaves.append(alpha)
    p = function(leaves[0], alpha)
    return p.detach(), *torch.autograd.grad(p, leaves, upstream.to(p.dtype))


def costs(x: Tensor, weights: Tensor, alpha: float | Tensor, upstream: Tensor, dim: int) -> dict[str, float]:
    """Return what rounding costs any implementation, as for attention whose keys and values are one-hot.

    The attention's queries stand in for the rows: only the size of the scores is taken from them.
    """
    scores, weights, upstream = (y.double().movedim(dim, -1) for y in (x, weights, upstream))
    n = scores.shape[-1]
    by_row = torch.as_tensor(alpha).detach().to(scores).expand(*scores.shape[:-1], 1).reshape(1, 1, -1, 1)
    scores, weights, upstream = (y.reshape(1, 1, -1, n) for y in (scores, weights, upstream))
    size = torch.zeros_like(scores)
    size[..., 0] = scores.masked_fill(scores.isinf(), 0).abs().amax(-1)
    one_hot = torch.eye(n, dtype=torch.float64, device=x.device)[None, None]
    found = rounding_costs(Solved(scores, weights, by_row), size, one_hot, one_hot, upstream, dtype=x.dtype, scale=1.0)
    return {"weights": found["output"], "dx": found["dq"], "dalpha": found["dalpha"]}


def check(
    method: str, x: Tensor, alpha: float | Tensor, dim: int = -1,
    oracle: Callable[..., Tensor] = entmax_reference,
) -> None:  # fmt: skip
    """Assert that weights and gradients err at most twice as much as eager's, plus what rounding costs."""
    upstream = torch.randn(x.shape, generator=torch.Generator().manual_seed(1)).to(x.device, x.dtype)
    if isinstance(alpha, Tensor):
        counts = alpha.detach().double().clamp(LOWEST_ALPHA, 2).requires_grad_(alpha.requires_grad)
    else:
        counts = alpha if alpha == 1 else max(alpha, LOWEST_ALPHA)
    exact = results(lambda x, a: oracle(x, a, dim), x.double(), counts, upstream)
    found = results(lambda x, a: entmax(x, a, dim, method=method), x, alpha, upstream)
    plain = results(lambda x, a: entmax(x, a, dim, method="eager"), x, alpha, upstream)
    cost = costs(x, exact[0], counts, upstream, dim)
    for name, a, b, e in zip(("weights", "dx", "dalpha"), found, plain, exact, strict=False):
        assert a.shape == b.shape == e.shape and a.dtype == b.dtype and a.isfinite().all(), name
        error, plain_error = (float((y.double() - e).norm()) for y in (a, b))
        allowed = 2 * plain_error + ROUNDINGS[x.dtype] * float(e.norm()) + cost[name]
        assert error <= allowed, f"{name}: {error / allowed:.3g} times the allowed error"
