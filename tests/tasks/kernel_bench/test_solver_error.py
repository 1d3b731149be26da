"""Errors by iteration: against values worked out apart, and the kernels against their translation."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

import tasks.kernel_bench.solver_error as program
from adasplash_kernels.reference import entmax_reference
from tasks.__main__ import main
from tasks.config import CONFIGS, from_plain, load_experiment
from tasks.errors import ConfigError
from tasks.kernel_bench.dense import entmax_by_bisection
from tasks.kernel_bench.solver_error import ErrorSettings, within_half
from tasks.programs import Context, Job
from tasks.records import read_records, records_path
from tasks.render import render_experiment

TINY: dict[str, Any] = {
    "measure": ["adasplash", "bisection_torch", "adasplash2", "columns"],
    "targets": ["output", "gradient"],
    "inputs": {"rows": 3, "n": 40, "dtype": "float32", "alpha": 1.5, "data": "gaussian", "variance": 1.0},
    "sweep": {"iterations": {"first": 1, "last": 4}},
    "reference": {"system": "sort_torch", "dtype": "float64"},
    "seeds": [0, 1],
}


def plain(**changes: Any) -> dict[str, Any]:
    values = copy.deepcopy(TINY)
    for key, change in changes.items():
        values[key] = values[key] | change if isinstance(change, dict) else change
    return values


def settings(**changes: Any) -> ErrorSettings:
    return from_plain(ErrorSettings, plain(**changes), "test.yaml")


def measured(system: str, wanted: ErrorSettings, tmp_path: Path) -> dict:
    found = program.solver_error(Job(system, 0), wanted, Context(tmp_path, None, lambda line: None))
    return {(m.metric, m.params.get("target"), m.params.get("iterations")): m for m in found}


@pytest.mark.parametrize(
    ("errors", "index"),
    [([8, 3.9, 1.9, 0.9, 0.8, 0.8], 3), ([8, 3.9, 2.1, 1.06, 1], 3), ([1, 0.6], 0), ([1, 0.4], 1),
     ([4, 9, 1, 0.7], 2), ([0, 0], 0)],
)  # fmt: skip
def test_within_half(errors, index):
    """The first that nothing later falls below the half of; one step that falls short of it is not the end."""
    assert within_half(errors) == index


def test_errors_of_bisection_worked_out_apart(tmp_path):
    found = measured("bisection_torch", settings(), tmp_path)
    generator = torch.Generator().manual_seed(0)
    scores, upstream = (torch.randn(3, 40, generator=generator) for _ in range(2))
    exact = scores.double().requires_grad_()
    p = entmax_reference(exact, 1.5)
    (gradient,) = torch.autograd.grad(p, exact, upstream.double())
    p = p.detach()
    for iterations in range(1, 5):
        leaf = scores.clone().requires_grad_()
        out = entmax_by_bisection(leaf, 1.5, iterations)
        (ds,) = torch.autograd.grad(out, leaf, upstream)
        for target, a, b in (("output", out.detach(), p), ("gradient", ds, gradient)):
            m = found["mean_abs_error", target, iterations]
            assert m.value == pytest.approx(float((a - b).abs().mean()), rel=1e-4)
            assert m.params["observed"] == "kernel"


def test_more_iterations_to_precision_of_the_two_has_no_target(tmp_path):
    found = measured("bisection_torch", settings(sweep={"iterations": {"first": 3, "last": 30}}), tmp_path)
    output, gradient, both = (found["iterations_to_precision", t, None].value for t in ("output", "gradient", None))
    assert both == max(output, gradient)
    assert 18 <= both <= 28


@pytest.mark.parametrize("system", ["adasplash", "adasplash2"])
def test_kernels_and_translation_have_the_same_errors(system, tmp_path, monkeypatch):
    wanted = settings(inputs={"rows": 2, "n": 33, "variance": 1.0}, sweep={"iterations": {"first": 1, "last": 2}})
    values = {}
    for way in ("kernel", "translation"):
        monkeypatch.setattr(program, "observed", lambda name, device, way=way: way)
        values[way] = measured(system, wanted, tmp_path)
    for key, m in values["kernel"].items():
        if key[0] == "mean_abs_error":
            assert m.value == pytest.approx(values["translation"][key].value, rel=0.05, abs=5e-9), key
    if system == "adasplash":  # the other is at float32's end after the first
        assert values["kernel"]["mean_abs_error", "output", 1].value > 1e-8


def test_what_is_observed():
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    on_gpu = {name: program.observed(name, gpu) for name in TINY["measure"]}
    assert on_gpu == {"adasplash": "kernel", "bisection_torch": "kernel", "adasplash2": "kernel",
                      "columns": "translation"}  # fmt: skip
    assert program.observed("adasplash", cpu) == "translation"


def test_out_of_memory_is_recorded(tmp_path, monkeypatch):
    def short(*arguments):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 TiB. GPU 0 has less")

    monkeypatch.setattr(program, "_errors", short)
    found = measured("columns", settings(), tmp_path)
    assert len(found) == 4 and {m.status for m in found.values()} == {"oom"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"measure": ["sort_torch"]}, "measure[0]: got 'sort_torch', allowed are bisection_torch, adasplash"),
        ({"targets": ["input"]}, "targets[0]: got 'input', allowed are output, gradient"),
        ({"sweep": {"iterations": {"first": 0, "last": 3}}}, "sweep.iterations.first: got 0"),
        ({"sweep": {"iterations": {"first": 3, "last": 3}}}, "sweep.iterations.last: got 3, allowed is more than"),
        ({"reference": {"dtype": "float32"}}, "reference.dtype: got 'float32', allowed is float64"),
        ({"inputs": {"alpha": 1.2}}, "inputs.alpha: got 1.2, allowed are 1.5 and 2"),
        ({"inputs": {"dtype": "bfloat16"}}, "inputs.dtype: got 'bfloat16', allowed is float32"),
        ({"inputs": {"seed": 1}}, "inputs.seed: unknown key"),
        ({"seeds": []}, "seeds: got []"),
        ({"seeds": [-1]}, "seeds[0]: got -1"),
    ],
)  # fmt: skip
def test_refused(changes, message):
    with pytest.raises(ConfigError) as caught:
        settings(**changes)
    assert message in str(caught.value)


def test_obstacle(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert program.obstacle(settings(), None) is None
    assert program.obstacle(settings(inputs={"rows": 4096, "n": 4096}), None) == "needs a GPU: 2e+07 scores"


@pytest.mark.skipif(torch.cuda.is_available(), reason="pins the translation; on a GPU the kernels run instead")
def test_the_smoke_run(tmp_path):
    """The real config: the curves start apart and end together, at the counts that the paper's text gives."""
    experiment = load_experiment(CONFIGS / "adasplash" / "figure2.yaml")
    assert main(["run", str(experiment.path), "--scale", "smoke", "--results", str(tmp_path), "--no-render"]) == 0
    found = read_records(records_path(tmp_path, experiment.id, "smoke"))
    curve = {(r.system, r.params["target"], r.params["iterations"]): r.value for r in found
             if r.metric == "mean_abs_error"}  # fmt: skip
    assert len(curve) == 4 * 2 * 25
    assert all(curve[s, "output", 25] < 2e-9 < curve[s, "output", 1] for s in TINY["measure"])
    to_precision = {r.system: r.value for r in found
                    if r.metric == "iterations_to_precision" and "target" not in r.params}  # fmt: skip
    reported = {c["system"]: c["value"] for c in experiment.reported.cells()}
    assert {s: to_precision[s] for s in reported} == reported
    table = next(f for f in render_experiment(experiment, tmp_path, lambda e: True) if f.suffix == ".md")
    assert "several measurements" not in table.read_text(encoding="utf-8")
