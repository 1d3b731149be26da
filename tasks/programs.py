"""What a task family offers the runner, and how the runner finds it.

A family's ``run.py`` holds ``PROGRAMS``, a mapping from the names that configs use to :class:`Program`. A program
turns settings into jobs and a job into measurements; records, resuming and rendering are none of its business.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tasks.config import Experiment
from tasks.distributed import Devices
from tasks.errors import NotImplementedYet, UserError
from tasks.records import Measurement

_PACKAGES = {"ruler": "tasks.long_context.ruler", "helmet": "tasks.long_context.helmet"}


@dataclass(frozen=True)
class Job:
    """The smallest piece of work that is recorded, skipped or repeated as a whole."""

    system: str
    seed: int | None = None

    def __str__(self) -> str:
        return self.system if self.seed is None else f"{self.system} (seed {self.seed})"


@dataclass(frozen=True)
class Context:
    """What a job may use beside its settings.

    Attributes:
        workspace: folder for caches, checkpoints and logs; anything there may be deleted between runs.
        data_root: the local data folder, if one was given.
        say: prints one line of progress.
        models: folder for small models to keep beside the records, of this experiment and scale; None keeps none.
        devices: what a program that trains on several devices may use; see ``Program.distributed``.
    """

    workspace: Path
    data_root: Path | None
    say: Callable[[str], None]
    devices: Devices = Devices()
    models: Path | None = None


@dataclass(frozen=True)
class Program:
    """One way of running experiments.

    Attributes:
        settings: the dataclass that the settings of a scale must fit.
        jobs: settings to the jobs they ask for.
        run: one job to its measurements.
        identity: settings and data root to what else decides the outcome, such as the data source used; part of
            the config hash, so other data means other records.
        obstacle: settings and data root to why this machine cannot run them, or None.
        distributed: whether ``run`` may be called in several processes at once, one a device (``context.devices``).
        by_devices: whether the devices decide the outcome too, so that other devices mean other records.
        seeds_apart: whether jobs of different seeds may run at the same time, in processes that share the workspace.
        needs: settings to the ids of experiments whose runs this one uses, besides those of its base.
        uses_base: whether it uses the runs of its base, and not its settings alone.
    """

    settings: type
    jobs: Callable[[Any], Sequence[Job]]
    run: Callable[[Job, Any, Context], list[Measurement]]
    identity: Callable[[Any, Path | None], dict[str, Any]] = lambda settings, data_root: {}
    obstacle: Callable[[Any, Path | None], str | None] = lambda settings, data_root: None
    distributed: bool = False
    by_devices: bool = False
    seeds_apart: bool = False
    needs: Callable[[Any], Sequence[str]] = lambda settings: ()
    uses_base: bool = False


def is_implemented(experiment: Experiment) -> bool:
    """Tell whether code exists for the experiment's family and program, be it that it lacks a package here."""
    try:
        find_program(experiment)
    except NotImplementedYet:
        return False
    except UserError:
        return True
    return True


def find_program(experiment: Experiment) -> Program:
    """Return the program an experiment names.

    Raises:
        NotImplementedYet: the family or the program has no code.
        UserError: the code needs a package that is not installed.
    """
    module = _run_module(experiment)
    missing = f"{experiment.file}: {experiment.id} is not implemented yet"
    if module is None:
        raise NotImplementedYet(f"{missing}: the family {experiment.family!r} has no code")
    try:
        programs: dict[str, Program] = importlib.import_module(module).PROGRAMS
    except ImportError as error:
        raise UserError(f"{experiment.file}: {experiment.id} cannot run here: importing {module} failed: {error}; "
                        "pyproject.toml lists the packages it needs (extra: experiments)") from error
    if experiment.program not in programs:
        raise NotImplementedYet(
            f"{missing}: the family {experiment.family!r} has no program {experiment.program!r}, only "
            f"{', '.join(programs)}"
        )
    return programs[experiment.program]


def package_of(experiment: Experiment) -> str:
    """Return the package that holds the family's code, if there is any."""
    return _PACKAGES.get(experiment.family, f"tasks.{experiment.family}")


def _run_module(experiment: Experiment) -> str | None:
    package = package_of(experiment)
    try:
        found = importlib.util.find_spec(f"{package}.run")
    except ModuleNotFoundError:
        found = None
    return None if found is None else f"{package}.run"
