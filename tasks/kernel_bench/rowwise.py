"""Entmax of rows of scores, without attention: time, memory and error of every system on the same rows."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from tasks.checks import distinct
from tasks.kernel_bench.compile_cache import state_at_start
from tasks.kernel_bench.correctness import ALLOWED
from tasks.kernel_bench.rows import SeededRows, bands, device_here, draw, exact_theta
from tasks.kernel_bench.rowwise_systems import ITERATING, SYSTEMS, Entmax
from tasks.kernel_bench.settings import Solver, Timing
from tasks.kernel_bench.solver_math import weights
from tasks.kernel_bench.timing import Clock, Times, interleave, run_forward
from tasks.kernel_bench.trial import Trial, failed_trial, free_memory
from tasks.programs import Context, Job
from tasks.records import Measurement

_MIB = 2**20
# Relative Frobenius error. Three iterations of Halley-bisection or twenty of bisection are far below; a few are not.
_ALLOWED = ALLOWED | {torch.float32: 1e-3}
_MOST_CPU_SCORES = 2**16  # Triton's interpreter goes through some ten thousand scores in a second


@dataclass(frozen=True)
class RowwiseSettings:
    """What ``program: rowwise_entmax`` takes; ``solver`` limits the iterations of a system."""

    measure: tuple[str, ...]
    inputs: SeededRows
    timing: Timing
    solver: dict[str, Solver] = field(default_factory=dict)

    def __post_init__(self) -> None:
        distinct("measure", self.measure)
        for i, name in enumerate(self.measure):
            if name not in SYSTEMS:
                raise ValueError(f"measure[{i}]: got {name!r}, allowed are {', '.join(SYSTEMS)}")
        for name in self.solver:
            if name not in ITERATING:
                raise ValueError(f"solver.{name}: unknown, allowed are {', '.join(ITERATING)}")


class RowsSideBySide:
    """The systems on the same rows; everything is measured once, when it is first asked for."""

    def __init__(self, settings: RowwiseSettings, say: Callable[[str], None]) -> None:
        self.settings, self.say, self.device = settings, say, device_here()
        generator = torch.Generator().manual_seed(settings.inputs.seed)
        self.scores = draw(settings.inputs, generator).to(self.device)
        self.theta = exact_theta(self.scores, settings.inputs.alpha)
        self._trials: dict[str, Trial] = {}
        self._systems: dict[str, Entmax] = {}

    def measurements(self, name: str) -> list[Measurement]:
        """Return time, memory, first call and error of a system; what was not measured has the reason beside it."""
        trial = self._trial(name)
        times = self._times.get(name) if trial.status == "ok" else None
        trial = self._trials[name]  # timing may have lost it
        params, why = self._params(name), {"reason": trial.reason}
        timed = params | {"statistic": self.settings.timing.statistic}
        if times is None:
            found = [Measurement("fwd_ms", None, "ms", timed | why, status=trial.status)]
        else:
            value = times.value("fwd_ms", self.settings.timing.statistic)
            found = [Measurement("fwd_ms", value, "ms", timed, times.stats("fwd_ms"))]
        if trial.peak_bytes is not None:
            found.append(Measurement("peak_mib", trial.peak_bytes / _MIB, "MiB", params))
        else:
            here = ("not_applicable", "memory is counted on a GPU only") if trial.status == "ok" else (
                trial.status, trial.reason)  # fmt: skip
            found.append(Measurement("peak_mib", None, "MiB", params | {"reason": here[1]}, status=here[0]))
        if trial.first_call_s is None:
            found.append(Measurement("first_call_s", None, "s", params | why, status=trial.status))
        else:
            cache = {"compile_cache_at_start": state_at_start()}
            found.append(Measurement("first_call_s", trial.first_call_s, "s", params | cache))
        error = trial.errors.get("out")
        if error is not None and error < float("inf"):
            found.append(Measurement("rel_err", error, "", params))
        else:
            status = "failed" if trial.status == "ok" else trial.status
            found.append(Measurement("rel_err", None, "", params | why, status=status))
        return found

    def _trial(self, name: str) -> Trial:
        if name not in self._trials:
            self._keep(name, self._try_out(name))
        return self._trials[name]

    def _keep(self, name: str, trial: Trial) -> None:
        self._trials[name] = trial
        if trial.status != "ok":
            self.say(f"{name}: no time recorded: {trial.reason}")

    def _lose(self, name: str, error: Exception) -> None:
        why = failed_trial(error)
        self._keep(name, replace(self._trials[name], status=why.status, reason=why.reason))

    @cached_property
    def _times(self) -> dict[str, Times]:
        fit = {n: self._systems[n] for n in self.settings.measure if self._trial(n).status == "ok"}
        free_memory(self.device)
        times = interleave(fit, self.scores, self.settings.timing, Clock(self.device), lose=self._lose,
                           once=run_forward)  # fmt: skip
        for name, found in times.items():
            self.say(f"{name}: {found.value('fwd_ms', self.settings.timing.statistic):.4g} ms, relative error "
                     f"{self._trials[name].errors['out']:.2g}")  # fmt: skip
        return times

    def _try_out(self, name: str) -> Trial:
        """Build a system, call it once and check the result; whatever it raises is in the trial."""
        free_memory(self.device)
        before = torch.cuda.memory_allocated() if self.device.type == "cuda" else 0
        solver, alpha = self.settings.solver.get(name), self.settings.inputs.alpha
        try:
            with torch.no_grad():
                started = time.perf_counter()
                self._systems[name] = SYSTEMS[name](alpha, solver.iterations if solver else None, self.device)
                out = self._systems[name](self.scores)
                Clock(self.device).wait()
                seconds = time.perf_counter() - started
                error = self._error(out)
                del out
                allowed = _ALLOWED[self.scores.dtype]
                if not error <= allowed:
                    reason = f"wrong result: it is off by {error:.3g} (relative), allowed is {allowed:g}"
                    return Trial("failed", reason, first_call_s=seconds, errors={"out": error})
                return Trial("ok", first_call_s=seconds, errors={"out": error}, peak_bytes=self._peak(name, before))
        except Exception as error:  # whatever a system raises
            return failed_trial(error)

    def _error(self, out: Tensor) -> float:
        """Return the relative error of weights (rows, n), Frobenius, against float64."""
        off = size = 0.0
        for at in bands(self.scores):
            exact, _ = weights(self.scores[at].double(), self.theta[at], self.settings.inputs.alpha - 1)
            off, size = off + float((out[at].double() - exact).square().sum()), size + float(exact.square().sum())
        return (off / size) ** 0.5

    def _peak(self, name: str, before: int) -> int | None:
        """Return the most bytes that tensors held during a second call, the scores among them; None on a CPU."""
        if self.device.type != "cuda":
            return None
        free_memory(self.device)
        torch.cuda.reset_peak_memory_stats()
        self._systems[name](self.scores)
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before + self.scores.nbytes

    def _params(self, name: str) -> dict[str, Any]:
        solver = self.settings.solver.get(name)
        return self.settings.inputs.params | ({"iterations": solver.iterations} if solver else {})


@dataclass
class _Current:
    """The systems are jobs of their own, recorded and resumed each by itself, but they are timed together: by the
    first job, while the others take their share of it."""

    context: Context
    settings: RowwiseSettings
    group: RowsSideBySide
    left: set[str]


_current: _Current | None = None


def jobs(settings: RowwiseSettings) -> list[Job]:
    """Return a job for each system."""
    return [Job(name, settings.inputs.seed) for name in settings.measure]


def obstacle(settings: RowwiseSettings, data_root: Any) -> str | None:
    """Tell why a CPU cannot run it."""
    scores = settings.inputs.rows * settings.inputs.n
    if not torch.cuda.is_available() and scores > _MOST_CPU_SCORES:
        return f"needs a GPU: {scores:.0e} scores"
    return None


def rowwise_entmax(job: Job, settings: RowwiseSettings, context: Context) -> list[Measurement]:
    """Time of the forward pass, memory and error of one system (AdaSplash, section 3.1)."""
    if not torch.cuda.is_available():
        os.environ.setdefault("TRITON_INTERPRET", "1")  # read when triton is first imported, by the first kernel
    state_at_start()
    global _current
    ours = _current is not None and _current.context is context and _current.settings == settings
    if not ours or job.system not in _current.left:  # type: ignore[union-attr]
        _current = None  # its memory goes before the next rows come
        _current = _Current(context, settings, RowsSideBySide(settings, context.say), set(settings.measure))
    current = _current
    assert current is not None
    current.left.discard(job.system)
    if not current.left:
        _current = None  # so that the tensors go once this last job is answered
    return current.group.measurements(job.system)
