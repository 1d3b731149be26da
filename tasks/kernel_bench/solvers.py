"""Every solver of the threshold in plain PyTorch on stored scores, one estimate at a time.

The kernels give the threshold they end with and not the way there, and lists of columns exist for attention alone.
These are translations of ``adasplash_kernels.thresholds``, line by line; tests hold the two side by side after every
number of updates. An update is one pass over a row's scores that moves its estimate. The passes before the first
estimate (for the largest score, the histogram, the group maxima) are none.

A kernel stops once every row of its block has settled; a row that has settled goes on being updated until then. The
sequences here go on for ever.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from tasks.kernel_bench.solver_math import curvature, last_step, norm_gap, weights

KERNEL_BINS = 8  # of the histogram, as thresholds/histogram.py has them
GROUPS = 32  # of the columns' maxima, as tile_sizes.choose_column_tiles has them on a GPU
_RANGE = 14.0  # the histogram's, in scores
_RISE_HISTOGRAM, _RISE_MAXIMA = 8, 4  # Newton steps on the bins, and on the group maxima
_TINY = 1e-30

Solver = Callable[[Tensor, float, int], Iterator[Tensor]]


def bisection(scores: Tensor, alpha: float, bins: int = KERNEL_BINS) -> Iterator[Tensor]:
    """Halve the bracket of tau, [max z - 1, max z - n^(1 - alpha)] with z = a s (AdaSplash, section 3.1).

    As ``dense.bisection`` does it: the estimate is the bracket's lower end.
    """
    a = alpha - 1
    z = scores * a
    low = z.amax(-1) - 1
    width = 1 - scores.shape[-1] ** -a
    while True:
        yield (low.double() + 1) / a
        width /= 2
        total = (z - (low + width)[:, None]).clamp_min(0).pow(1 / a).sum(-1)
        low = torch.where(total >= 1, low + width, low)


def halley(scores: Tensor, alpha: float, bins: int = KERNEL_BINS) -> Iterator[Tensor]:
    """Halley-bisection (AdaSplash, algorithm 1): from the middle of the bracket."""
    a = alpha - 1
    low, high = _bracket(scores, a)
    return _refine(scores, a, low, high, 0.5 * (low + high), norm=False)


def histogram(scores: Tensor, alpha: float, bins: int = KERNEL_BINS) -> Iterator[Tensor]:
    """Histogram start, then safeguarded updates on the norm (AdaSplash-2).

    Args:
        bins: 2 or more that reach down from the largest score as far as the support can; the kernel has
            :data:`KERNEL_BINS`.
    """
    a = alpha - 1
    low, high = _bracket(scores, a)
    top = scores.amax(-1)
    width = min(1 / a, _RANGE) / (bins - 1)
    in_bins = 1 / width
    # half bins below the largest score, to the nearest (ties to even): what the kernel's addition of 1.5 2^22 leaves
    halves = (2 * ((top / width)[:, None] - scores * in_bins)).round()
    bin_of = (halves / 2).floor().clamp(0, bins).long()  # ``bins``: below them all
    counts = scores.new_zeros(len(scores), bins + 1).scatter_add_(1, bin_of, torch.ones_like(scores))[:, :bins]
    edges = top[:, None] - torch.arange(1, bins + 1, dtype=scores.dtype, device=scores.device) * width
    start = _rise(edges, counts, top - width, a, _RISE_HISTOGRAM)
    low = torch.maximum(low, start - 1e-6 * (1 + start.abs()))
    theta = torch.maximum(torch.minimum(start + 0.75 * width, high), low)
    return _refine(scores, a, low, high, theta, norm=True)


def columns(scores: Tensor, alpha: float, bins: int = KERNEL_BINS, groups: int = GROUPS) -> Iterator[Tensor]:
    """A lower bound from the maxima of every ``groups``-th score, then Newton's steps on the norm from below."""
    a = alpha - 1
    padding = -scores.shape[-1] % groups
    maxima = torch.nn.functional.pad(scores, (0, padding), value=-torch.inf).unflatten(1, (-1, groups)).amax(1)
    theta = _rise(maxima, torch.ones_like(maxima), maxima.amax(-1), a, _RISE_MAXIMA)
    return _newton(scores, a, theta - 1e-6 * (1 + theta.abs()))


SOLVERS: dict[str, Solver] = {
    "bisection_torch": bisection, "adasplash": halley, "adasplash2": histogram, "columns": columns,
}  # fmt: skip


def _newton(scores: Tensor, a: float, theta: Tensor) -> Iterator[Tensor]:
    while True:
        yield theta
        p, u = weights(scores, theta, a)
        gap, factor = norm_gap(p.sum(-1).clamp_min(_TINY), a)
        theta = theta + gap / (factor * u.sum(-1).clamp_min(_TINY))


def _rise(scores: Tensor, counts: Tensor, theta: Tensor, a: float, steps: int) -> Tensor:
    """Climb from a lower bound (R,) of the threshold of scores (R, m) that count ``counts`` times (lower_bound.py)."""
    for _ in range(steps):
        p, u = weights(scores, theta, a)
        gap, factor = norm_gap((counts * p).sum(-1).clamp_min(1), a)
        theta = theta + gap / (factor * (counts * u).sum(-1).clamp_min(_TINY))
    return theta


def _bracket(scores: Tensor, a: float) -> tuple[Tensor, Tensor]:
    """Return the a-priori bracket [max s, max s + (1 - n^(-a)) / a] with room for rounding; n counts scores seen."""
    top = scores.amax(-1)
    log_n = (scores > -torch.inf).sum(-1).to(scores.dtype).log()
    reduction = a * log_n
    y = -reduction
    series = log_n * (1 + y * (1 / 2 + y * (1 / 6 + y * (1 / 24 + y * (1 / 120 + y * (1 / 720))))))
    width = torch.where(reduction < 0.25, series, (1 - y.exp()) / a)
    slack = top.abs() * 2e-7
    return top - slack, top + width * 1.000001 + 1e-6 + slack


def _refine(scores: Tensor, a: float, low: Tensor, high: Tensor, theta: Tensor, norm: bool) -> Iterator[Tensor]:
    """Yield a start inside a bracket and what Halley's steps make of it; the midpoint where they leave the bracket."""
    tolerance = torch.maximum(1.2e-7 * low.abs(), torch.full_like(low, last_step(a)))
    while True:
        yield theta
        p, u = weights(scores, theta, a)
        sums = p.sum(-1), u.sum(-1), curvature(p, u, a).sum(-1)
        theta, low, high = _step(theta, low, high, *sums, a, tolerance, norm)


def _step(
    theta: Tensor, low: Tensor, high: Tensor, total: Tensor, slope: Tensor, curve: Tensor, a: float, tolerance: Tensor,
    norm: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """One update: the new iterate and the narrowed bracket, as ``_step`` of refine.py; all (R,)."""
    f = total - 1
    low = torch.where(f >= 0, theta, low)
    high = torch.where(f <= 0, theta, high)
    slope = slope.clamp_min(_TINY)
    if norm:
        total = total.clamp_min(_TINY)
        g, factor = norm_gap(total, a)
        newton = g / (factor * slope)
        bend = curve - (1 - a) * slope * (slope / total)
        halley_step = 2 * g * slope / (2 * factor * slope * slope - g * bend).clamp_min(_TINY)
    else:
        newton = f / slope
        halley_step = 2 * f * slope / (2 * slope * slope - f * curve).clamp_min(_TINY)
    candidate = theta + halley_step
    use_middle = (halley_step.abs() < 0.5 * newton.abs()) | (candidate <= low) | (candidate >= high)
    width = high - low
    error = torch.minimum(newton.abs(), width)
    bent = (error * curve / slope > 0.03) & (error > 1e-6)
    settled = ~(torch.where(bent, width, error) > tolerance)
    nearest = torch.minimum(torch.maximum(candidate, low), high)
    return torch.where(settled, nearest, torch.where(use_middle, 0.5 * (low + high), candidate)), low, high
