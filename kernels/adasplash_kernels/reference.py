"""The oracle: alpha-entmax and its attention in dense float64, written to be read rather than to be fast.

Parametrisation used throughout the package: with ``a = alpha - 1`` and scores ``s``, the paper's threshold is
``tau = a * theta - 1`` and the weights are ``p = [a s - tau]_+^(1/a) = [1 + a (s - theta)]_+^(1/a)``. ``theta`` is a
threshold in units of scores; it stays well conditioned as alpha -> 1, where it becomes the log-sum-exp.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from .masks import AttentionMask

_HALVINGS = 80  # float64 has 52 bits of mantissa; the bracket is at most log(n) wide


def _weights(s: Tensor, theta: Tensor, a: Tensor) -> Tensor:
    y = s - theta
    inside = (1 + a * y > 0) & torch.isfinite(s)
    y = torch.where(inside, y, 0.0)  # keeps the logarithm's gradient finite outside the support
    tiny = a < 1e-12
    exponent = torch.where(tiny, y, torch.log1p(a * y) / torch.where(tiny, 1.0, a))
    return torch.where(inside, exponent.exp(), 0.0)


def entmax_reference(scores: Tensor, alpha: float | Tensor = 1.5, dim: int = -1) -> Tensor:
    """alpha-entmax in float64 by bisection (AdaSplash, eq. 2 and 4).

    Args:
        scores: real tensor; ``-inf`` marks entries that may not be chosen.
        alpha: in [1, 2]; a number or a tensor that broadcasts against ``scores`` with ``dim`` moved last.
        dim: the dimension that sums to one.

    Returns:
        float64 weights of the shape of ``scores``; a row of ``-inf`` alone gives zeros. Differentiable in
        ``scores`` and ``alpha``: the threshold passes through one Newton step, whose derivative is the implicit
        function theorem's.
    """
    s = scores.double().movedim(dim, -1)
    a = torch.as_tensor(alpha, dtype=torch.float64, device=s.device) - 1
    with torch.no_grad():
        top = s.amax(-1, keepdim=True)
        empty = ~torch.isfinite(top)
        low = torch.where(empty, 0.0, top)
        high = low + math.log(s.shape[-1])
        for _ in range(_HALVINGS):
            middle = (low + high) / 2
            too_low = _weights(s, middle, a).sum(-1, keepdim=True) > 1
            low, high = torch.where(too_low, middle, low), torch.where(too_low, high, middle)
        p = _weights(s, low, a)
        slope = torch.where(p > 0, p ** (1 - a), 0.0).sum(-1, keepdim=True).clamp_min(1e-300)
    theta = low + (_weights(s, low, a).sum(-1, keepdim=True) - 1) / slope
    return torch.where(empty, 0.0, _weights(s, theta, a)).movedim(-1, dim)


def attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    alpha: float | Tensor = 1.5,
    scale: float | None = None,
    **mask: Any,
) -> Tensor:
    """alpha-entmax attention in dense float64, (B, H, N_q, D).

    Arguments are as for ``entmax_attention``; ``mask`` holds the fields of ``AttentionMask``.
    """
    rule, (n_q, n_k) = AttentionMask(**mask), (q.shape[2], k.shape[2])
    groups = q.shape[1] // k.shape[1]
    k = k.double().repeat_interleave(groups, dim=1)
    v = v.double().repeat_interleave(groups, dim=1)
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    scores = scale * (q.double() @ k.transpose(-1, -2))
    bias = rule.bias(n_q, n_k, device=q.device, dtype=torch.float64)
    scores = scores if bias is None else scores + bias
    scores = scores.masked_fill(~rule.allowed(n_q, n_k, device=q.device), -math.inf)
    alpha = alpha.reshape(-1, 1, 1) if isinstance(alpha, Tensor) and alpha.ndim else alpha
    return entmax_reference(scores, alpha) @ v
