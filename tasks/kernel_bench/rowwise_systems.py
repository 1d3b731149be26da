"""Every system that computes entmax of rows of scores, by the name that configs and records use."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from adasplash_kernels import entmax
from adasplash_kernels.dispatch import kernels_interpreted
from tasks.kernel_bench.dense import entmax_by_bisection
from tasks.kernel_bench.own import limited
from tasks.kernel_bench.problem import NotMeasured

Entmax = Callable[[Tensor], Tensor]
Build = Callable[[float, int | None, torch.device], Entmax]  # alpha, iterations (None: its own choice), device


def kernels(method: str, alpha: float, iterations: int | None, device: torch.device) -> Entmax:
    """The package's ``entmax`` with a method; to full precision unless ``iterations`` sets a limit."""
    if device.type == "cpu" and not kernels_interpreted():
        raise NotMeasured("needs a CUDA device, or TRITON_INTERPRET=1 for Triton's interpreter")
    return partial(entmax, method=method if iterations is None else limited(method, iterations), alpha=alpha)


def bisection(alpha: float, iterations: int | None, device: torch.device) -> Entmax:
    """Halving in plain PyTorch, in float32; 50 times unless told."""
    options = {} if iterations is None else {"iterations": iterations}
    return lambda scores: entmax_by_bisection(scores.float(), alpha, **options).to(scores.dtype)


def sorting(alpha: float, iterations: int | None, device: torch.device) -> Entmax:
    """Exact thresholds from sorted scores, in float32: the package's eager method."""
    if alpha not in (1.5, 2.0):
        raise NotMeasured("sorting solves alpha 1.5 and 2 only")
    return partial(entmax, method="eager", alpha=alpha)


SYSTEMS: dict[str, Build] = {
    "adasplash": partial(kernels, "adasplash"),
    "adasplash2": partial(kernels, "adasplash2"),
    "bisection_torch": bisection,
    "sort_torch": sorting,
}
ITERATING = ("adasplash", "adasplash2", "bisection_torch")  # whose ``solver`` may set how many iterations they get
