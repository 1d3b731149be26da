"""Configs and a task family made for the tests of the frame: config, records, runner, command line."""

from __future__ import annotations

import copy
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import tasks.programs
import tasks.records
from tasks.config import REPOSITORY, Experiment, load_experiment
from tasks.runner import Options

VALID: dict[str, Any] = {
    "experiment": "adasplash/fake",
    "paper": "AdaSplash",
    "item": "Table 0",
    "title": "A table made for the tests",
    "family": "helmet",
    "program": "fake",
    "notes": ["nothing is known"],
    "systems": {"a": "System A", "b_1.5": "System B"},
    "reported": {"source": "nowhere", "columns": ["system", "metric", "n", "value"],
                 "rows": [["a", "val_loss", 8, 3], ["b_1.5", "val_loss", 8, "oom"]]},
    "common": {},
    "scales": {"smoke": {}, "lab": {}, "paper": {}},
    "render": {"table": {"rows": ["system"], "columns": ["metric"], "metrics": ["val_loss"]}},
}  # fmt: skip

# What a job does is its system's name.
FAMILY = '''
import os
import signal
import time
from dataclasses import dataclass
from pathlib import Path

from tasks.errors import DataError
from tasks.programs import Job, Program
from tasks.records import Measurement


@dataclass(frozen=True)
class Settings:
    does: tuple[str, ...]
    seeds: tuple[int, ...] = (0,)
    value: float = 1.0
    obstacle: str | None = None
    needs: tuple[str, ...] = ()


def jobs(settings):
    if "bug" in settings.does:
        raise KeyError("a bug in jobs")
    return [Job(name, seed) for name in settings.does for seed in settings.seeds]


def run(job, settings, context):
    with (context.workspace.parent / "ran.txt").open("a") as handle:
        handle.write(f"{job}\\n")
    act = ACTS.get(job.system)
    measured = act and act()
    return [Measurement("val_loss", settings.value, "nats/token")] if measured is None else measured


def raises():
    raise RuntimeError("went wrong\\nsecond line")


def raises_when_told():
    if os.environ.get("FAKE_FAILS"):
        raises()


def meet():
    """Wait for another process that does the same."""
    folder = Path(os.environ["FAKE_PLACE"])
    (folder / f"gpu-{os.environ['CUDA_VISIBLE_DEVICES']}").touch()
    for _ in range(300):
        if len(list(folder.glob("gpu-*"))) >= 2:
            return
        time.sleep(0.05)
    raise TimeoutError("nobody came")


def wait():
    Path(os.environ["FAKE_PLACE"], "waits").touch()
    time.sleep(60)


def base():
    time.sleep(0.5)
    Path(os.environ["FAKE_PLACE"], "base").touch()


def after():
    if not Path(os.environ["FAKE_PLACE"], "base").exists():
        raise RuntimeError("too early")


def user_error():
    raise DataError("data.local: no folder lm/nowhere")


def interrupt():
    raise KeyboardInterrupt


def interrupt_as_lightning_does():
    try:
        raise KeyboardInterrupt
    except KeyboardInterrupt:
        raise SystemExit(1)


def leave():
    raise SystemExit(3)


def kill():
    os.kill(os.getpid(), signal.SIGKILL)


def not_finite():
    return [Measurement("val_loss", float("nan"), "nats/token")]


def not_json():
    return [Measurement("val_loss", 1.0, "nats/token", {"dtype": object()})]


def infinite_param():
    return [Measurement("val_loss", 1.0, "nats/token", {"limit": float("inf")})]


def out_of_memory():
    return [Measurement("val_loss", None, "nats/token", status="oom")]


ACTS = {f.__name__: f for f in (raises, raises_when_told, user_error, interrupt, interrupt_as_lightning_does, leave,
                                kill, not_finite, not_json, infinite_param, out_of_memory, meet, wait, base, after)}
ACTS["nothing"] = list

PROGRAMS = {
    "fake": Program(Settings, jobs, run,
                    identity=lambda settings, data_root: {"data": data_root.name if data_root else "embedded"},
                    obstacle=lambda settings, data_root: settings.obstacle),
    "shared": Program(Settings, jobs, run, distributed=True),
    "apart": Program(Settings, jobs, run, seeds_apart=True),
    "using": Program(Settings, jobs, run, uses_base=True, needs=lambda settings: settings.needs),
}
'''

# Lets children find the family too, and spares them the seconds that importing torch takes.
SITECUSTOMIZE = f'''
import sys
sys.path[:0] = [{str(REPOSITORY)!r}]
import tasks.programs, tasks.records
tasks.programs._PACKAGES["helmet"] = "fake_family"
tasks.records.environment = lambda: {{"gpu": None, "driver": None, "torch": "0", "triton": None, "python": "3"}}
'''


@pytest.fixture
def write_config(tmp_path: Path) -> Callable[..., Path]:
    """Write a valid config below ``configs`` in tmp_path, after a function has changed its content."""

    def write(identity: str = "adasplash/fake", change: Callable[[dict], Any] = lambda config: None) -> Path:
        config = copy.deepcopy(VALID) | {"experiment": identity}
        change(config)
        path = tmp_path / "configs" / f"{identity}.yaml"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(yaml.safe_dump(config, sort_keys=False), encoding="utf-8")
        return path

    return write


@pytest.fixture
def fake_family(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stand a family in for helmet, in this process and in its children."""
    package = tmp_path / "import" / "fake_family"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    (package / "run.py").write_text(textwrap.dedent(FAMILY), encoding="utf-8")
    (package.parent / "sitecustomize.py").write_text(SITECUSTOMIZE, encoding="utf-8")
    monkeypatch.syspath_prepend(package.parent)
    monkeypatch.setenv("PYTHONPATH", str(package.parent))
    monkeypatch.delenv("ADASPLASH_DATA", raising=False)
    monkeypatch.setitem(tasks.programs._PACKAGES, "helmet", "fake_family")
    for name in ("fake_family", "fake_family.run"):
        monkeypatch.delitem(sys.modules, name, raising=False)


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> dict[str, str | None]:
    """What records say of the machine; change it to be on another one."""
    found: dict[str, str | None] = {"gpu": None, "driver": None, "torch": "0", "triton": None, "python": "3"}
    monkeypatch.setattr(tasks.records, "environment", lambda: dict(found))
    return found


@pytest.fixture
def options(tmp_path: Path) -> Options:
    """A run at smoke scale with results in tmp_path."""
    return Options("smoke", results=tmp_path / "results")


@pytest.fixture
def make_fake(write_config: Callable[..., Path], fake_family: None, machine: dict) -> Callable[..., Experiment]:
    """Make an experiment whose jobs do what they are told, in this order."""

    def make(*does: str, identity: str = "adasplash/fake", **settings: Any) -> Experiment:
        def change(config: dict) -> None:
            config["common"] = {"does": list(does), **settings}

        path = write_config(identity, change)
        return load_experiment(path, path.parents[1])

    return make


@pytest.fixture
def ran(tmp_path: Path) -> Callable[[], list[str]]:
    """Return the jobs that ran since it was last asked."""

    def jobs() -> list[str]:
        path = tmp_path / "results" / "ran.txt"
        lines = path.read_text().splitlines() if path.exists() else []
        path.unlink(missing_ok=True)
        return lines

    return jobs


@pytest.fixture(autouse=True)
def few_threads() -> Iterator[None]:
    """Tiny tensors gain nothing from threads, and lose much on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
