"""Running experiments: which jobs are due, one after the other, each recorded as soon as it ends."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from tasks.code_used import code_sha256
from tasks.config import REPOSITORY, Experiment
from tasks.distributed import Devices, rank
from tasks.errors import ConfigError, UserError
from tasks.programs import Context, Job, Program, find_program, package_of
from tasks.records import (
    RESULTS,
    Measurement,
    Provenance,
    append_records,
    read_records,
    records_path,
    sha256_of,
)

DONE, SKIPPED, FAILED = "done", "up to date", "failed"
EXIT_INTERRUPTED = 130


@dataclass(frozen=True)
class Options:
    """What the command line decides for every experiment of a run."""

    scale: str
    data_root: Path | None = None
    force: bool = False
    results: Path = RESULTS
    devices: Devices = Devices()
    seeds: frozenset[int] | None = None  # leave out jobs of other seeds

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
        UserError: the config, the data root or a record file is wrong, the experiment has no code, or something
            is due that this machine cannot run.
    """
    program = find_program(experiment)
    settings = experiment.typed_settings(options.scale, program.settings)
    identity = program.identity(settings, options.data_root)
    if program.by_devices:
        identity |= {"devices": asdict(options.devices)}
    config_hash = sha256_of({"experiment": experiment.id, "program": experiment.program, "scale": options.scale,
                             "identity": identity, "settings": asdict(settings)})  # fmt: skip
    code_hash = code_sha256(package_of(experiment))
    known = read_records(records_path(options.results, experiment.id, options.scale))
    jobs = []
    for job in program.jobs(settings):
        provenance = Provenance(experiment=experiment.id, scale=options.scale, system=job.system, seed=job.seed,
                                config_sha256=config_hash, source_sha256=code_hash)  # fmt: skip
        earlier = [r for r in known if provenance.matches(r)]
        fresh = bool(earlier) and all(r.status != "failed" for r in earlier if r.created == earlier[-1].created)
        jobs.append((job, provenance, fresh and not options.force))
    where = f"{experiment.file}: scale {options.scale}"
    if not jobs:
        raise ConfigError(f"{where}: the settings ask for no job, allowed is one or more")
    if options.seeds is not None:
        there = sorted({job.seed for job, _, _ in jobs if job.seed is not None})
        if missing := sorted(options.seeds.difference(there)):
            raise ConfigError(f"{where}: --seeds: got {', '.join(map(str, missing))}, allowed are "
                              f"{', '.join(map(str, there)) or 'none: its jobs have no seed'}")
        jobs = [entry for entry in jobs if entry[0].seed in options.seeds]
    due = not all(fresh for _, _, fresh in jobs)
    if due and options.devices.world > 1 and not program.distributed:
        raise UserError(f"{where}: --devices: got {options.devices.world} in all, allowed is 1: the program "
                        f"{experiment.program} uses one device")
    if due and (obstacle := program.obstacle(settings, options.data_root)):
        raise UserError(f"{where}: cannot run here: {obstacle}")
    return program, settings, jobs


def run_experiment(experiment: Experiment, options: Options) -> Outcome:
    """Run what is due of one experiment in this process; every job is recorded as it ends.

    A job that raises, or whose measurements are none or not finite, leaves a ``failed`` record and the next one
    still runs. With several devices this is called in every process and the first one records; there a job that
    fails ends the run, for the other processes may be waiting for this one.

    Raises:
        UserError: as :func:`plan`, a job raised it, or the records cannot be written.
    """
    started = time.monotonic()
    program, settings, jobs = plan(experiment, options)
    due = [(job, provenance) for job, provenance, fresh in jobs if not fresh]
    if not due:
        return Outcome(experiment, SKIPPED, f"jobs recorded earlier: {len(jobs)} (--force runs them again)")
    first = rank() == 0
    context = Context(options.workspace, options.data_root, devices=options.devices,
                      models=options.results / "models" / experiment.id / options.scale if first else None,
                      say=lambda line: print(f"  {line}", flush=True) if first else None)  # fmt: skip
    path = records_path(options.results, experiment.id, options.scale)
    log = log_path(experiment, options)
    failures = []
    with _logging_to(log):
        for number, (job, provenance) in enumerate(due, 1):
            context.say(f"{job}: job {number} of {len(due)}")
            try:
                measurements = program.run(job, settings, context)
                if not measurements:
                    raise ValueError("the program returned no measurements")
                if first:
                    append_records(path, provenance.records(measurements))
            except UserError:
                raise
            except (Exception, SystemExit) as error:
                if isinstance(error, SystemExit) and isinstance(error.__context__, KeyboardInterrupt):
                    raise KeyboardInterrupt from error  # Lightning leaves the interpreter on Ctrl-C
                logging.getLogger(__name__).error("%s failed\n%s", job, traceback.format_exc())
                reason = f"{type(error).__name__}: {error}".splitlines()[0]
                context.say(f"{job}: failed: {reason}")
                failures.append(f"{job}: {reason}")
                failed = Measurement("job", None, "", {"reason": reason}, status="failed")
                if first:
                    append_records(path, provenance.records([failed]))
                if options.devices.world > 1:
                    raise UserError(f"{job}: failed in process {rank()}: {reason} (log: {shown(log)})") from error
    seconds = time.monotonic() - started
    if failures:
        detail = f"{len(failures)} of {len(due)} jobs, the first: {failures[0]} (log: {shown(log)})"
        return Outcome(experiment, FAILED, detail, seconds)
    return Outcome(experiment, DONE, f"jobs run: {len(due)}, up to date: {len(jobs) - len(due)}", seconds)


def run_many(experiments: Sequence[Experiment], options: Options) -> list[Outcome]:
    """Run experiments one after the other, each in a process of its own, so that a crash stops only one.

    Raises:
        KeyboardInterrupt: passed on at once; finished jobs are recorded, the rest resumes next time.
    """
    outcomes = []
    for number, experiment in enumerate(experiments, 1):
        print(f"[{number}/{len(experiments)}] {experiment.id}: {experiment.title}", flush=True)
        started = time.monotonic()
        outcome = run_in_child(experiment, options)
        outcomes.append(Outcome(experiment, *outcome, seconds=time.monotonic() - started))
        print(f"  {outcome[0]}{': ' + outcome[1] if outcome[1] else ''}", flush=True)
    return outcomes


def run_in_child(experiment: Experiment, options: Options, environment: Mapping[str, str] | None = None,
                 say: Callable[[str], None] | None = None,
                 started: Callable[[subprocess.Popen], None] = lambda process: None) -> tuple[str, str]:  # fmt: skip
    """Run an experiment in a process of its own; return how it ended, and the details.

    Args:
        environment: variables for the child, over those of this process.
        say: what gets the lines that it prints; without it the child prints where this process does.
        started: with ``say``, what gets the process.

    Raises:
        KeyboardInterrupt: the child was interrupted.
    """
    try:
        if all(fresh for _, _, fresh in plan(experiment, options)[2]):
            return SKIPPED, "--force runs it again"
    except UserError as error:
        return FAILED, one_line(error)
    except Exception:  # a bug: the child shows it, with its traceback
        logging.getLogger(__name__).debug("planning %s failed", experiment.id, exc_info=True)
    command = [sys.executable, "-m", "tasks", "run", str(experiment.path), "--scale", options.scale, "--no-render",
               "--results", str(options.results)]  # fmt: skip
    if options.data_root is not None:
        command += ["--data-root", str(options.data_root)]
    if options.force:
        command += ["--force"]
    if options.seeds is not None:
        command += ["--seeds", ",".join(map(str, sorted(options.seeds)))]
    paths = [str(REPOSITORY), str(REPOSITORY / "kernels"), os.environ.get("PYTHONPATH", "")]
    child = {**os.environ, **(environment or {}), "PYTHONPATH": os.pathsep.join(p for p in paths if p)}
    with tempfile.TemporaryDirectory() as folder:
        note = Path(folder) / "outcome"
        code = _run([*command, "--outcome", str(note)], child, say, started)
        state, _, detail = note.read_text(encoding="utf-8").partition("\n") if note.exists() else ("", "", "")
    if state:
        return state, detail
    if code == EXIT_INTERRUPTED:
        raise KeyboardInterrupt
    log = log_path(experiment, options)
    return FAILED, _ending(code) + (f" (log: {shown(log)})" if log.exists() else "")


def _run(command: Sequence[str], environment: Mapping[str, str], say: Callable[[str], None] | None,
         started: Callable[[subprocess.Popen], None]) -> int:  # fmt: skip
    if say is None:
        return subprocess.run(command, env=environment).returncode
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                          errors="replace") as process:  # fmt: skip
        started(process)
        assert process.stdout is not None
        for line in process.stdout:
            say(line.rstrip())
    return process.returncode


def write_outcome(path: Path, state: str, detail: str) -> None:
    """Leave a child's outcome where :func:`run_many` looks for it."""
    path.write_text(f"{state}\n{' '.join(detail.splitlines())}", encoding="utf-8")


def one_line(error: BaseException) -> str:
    """Return an error's message without line breaks."""
    return " ".join(str(error).split("\n")) or type(error).__name__


def _ending(code: int) -> str:
    if code >= 0:
        return f"its process ended with exit status {code}"
    name = signal.Signals(-code).name if -code in set(signal.Signals) else str(-code)
    hint = ": often the system, out of memory" if -code == signal.SIGKILL else ""
    return f"its process was ended by {name}{hint}"


def log_path(experiment: Experiment, options: Options) -> Path:
    """Return the log file of an experiment at a scale; of several processes, and of other seeds, each has its own."""
    process = f"-process{rank()}" if rank() else ""
    seeds = "" if options.seeds is None else "-seeds-" + "-".join(map(str, sorted(options.seeds)))
    return options.workspace / "logs" / f"{experiment.id.replace('/', '-')}-{options.scale}{seeds}{process}.log"


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
    level = root.level
    root.addHandler(handler)
    root.setLevel(logging.INFO)
    logging.captureWarnings(True)
    try:
        yield
    finally:
        logging.captureWarnings(False)
        root.removeHandler(handler)
        root.setLevel(level)
        handler.close()
