"""Settling a threshold with the output: Newton's last step is taken by the pass that computes O, which has what it
needs, instead of by a pass over the keys that only confirms.

The pass at theta has T = sum p and sum u, so the next step e, and O = P V and U V. For alpha = 1.5 a weight at
theta + e is p - e u + e^2 / 4, or zero if it leaves the support: O - e U V is O at theta + e with an error in each
weight between 0 and e^2 / 4. With n weights in the support,

- those of O are off by n e^2 / 4 together, and sum to 1 - (e (sum u) / (2 T))^2, which is less;
- theta is off by the step after, c e^2, with c = (n / sum u - sum u / T) / 4;
- O2, which is not corrected, is off by e / 2 (n / sum u) (mean of v - O2), for unrelated values by
  e / 2 (n / sum u) sqrt(1 - (sum u)^2 / (n T)) of itself.

Of the dtype's eps the first may be 0.3 and the last a half, no more than storing O and O2 may cost, and that limits e.
Every weight counts that may be in the support: keys tied at its edge make n large, and allow next to nothing. The solve
has counted n at a theta below, so it is never too small.

Since the solve counts, it also knows c, and goes on by e + c e^2 at once. That is Halley's step to second order, and
leaves about (c e)^2 e. For scores of Gaussian inputs and of trained models one pass is enough from the group maxima's
bound; if not, the output sees it and takes another pass.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from ..mapping import norm_gap
from .refine import last_step


class Settle(NamedTuple):
    """How the output's pass settles thresholds.

    Attributes:
        count: (B, H, N_q) float32, how many weights may be in the support; the solve writes it, the output's pass
            reads it.
        PASSES: of the output, at the most.
        EPS: the dtype's eps.
    """

    count: Any
    PASSES: tl.constexpr
    EPS: tl.constexpr


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
def settled_step(theta, total, slope, count, a, ALPHA: tl.constexpr, EPS: tl.constexpr):
    """Return how large a step may be that the output's pass takes, from sum p, sum u and the number of weights."""
    share = 1.0 / tl.maximum(count, 1.0)
    unlike = 1.0 - slope * slope * share / tl.maximum(total, 1e-30)
    settled = tl.minimum(tl.sqrt(share * (1.2 * EPS)), share * slope * EPS / tl.sqrt(tl.maximum(unlike, 0.04)))
    return tl.maximum(resolved_step(theta, a, ALPHA), settled)


@triton.jit
def longer_step(step, total, slope, count):
    """Return Newton's step and the one after it together, and how large the next will be at the most, about."""
    bend = 0.25 * (count / tl.maximum(slope, 1e-30) - slope / tl.maximum(total, 1e-30))
    turn = tl.minimum(tl.maximum(bend, 0.0) * tl.abs(step), 1.0)
    return step + turn * tl.abs(step), 4.0 * turn * turn * tl.abs(step)  # in simulations 3 to 7 times the square
