"""How many updates each solver needs until its tau is right, against what the scores are like."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from adasplash_kernels.eager import solve_theta
from tasks.checks import above_zero, at_least, distinct
from tasks.kernel_bench.rows import bands, check_rows, device_here, exact_theta
from tasks.kernel_bench.solvers import SOLVERS
from tasks.kernel_bench.training_trace import TrainingTrace, load_scores
from tasks.kernel_bench.trial import failed_trial
from tasks.programs import Context, Job
from tasks.records import Measurement

DTYPES = {"float32": torch.float32, "float64": torch.float64}
METRICS = {"updates": "updates/row", "updates_max": "updates/row", "tau_abs_error": "", "sparsity": "%"}
TRAINING = "training step"
# What records call a sweep. Sparsity goes by what is left, which a logarithmic axis can spread out.
TITLES = {"bins": "bins", "score_variance": "score variance", "sparsity": "nonzero weights (%)", "n": "length"}
_MOST_CPU_SCORES = 2**20
_HALVINGS = 30  # of the range of factors that the rows are scaled by
_MOST_DOUBLINGS = 20  # that range: 2^-20 to 2^20


@dataclass(frozen=True)
class UpdateInputs:
    """Rows of scores (rows, n) at the point that all sweeps share: Gaussian of a variance, and the histogram's bins."""

    rows: int
    n: int
    dtype: str
    alpha: float
    data: str
    score_variance: float
    bins: int
    seed: int = 0

    def __post_init__(self) -> None:
        check_rows(self.rows, self.n, self.dtype, self.alpha, self.data, DTYPES)
        above_zero(score_variance=self.score_variance)
        at_least(2, bins=self.bins)
        at_least(0, seed=self.seed)


@dataclass(frozen=True)
class Stop:
    """When a row is done: its tau is that close to the exact one. A row that never is counts ``max_updates``."""

    tau_abs_error: float
    max_updates: int

    def __post_init__(self) -> None:
        above_zero(tau_abs_error=self.tau_abs_error)
        at_least(1, max_updates=self.max_updates)


@dataclass(frozen=True)
class Sweeps:
    """What is varied, one at a time. ``sparsity`` is the share of weights that are zero, in percent."""

    bins: tuple[int, ...]
    score_variance: tuple[float, ...]
    sparsity: tuple[float, ...]
    n: tuple[int, ...]

    def __post_init__(self) -> None:
        for name, values in self.points().items():
            distinct(name, values)
        for i, bins in enumerate(self.bins):
            at_least(2, **{f"bins[{i}]": bins})
        for i, n in enumerate(self.n):
            at_least(1, **{f"n[{i}]": n})
        for i, variance in enumerate(self.score_variance):
            above_zero(**{f"score_variance[{i}]": variance})

    def points(self) -> dict[str, Sequence[float]]:
        """Return the points by sweep."""
        return {"bins": self.bins, "score_variance": self.score_variance, "sparsity": self.sparsity, "n": self.n}


@dataclass(frozen=True)
class UpdateSettings:
    """What ``program: solver_updates`` takes."""

    measure: tuple[str, ...]
    inputs: UpdateInputs
    stop: Stop
    sweeps: Sweeps
    training_trace: TrainingTrace

    def __post_init__(self) -> None:
        distinct("measure", self.measure)
        for i, name in enumerate(self.measure):
            if name not in SOLVERS:
                raise ValueError(f"measure[{i}]: got {name!r}, allowed are {', '.join(SOLVERS)}")
        most = 100 * (1 - 1 / self.inputs.n)
        for i, level in enumerate(self.sweeps.sparsity):
            if not 0 < level <= most:
                raise ValueError(
                    f"sweeps.sparsity[{i}]: got {level}, allowed is above 0 to {most:g}, where one weight "
                    f"in a row of n = {self.inputs.n} is left"
                )


@dataclass(frozen=True)
class PointJob(Job):
    """One solver at one point of a sweep, or along the whole training. The seed tells the points' records apart; the
    rows are drawn from ``inputs.seed`` and n alone, so that points of the same n differ in nothing else."""

    sweep: str = ""
    point: float = 0

    def __str__(self) -> str:
        return f"{self.system}, {self.sweep}" + ("" if self.sweep == TRAINING else f" = {self.point:g}")


@dataclass(frozen=True)
class Counted:
    """What came of rows: updates each needed, the error of tau each ended with, and the share of zeros in percent."""

    updates: Tensor
    error: Tensor
    unreached: int
    sparsity: float


def jobs(settings: UpdateSettings) -> list[PointJob]:
    """Return a job for each solver at each point, and one for each along the training."""
    points = [(sweep, point) for sweep, values in settings.sweeps.points().items() for point in values]
    return [PointJob(name, zlib.crc32(f"{settings.inputs.seed} {sweep} {point:g}".encode()), sweep, point)
            for sweep, point in [*points, (TRAINING, 0)] for name in settings.measure]  # fmt: skip


def identity(settings: UpdateSettings, data_root: Path | None) -> dict[str, Any]:
    """Name the captures that are there: with others everything is due again."""
    return {"captures": settings.training_trace.present(data_root)}


def obstacle(settings: UpdateSettings, data_root: Path | None) -> str | None:
    """Tell why a CPU would take too long."""
    scores = settings.inputs.rows * max(settings.inputs.n, *settings.sweeps.n)
    if not torch.cuda.is_available() and scores > _MOST_CPU_SCORES:
        return f"needs a GPU: {scores:.0e} scores"
    return None


def solver_updates(job: PointJob, settings: UpdateSettings, context: Context) -> list[Measurement]:
    """Updates until tau is right and its error in the end, of one solver (AdaSplash-2, abstract)."""
    if job.sweep == TRAINING:
        return _along_training(job, settings, context)
    x = settings.inputs
    values = {"n": x.n, "score_variance": x.score_variance, "bins": x.bins}
    if job.sweep != "sparsity":
        values[job.sweep] = int(job.point) if job.sweep in ("n", "bins") else job.point
    point = round(100 - job.point, 9) if job.sweep == "sparsity" else job.point
    params = values | {"sweep": TITLES[job.sweep], "point": point, "rows": x.rows, "dtype": x.dtype, "alpha": x.alpha,
                       "data": x.data, "rows_seed": x.seed}  # fmt: skip
    try:
        scores = _gaussian(x.rows, values["n"], x.seed) * values["score_variance"] ** 0.5
        if job.sweep == "sparsity":
            scores = scores * _factor(x.rows, x.n, x.seed, x.score_variance, x.alpha, job.point)
        counted = count_updates(job.system, scores.to(DTYPES[x.dtype]), x.alpha, values["bins"], settings.stop)
    except torch.OutOfMemoryError as error:
        why = failed_trial(error)
        return _nothing(params | {"reason": why.reason}, why.status)
    context.say(f"{job}: {float(counted.updates.mean()):.2f} updates, {int(counted.updates.max())} at most")
    return _measurements(params, counted)


def _along_training(job: PointJob, settings: UpdateSettings, context: Context) -> list[Measurement]:
    x, trace = settings.inputs, settings.training_trace
    params = {"sweep": TRAINING, "rows": x.rows, "dtype": x.dtype, "alpha": x.alpha, "bins": x.bins,
              "data": f"{trace.run}, {trace.system}", "sequences": trace.sequences}  # fmt: skip
    there = [step for step in trace.points if trace.file(context.data_root, step).is_file()]
    context.say(f"{job}: {len(there)} of {len(trace.points)} captures are there")
    if not there:  # one point says it for all
        last = trace.points[-1]
        return _nothing(params | {"point": last, "reason": trace.missing(last)}, "not_applicable")
    found = []
    for step in trace.points:
        here = params | {"point": step}
        if step not in there:
            found += _nothing(here | {"reason": trace.missing(step)}, "not_applicable")
            continue
        scores = load_scores(trace.file(context.data_root, step), trace.sequences, x.rows, x.seed).to(DTYPES[x.dtype])
        found += _measurements(here, count_updates(job.system, scores, x.alpha, x.bins, settings.stop))
    return found


def count_updates(name: str, scores: Tensor, alpha: float, bins: int, stop: Stop) -> Counted:
    """Count the updates that each row (R, n) of scores needs, on the device at hand.

    A row is done after as many updates as first bring its tau within ``stop.tau_abs_error`` of the float64 solution, or
    within two units of the dtype's last place where scores are so large that this is more.
    """
    device, a = device_here(), alpha - 1
    eps = torch.finfo(scores.dtype).eps
    updates, errors, zeros = [], [], 0
    for at in bands(scores):
        rows = scores[at].to(device)
        exact = exact_theta(rows, alpha)
        seen = rows > -torch.inf
        zeros += int((seen & (rows.double() <= exact[:, None] - 1 / a)).sum())
        last_place = torch.ldexp(torch.full_like(exact, eps), torch.frexp(exact).exponent - 1)
        allowed = (2 * a * last_place).clamp_min(stop.tau_abs_error)
        needed = torch.full_like(exact, torch.inf)
        for count, theta in enumerate(islice(SOLVERS[name](rows, alpha, bins), stop.max_updates + 1)):
            error = a * (theta.double() - exact).abs()
            needed = torch.where((needed > count) & (error <= allowed), count, needed)
        updates.append(needed.cpu())
        errors.append(error.cpu())
    needed = torch.cat(updates)
    total = int((scores > -torch.inf).sum())
    return Counted(needed.clamp_max(stop.max_updates), torch.cat(errors), int((needed > stop.max_updates).sum()),
                   100 * zeros / total)  # fmt: skip


def _measurements(params: dict[str, Any], counted: Counted) -> list[Measurement]:
    updates, error = counted.updates, counted.error
    spread = {"n": len(updates), "min": float(updates.min()), "max": float(updates.max()),
              "std": float(updates.std(correction=0)), "unreached": counted.unreached}  # fmt: skip
    values = {"updates": float(updates.mean()), "updates_max": float(updates.max()),
              "tau_abs_error": float(error.mean()), "sparsity": counted.sparsity}  # fmt: skip
    stats = {"updates": spread, "tau_abs_error": {"n": len(error), "max": float(error.max())}}
    return [Measurement(m, values[m], unit, params, stats.get(m)) for m, unit in METRICS.items()]


def _nothing(params: dict[str, Any], status: str) -> list[Measurement]:
    return [Measurement(metric, None, unit, params, status=status) for metric, unit in METRICS.items()]


@lru_cache(maxsize=1)  # the solvers of a point come one after the other
def _gaussian(rows: int, n: int, seed: int) -> Tensor:
    """Return standard normal rows (rows, n) float32, drawn on the CPU; those of one n and seed are the same."""
    return torch.randn(rows, n, generator=torch.Generator().manual_seed(zlib.crc32(f"{seed} {n}".encode())))


@lru_cache(maxsize=1)
def _factor(rows: int, n: int, seed: int, variance: float, alpha: float, level: float) -> float:
    """Return by how much rows are multiplied for so many percent of all weights to be zero: more is sparser."""
    scores = _gaussian(rows, n, seed) * variance**0.5
    return factor_for(scores.to(device_here()), alpha, level)


def factor_for(scores: Tensor, alpha: float, level: float) -> float:
    """Find the factor by bisection of its logarithm, with the exact solution in float64 at every try."""
    low, high = -float(_MOST_DOUBLINGS), float(_MOST_DOUBLINGS)
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        zeros = 0
        for at in bands(scores):
            rows = scores[at].double() * 2**middle
            zeros += int((rows <= solve_theta(rows, alpha) - 1 / (alpha - 1)).sum())
        low, high = (middle, high) if 100 * zeros / scores.numel() < level else (low, middle)
    return 2**high
