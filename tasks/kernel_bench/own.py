"""The kernels of this repository."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

from adasplash_kernels import entmax_attention
from adasplash_kernels.dispatch import kernels_interpreted
from tasks.kernel_bench.problem import Attention, NotMeasured, Problem


def kernels(method: str, problem: Problem) -> Attention:
    """``entmax_attention`` with a method; to full precision, unless ``problem.iterations`` sets a limit.

    On a CPU the kernels run in Triton's interpreter.
    """
    if problem.device.type == "cpu" and not kernels_interpreted():
        raise NotMeasured("needs a CUDA device, or TRITON_INTERPRET=1 for Triton's interpreter")
    if problem.iterations is not None:
        method = limited(method, problem.iterations)
    return partial(entmax_attention, method=method, alpha=problem.alpha, causal=problem.causal)


def limited(method: str, iterations: int) -> str:
    """Add a method that is another with a limit on its iterations, and return the name it goes by."""
    import adasplash_kernels.launch  # noqa: F401 - fills the table
    from adasplash_kernels.thresholds import THRESHOLDS

    name = f"{method}_{iterations}_iterations"
    entry = THRESHOLDS[method]
    entry = replace(entry, solve=partial(entry.solve, max_iterations=iterations), approach=None)
    THRESHOLDS.setdefault(name, entry)
    return name
