"""What rounding costs, to first order, whatever the implementation: the part of the error budget that plain PyTorch
does not show.

Two things make the error of a correct kernel many times that of plain PyTorch on the same inputs. A weight at the edge
of the support is there or not by one rounding of its score, and for alpha near 2 takes a finite part of the gradient
with it; which of the two implementations trips is chance. And the paper's backward pass rounds where dense PyTorch does
not: O2 is stored, P, U and dS are multiplied, at the inputs' precision (AdaSplash, alg. 3 to 5), which shows where the
exact gradients cancel or vanish. So the closed forms of the paper are evaluated in float64 with the scores moved by
their rounding, and the other roundings are carried through them as independent errors.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

FLOAT32 = 2**-23  # here and below roundings count as one unit in the last place, twice what one may be off


class Solved(NamedTuple):
    """What the oracle found: (B, H, N_q, N_k) scores, ``-inf`` where masked, and weights; alpha, broadcastable."""

    scores: Tensor
    weights: Tensor
    alpha: Tensor


@dataclass
class ClosedForm:
    """Output and gradients of attention by the paper's formulas, for weights that need not sum to one.

    Args:
        p, u: (B, H, N_q, N_k) weights and p^(2 - alpha), zero outside the support.
        a: alpha - 1, broadcastable, positive.
        q, upstream: (B, H, N_q, D); upstream None for the output alone.
        k, v: (B, H, N_k, D), repeated for grouped queries.
    """

    p: Tensor
    u: Tensor
    a: Tensor
    q: Tensor
    k: Tensor
    v: Tensor
    upstream: Tensor | None
    scale: float
    kv_heads: int

    def __post_init__(self) -> None:
        if self.upstream is None:
            return
        self.out2 = self.u @ self.v / self.u.sum(-1, keepdim=True).clamp_min(1e-300)
        self.delta = (self.upstream * self.out2).sum(-1, keepdim=True)
        self.centred = self.upstream @ self.v.mT - self.delta
        self.ds = self.u * self.centred
        log_p = torch.where(self.p > 0, self.p, 1.0).log()
        # p times the slope of ln p in alpha at a fixed threshold (Correia et al. 2019)
        self.slope = -self.p * (torch.expm1(-self.a * log_p) / self.a + log_p) / self.a

    def results(self) -> dict[str, Tensor]:
        """Return output and, with ``upstream``, dq, dk, dv, and dalpha by query (B, H, N_q, 1)."""
        output = {"output": self.p @ self.v}
        if self.upstream is None:
            return output
        return output | {
            "dq": self.scale * self.ds @ self.k,
            "dk": self.fold(self.scale * self.ds.mT @ self.q),
            "dv": self.fold(self.p.mT @ self.upstream),
            "dalpha": (self.centred * self.slope).sum(-1, keepdim=True),
        }

    def fold(self, x: Tensor) -> Tensor:
        """Sum (B, H, ...) over the query heads that share keys and values."""
        return x.unflatten(1, (self.kv_heads, -1)).sum(2)


def independent_errors(at: ClosedForm, moved: ClosedForm, dtype: torch.dtype) -> dict[str, float]:
    """Return the root of the expected squared error of each result, if rounding errs independently everywhere.

    P, U, dS and O2 are rounded to ``dtype``, dP is a float32 sum, and each score errs as from ``at`` to ``moved``.
    """
    unit, grain = torch.finfo(dtype).eps, torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps

    def rounded(x: Tensor, y: Tensor) -> Tensor:
        return (unit * x) ** 2 + torch.where(y != 0, grain**2, 0.0) + (y - x) ** 2

    p_error, v2 = rounded(at.p, moved.p), _squares(at.v)
    errors = {"output": p_error @ v2}
    if at.upstream is not None:
        up2, u2 = _squares(at.upstream), torch.maximum(at.u, moved.u) ** 2
        slope2 = torch.maximum(at.slope.abs(), moved.slope.abs()) ** 2
        dp_error = FLOAT32**2 * up2 * v2.mT
        delta_error = unit**2 * (at.delta.abs() + _squares(at.upstream * at.out2).sqrt()) ** 2  # one for all of a row
        ds_error = rounded(at.ds, moved.ds) + u2 * dp_error
        slope_error = slope2 * dp_error + (8 * FLOAT32 * at.centred) ** 2 * slope2
        slope_error = slope_error + (moved.centred * moved.slope - at.centred * at.slope) ** 2
        errors |= {
            "dq": at.scale**2 * (ds_error @ _squares(at.k) + delta_error * _squares(at.u @ at.k)),
            "dk": at.scale**2 * ((ds_error + u2 * delta_error).mT @ _squares(at.q)),
            "dv": p_error.mT @ up2,
            "dalpha": slope_error.sum(-1, keepdim=True) + delta_error * moved.slope.sum(-1, keepdim=True) ** 2,
        }
    return {name: float(x.sum().sqrt()) for name, x in errors.items()}


def rounding_costs(
    solved: Solved, q: Tensor, k: Tensor, v: Tensor, upstream: Tensor | None, scale: float | None, dtype: torch.dtype
) -> dict[str, float]:
    """Return what rounding costs each result, as a norm: "output" and, with ``upstream``, "dq", "dk", "dv", "dalpha".

    Args:
        q, k, v, upstream: float64 tensors of ``error_ratios``; upstream None for the output alone.
        scale: the option of ``entmax_attention``.
        dtype: the inputs' own.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    groups, kv_heads = q.shape[1] // k.shape[1], k.shape[1]
    k, v = (x.repeat_interleave(groups, dim=1) for x in (k, v))
    a = (solved.alpha - 1).clamp_min(1e-9)
    top, best = (x.amax(-1, keepdim=True) for x in (solved.scores, solved.weights))
    empty = best == 0
    theta = torch.where(empty, 0.0, top - torch.expm1(a * torch.where(empty, 1.0, best).log()) / a)

    # No score is computed better than to the rounding of what it is summed from. Where there is weight, ALiBi's term
    # is at most about as large as the product of q and k and the threshold together.
    size = scale * q.norm(dim=-1, keepdim=True) * k.norm(dim=-1, keepdim=True).mT
    shift = FLOAT32 * (size + theta.abs() + 1)

    def moved(sign: float) -> ClosedForm:
        t = a * (solved.scores - theta + sign * shift)
        inside = t > -1  # false where masked
        log_p = (torch.log1p(torch.where(inside, t, 0.0)) / a).clamp_max(0)
        p, u = (torch.where(inside, (power * log_p).exp(), 0.0) for power in (1.0, 1 - a))
        return ClosedForm(p, u, a, q, k, v, upstream, scale, kv_heads)

    exact = moved(0.0)
    costs: dict[str, float] = {}
    results = exact.results()
    for away in (moved(1.0), moved(-1.0)):
        together = {n: float((x - results[n]).norm()) for n, x in away.results().items()}
        apart = independent_errors(exact, away, dtype)
        costs = {n: max(costs.get(n, 0.0), together[n] + apart[n]) for n in results}
    return costs


def _squares(x: Tensor) -> Tensor:
    return x.square().sum(-1, keepdim=True)
