"""The programs of the kernel benchmarks: config and scale in, measurements out."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tasks.kernel_bench import captured, mappings, published, rowwise, solver_error, solver_updates
from tasks.kernel_bench.compile_cache import state_at_start
from tasks.kernel_bench.reads import program as reads
from tasks.kernel_bench.reads.settings import ReadsSettings
from tasks.kernel_bench.settings import CAPTURE, Case, SpeedSettings, cases
from tasks.kernel_bench.side_by_side import SideBySide
from tasks.kernel_bench.sparsity_by_tile import TileSettings, block_sparsity_by_tile, tile_jobs
from tasks.kernel_bench.sparsity_sweep import LevelCase, SideBySideAtLevel, SweepSettings, level_cases
from tasks.programs import Context, Job, Program
from tasks.records import Measurement

# Triton's interpreter goes through a few million pairs of a query and a key in a second.
_MOST_CPU_PAIRS = 2**22


@dataclass(frozen=True)
class CaseJob(Job):
    """One system in one case. The seed, which differs between cases, tells the records of one from another's."""

    case: Case | LevelCase | None = None

    def __str__(self) -> str:
        return f"{self.system}, {self.case}"


def _jobs(settings: SpeedSettings) -> list[CaseJob]:
    return [CaseJob(name, case.seed, case) for case in cases(settings.inputs) for name in settings.measure]


def _sweep_jobs(settings: SweepSettings) -> list[CaseJob]:
    return [CaseJob(name, case.seed, case) for case in level_cases(settings) for name in settings.measure]


def _identity(settings: SpeedSettings | SweepSettings | ReadsSettings, data_root: Path | None) -> dict[str, Any]:
    """Captured data, and the published package: with another one, or once it is there, everything is due again."""
    identity: dict[str, Any] = {}
    if settings.inputs.data.startswith(CAPTURE):
        path = captured.locate(settings.inputs.data.removeprefix(CAPTURE), data_root)
        x = settings.inputs
        captured.check(path, (x.h, x.h_kv, max(x.n), x.d))
        identity["captured"] = captured.sha256(path)
    if any(name.startswith("adasplash_pypi") for name in settings.measure):
        identity["adasplash"] = published.installed()
    return identity


def _obstacle(settings: SpeedSettings | SweepSettings | ReadsSettings, data_root: Path | None) -> str | None:
    x = settings.inputs
    pairs = x.b * x.h * (x.n if isinstance(x.n, int) else max(x.n)) ** 2
    if not torch.cuda.is_available() and pairs > _MOST_CPU_PAIRS:
        return f"needs a GPU: {pairs:.0e} pairs of a query and a key"
    return None


@dataclass
class _Current:
    """The case being measured. Its systems are jobs of their own, so that each is recorded and resumed by itself, but
    they are measured together: by the first job of a case, while the others take their share of it."""

    context: Context
    settings: SpeedSettings | SweepSettings
    job: CaseJob
    group: SideBySide
    served: set[str]

    def serves(self, job: CaseJob, settings: SpeedSettings | SweepSettings, context: Context) -> bool:
        """Tell whether a job is of this run and case, and has not had its share."""
        return self.context is context and self.settings == settings and self.job.case == job.case \
            and job.system not in self.served


_current: _Current | None = None


def attention_speed(job: CaseJob, settings: SpeedSettings, context: Context) -> list[Measurement]:
    """Time, memory, error and block sparsity of one system in one case (AdaSplash-2, runtime figure)."""
    return _measured_together(SideBySide, job, settings, context)


def block_sparsity_sweep(job: CaseJob, settings: SweepSettings, context: Context) -> list[Measurement]:
    """The same on inputs that have the asked share of empty tiles (AdaSplash, figure 1)."""
    return _measured_together(SideBySideAtLevel, job, settings, context)


def _measured_together(kind: type[SideBySide], job: CaseJob, settings: SpeedSettings | SweepSettings,
                       context: Context) -> list[Measurement]:  # fmt: skip
    if not torch.cuda.is_available():
        os.environ.setdefault("TRITON_INTERPRET", "1")  # read when triton is first imported, by the first kernel
    state_at_start()
    global _current
    if _current is None or not _current.serves(job, settings, context):
        _current = None  # its memory goes before the next inputs come
        assert job.case is not None
        group = kind(job.case, settings, context.data_root, context.say)
        _current = _Current(context, settings, job, group, set())
    current = _current
    current.served.add(job.system)
    if current.served >= set(settings.measure):
        _current = None  # so that the tensors go once this last job is answered
    return current.group.measurements(job.system)


PROGRAMS = {
    "attention_speed": Program(SpeedSettings, _jobs, attention_speed, _identity, _obstacle),
    "block_sparsity_sweep": Program(SweepSettings, _sweep_jobs, block_sparsity_sweep, _identity, _obstacle),
    "block_sparsity_by_tile": Program(TileSettings, tile_jobs, block_sparsity_by_tile),
    "rowwise_entmax": Program(rowwise.RowwiseSettings, rowwise.jobs, rowwise.rowwise_entmax, obstacle=rowwise.obstacle),
    "solver_error": Program(solver_error.ErrorSettings, solver_error.jobs, solver_error.solver_error,
                            obstacle=solver_error.obstacle),
    "solver_updates": Program(solver_updates.UpdateSettings, solver_updates.jobs, solver_updates.solver_updates,
                              solver_updates.identity, solver_updates.obstacle,
                              needs=lambda settings: [settings.training_trace.run]),
    "count_reads": Program(ReadsSettings, reads.jobs, reads.count_reads, _identity, _obstacle),
    "mapping_surfaces": Program(mappings.SurfaceSettings, mappings.jobs, mappings.mapping_surfaces),
}  # fmt: skip
