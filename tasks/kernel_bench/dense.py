"""Entmax attention in plain PyTorch, which stores all scores: by bisection and by sorting."""

from __future__ import annotations

from functools import partial

from torch import Tensor

from adasplash_kernels import entmax_attention
from adasplash_kernels.eager import masked_scores
from adasplash_kernels.masks import AttentionMask
from tasks.kernel_bench.problem import Attention, NotMeasured, Problem
from tasks.models.bisection import Bisection

_ITERATIONS = 50  # the usual choice for float32


def sorting(problem: Problem) -> Attention:
    """Exact thresholds from sorted scores (Peters et al. 2019): the package's eager method."""
    if problem.alpha not in (1.5, 2.0):
        raise NotMeasured("sorting solves alpha 1.5 and 2 only")
    return partial(entmax_attention, method="eager", alpha=problem.alpha, causal=problem.causal)


def bisection(problem: Problem) -> Attention:
    """Thresholds by halving the interval ``iterations`` times, weights then made to sum to one (Blondel et al. 2019).

    Scores and weights are float32, products with V in the inputs' dtype, as in the eager method.
    """
    mask, iterations = AttentionMask(causal=problem.causal), problem.iterations or _ITERATIONS

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        p = entmax_by_bisection(masked_scores(q, k, scale=problem.scale, mask=mask), problem.alpha, iterations)
        return p.to(v.dtype) @ v.repeat_interleave(q.shape[1] // v.shape[1], dim=1)

    return attention


def entmax_by_bisection(scores: Tensor, alpha: float, iterations: int = _ITERATIONS) -> Tensor:
    """Return entmax of the last dimension of scores, by as many halvings; differentiable."""
    return Bisection.apply(scores, alpha, iterations)
