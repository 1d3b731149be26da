"""Running many seeds in worker processes, of which any may crash or hang without losing the others' results."""

from __future__ import annotations

import contextlib
import math
import multiprocessing
import signal
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait

_SPAWN = multiprocessing.get_context("spawn")  # CUDA does not survive a fork


@dataclass(frozen=True)
class Outcome:
    """How a case ended.

    Attributes:
        ratio: largest error / allowed over the compared tensors; None if there was nothing finite to compare.
        failure: what went wrong, None if nothing did.
    """

    ratio: float | None
    failure: str | None = None


Run = Callable[[int], Outcome]


@dataclass
class Report:
    """What a number of cases gave.

    Attributes:
        asked: number of cases that were to run.
        ran: how many did.
        failures: outcomes that failed, by seed.
        worst: the largest finite ratio and its seed, None before there is one.
    """

    asked: int
    ran: int = 0
    failures: dict[int, Outcome] = field(default_factory=dict)
    worst: tuple[float, int] | None = None

    def add(self, seed: int, outcome: Outcome) -> None:
        """Count one more case."""
        self.ran += 1
        if outcome.failure is not None:
            self.failures[seed] = outcome
        ratio = outcome.ratio
        if ratio is not None and math.isfinite(ratio) and (self.worst is None or ratio > self.worst[0]):
            self.worst = (ratio, seed)

    @property
    def passed(self) -> bool:
        """Whether every case that was asked for ran and none failed."""
        return self.ran == self.asked and not self.failures


class _Worker:
    """A process that runs one seed at a time."""

    def __init__(self, run: Run) -> None:
        self.connection, theirs = _SPAWN.Pipe()
        self.process = _SPAWN.Process(target=_serve, args=(theirs, run), daemon=True)
        self.process.start()
        theirs.close()  # so that the end of the process ends the connection
        self.seed: int | None = None
        self.since = math.inf

    def give(self, seed: int) -> None:
        """Send the next seed; a worker that has just died is found out when it does not answer."""
        self.seed, self.since = seed, time.monotonic()
        with contextlib.suppress(OSError):
            self.connection.send(seed)

    def take(self) -> tuple[Outcome, bool]:
        """Return the outcome of its seed, and whether the worker can go on."""
        try:
            return self.connection.recv()
        except (EOFError, OSError):
            self.process.join()
            return Outcome(None, _ending(self.process.exitcode)), False

    def stop(self) -> None:
        """End the process, whatever it is doing."""
        self.process.kill()
        self.process.join()
        self.connection.close()


def _serve(connection: Connection, run: Run) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides
    while True:
        try:
            seed = connection.recv()
        except EOFError:
            return
        outcome = run(seed)
        # an illegal access leaves every later call of the process failing
        usable = outcome.failure is None or _device_works()
        connection.send((outcome, usable))
        if not usable:
            return


def _device_works() -> bool:
    torch = sys.modules.get("torch")  # whoever used a device has imported it
    if torch is None or not torch.cuda.is_initialized():
        return True
    try:
        torch.zeros(1, device="cuda").item()
    except RuntimeError:
        return False
    return True


def run_cases(
    run: Run, seeds: Iterable[int], *, workers: int, seconds: float, case_seconds: float,
    tell: Callable[[Report], None] = lambda report: None,
) -> Report:  # fmt: skip
    """Run seeds over worker processes until they are through or the time is up.

    Args:
        run: a function of a seed, importable where the workers start.
        seeds: what to run, each once, in this order.
        workers: number of processes.
        seconds: after these no further seed is started; those under way are awaited.
        case_seconds: a case that takes longer has failed, and its worker is replaced.
        tell: called after each case.
    """
    waiting = deque(seeds)
    report, started = Report(asked=len(waiting)), time.monotonic()
    team: list[_Worker] = []
    try:
        while True:
            if time.monotonic() - started > seconds:
                waiting.clear()
            for worker in team:
                if worker.seed is None and waiting:
                    worker.give(waiting.popleft())
            while waiting and len(team) < workers:
                team.append(_Worker(run))
                team[-1].give(waiting.popleft())
            busy = [w for w in team if w.seed is not None]
            if not busy:
                return report
            ready = wait([w.connection for w in busy], timeout=1)
            for worker in busy:
                if worker.connection in ready:
                    outcome, usable = worker.take()
                elif time.monotonic() - worker.since > case_seconds:
                    outcome, usable = Outcome(None, f"did not end within {case_seconds:g} seconds"), False
                else:
                    continue
                report.add(worker.seed, outcome)
                worker.seed = None
                tell(report)
                if not usable:
                    worker.stop()
                    team.remove(worker)
    except KeyboardInterrupt:
        return report
    finally:
        for worker in team:
            worker.stop()


def _ending(code: int | None) -> str:
    how = f"signal {-code}" if code is not None and code < 0 else f"exit status {code}"
    return f"the worker process ended with {how}"
