"""Exact alpha-entmax in dense PyTorch: the CPU path, and the baseline that needs no kernel.

The threshold comes from sorting for alpha = 1.5 and alpha = 2 (Peters et al. 2019; Martins and Astudillo 2016),
from log-sum-exp for alpha = 1, and otherwise from Newton's method on the norm ``||[z - tau]_+||_(1/(alpha-1)) - 1``.
The norm is convex and falls in tau, so Newton started left of the root climbs to it without overshooting; unlike
the sum of powers it is nearly linear for alpha close to 1, where one step suffices.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from .masks import AttentionMask

_NEWTON_STEPS = 20  # a fixed number, ample in float64: stopping early would wait for the GPU
TWICE = "entmax attention cannot be differentiated twice"


def solve_theta(s: Tensor, alpha: float | Tensor) -> Tensor:
    """Return the threshold of every row.

    Args:
        s: (..., n) scores, float32 or float64, ``-inf`` where masked.
        alpha: in [1, 2]; a number, or a tensor that broadcasts against (..., 1).

    Returns:
        (..., 1) theta, with ``p = [1 + (alpha-1)(s - theta)]_+^(1/(alpha-1))`` summing to one. Rows without any
        finite score get ``+inf``, which makes every weight zero.
    """
    top = s.amax(-1, keepdim=True)
    empty = top == -math.inf
    top = torch.where(empty, 0.0, top)
    shifted = s - top
    if isinstance(alpha, Tensor):
        theta = _theta_newton(shifted, exponent(alpha, s.dtype))
    elif alpha == 1.0:
        theta = shifted.logsumexp(-1, keepdim=True)
    elif alpha == 1.5:
        theta = _theta_sorted_15(shifted)
    elif alpha == 2.0:
        theta = _theta_sorted_2(shifted)
    else:
        theta = _theta_newton(shifted, torch.tensor(alpha - 1, dtype=s.dtype, device=s.device))
    return torch.where(empty, math.inf, theta + top)


def exponent(alpha: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a = alpha - 1 of a tensor, held in [1e-6, 1]; at the lower end weights differ from softmax by 1e-6 y^2."""
    return (alpha.to(dtype) - 1).clamp(1e-6, 1)


def _theta_sorted_15(s: Tensor) -> Tensor:
    """Threshold for alpha 1.5: the largest support whose quadratic has its root below its smallest member."""
    z = s.sort(-1, descending=True).values / 2
    z = z.clamp_min(-2.0)  # below the support anyway; keeps -inf and large values out of the running sums
    size = torch.arange(1, z.shape[-1] + 1, dtype=z.dtype, device=z.device)
    mean = z.cumsum(-1) / size
    spread = (z * z).cumsum(-1) - size * mean * mean
    tau = mean - ((1 - spread) / size).clamp_min(0).sqrt()
    support = (tau <= z).sum(-1, keepdim=True)
    return 2 * (tau.gather(-1, (support - 1).clamp_min(0)) + 1)


def _theta_sorted_2(s: Tensor) -> Tensor:
    """Threshold for alpha 2 (sparsemax)."""
    z = s.sort(-1, descending=True).values.clamp_min(-2.0)
    size = torch.arange(1, z.shape[-1] + 1, dtype=z.dtype, device=z.device)
    tau = (z.cumsum(-1) - 1) / size
    support = (tau < z).sum(-1, keepdim=True)
    return tau.gather(-1, (support - 1).clamp_min(0)) + 1


def _theta_newton(s: Tensor, a: Tensor) -> Tensor:
    theta = torch.zeros_like(s[..., :1])
    for _ in range(_NEWTON_STEPS):
        log_p = _log_weights(s, theta, a)
        total = log_p.exp().sum(-1, keepdim=True)
        slope = ((1 - a) * log_p).exp().masked_fill(log_p == -math.inf, 0).sum(-1, keepdim=True)
        log_total = total.log()
        step = torch.expm1(a * log_total) / a * ((1 - a) * log_total).exp() / slope
        step = step.masked_fill(~torch.isfinite(step), 0)  # rows that are masked out or hold NaN
        theta = theta + step
    return theta


def _log_weights(s: Tensor, theta: Tensor, a: Tensor) -> Tensor:
    """ln p; ``-inf`` outside the support."""
    return torch.log1p((a * (s - theta)).clamp_min(-1)) / a


def weights(s: Tensor, theta: Tensor, alpha: float | Tensor) -> Tensor:
    """Return p (..., n) for scores and thresholds (equation 2 of AdaSplash)."""
    y = s - theta
    if isinstance(alpha, Tensor):
        return _log_weights(s, theta, exponent(alpha, s.dtype)).exp()
    if alpha == 1.0:
        return y.exp()
    if alpha == 1.5:
        return (1 + 0.5 * y).clamp_min(0).square()
    if alpha == 2.0:
        return (1 + y).clamp_min(0)
    return _log_weights(s, theta, torch.tensor(alpha - 1, dtype=s.dtype, device=s.device)).exp()


class DenseEntmax(torch.autograd.Function):
    """p = entmax(s) along the last dimension, with the closed-form gradients to ``s`` and ``alpha``."""

    @staticmethod
    def forward(ctx: Any, s: Tensor, alpha: float | Tensor) -> Tensor:
        p = weights(s, solve_theta(s, alpha), alpha)
        ctx.alpha = None if isinstance(alpha, Tensor) else alpha
        ctx.save_for_backward(p, alpha if isinstance(alpha, Tensor) else None)
        return p

    @staticmethod
    def backward(ctx: Any, dp: Tensor) -> tuple[Tensor | None, Tensor | None]:
        p, alpha = ctx.saved_tensors
        return _DenseGradient.apply(dp, p, ctx.alpha if alpha is None else alpha, ctx.needs_input_grad[1])


class _DenseGradient(torch.autograd.Function):
    """Closed-form gradients as a node of its own, so that a second derivative raises instead of being left out."""

    @staticmethod
    def forward(ctx: Any, dp: Tensor, p: Tensor, alpha: float | Tensor, to_alpha: bool) -> tuple[Tensor, Tensor | None]:
        a = exponent(alpha, p.dtype) if isinstance(alpha, Tensor) else alpha - 1
        u = torch.where(p > 0, p ** (1 - a), 0.0)  # p^(2-alpha) on the support
        total = u.sum(-1, keepdim=True).clamp_min(torch.finfo(p.dtype).tiny)
        delta = (u * dp).sum(-1, keepdim=True) / total
        ds = u * (dp - delta)
        if not to_alpha:
            return ds, None
        # dp/dalpha = p c - u (sum p c) / (sum u), with c = d ln p / d alpha at a fixed threshold; summed against
        # dp this is sum (dp - delta) p c. Same as Correia et al. 2019, arranged so that alpha -> 1 stays finite.
        assert isinstance(alpha, Tensor)
        slope = (dp - delta) * p * _log_weight_slope(p, a)
        aligned = (1,) * (p.ndim - alpha.ndim) + tuple(alpha.shape)
        return ds, slope.sum_to_size(aligned).reshape(alpha.shape).to(alpha.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[None, ...]:
        raise RuntimeError(TWICE)


def _log_weight_slope(p: Tensor, a: Tensor) -> Tensor:
    """d ln p / d alpha at a fixed threshold: ``(-expm1(-a ln p)/a - ln p) / a``, ``-(ln p)^2/2`` as a -> 0."""
    log_p = torch.where(p > 0, p, 1.0).log()
    x = a * log_p
    series = -0.5 + x / 6 - x * x / 24 + x * x * x / 120
    safe = torch.where(x.abs() < 1e-2, 1.0, x)
    return log_p.square() * torch.where(x.abs() < 1e-2, series, (-torch.expm1(-safe) - safe) / safe.square())


def masked_scores(q: Tensor, k: Tensor, *, scale: float, mask: AttentionMask, rows: slice | None = None) -> Tensor:
    """Return the scores of queries and keys: scaled, lowered by ALiBi, ``-inf`` where the mask hides the key.

    Args:
        q: (B, H, N_q, D).
        k: (B, H_kv, N_k, D), H a multiple of H_kv.
        rows: the queries wanted, all by default.

    Returns:
        (B, H, rows, N_k) float32, or float64 for float64 inputs.
    """
    n_q, n_k = q.shape[2], k.shape[2]
    compute = torch.float64 if q.dtype == torch.float64 else torch.float32
    k = k.to(compute).repeat_interleave(q.shape[1] // k.shape[1], dim=1)
    scores = scale * (q[:, :, slice(None) if rows is None else rows].to(compute) @ k.transpose(-1, -2))
    if (bias := mask.bias(n_q, n_k, rows=rows, device=q.device, dtype=compute)) is not None:
        scores = scores + bias
    if mask.hides_keys:
        scores = scores.masked_fill(~mask.allowed(n_q, n_k, rows=rows, device=q.device), -math.inf)
    return scores


def attention_eager(
    q: Tensor, k: Tensor, v: Tensor, *, alpha: float | Tensor, scale: float, mask: AttentionMask
) -> Tensor:
    """Dense attention: scores in float32 (float64 for float64 inputs), exact weights, weights times values.

    Takes checked arguments as ``entmax_attention`` does and returns (B, H, N_q, D) in q's dtype. The scores of all
    pairs are stored, those the mask hides too: memory grows with N_q * N_k, for packed sequences with the square of
    their total length.
    """
    scores = masked_scores(q, k, scale=scale, mask=mask)
    if isinstance(alpha, Tensor):
        alpha = alpha.reshape(-1, 1, 1)
    p = DenseEntmax.apply(scores, alpha)
    return (p.to(v.dtype) @ v.repeat_interleave(q.shape[1] // v.shape[1], dim=1)).to(q.dtype)
