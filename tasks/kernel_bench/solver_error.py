"""How far entmax and its gradient are from the exact ones after each number of iterations."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from tasks.checks import at_least, distinct
from tasks.kernel_bench.rows import Rows, device_here, draw, exact_theta
from tasks.kernel_bench.rowwise_systems import bisection, kernels
from tasks.kernel_bench.solver_math import vector_jacobian, weights
from tasks.kernel_bench.solvers import KERNEL_BINS, SOLVERS
from tasks.kernel_bench.trial import failed_trial
from tasks.programs import Context, Job
from tasks.records import Measurement

TARGETS = ("output", "gradient")
REFERENCE = ("sort_torch", "float64")
_MOST_CPU_SCORES = 2**22  # the paper's scale: minutes
KERNEL, TRANSLATION = "kernel", "translation"  # what was observed: the system itself, or the solvers in PyTorch


@dataclass(frozen=True)
class Counts:
    """Every number of iterations from ``first`` to ``last``."""

    first: int
    last: int

    def __post_init__(self) -> None:
        at_least(1, first=self.first)
        if self.last <= self.first:
            raise ValueError(f"last: got {self.last}, allowed is more than first ({self.first})")


@dataclass(frozen=True)
class Sweep:
    """What is varied."""

    iterations: Counts


@dataclass(frozen=True)
class Reference:
    """What is taken as exact."""

    system: str
    dtype: str

    def __post_init__(self) -> None:
        for name, given, allowed in zip(("system", "dtype"), (self.system, self.dtype), REFERENCE, strict=True):
            if given != allowed:
                raise ValueError(f"{name}: got {given!r}, allowed is {allowed}")


@dataclass(frozen=True)
class ErrorSettings:
    """What ``program: solver_error`` takes."""

    measure: tuple[str, ...]
    targets: tuple[str, ...]
    inputs: Rows
    sweep: Sweep
    reference: Reference
    seeds: tuple[int, ...]

    def __post_init__(self) -> None:
        for name, given, allowed in (("measure", self.measure, SOLVERS), ("targets", self.targets, TARGETS)):
            distinct(name, given)
            for i, value in enumerate(given):
                if value not in allowed:
                    raise ValueError(f"{name}[{i}]: got {value!r}, allowed are {', '.join(allowed)}")
        if self.inputs.alpha not in (1.5, 2.0):
            raise ValueError(f"inputs.alpha: got {self.inputs.alpha}, allowed are 1.5 and 2, which sorting solves")
        if self.inputs.dtype != "float32":
            raise ValueError(f"inputs.dtype: got {self.inputs.dtype!r}, allowed is float32")
        distinct("seeds", self.seeds)
        for i, seed in enumerate(self.seeds):
            at_least(0, **{f"seeds[{i}]": seed})


def jobs(settings: ErrorSettings) -> list[Job]:
    """Return a job for each system and seed."""
    return [Job(name, seed) for seed in settings.seeds for name in settings.measure]


def obstacle(settings: ErrorSettings, data_root: Any) -> str | None:
    """Tell why a CPU would take too long."""
    scores = settings.inputs.rows * settings.inputs.n
    if not torch.cuda.is_available() and scores > _MOST_CPU_SCORES:
        return f"needs a GPU: {scores:.0e} scores"
    return None


def solver_error(job: Job, settings: ErrorSettings, context: Context) -> list[Measurement]:
    """Mean absolute error of the output and of a vector-Jacobian product by iteration (AdaSplash, figure 2)."""
    counts = range(settings.sweep.iterations.first, settings.sweep.iterations.last + 1)
    params = settings.inputs.params | {"observed": observed(job.system, device_here())}
    try:
        errors = _errors(job, settings, counts)
    except torch.OutOfMemoryError as error:
        why = failed_trial(error)
        bad = {"status": why.status}
        return [Measurement(metric, None, "", params | {"target": target, "reason": why.reason}, **bad)
                for target in settings.targets for metric in ("mean_abs_error", "iterations_to_precision")]  # fmt: skip
    found, reached = [], {}
    for target in settings.targets:
        here = params | {"target": target}
        found += [Measurement("mean_abs_error", error, "", here | {"iterations": count})
                  for count, error in zip(counts, errors[target], strict=True)]  # fmt: skip
        reached[target] = counts[within_half(errors[target])]
        found.append(Measurement("iterations_to_precision", float(reached[target]), "", here))
        context.say(f"{job}: {target}: {min(errors[target]):.2g} at best, {reached[target]} iterations to precision")
    # for all targets: what stands beside the paper's number, which names none
    return [*found, Measurement("iterations_to_precision", float(max(reached.values())), "", params)]


def observed(name: str, device: torch.device) -> str:
    """Tell what is measured under a system's name. Lists of columns do not exist for stored rows; on a CPU, Triton's
    interpreter would take minutes."""
    own = name == "bisection_torch" or (name != "columns" and device.type == "cuda")
    return KERNEL if own else TRANSLATION


def within_half(errors: list[float]) -> int:
    """Return the index of the first error that no later one falls below the half of."""
    return next(i for i, error in enumerate(errors) if min(errors[i:]) >= error / 2)


def _errors(job: Job, settings: ErrorSettings, counts: range) -> dict[str, list[float]]:
    device, alpha = device_here(), settings.inputs.alpha
    assert job.seed is not None
    generator = torch.Generator().manual_seed(job.seed)
    scores = draw(settings.inputs, generator).to(device)
    upstream = torch.randn(scores.shape, generator=generator).to(device)
    p, u = weights(scores.double(), exact_theta(scores, alpha), alpha - 1)
    exact = {"output": p, "gradient": vector_jacobian(u, upstream.double())}
    errors: dict[str, list[float]] = {target: [] for target in TARGETS}
    for answer in _answers(job.system, scores, upstream, alpha, counts):
        for target, found in zip(TARGETS, answer, strict=True):
            errors[target].append(float((found.double() - exact[target]).abs().mean()))
    return errors


def _answers(name: str, scores: Tensor, upstream: Tensor, alpha: float,
             counts: range) -> Iterator[tuple[Tensor, Tensor]]:  # fmt: skip
    """Yield output and gradient, (R, n) float32, after each number of iterations."""
    if observed(name, scores.device) == KERNEL:
        build = bisection if name == "bisection_torch" else partial(kernels, name)
        for iterations in counts:
            leaf = scores.clone().requires_grad_()
            out = build(alpha, iterations, scores.device)(leaf)
            yield out.detach(), torch.autograd.grad(out, leaf, upstream)[0]
        return
    for theta in islice(SOLVERS[name](scores, alpha, KERNEL_BINS), counts.start, counts.stop):
        p, u = weights(scores, theta, alpha - 1)
        yield p, vector_jacobian(u, upstream)
