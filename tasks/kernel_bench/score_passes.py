"""How far a forward pass is from the least that any exact one does: to compute every score once.

Entmax needs every score, if only to see that its weight is zero. At the rate that this GPU multiplies large matrices, a
pass over the scores that the mask leaves takes 2 d operations a pair of query and key; FlashAttention's forward pass,
with its second product, is two of them at the least.
"""

from __future__ import annotations

from functools import lru_cache

import torch

from tasks.kernel_bench.problem import Problem
from tasks.matmul_rate import matmul_rate


@lru_cache
def rate(device: torch.device) -> float:
    """Return the device's operations a second, measured once in a process."""
    return matmul_rate(device)


def obstacle(problem: Problem) -> str | None:
    """Say why the rate is no measure here, or None."""
    if problem.device.type != "cuda":
        return "the rate of matrix products is measured on a GPU only"
    return None if problem.dtype.itemsize == 2 else "the rate is that of 16-bit matrix products"


def one_pass_ms(problem: Problem, flops: float) -> float:
    """Return how long it takes to compute all visible scores once, in milliseconds, at so many operations a second."""
    pairs = problem.n * (problem.n + 1) // 2 if problem.causal else problem.n**2
    return 1e3 * problem.b * problem.h * pairs * 2 * problem.d / flops
