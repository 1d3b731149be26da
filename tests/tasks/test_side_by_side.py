"""Experiments side by side, a process a GPU; without GPUs the processes share the CPU."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import tasks.side_by_side as module
from tasks.__main__ import main
from tasks.config import CONFIGS, Experiment, load_experiment
from tasks.errors import ConfigError
from tasks.records import read_records, records_path
from tasks.runner import DONE, FAILED, SKIPPED
from tasks.side_by_side import needs_of, parts_of, run_side_by_side, visible_devices


@pytest.fixture
def place(tmp_path, monkeypatch) -> Path:
    """Where processes meet."""
    folder = tmp_path / "place"
    folder.mkdir()
    monkeypatch.setenv("FAKE_PLACE", str(folder))
    return folder


@pytest.fixture
def make(write_config, fake_family, machine, place, monkeypatch) -> Callable[..., Experiment]:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)  # what runs is no work for a GPU, however many there are

    def experiment(name: str, *does: str, program: str = "fake", base: str | None = None, **settings) -> Experiment:
        def change(config: dict) -> None:
            config.update(program=program, common={"does": list(does), **settings})

        path = write_config(f"adasplash/{name}", change)
        found = load_experiment(path, path.parents[1])
        return replace(found, base=f"adasplash/{base}") if base else found  # children look for it in configs/

    return experiment


def recorded(experiment: Experiment, options) -> list[tuple]:
    return sorted((r.system, r.seed, r.status)
                  for r in read_records(records_path(options.results, experiment.id, options.scale)))  # fmt: skip


def test_two_run_at_a_time_each_on_its_gpu(make, options, place, capsys):
    one, other, third = make("one", "meet"), make("other", "meet"), make("third", "a")
    outcomes = run_side_by_side([one, other, third], options, 2)
    assert [(o.experiment, o.state, o.detail) for o in outcomes] == [
        (e, DONE, "jobs run: 1, up to date: 0") for e in (one, other, third)]  # fmt: skip
    assert sorted(p.name for p in place.iterdir()) == ["gpu-0", "gpu-1"]
    out = capsys.readouterr().out
    assert "GPU 0: adasplash/one: A table made for the tests\n" in out and "[3/3] GPU " in out
    assert "  adasplash/other: meet (seed 0): job 1 of 1\n" in out
    assert "  adasplash/third: done: jobs run: 1, up to date: 0\n" in out
    assert [o.state for o in run_side_by_side([one, other, third], options, 2)] == [SKIPPED] * 3


def test_seeds_that_are_apart_are_spread(make, options):
    experiment = make("apart", "a", "raises", program="apart", seeds=[0, 1, 2])
    parts = parts_of(experiment, options, 2)
    assert [str(p) for p in parts] == ["adasplash/apart, seeds 0, 2", "adasplash/apart, seed 1"]
    assert [p.seeds for p in parts_of(experiment, options, 4)] == [(0,), (1,), (2,)]
    [outcome] = run_side_by_side([experiment], options, 2)
    assert outcome.state == FAILED
    assert outcome.detail.startswith("seeds 0, 2: 2 of 4 jobs, the first: raises (seed 0): RuntimeError: went wrong")
    assert "; seed 1: 1 of 2 jobs, the first: raises (seed 1)" in outcome.detail
    assert recorded(experiment, options) == [("a", i, "ok") for i in range(3)] + [("raises", i, "failed")
                                                                                  for i in range(3)]  # fmt: skip
    assert parts_of(make("whole", "a", seeds=[0, 1, 2]), options, 2)[0].seeds is None
    only = replace(options, seeds=frozenset([1, 2]))
    assert [p.seeds for p in parts_of(experiment, only, 4)] == [(1,), (2,)]


@pytest.mark.parametrize("how", ["base", "needs"])
def test_what_uses_the_runs_of_another_comes_after_it(make, options, how):
    first = make("first", "base", program="apart", seeds=[0, 1])
    link = {"base": "first"} if how == "base" else {"needs": ["adasplash/first"]}
    second = make("second", "after", program="using", **link)
    free = make("free", "a", base="first")
    assert needs_of(second, options) == {"adasplash/first"} and needs_of(free, options) == set()
    outcomes = run_side_by_side([second, first, free], options, 4)
    assert [o.state for o in outcomes] == [DONE] * 3, [o.detail for o in outcomes]


def test_of_those_that_use_the_same_absent_runs_one_makes_them(make, options):
    one, other, third = (make(name, does, program="using", base="absent")
                         for name, does in (("one", "base"), ("other", "after"), ("third", "after")))  # fmt: skip
    assert [o.state for o in run_side_by_side([one, other, third], options, 3)] == [DONE] * 3


def test_what_fails_stops_nothing_else(make, options, capfd):
    broken, refused, killed, last = (make("broken", "bug"), make("refused", "a", obstacle="needs a GPU"),
                                     make("killed", "kill"), make("last", "a"))  # fmt: skip
    outcomes = run_side_by_side([broken, refused, killed, last], options, 2)
    assert [o.state for o in outcomes] == [FAILED, FAILED, FAILED, DONE]
    assert outcomes[1].detail.endswith("cannot run here: needs a GPU")
    assert "SIGKILL" in outcomes[2].detail
    assert "KeyError" in capfd.readouterr().out  # what a child writes to stderr too is told as its own


def test_an_interruption_ends_all(make, options, ran):
    with pytest.raises(KeyboardInterrupt):
        run_side_by_side([make("first", "interrupt"), *(make(f"later{i}", "a") for i in range(3))], options, 1)
    assert ran() == ["interrupt (seed 0)"]


@pytest.fixture
def interruptible() -> Iterator[None]:
    """Take SIGINT as Python does, also where a shell has started pytest in the background, which ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_children_are_interrupted_with_their_parent(make, options, place, monkeypatch, interruptible):
    """Also where it alone is told, not by a terminal."""
    monkeypatch.setattr(module, "_GRACE", 0.1)

    def tell() -> None:
        while not (place / "waits").exists():
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=tell, daemon=True).start()
    started = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        run_side_by_side([make("long", "wait"), make("later", "a")], options, 1)
    assert time.monotonic() - started < 40
    assert recorded(make("long", "wait"), options) == []


def test_gpus_there_are(monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    for there, asked, names in ((0, 2, ["0", "1"]), (4, 2, ["0", "1"]), (2, 2, ["0", "1"])):
        monkeypatch.setattr(torch.cuda, "device_count", lambda there=there: there)
        assert visible_devices(asked) == names
    with pytest.raises(ConfigError, match="--gpus: got 3, allowed here is 1 to 2"):
        visible_devices(3)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5, GPU-a")
    assert visible_devices(2) == ["5", "GPU-a"]


def test_real_experiments_know_what_they_use(options):
    def needs(name: str) -> set[str]:
        return needs_of(load_experiment(CONFIGS / f"{name}.yaml"), replace(options, scale="lab"))

    assert needs("adasplash/figure6") == needs("adasplash/table4_texts") == {"adasplash/table4"}
    assert needs("adasplash2/iterations") == {"adasplash/table4"}
    assert needs("adasplash/table4") == needs("adasplash/table4_cost") == needs("adasplash/table4_devices") == set()
    assert [p.seeds for p in parts_of(load_experiment(CONFIGS / "adasplash/table4.yaml"), options, 3)] == [None]


def test_the_command_line(make, options, monkeypatch, capsys):
    asked = []
    monkeypatch.setattr(module, "run_side_by_side", lambda experiments, options, gpus: asked.append(
        ([e.id for e in experiments], gpus)) or [])  # fmt: skip
    one, two = make("one", "a").path, make("two", "a").path
    results = ["--results", str(options.results), "--no-render"]
    for configs, gpus in (([one], 2), ([one, two], 3)):
        assert main(["run", *map(str, configs), *results, "--gpus", str(gpus)]) == 0
    assert asked == [(["adasplash/one"], 2), (["adasplash/one", "adasplash/two"], 3)]
    capsys.readouterr()
    for arguments, message in ((["--gpus", "0"], "--gpus: got 0, allowed is 1 or more"),
                               (["--gpus", "2", "--devices", "2"], "--devices: got 2 on 1 node(s), but")):
        assert main(["run", str(one), *results, *arguments]) == 2
        assert message in capsys.readouterr().err


def test_threads_are_shared(make, options, monkeypatch):
    seen = []
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    monkeypatch.setattr(module, "run_in_child", lambda e, o, environment, *_: seen.append(environment) or (DONE, ""))
    for given, expected in (("", "4"), ("3", "3")):
        monkeypatch.setenv("OMP_NUM_THREADS", given)
        run_side_by_side([make(f"e{i}", "a") for i in range(2)], options, 2)
        assert {x["OMP_NUM_THREADS"] for x in seen} == {expected}
        seen.clear()
