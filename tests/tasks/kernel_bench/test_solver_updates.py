"""Updates counted: against a bisection worked out by hand, and against the definition of each quantity."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch

import tasks.kernel_bench.solver_updates as program
from adasplash_kernels.eager import solve_theta
from adasplash_kernels.reference import entmax_reference
from tasks.__main__ import main
from tasks.config import CONFIGS, from_plain, load_experiment
from tasks.errors import ConfigError
from tasks.kernel_bench.solver_updates import TRAINING, Stop, UpdateSettings, count_updates, factor_for
from tasks.programs import Context
from tasks.records import read_records, records_path
from tasks.render import render_experiment

TINY: dict[str, Any] = {
    "measure": ["bisection_torch", "adasplash2"],
    "inputs": {"rows": 6, "n": 50, "dtype": "float32", "alpha": 1.5, "data": "gaussian", "score_variance": 4.0,
               "bins": 8, "seed": 0},
    "stop": {"tau_abs_error": 1e-6, "max_updates": 40},
    "sweeps": {"bins": [2, 32], "score_variance": [1, 100], "sparsity": [50, 90], "n": [20, 50]},
    "training_trace": {"run": "adasplash/table4", "system": "entmax_1.5", "steps": 20, "every_steps": 10,
                       "sequences": 1, "captures": "captured/tiny"},
}  # fmt: skip


def plain(**changes: Any) -> dict[str, Any]:
    values = copy.deepcopy(TINY)
    for key, change in changes.items():
        values[key] = values[key] | change if isinstance(change, dict) else change
    return values


def settings(**changes: Any) -> UpdateSettings:
    return from_plain(UpdateSettings, plain(**changes), "test.yaml")


def measured(wanted: UpdateSettings, tmp_path: Path) -> dict:
    """Return everything but the training trace, by system, sweep, point and metric."""
    context = Context(tmp_path, None, lambda line: None)
    return {(job.system, m.params["sweep"], m.params["point"], m.metric): m for job in program.jobs(wanted)
            if job.sweep != TRAINING for m in program.solver_updates(job, wanted, context)}  # fmt: skip


def test_bisection_by_hand():
    """Two equal scores, alpha 2: tau = -1/2, the first estimate -1, then half as far each time: after 6, 1/128."""
    scores = torch.zeros(3, 2)
    counted = count_updates("bisection_torch", scores, 2.0, 8, Stop(0.01, 10))
    assert counted.updates.tolist() == [6, 6, 6]
    assert counted.error.tolist() == pytest.approx([0.5 / 2**10] * 3)
    assert (counted.unreached, counted.sparsity) == (0, 0)


def test_a_row_that_never_gets_there_counts_the_most():
    """The second row's scores decide at once: its first estimate is the threshold, no update is needed."""
    scores = torch.tensor([[0.0, 0.0], [0.0, -9.0]])
    counted = count_updates("bisection_torch", scores, 2.0, 8, Stop(0.01, 3))
    assert counted.updates.tolist() == [3, 0]
    assert counted.unreached == 1
    assert counted.sparsity == 25  # one weight of four


def test_large_scores_are_done_at_their_own_resolution():
    """Two units in the last place at theta = 4096 are 2^-10; alpha 2: tau = theta - 1, and 1e-6 cannot be met."""
    scores = 4096 + torch.randn(20, 30, generator=torch.Generator().manual_seed(0))
    counted = count_updates("adasplash", scores, 2.0, 8, Stop(1e-6, 30))
    assert counted.unreached == 0
    assert 1e-6 < float(counted.error.max()) <= 2**-10
    assert float(counted.updates.max()) <= 6


def test_scores_that_are_not_seen_count_for_nothing():
    scores = torch.tensor([[1.0, 0.5, -8.0], [1.0, 0.5, -math.inf]])
    assert count_updates("adasplash", scores, 1.5, 8, Stop(1e-6, 20)).sparsity == pytest.approx(100 / 5)


def test_rows_by_bands_are_the_same(monkeypatch):
    scores = torch.randn(7, 30, generator=torch.Generator().manual_seed(0))
    whole = count_updates("columns", scores, 1.5, 8, Stop(1e-6, 20))
    monkeypatch.setattr("tasks.kernel_bench.rows.BATCH", 70)  # two rows at a time
    parts = count_updates("columns", scores, 1.5, 8, Stop(1e-6, 20))
    assert torch.equal(whole.updates, parts.updates) and torch.equal(whole.error, parts.error)


@pytest.mark.parametrize("level", [20, 50, 90])
def test_factor_for(level):
    scores = torch.randn(40, 60, generator=torch.Generator().manual_seed(0))
    p = entmax_reference(factor_for(scores, 1.5, level) * scores, 1.5)
    assert 100 * float((p == 0).double().mean()) == pytest.approx(level, abs=0.1)


def test_every_point_has_its_numbers(tmp_path):
    found = measured(settings(), tmp_path)
    points = {"bins": (2, 32), "score variance": (1, 100), "nonzero weights (%)": (50, 10), "length": (20, 50)}
    assert set(found) == {(s, sweep, p, m) for s in TINY["measure"] for sweep, ps in points.items() for p in ps
                          for m in program.METRICS}  # fmt: skip
    for (system, sweep, point, metric), m in found.items():
        assert m.status == "ok"
        assert m.params["rows"] == 6 and m.params["rows_seed"] == 0
        if metric == "sparsity" and sweep.startswith("nonzero"):
            assert m.value == pytest.approx(100 - point, abs=0.4)  # one weight of 300 more or less
        if metric == "updates":
            assert m.value <= found[system, sweep, point, "updates_max"].value == m.stats["max"]
            assert m.stats["unreached"] == 0
    bins = [found["adasplash2", "bins", b, "updates"].value for b in (2, 32)]
    assert bins[0] > bins[1]
    assert len({found["bisection_torch", "bins", b, "updates"].value for b in (2, 32)}) == 1
    variance = [found["adasplash2", "score variance", v, "sparsity"].value for v in (1, 100)]
    assert variance[0] < variance[1]
    assert found["adasplash2", "length", 20, "sparsity"].params["n"] == 20


def test_points_of_one_length_are_the_same_rows(tmp_path):
    """The shared point, reached by two sweeps, gives the same numbers; their seeds tell the jobs apart."""
    found = measured(settings(sweeps={"bins": [8], "score_variance": [4], "n": [50]}), tmp_path)
    values = [[found["adasplash2", sweep, p, m].value for m in program.METRICS]
              for sweep, p in (("bins", 8), ("score variance", 4.0), ("length", 50))]  # fmt: skip
    assert values[0] == values[1] == values[2]
    jobs = program.jobs(settings())
    assert len({(j.system, j.seed) for j in jobs}) == len(jobs) == 2 * 9


def test_the_rows_are_those_of_the_records(tmp_path):
    """Updates of one point, counted again from rows drawn apart."""
    found = measured(settings(), tmp_path)
    rows = program._gaussian(6, 50, 0) * 10.0
    exact = solve_theta(rows.double(), 1.5)[:, 0]
    needed = []
    for row in range(6):
        for count, theta in enumerate(program.SOLVERS["bisection_torch"](rows[row : row + 1], 1.5, 8)):
            if abs(float(0.5 * (theta - exact[row]))) <= max(1e-6, 0.5 * 2 * 2**-23 * 2 ** math.floor(
                    math.log2(abs(float(exact[row]))))):  # fmt: skip
                needed.append(count)
                break
    m = found["bisection_torch", "score variance", 100.0, "updates"]
    assert m.value == pytest.approx(sum(needed) / 6)


def test_out_of_memory_is_recorded(tmp_path, monkeypatch):
    def short(*arguments):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 TiB. GPU 0 has less")

    monkeypatch.setattr(program, "count_updates", short)
    found = measured(settings(), tmp_path)
    assert {(m.status, m.params["reason"][:13]) for m in found.values()} == {("oom", "out of memory")}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"measure": ["sort_torch"]}, "measure[0]: got 'sort_torch', allowed are bisection_torch, adasplash"),
        ({"inputs": {"bins": 1}}, "inputs.bins: got 1, allowed is 2 or more"),
        ({"inputs": {"dtype": "bfloat16"}}, "inputs.dtype: got 'bfloat16', allowed are float32, float64"),
        ({"inputs": {"score_variance": 0}}, "inputs.score_variance: got 0"),
        ({"inputs": {"data": "uniform"}}, "inputs.data: got 'uniform', allowed is gaussian"),
        ({"inputs": {"alpha": 1}}, "inputs.alpha: got 1"),
        ({"stop": {"tau_abs_error": 0}}, "stop.tau_abs_error: got 0"),
        ({"stop": {"max_updates": 0}}, "stop.max_updates: got 0"),
        ({"sweeps": {"bins": [1]}}, "sweeps.bins[0]: got 1"),
        ({"sweeps": {"n": []}}, "sweeps.n: got []"),
        ({"sweeps": {"score_variance": [1, -1]}}, "sweeps.score_variance[1]: got -1"),
        ({"sweeps": {"sparsity": [99]}}, "sweeps.sparsity[0]: got 99.0, allowed is above 0 to 98, where one weight"),
        ({"sweeps": {"sparsity": [0]}}, "sweeps.sparsity[0]: got 0"),
        ({"training_trace": {"every_steps": 30}}, "training_trace.every_steps: got 30, allowed is 1 to steps (20)"),
        ({"training_trace": {"sequences": 0}}, "training_trace.sequences: got 0"),
        ({"training_trace": {"captures": ""}}, "training_trace.captures: got ''"),
    ],
)  # fmt: skip
def test_refused(changes, message):
    with pytest.raises(ConfigError) as caught:
        settings(**changes)
    assert message in str(caught.value)


def test_obstacle(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert program.obstacle(settings(), None) is None
    assert program.obstacle(settings(sweeps={"n": [2**20]}), None) == "needs a GPU: 6e+06 scores"


def test_the_smoke_run(tmp_path, monkeypatch):
    """The real config through the command line: every point, and a trace that says what is missing."""
    monkeypatch.delenv("ADASPLASH_DATA", raising=False)
    monkeypatch.chdir(tmp_path)  # where no training has left anything
    experiment = load_experiment(CONFIGS / "adasplash2" / "iterations.yaml")
    assert main(["run", str(experiment.path), "--scale", "smoke", "--results", str(tmp_path), "--no-render"]) == 0
    found = read_records(records_path(tmp_path, experiment.id, "smoke"))
    assert {r.status for r in found if r.params["sweep"] != TRAINING} == {"ok"}
    trace = [r for r in found if r.params["sweep"] == TRAINING]
    assert {r.status for r in trace} == {"not_applicable"}
    assert "first train entmax_1.5 of adasplash/table4 at this scale" in trace[0].params["reason"]
    assert len({(r.system, r.params["sweep"], r.params["point"]) for r in found}) == 4 * (2 * 4 + 1)
    table = next(f for f in render_experiment(experiment, tmp_path, lambda e: True) if f.suffix == ".md")
    assert "several measurements" not in table.read_text(encoding="utf-8")
