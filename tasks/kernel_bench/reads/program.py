"""The program: one job a system and length, which counts forward and backward."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch

from tasks.errors import UserError
from tasks.kernel_bench.inputs import make_problem, make_tensors
from tasks.kernel_bench.problem import Problem
from tasks.kernel_bench.reads import published
from tasks.kernel_bench.reads.settings import ReadsSettings
from tasks.kernel_bench.reads.tally import Tally
from tasks.kernel_bench.settings import GAUSSIAN, Case, cases
from tasks.kernel_bench.systems import SYSTEMS
from tasks.kernel_bench.trial import Trial, failed_trial, free_memory
from tasks.programs import Context, Job
from tasks.records import Measurement

METRICS = {"q_reads": "q", "k_reads": "k", "v_reads": "v"}
UNIT = "rows/query block"
_PUBLISHED: dict[str, Callable[[Problem, str], Tally]] = {"fa2": published.flash, "bisection_torch": published.dense}


@dataclass(frozen=True)
class ReadsJob(Job):
    """One system in one case. The seed, which differs between cases, tells the records of one from another's."""

    case: Case | None = None

    def __str__(self) -> str:
        return f"{self.system}, {self.case}"


def jobs(settings: ReadsSettings) -> list[ReadsJob]:
    """Return a job for every system in every case."""
    return [ReadsJob(name, case.seed, case) for case in cases(settings.inputs) for name in settings.measure]


def count_reads(job: ReadsJob, settings: ReadsSettings, context: Context) -> list[Measurement]:
    """Count the rows of Q, K and V that one system reads in one case, for each pass."""
    if not torch.cuda.is_available():
        os.environ.setdefault("TRITON_INTERPRET", "1")  # read when triton is first imported, by the first kernel
    tallies: dict[str, Tally] | Trial
    try:
        tallies = _count(job, settings, context)
    except UserError:
        raise
    except Exception as error:  # whatever a kernel raises
        tallies = failed_trial(error)
        context.say(f"{job}: not counted: {tallies.reason}")
    measurements = []
    for which in settings.passes:
        params = _params(job, settings) | {"pass": which}
        if isinstance(tallies, Trial):
            params["reason"] = tallies.reason
            measurements += [Measurement(m, None, UNIT, params, status=tallies.status) for m in METRICS]
            continue
        tally = tallies[which]
        params |= {"query_block": tally.block_m, "key_block": tally.block_n}
        measurements += [Measurement(metric, tally.per_block(operand), UNIT, params, tally.by_part(operand) or None)
                         for metric, operand in METRICS.items()]  # fmt: skip
        spelled = ", ".join(f"{operand} {tally.per_block(operand):.6g}" for operand in METRICS.values())
        context.say(f"{job}, {which}: {spelled} rows a block of {tally.block_m} queries")
    return measurements


def _count(job: ReadsJob, settings: ReadsSettings, context: Context) -> dict[str, Tally]:
    assert job.case is not None
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    problem = make_problem(settings.inputs, job.case, device)
    if job.system in _PUBLISHED:
        return {which: _PUBLISHED[job.system](problem, which) for which in settings.passes}
    from tasks.kernel_bench.reads import own  # triton, if it is to be used, comes with it

    free_memory(device)
    solver = settings.solver.get(job.system)
    problem = replace(problem, iterations=solver.iterations if solver else None)
    return own.count(job.system, problem, make_tensors(settings.inputs, job.case, device, context.data_root))


def _params(job: ReadsJob, settings: ReadsSettings) -> dict[str, Any]:
    """Return what identifies a measurement."""
    assert job.case is not None
    x, system = settings.inputs, SYSTEMS[job.system]
    params = {"b": x.b, "h": x.h, "h_kv": x.h_kv, "n": job.case.n, "d": x.d, "dtype": x.dtype, "causal": x.causal,
              "alpha": system.alpha(x.alpha), "data": x.data, "query_scale": job.case.query_scale}  # fmt: skip
    if x.data == GAUSSIAN:
        params |= {"query_variance": x.query_variance, "key_variance": x.key_variance,
                   "value_variance": x.value_variance}  # fmt: skip
    if job.system in settings.solver:
        params["iterations"] = settings.solver[job.system].iterations
    return params
