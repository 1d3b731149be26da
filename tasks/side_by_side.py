"""Experiments side by side, one a GPU: each in a process of its own that sees that GPU alone.

An experiment starts once those whose runs it uses have ended. Where seeds are apart (``Program.seeds_apart``) those of
one experiment are spread over the GPUs too.
"""

from __future__ import annotations

import os
import signal
import subprocess
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from tasks.config import Experiment
from tasks.errors import ConfigError, UserError
from tasks.programs import find_program
from tasks.runner import DONE, FAILED, SKIPPED, Options, Outcome, plan, run_in_child

_VISIBLE = "CUDA_VISIBLE_DEVICES"
_GRACE = 5.0  # seconds: a terminal interrupts the children too, and twice would cut off how they end


@dataclass(frozen=True)
class Part:
    """What one process does: an experiment, or some seeds of it."""

    experiment: Experiment
    seeds: tuple[int, ...] | None = None

    def __str__(self) -> str:
        if self.seeds is None:
            return self.experiment.id
        return f"{self.experiment.id}, seed{'s' * (len(self.seeds) != 1)} {', '.join(map(str, self.seeds))}"


@dataclass
class _State:
    """What the workers share; ``changed`` guards all of it."""

    waiting: list[Part]
    parts: int
    needs: dict[str, set[str]]
    left: dict[str, int]  # parts of each experiment that have not ended
    ended: list[tuple[Part, str, str, float]] = field(default_factory=list)
    stopped: bool = False
    error: BaseException | None = None
    processes: list[subprocess.Popen] = field(default_factory=list)
    changed: threading.Condition = field(default_factory=threading.Condition)

    def ready(self) -> Part | None:
        return next((p for p in self.waiting if not any(self.left.get(e) for e in self.needs[p.experiment.id])), None)


def run_side_by_side(experiments: Sequence[Experiment], options: Options, gpus: int) -> list[Outcome]:
    """Run experiments on several GPUs; a crash stops only one.

    Raises:
        ConfigError: there are GPUs here, but fewer.
        KeyboardInterrupt: passed on once the processes have ended; finished jobs are recorded.
    """
    devices = visible_devices(gpus)
    parts = [part for experiment in experiments for part in parts_of(experiment, options, gpus)]
    state = _State(list(parts), len(parts), order_of(experiments, options),
                   {e.id: sum(p.experiment is e for p in parts) for e in experiments})  # fmt: skip
    threads = os.environ.get("OMP_NUM_THREADS") or max(1, (os.cpu_count() or 1) // gpus)
    workers = [threading.Thread(target=_work, args=(state, options, device, str(threads)), daemon=True)
               for device in devices]  # fmt: skip
    for worker in workers:
        worker.start()
    try:
        for worker in workers:
            while worker.is_alive():
                worker.join(0.2)  # so that an interruption is noticed
    except KeyboardInterrupt:
        _stop(state, workers)
        raise
    if state.error is not None:
        raise state.error
    in_order = sorted(state.ended, key=lambda ended: parts.index(ended[0]))
    return [_merged(e, [x for x in in_order if x[0].experiment is e]) for e in experiments]


def _stop(state: _State, workers: Sequence[threading.Thread]) -> None:
    """Return when all processes have ended; those that go on after ``_GRACE`` are interrupted."""
    with state.changed:
        state.stopped = True
        state.changed.notify_all()
    late = time.monotonic() + _GRACE
    for worker in workers:
        worker.join(max(0.0, late - time.monotonic()))
    for process in state.processes:
        if process.poll() is None:
            process.send_signal(signal.SIGINT)
    for worker in workers:
        worker.join()


def visible_devices(gpus: int) -> list[str]:
    """Name the GPUs to use, as ``CUDA_VISIBLE_DEVICES`` names them; without any, the processes share the CPU.

    Raises:
        ConfigError: there are some, but fewer.
    """
    import torch

    there = torch.cuda.device_count()
    if 0 < there < gpus:
        raise ConfigError(f"--gpus: got {gpus}, allowed here is 1 to {there}")
    given = [x.strip() for x in os.environ.get(_VISIBLE, "").split(",") if x.strip()]
    return given[:gpus] if there and len(given) >= gpus else [str(i) for i in range(gpus)]


def parts_of(experiment: Experiment, options: Options, gpus: int) -> list[Part]:
    """Divide an experiment by what is due of its seeds, where they are apart, into at most ``gpus`` parts."""
    try:
        jobs = plan(experiment, options)[2] if find_program(experiment).seeds_apart else []
    except Exception:  # its process says what is wrong
        jobs = []
    seeds = list(dict.fromkeys(job.seed for job, _, fresh in jobs if not fresh and job.seed is not None))
    if len(seeds) < 2:
        return [Part(experiment)]
    return [Part(experiment, tuple(seeds[i::gpus])) for i in range(min(gpus, len(seeds)))]


def order_of(experiments: Sequence[Experiment], options: Options) -> dict[str, set[str]]:
    """Return for each experiment the ids of those that are to end before it starts.

    Where several use the runs of one that is not among them, the first of them makes these runs.
    """
    ids = {e.id for e in experiments}
    order: dict[str, set[str]] = {}
    makers: dict[str, str] = {}
    for experiment in experiments:
        needs = needs_of(experiment, options) - {experiment.id}
        for missing in needs - ids:
            if (maker := makers.setdefault(missing, experiment.id)) != experiment.id:
                needs.add(maker)
        order[experiment.id] = needs
    return order


def needs_of(experiment: Experiment, options: Options) -> set[str]:
    """Return the ids of experiments that are to end first."""
    try:
        program = find_program(experiment)
        settings = experiment.typed_settings(options.scale, program.settings)
    except UserError:  # as above
        return set()
    base = {experiment.base} if program.uses_base and experiment.base else set()
    return base | set(program.needs(settings))


def _work(state: _State, options: Options, device: str, threads: str) -> None:
    while True:
        with state.changed:
            while not state.stopped and state.waiting and state.ready() is None:
                state.changed.wait()
            part = None if state.stopped else state.ready()
            if part is None:
                return
            state.waiting.remove(part)
            number = state.parts - len(state.waiting)
            print(f"[{number}/{state.parts}] GPU {device}: {part}: {part.experiment.title}", flush=True)
        started, error = time.monotonic(), None
        own = options if part.seeds is None else replace(options, seeds=frozenset(part.seeds))
        try:
            ended = run_in_child(part.experiment, own, {_VISIBLE: device, "OMP_NUM_THREADS": threads},
                                 lambda line, part=part: print(f"  {part}: {line.strip()}", flush=True),
                                 state.processes.append)  # fmt: skip
        except BaseException as raised:  # an interruption of the child, too
            ended, error = (FAILED, f"{type(raised).__name__}: {raised}"), raised
        print(f"  {part}: {ended[0]}{': ' + ended[1] if ended[1] else ''}", flush=True)
        with state.changed:
            state.ended.append((part, *ended, time.monotonic() - started))
            state.left[part.experiment.id] -= 1
            if error is not None:
                state.error, state.stopped = state.error or error, True
            state.changed.notify_all()


def _merged(experiment: Experiment, ended: Sequence[tuple[Part, str, str, float]]) -> Outcome:
    """Put the outcomes of an experiment's parts together; the seconds are those of the longest."""
    states = [state for _, state, _, _ in ended]
    state = FAILED if FAILED in states else DONE if DONE in states else SKIPPED
    own = [(part, detail) for part, s, detail, _ in ended if s == state and detail]
    detail = own[0][1] if len(ended) == 1 and own else "; ".join(
        f"{str(part).removeprefix(experiment.id + ', ')}: {detail}" for part, detail in own)
    return Outcome(experiment, state, detail, max(seconds for *_, seconds in ended))
