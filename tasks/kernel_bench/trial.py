"""The first call of a system: does it run here, is it right, how long does it take, how much memory does it need?"""

from __future__ import annotations

import gc
import logging
import time
from dataclasses import dataclass, field, replace

import torch

from tasks.kernel_bench.correctness import fault, relative_errors
from tasks.kernel_bench.exact import Exact
from tasks.kernel_bench.problem import Attention, NotMeasured, Problem
from tasks.kernel_bench.systems import System
from tasks.kernel_bench.timing import backward

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Trial:
    """How a system did at its first call.

    Attributes:
        status: ``ok`` if it may be timed; else ``oom``, ``failed`` (it raised, or is wrong) or ``not_applicable``
            (it does not take this problem here), with ``reason`` in one line.
        attention: the system, built; only with ``ok``.
        first_call_s: seconds of building and of one forward and backward, until the device was done.
        errors: relative error of the output and of each gradient that was checked; empty if it did not run.
        peak_bytes: see :func:`peak_memory`; None on a CPU.
    """

    status: str
    reason: str = ""
    attention: Attention | None = None
    first_call_s: float | None = None
    errors: dict[str, float] = field(default_factory=dict)
    peak_bytes: int | None = None


def failed_trial(error: Exception) -> Trial:
    """Return the trial of a system that raised; a traceback goes to the log."""
    reason = " ".join(str(error).split()) or type(error).__name__
    if isinstance(error, torch.OutOfMemoryError):
        return Trial("oom", f"out of memory: {reason.split('. ')[0]}")
    if isinstance(error, NotMeasured):
        return Trial("not_applicable", reason)
    if isinstance(error, NotImplementedError | ImportError):
        log.info("not available", exc_info=error)
        return Trial("not_applicable", reason)
    log.error("failed", exc_info=error)
    return Trial("failed", f"{type(error).__name__}: {reason}"[:300])


def try_out(system: System, problem: Problem, exact: Exact) -> Trial:
    """Build a system, call it once forward and backward, and check what came out.

    Only what this module is told to expect is raised; whatever the system raises is in the trial.
    """
    exact.parts(system.alpha(problem.alpha))  # outside: its memory is not the system's
    free_memory(problem.device)
    before = _allocated(problem.device)
    try:
        trial = _first_call(system, problem, exact)
        if trial.status != "ok":
            return trial
        return replace(trial, peak_bytes=peak_memory(trial.attention, exact, before))
    except Exception as error:  # whatever a foreign kernel raises
        return failed_trial(error)


def _first_call(system: System, problem: Problem, exact: Exact) -> Trial:
    started = time.perf_counter()
    attention = system.build(problem)
    out = attention(*exact.tensors.leaves)
    gradients = backward(out, exact.tensors)
    if problem.device.type == "cuda":
        torch.cuda.synchronize()
    seconds = time.perf_counter() - started
    errors, reason = judged(exact, system.alpha(problem.alpha), out.detach(), gradients)
    if reason:
        return Trial("failed", reason, first_call_s=seconds, errors=errors)
    return Trial("ok", attention=attention, first_call_s=seconds, errors=errors)


def judged(exact: Exact, alpha: float, out: torch.Tensor,
           gradients: tuple[torch.Tensor, ...]) -> tuple[dict[str, float], str | None]:  # fmt: skip
    """Return the relative errors of an output and gradients, and what is wrong with them, or None."""
    finite = all(bool(x.isfinite().all()) for x in (out, *gradients))
    errors = relative_errors(exact.pick(out, gradients), exact.parts(alpha))
    return errors, fault(errors, finite, exact.problem.dtype, exact.rounding(alpha))


def peak_memory(attention: Attention, exact: Exact, before: int) -> int | None:
    """Return the most memory that tensors held during one forward and backward, in bytes; None on a CPU.

    Counted are q, k, v and the gradient to the output (the same for all systems), and whatever is allocated beyond
    ``before``, the bytes held when the system was about to be built: output, what the forward saves, workspaces,
    gradients, and masks that the system keeps. It is a second call: what compiling and tuning take for a moment does
    not count, nor what PyTorch's allocator keeps in reserve.
    """
    if exact.problem.device.type != "cuda":
        return None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    backward(attention(*exact.tensors.leaves), exact.tensors)
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before + exact.tensors.nbytes


def free_memory(device: torch.device) -> None:
    """Give back what earlier systems left, so that one's memory is not short because of another's."""
    if device.type == "cuda":
        gc.collect()
        torch.cuda.empty_cache()


def _allocated(device: torch.device) -> int:
    return torch.cuda.memory_allocated() if device.type == "cuda" else 0
