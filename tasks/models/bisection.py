"""Entmax by bisection in plain PyTorch, as it was done before there were kernels: the papers' slow baseline."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class Bisection(torch.autograd.Function):
    """Entmax of the last dimension by halving the threshold's interval (Blondel et al. 2019); weights are then made
    to sum to one.

    ``apply(scores, alpha, iterations)``: scores (..., n) float32 or float64, ``-inf`` where masked, with a finite one
    in every row; alpha above 1, at most 2.
    """

    @staticmethod
    def forward(ctx: Any, scores: Tensor, alpha: float, iterations: int) -> Tensor:
        z = scores * (alpha - 1)
        power = 1 / (alpha - 1)
        low = z.amax(-1, keepdim=True) - 1
        width = 1 - z.shape[-1] ** (1 - alpha)  # the threshold lies in [max z - 1, max z - n^(1 - alpha)]
        for _ in range(iterations):
            width /= 2
            total = (z - (low + width)).clamp_min(0).pow(power).sum(-1, keepdim=True)
            low = torch.where(total >= 1, low + width, low)
        p = (z - low).clamp_min(0).pow(power)
        p = p / p.sum(-1, keepdim=True)
        ctx.alpha = alpha
        ctx.save_for_backward(p)
        return p

    @staticmethod
    def backward(ctx: Any, dp: Tensor) -> tuple[Tensor, None, None]:
        (p,) = ctx.saved_tensors
        u = torch.where(p > 0, p.pow(2 - ctx.alpha), 0.0)
        delta = (u * dp).sum(-1, keepdim=True) / u.sum(-1, keepdim=True)
        return u * (dp - delta), None, None
