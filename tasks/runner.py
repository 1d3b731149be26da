"""Running experiments: which jobs are due, one after the other, each recorded as soon as it ends."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import time
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from tasks.config import REPOSITORY, Experiment
from tasks.errors import NotImplementedYet, UserError
from tasks.programs import Context, Job, Program, find_program
from tasks.records import (
    RESULTS,
    Measurement,
    Provenance,
    append_records,
    read_records,
    records_path,
    sha256_of,
    source_sha256,
)

DONE, SKIPPED, FAILED, NOT_IMPLEMENTED = "done", "up to date", "failed", "not implemented"
EXIT_SKIPPED = 10  # how a child process says that nothing was due


@dataclass(frozen=True)
class Options:
    """What the command line decides for every experiment of a run."""

    scale: str
    data_root: Path | None = None
    force: bool = False
    results: Path = RESULTS

    @property
    def workspace(self) -> Path:
        return self.results / "work"


@dataclass(frozen=True)
class Outcome:
    """How one experiment ended, for the summary."""

    experiment: Experiment
    state: str
    detail: str = ""
    seconds: float = 0.0


def plan(experiment: Experiment, options: Options) -> tuple[Program, object, list[tuple[Job, Provenance, bool]]]:
    """Return the program, its settings, and each job with its provenance and whether it is up to date.

    Raises:
        UserError: the config, the data root or a record file is wrong, or the experiment has no code.
    """
    program = find_program(experiment)
    settings = experiment.typed_settings(options.scale, program.settings)
    identity = program.identity(settings, options.data_root)
    config_hash = sha256_of({"experiment": experiment.id, "scale": options.scale, "identity": identity,
                             "settings": asdict(settings)})  # fmt: skip
    known = read_records(records_path(options.results, experiment.id, options.scale))
    jobs = []
    for job in program.jobs(settings):
        provenance = Provenance(experiment=experiment.id, scale=options.scale, system=job.system, seed=job.seed,
                                config_sha256=config_hash, source_sha256=source_sha256(experiment.path))  # fmt: skip
        earlier = [r for r in known if provenance.matches(r)]
        fresh = bool(earlier) and all(r.status != "failed" for r in earlier if r.created == earlier[-1].created)
        jobs.append((job, provenance, fresh and not options.force))
    return program, settings, jobs


def run_experiment(experiment: Experiment, options: Options) -> Outcome:
    """Run what is due of one experiment in this process; every job is recorded as it ends.

    A job that raises leaves a ``failed`` record and the next one still runs.

    Raises:
        UserError: as :func:`plan`, or the records cannot be written.
    """
    started = time.monotonic()
    program, settings, jobs = plan(experiment, options)
    due = [(job, provenance) for job, provenance, fresh in jobs if not fresh]
    if not due:
        return Outcome(experiment, SKIPPED, f"{len(jobs)} of {len(jobs)} jobs recorded")
    if obstacle := program.obstacle(settings, options.data_root):
        raise UserError(f"{experiment.file}: cannot run at scale {options.scale}: {obstacle}")
    context = Context(options.workspace, options.data_root, say=lambda line: print(f"  {line}", flush=True))
    path = records_path(options.results, experiment.id, options.scale)
    log = log_path(experiment, options)
    failures = []
    with _logging_to(log):
        for number, (job, provenance) in enumerate(due, 1):
            context.say(f"{job}: job {number} of {len(due)}")
            try:
                measurements = program.run(job, settings, context)
            except UserError:
                raise
            except Exception as error:
                logging.getLogger(__name__).error("%s failed\n%s", job, traceback.format_exc())
                reason = f"{type(error).__name__}: {error}".splitlines()[0]
                context.say(f"{job}: failed: {reason}")
                failures.append(f"{job}: {reason}")
                measurements = [Measurement("job", None, "", {"reason": reason}, status="failed")]
            append_records(path, provenance.records(measurements))
    seconds = time.monotonic() - started
    if failures:
        return Outcome(experiment, FAILED, f"{'; '.join(failures)} (log: {shown(log)})", seconds)
    return Outcome(experiment, DONE, f"{len(due)} jobs run, {len(jobs) - len(due)} up to date", seconds)


def run_many(experiments: Sequence[Experiment], options: Options) -> list[Outcome]:
    """Run experiments one after the other, each in a process of its own, so that a crash stops only one.

    Raises:
        KeyboardInterrupt: passed on at once; finished jobs are recorded, the rest resumes next time.
    """
    outcomes = []
    for number, experiment in enumerate(experiments, 1):
        print(f"[{number}/{len(experiments)}] {experiment.id}: {experiment.title}", flush=True)
        started = time.monotonic()
        outcome = _run_in_child(experiment, options)
        outcomes.append(Outcome(experiment, *outcome, seconds=time.monotonic() - started))
        print(f"  {outcome[0]}{': ' + outcome[1] if outcome[1] else ''}", flush=True)
    return outcomes


def _run_in_child(experiment: Experiment, options: Options) -> tuple[str, str]:
    try:
        if all(fresh for _, _, fresh in plan(experiment, options)[2]):
            return SKIPPED, ""
    except NotImplementedYet:
        return NOT_IMPLEMENTED, ""
    except UserError as error:
        return FAILED, str(error)
    command = [sys.executable, "-m", "tasks", "run", str(experiment.path), "--scale", options.scale, "--no-render",
               "--quiet", "--results", str(options.results)]  # fmt: skip
    if options.data_root is not None:
        command += ["--data-root", str(options.data_root)]
    if options.force:
        command += ["--force"]
    paths = [str(REPOSITORY), str(REPOSITORY / "kernels"), os.environ.get("PYTHONPATH", "")]
    child = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in paths if p)}
    code = subprocess.run(command, env=child).returncode
    log = shown(log_path(experiment, options))
    if code in (0, EXIT_SKIPPED):
        return (DONE, "") if code == 0 else (SKIPPED, "")
    if code < 0:
        return FAILED, f"ended by signal {-code} (log: {log})"
    return FAILED, f"see above (log: {log})"


def log_path(experiment: Experiment, options: Options) -> Path:
    """Return the log file of an experiment at a scale."""
    return options.workspace / "logs" / f"{experiment.id.replace('/', '-')}-{options.scale}.log"


def shown(path: Path) -> str:
    """Return a path as messages show it: relative to the repository where it lies inside."""
    return str(path.relative_to(REPOSITORY)) if path.is_relative_to(REPOSITORY) else str(path)


@contextmanager
def _logging_to(path: Path) -> Iterator[None]:
    """Send log messages and Python warnings of every library to a file, keeping the screen for progress."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handler = logging.FileHandler(path, mode="w", encoding="utf-8")
    except OSError as error:
        raise UserError(f"{shown(path)}: cannot write the log: {error.strerror}") from error
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    root = logging.getLogger()
    root.addHandler(handler)
    root.setLevel(logging.INFO)
    logging.captureWarnings(True)
    try:
        yield
    finally:
        logging.captureWarnings(False)
        root.removeHandler(handler)
        handler.close()
