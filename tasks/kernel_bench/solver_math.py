"""From scores to weights in plain PyTorch, with the rules of the kernels' ``mapping.py``, for any float dtype.

With ``a = alpha - 1`` and ``theta = (tau + 1) / a``: ``p = [1 + a (s - theta)]_+^(1/a)``. Alpha 1.5 and 2 have closed
forms, the others go through logarithms.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def weights(scores: Tensor, theta: Tensor, a: float) -> tuple[Tensor, Tensor]:
    """Return p and u = p^(2 - alpha), zero outside the support, (R, n), of scores (R, n) and thresholds (R,)."""
    y = scores - theta[:, None]
    if a == 0.5:
        u = (0.5 * y + 1).clamp_min(0)
        return u * u, u
    if a == 1.0:
        p = (y + 1).clamp_min(0)
        return p, (p > 0).to(p.dtype)
    t = a * y
    outside = t <= -1
    log_p = torch.log1p(t.masked_fill(outside, 0)) / a
    return log_p.exp().masked_fill(outside, 0), ((1 - a) * log_p).exp().masked_fill(outside, 0)


def curvature(p: Tensor, u: Tensor, a: float) -> Tensor:
    """Return the terms of d2f/dtheta2, which is (1 - a) sum p^(1 - 2a)."""
    if a == 0.5:
        return 0.5 * (u > 0).to(u.dtype)
    if a == 1.0:
        return torch.zeros_like(p)
    return torch.where(p > 0, (1 - a) * u * (u / torch.where(p > 0, p, 1.0)), 0.0)


def norm_gap(total: Tensor, a: float) -> tuple[Tensor, Tensor]:
    """Return g = (T^a - 1) / a and T^(a - 1), the norm of the weights, of their sums T."""
    if a == 0.5:
        root = total.sqrt()
        return 2 * (total - 1) / (root + 1), 1 / root
    if a == 1.0:
        return total - 1, torch.ones_like(total)
    log_total = total.log()
    y = a * log_total
    power = y.exp()
    series = log_total * (1 + y * (0.5 + y * (1 / 6 + y * (1 / 24))))
    return torch.where(y.abs() < 0.1, series, (power - 1) / a), power / total


def last_step(a: float) -> float:
    """Return how large a step may be that needs no other after it; see the kernels' ``refine.py``."""
    if a == 0.5:
        return 1e-5
    if a == 1.0:
        return 1e-6
    return max(min(math.exp(-24.4 * a) / a, 1e-3), 1e-6)


def vector_jacobian(u: Tensor, upstream: Tensor) -> Tensor:
    """Return dS = U (dP - delta), delta = sum(U dP) / sum(U) by row, of u and the gradient to p, both (R, n)."""
    return u * (upstream - (u * upstream).sum(-1, keepdim=True) / u.sum(-1, keepdim=True))
