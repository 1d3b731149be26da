"""Entmax of rows: what is recorded of systems that run, and of those that do not or are wrong."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import tasks.kernel_bench.rowwise as program
from adasplash_kernels import entmax
from adasplash_kernels.reference import entmax_reference
from tasks.__main__ import main
from tasks.config import CONFIGS, from_plain, load_experiment
from tasks.errors import ConfigError
from tasks.kernel_bench.problem import NotMeasured
from tasks.kernel_bench.rows import Rows, draw, exact_theta
from tasks.kernel_bench.rowwise import RowwiseSettings
from tasks.kernel_bench.rowwise_systems import SYSTEMS, bisection, kernels, sorting
from tasks.kernel_bench.solver_math import weights
from tasks.programs import Context
from tasks.records import read_records, records_path

ON_GPU = torch.cuda.is_available()
METRICS = ("fwd_ms", "peak_mib", "first_call_s", "rel_err")
TINY: dict[str, Any] = {
    "measure": ["sort_torch", "bisection_torch"],
    "inputs": {"rows": 5, "n": 40, "dtype": "float32", "alpha": 1.5, "data": "gaussian", "variance": 4.0, "seed": 3},
    "solver": {"bisection_torch": {"iterations": 30}},
    "timing": {"warmup": 1, "repeats": 3, "statistic": "mean"},
}


def plain(**changes: Any) -> dict[str, Any]:
    values = copy.deepcopy(TINY)
    for key, change in changes.items():
        values[key] = values[key] | change if isinstance(change, dict) else change
    return values


def out_of_memory(scores):
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 TiB. GPU 0 has less")


def unfit(*arguments):
    raise NotMeasured("takes no such thing")


class Late:
    """Right at its first calls, then broken."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, scores):
        self.calls += 1
        if self.calls > 3:
            raise RuntimeError("gone")
        return entmax(scores, method="eager")


@pytest.fixture(autouse=True)
def actors(monkeypatch):
    for name, build in {
        "wrong": lambda *a: lambda scores: 1.01 * entmax(scores, method="eager"),
        "nan": lambda *a: lambda scores: scores * float("nan"),
        "oom": lambda *a: out_of_memory,
        "unfit": unfit,
        "late": lambda *a: Late(),
    }.items():
        monkeypatch.setitem(SYSTEMS, name, build)


@pytest.fixture
def measure(tmp_path) -> Callable[..., dict]:
    """Run the program as the runner does; return measurements by system and metric."""

    def run(*systems: str, said: list[str] | None = None, **changes: Any) -> dict:
        settings = from_plain(RowwiseSettings, plain(measure=list(systems), **changes), "test.yaml")
        context = Context(tmp_path, None, (said if said is not None else []).append)
        return {(job.system, m.metric): m for job in program.jobs(settings)
                for m in program.rowwise_entmax(job, settings, context)}  # fmt: skip

    return run


def test_every_system_has_its_numbers(measure):
    found = measure("sort_torch", "bisection_torch")
    assert set(found) == {(s, m) for s in ("sort_torch", "bisection_torch") for m in METRICS}
    for (system, metric), m in found.items():
        assert m.status == ("not_applicable" if metric == "peak_mib" and not ON_GPU else "ok")
        assert (m.params["rows"], m.params["n"], m.params["variance"]) == (5, 40, 4.0)
        assert m.params.get("iterations") == (30 if system == "bisection_torch" else None)
    assert found["sort_torch", "fwd_ms"].value > 0
    assert found["sort_torch", "fwd_ms"].stats["n"] == 3
    assert found["sort_torch", "fwd_ms"].params["statistic"] == "mean"
    assert found["sort_torch", "rel_err"].value < 1e-6
    assert program._current is None  # no tensors are kept


def test_the_error_is_against_float64(measure):
    """Three halvings are far off: refused, with their error, which is that of a computation apart."""
    found = measure("bisection_torch", solver={"bisection_torch": {"iterations": 3}})
    scores = draw(Rows(5, 40, "float32", 1.5, "gaussian", 4.0), torch.Generator().manual_seed(3))
    exact = entmax_reference(scores, 1.5)
    expected = float((bisection(1.5, 3, torch.device("cpu"))(scores) - exact).norm() / exact.norm())
    assert expected > 1e-3
    assert found["bisection_torch", "rel_err"].value == pytest.approx(expected, rel=1e-3)
    assert found["bisection_torch", "fwd_ms"].status == "failed"
    assert found["bisection_torch", "fwd_ms"].params["reason"].startswith("wrong result: it is off by ")


@pytest.mark.parametrize(
    ("system", "status", "reason"),
    [("oom", "oom", "out of memory: CUDA out of memory"), ("unfit", "not_applicable", "takes no such thing"),
     ("wrong", "failed", "wrong result: it is off by 0.01 (relative), allowed is 0.001"),
     ("nan", "failed", "wrong result: it is off by nan (relative), allowed is 0.001")],
)  # fmt: skip
def test_one_that_does_not_run_stops_no_other(system, status, reason, measure):
    said: list[str] = []
    found = measure(system, "sort_torch", said=said)
    assert (found[system, "fwd_ms"].status, found[system, "fwd_ms"].params["reason"]) == (status, reason)
    assert found[system, "peak_mib"].status == status
    assert found[system, "rel_err"].status == ("ok" if system == "wrong" else status)
    assert found["sort_torch", "fwd_ms"].status == "ok"
    assert said.count(f"{system}: no time recorded: {reason}") == 1


def test_one_that_breaks_while_timed(measure):
    found = measure("late", "sort_torch", timing={"repeats": 5})
    assert (found["late", "fwd_ms"].status, found["late", "rel_err"].status) == ("failed", "ok")
    assert found["sort_torch", "fwd_ms"].stats["n"] == 5


def test_interrupted_runs_and_other_settings_share_nothing(tmp_path):
    settings = from_plain(RowwiseSettings, plain(), "test.yaml")
    job, other = program.jobs(settings)
    program.rowwise_entmax(job, settings, Context(tmp_path, None, print))
    first = program._current
    program.rowwise_entmax(other, settings, Context(tmp_path, None, print))
    assert first is not None and program._current is not first
    program._current = None


@pytest.mark.parametrize("alpha", [1.5, 2.0, 1.25])
def test_exact_theta(alpha):
    scores = draw(Rows(4, 30, "float32", alpha, "gaussian", 9.0), torch.Generator().manual_seed(0))
    p, _ = weights(scores.double(), exact_theta(scores, alpha), alpha - 1)
    assert torch.allclose(p, entmax_reference(scores, alpha), atol=1e-12)


def test_bands_cover_every_row(monkeypatch):
    scores = torch.randn(7, 10)
    whole = exact_theta(scores, 1.5)
    monkeypatch.setattr("tasks.kernel_bench.rows.BATCH", 25)  # two rows at a time
    assert torch.equal(exact_theta(scores, 1.5), whole)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_systems_keep_the_dtype(dtype):
    scores, cpu = torch.randn(2, 9).to(dtype), torch.device("cpu")
    for build in (bisection, sorting):
        assert build(1.5, None, cpu)(scores).dtype == dtype
    assert build is sorting
    with pytest.raises(NotMeasured, match="sorting solves alpha 1.5 and 2 only"):
        sorting(1.3, None, cpu)


def test_the_kernels_obey_their_limit(device):
    scores = (3 * torch.randn(2, 20, generator=torch.Generator().manual_seed(0))).to(device)
    exact = entmax_reference(scores, 1.5)
    errors = [float((kernels("adasplash", 1.5, i, scores.device)(scores) - exact).norm()) for i in (1, 3, None)]
    assert errors[0] > 100 * errors[1]
    assert errors[1] == pytest.approx(errors[2], abs=1e-6)


def test_without_interpreter_the_kernels_are_not_measured(monkeypatch):
    monkeypatch.setattr("tasks.kernel_bench.rowwise_systems.kernels_interpreted", lambda: False)
    with pytest.raises(NotMeasured, match="needs a CUDA device"):
        kernels("adasplash", 1.5, None, torch.device("cpu"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"measure": ["columns"]}, "measure[0]: got 'columns', allowed are adasplash, adasplash2"),
        ({"measure": []}, "measure: got []"),
        ({"inputs": {"rows": 0}}, "inputs.rows: got 0"),
        ({"inputs": {"n": 0}}, "inputs.n: got 0"),
        ({"inputs": {"alpha": 1}}, "inputs.alpha: got 1"),
        ({"inputs": {"dtype": "float64"}}, "inputs.dtype: got 'float64', allowed are float32, float16, bfloat16"),
        ({"inputs": {"data": "uniform"}}, "inputs.data: got 'uniform', allowed is gaussian"),
        ({"inputs": {"variance": 0}}, "inputs.variance: got 0"),
        ({"inputs": {"seed": -1}}, "inputs.seed: got -1"),
        ({"solver": {"sort_torch": {"iterations": 3}}}, "solver.sort_torch: unknown, allowed are adasplash, "),
        ({"solver": {"adasplash": {"iterations": 0}}}, "solver.adasplash.iterations: got 0"),
    ],
)  # fmt: skip
def test_refused(changes, message):
    with pytest.raises(ConfigError) as caught:
        from_plain(RowwiseSettings, plain(**changes), "test.yaml")
    assert message in str(caught.value)


def test_obstacle(monkeypatch):
    settings = from_plain(RowwiseSettings, plain(inputs={"rows": 8192, "n": 8192}), "test.yaml")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert program.obstacle(settings, None) == "needs a GPU: 7e+07 scores"
    assert program.obstacle(from_plain(RowwiseSettings, plain(), "test.yaml"), None) is None


def test_the_smoke_run(tmp_path: Path):
    """The real config through the command line, on even fewer rows."""
    config = yaml.safe_load((CONFIGS / "adasplash/section3_1.yaml").read_text(encoding="utf-8"))
    config |= {"experiment": "here/tiny"}
    config["scales"]["smoke"]["inputs"] = {"rows": 2, "n": 32}
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(config), encoding="utf-8")
    assert main(["run", str(path), "--scale", "smoke", "--results", str(tmp_path), "--no-render"]) == 0
    found = read_records(records_path(tmp_path, "here/tiny", "smoke"))
    systems = load_experiment(path).settings("smoke")["measure"]
    assert {(r.system, r.metric) for r in found} == {(s, m) for s in systems for m in METRICS}
    for record in found:
        assert record.status == ("not_applicable" if record.metric == "peak_mib" and not ON_GPU else "ok")
        if record.metric == "rel_err":
            assert record.value < 1e-5
    limits = {r.system: r.params["iterations"] for r in found if "iterations" in r.params}
    assert limits == {"adasplash": 3, "bisection_torch": 23, "adasplash2": 2}
