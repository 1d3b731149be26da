"""Every system that can be measured, by the name that configs and records use."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from tasks.kernel_bench import dense, own, published, softmax
from tasks.kernel_bench.problem import Attention, Problem

SOFTMAX, ENTMAX = "softmax", "entmax"


@dataclass(frozen=True)
class System:
    """One implementation of attention.

    Attributes:
        computes: ``softmax`` or ``entmax``: which function its output is checked against.
        build: problem to a function of q, k and v; raises NotMeasured, NotImplementedError or ImportError where the
            system cannot take the problem. What it prepares (compiling, masks) belongs to the first call.
        takes_iterations: whether ``solver`` may set how many iterations its threshold gets.
        prepared: says why the first call for a problem is not what a user's would be; None where it is.
    """

    computes: str
    build: Callable[[Problem], Attention]
    takes_iterations: bool = False
    prepared: Callable[[Problem], str | None] = lambda problem: None

    def alpha(self, problem_alpha: float) -> float:
        """Return the alpha of what it computes; softmax is 1."""
        return 1.0 if self.computes == SOFTMAX else problem_alpha


SYSTEMS: dict[str, System] = {
    "fa2": System(SOFTMAX, softmax.flash),
    "cudnn": System(SOFTMAX, softmax.cudnn),
    "fa2_triton": System(SOFTMAX, softmax.flex),
    "adasplash_pypi_v1": System(ENTMAX, published.first, takes_iterations=True),
    "adasplash_pypi_v2": System(ENTMAX, published.second, takes_iterations=True, prepared=published.tuned_before),
    "adasplash": System(ENTMAX, partial(own.kernels, "adasplash"), takes_iterations=True),
    "adasplash_nomask": System(ENTMAX, partial(own.kernels, "adasplash_nomask"), takes_iterations=True),
    "adasplash2": System(ENTMAX, partial(own.kernels, "adasplash2"), takes_iterations=True),
    "columns": System(ENTMAX, partial(own.kernels, "columns")),
    "columns_nolist": System(ENTMAX, partial(own.kernels, "columns_nolist")),
    "bisection_torch": System(ENTMAX, dense.bisection, takes_iterations=True),
    "sort_torch": System(ENTMAX, dense.sorting),
}
