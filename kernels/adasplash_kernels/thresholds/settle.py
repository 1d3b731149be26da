"""Settling a threshold with the output: Newton's last step is taken by the pass that computes O, which has what it
needs, instead of by a pass over the keys that only confirms.

The pass at theta has T = sum p and sum u, so the next step e, and O = P V and U V. For alpha = 1.5 a weight at
theta + e is p - e u + e^2 / 4, or zero if it leaves the support: O - e U V is O at theta + e with an error in each
weight between 0 and e^2 / 4. What this and the steps before leave goes by two numbers: nu = e (sum u) / (2 T), by which
the norm of the weights is not one, and rho = e / s, where s is the step before. Newton's steps from below shrink as
e = c s^2, and c = (n / sum u - sum u / T) / 4 for n weights in the support, about the same from step to step, so that

- the n weights of O are off by n e^2 / 4 = T (2 rho^2 + nu) nu together, and sum to 1 - nu^2;
- theta is off by the step after, c e^2 = rho^2 e;
- O2, which is not corrected, is off by e / 2 (n / sum u) (mean of v - O2), for unrelated values by
  sqrt(2 rho^2 (2 rho^2 + nu)) of itself.

All of it is of second order, so what is allowed of e and of rho goes by the root of the dtype's eps. With root / 2 for
rho, 2 rho^2 is eps / 2, no more than storing O2 may cost; with root / 300 for e, n e^2 / 4 is below 0.3 eps for 10^5
keys. The limit on rho is what finds weights tied at the edge of the support: as long as they are above it, steps
shrink by half and theta is as far away as the last of them, however small that is.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from ..mapping import norm_gap
from .refine import last_step

_CURVATURE = tl.constexpr(1.0)  # the least that c is taken for: about the most for Gaussian scores; the output checks


class Settle(NamedTuple):
    """How the output's pass settles thresholds.

    Attributes:
        step: (B, H, N_q) float32, the last step that was taken; the solve writes it, the output's pass reads it.
        PASSES: of the output, at the most.
        ROOT: of the dtype's eps.
    """

    step: Any
    PASSES: tl.constexpr
    ROOT: tl.constexpr


@triton.jit
def newton_step(total, slope, a, ALPHA: tl.constexpr):
    """Return Newton's step on the norm of the weights, from sum p and sum u; it rises to theta and never passes it.

    Not clamped at zero: the last step may take back what rounding added to an earlier one.
    """
    gap, factor = norm_gap(tl.maximum(total, 1e-30), a, ALPHA)
    return gap / (factor * tl.maximum(slope, 1e-30))


@triton.jit
def resolved_step(theta, a, ALPHA: tl.constexpr):
    """Return how large a step may be after which what is left is below float32's resolution."""
    return tl.maximum(last_step(a, ALPHA), 1.2e-7 * tl.abs(theta))


@triton.jit
def settled_step(theta, before, a, ALPHA: tl.constexpr, ROOT: tl.constexpr):
    """Return how large a step may be that the output's pass takes, after one of ``before``."""
    settled = tl.minimum(tl.abs(before) * (ROOT / 2.0), ROOT / 300.0)
    return tl.maximum(resolved_step(theta, a, ALPHA), settled)


@triton.jit
def next_step(step, before):
    """Return how large the step after these two will be about; ``before`` is infinite if ``step`` was the first."""
    length = tl.abs(step)
    ratio = length / tl.maximum(tl.abs(before), 1e-30)
    return length * tl.maximum(length * _CURVATURE, ratio * ratio)
