"""Settings of ``program: count_reads``."""

from __future__ import annotations

from dataclasses import dataclass, field

from tasks.kernel_bench.reads.tally import PASSES
from tasks.kernel_bench.settings import Inputs, Solver
from tasks.kernel_bench.systems import SYSTEMS

COUNTED = ("bisection_torch", "fa2", "adasplash_nomask", "adasplash", "adasplash2", "columns")


@dataclass(frozen=True)
class ReadsSettings:
    """Systems, and passes of them (forward, backward), whose reads are counted at every length of the inputs.

    ``solver`` limits the iterations of a system's search for the threshold.
    """

    measure: tuple[str, ...]
    passes: tuple[str, ...]
    inputs: Inputs
    solver: dict[str, Solver] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, values, allowed in (("measure", self.measure, COUNTED), ("passes", self.passes, PASSES)):
            for i, value in enumerate(values):
                if value not in allowed:
                    raise ValueError(f"{name}[{i}]: got {value!r}, allowed are {', '.join(allowed)}")
            if not values or len(set(values)) != len(values):
                raise ValueError(f"{name}: got {list(values)}, allowed is one or more, each once")
        iterating = [name for name in COUNTED if SYSTEMS[name].takes_iterations]
        for name in self.solver:
            if name not in iterating:
                raise ValueError(f"solver.{name}: unknown, allowed are {', '.join(iterating)}")
