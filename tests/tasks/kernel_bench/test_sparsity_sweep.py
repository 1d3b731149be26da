"""The sweep over block sparsity: its settings, and what is recorded at each level."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tasks.config import Experiment, from_plain
from tasks.errors import ConfigError
from tasks.kernel_bench import sparsity_sweep
from tasks.kernel_bench.sparsity_sweep import SweepSettings, level_cases, make_placed_tensors
from tasks.kernel_bench.timing import PIECES
from tasks.records import read_records, records_path
from tasks.render import render_experiment
from tasks.runner import DONE, FAILED, Options, run_experiment

# Sixteen tiles a side; 4 dimensions for codes.
TINY: dict[str, Any] = {
    "measure": ["sort_torch", "bisection_torch"],
    "relative_to": "sort_torch",
    "inputs": {"b": 1, "h": 2, "h_kv": 1, "n": 64, "d": 8, "dtype": "float32", "causal": False, "alpha": 1.5,
               "data": "placed_tiles", "tile": [4, 4]},
    "sweep": {"block_sparsity": [50, 75]},
    "timing": {"warmup": 0, "repeats": 1, "statistic": "median"},
}  # fmt: skip


def tiny(**changes: Any) -> dict[str, Any]:
    values = copy.deepcopy(TINY)
    for key, change in changes.items():
        values[key] = values[key] | change if isinstance(change, dict) and key in values else change
    return values


def settings(**changes: Any) -> SweepSettings:
    return from_plain(SweepSettings, tiny(**changes), "test.yaml")


@pytest.fixture
def make(write_tiny: Callable[[str, dict], Experiment]) -> Callable[..., Experiment]:
    """Write the real config with tiny settings outside the tree, and load it."""

    return lambda **changes: write_tiny("adasplash/figure1", tiny(**changes))


@pytest.fixture
def options(tmp_path: Path) -> Options:
    return Options("smoke", results=tmp_path / "results")


def records(experiment: Experiment, options: Options) -> list:
    return read_records(records_path(options.results, experiment.id, options.scale))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"measure": []}, "measure: got []"),
        ({"measure": ["fa4"]}, "measure[0]: got 'fa4'"),
        ({"relative_to": "fa2"}, "relative_to: got 'fa2', allowed are those in measure"),
        ({"relative_to": None}, "relative_to: got nothing"),
        ({"solver": {"fa2": {"iterations": 3}}}, "solver.fa2: unknown"),
        ({"inputs": {"n": 0}}, "inputs.n: got 0, allowed is 1 or more"),
        ({"inputs": {"n": 66}}, "inputs.n: got 66, allowed are multiples of both sides of tile ([4, 4])"),
        ({"inputs": {"tile": [4, 6]}}, "inputs.n: got 64, allowed are multiples of both sides of tile ([4, 6])"),
        ({"inputs": {"tile": [4]}}, "inputs.tile: got [4]"),
        ({"inputs": {"tile": [0, 4]}}, "inputs.tile: got [0, 4]"),
        ({"inputs": {"d": 3}}, "inputs.d: got 3, allowed with placed_tiles is 4 to 256"),
        ({"inputs": {"d": 257}}, "inputs.d: got 257"),
        ({"inputs": {"h": 3, "h_kv": 2}}, "inputs.h: got 3"),
        ({"inputs": {"causal": True}}, "inputs.causal: got true, allowed with placed_tiles is false"),
        ({"inputs": {"alpha": 1.0}}, "inputs.alpha: got 1.0"),
        ({"inputs": {"data": "gaussian"}}, "inputs.data: got 'gaussian', allowed is placed_tiles"),
        ({"inputs": {"seed": -1}}, "inputs.seed: got -1"),
        ({"inputs": {"query_variance": 1}}, "inputs.query_variance: unknown key"),
        ({"sweep": {"block_sparsity": []}}, "sweep.block_sparsity: got []"),
        ({"sweep": {"block_sparsity": [50, 50.0]}}, "sweep.block_sparsity: got [50.0, 50.0]"),
        ({"sweep": {"block_sparsity": [50, 101]}}, "sweep.block_sparsity[1]: got 101, allowed is 0 to 100"),
        ({"sweep": {"block_sparsity": [-1]}}, "sweep.block_sparsity[0]: got -1"),
    ],
)
def test_refused(changes, message):
    with pytest.raises(ConfigError) as caught:
        settings(**changes)
    assert str(caught.value).startswith(f"test.yaml: {message}")


def test_the_inputs_of_a_level_depend_on_no_other():
    few, many = (level_cases(settings(sweep={"block_sparsity": levels})) for levels in ([75], [50, 75, 90]))
    assert set(few) < set(many) and len({c.seed for c in many}) == 3
    assert not {c.seed for c in many} & {c.seed for c in level_cases(settings(inputs={"seed": 1}))}


def test_tensors():
    wanted = settings(inputs={"dtype": "bfloat16"})
    case = level_cases(wanted)[0]
    first, again = (make_placed_tensors(wanted.inputs, case, torch.device("cpu")) for _ in range(2))
    assert [x.shape for x in (first.q, first.k, first.v, first.do)] == [(1, h, 64, 8) for h in (2, 1, 1, 2)]
    assert {x.dtype for x in (first.q, first.k, first.v, first.do)} == {torch.bfloat16}
    assert all(x.requires_grad for x in first.leaves) and not first.do.requires_grad
    assert all(torch.equal(a, b) for a, b in zip(first.leaves, again.leaves, strict=True))


def test_what_is_recorded_of_a_level(make, options):
    experiment = make(sweep={"block_sparsity": [50, 100]})
    assert run_experiment(experiment, options).state == DONE
    found = {(r.system, r.params["block_sparsity_asked"], r.metric): r for r in records(experiment, options)}
    for system in TINY["measure"]:
        for asked, measured in ((50.0, 50.0), (100.0, 93.75)):  # at best one tile in 16
            for metric in (*PIECES, "speedup", "rel_err", "block_sparsity"):
                record = found[system, asked, metric]
                assert (record.status, record.params["block_sparsity"]) == ("ok", measured)
                assert record.params["tile"] == [4, 4] or metric == "block_sparsity"
            assert found[system, asked, "block_sparsity"].value == measured
            assert found[system, asked, "block_sparsity_16"].params["tile"] == [16, 16]
            assert found[system, asked, "block_sparsity_64"].value == 0.0
            assert found[system, asked, "rel_err"].value < 1e-4
    both, base = (found[s, 50.0, "fwd_bwd_ms"].value for s in ("bisection_torch", "sort_torch"))
    assert found["bisection_torch", 50.0, "speedup"].value == pytest.approx(base / both)


def test_the_table_has_the_parity(make, options):
    experiment = make()
    run_experiment(experiment, options)
    files = render_experiment(experiment, options.results, lambda e: True)
    lines = next(f for f in files if f.suffix == ".csv").read_text(encoding="utf-8").splitlines()
    measured = [line for line in lines if ",measured,bisection_torch,parity_block_sparsity," in line]
    assert len(measured) == 1 and "not_run" not in measured[0]


def test_softmax_has_the_level_too(make, options):
    """Its curve stands beside the others, whatever the machine."""
    experiment = make(measure=["fa2", "sort_torch"], sweep={"block_sparsity": [50]}, inputs={"h_kv": 2})
    run_experiment(experiment, options)
    found = {(r.system, r.metric): r for r in records(experiment, options)}
    assert found["fa2", "speedup"].params["block_sparsity"] == 50.0
    assert found["fa2", "block_sparsity"].status == "not_applicable"


def test_levels_are_resumed_one_by_one(make, options, monkeypatch):
    experiment = make(measure=["sort_torch"])
    draw = sparsity_sweep.draw_queries_and_keys

    def fails_at_75(level, *arguments):
        if level == 75:
            raise ValueError("d: too few dimensions")
        return draw(level, *arguments)

    monkeypatch.setattr(sparsity_sweep, "draw_queries_and_keys", fails_at_75)
    outcome = run_experiment(experiment, options)
    assert (outcome.state, "1 of 2 jobs" in outcome.detail) == (FAILED, True)
    monkeypatch.undo()
    assert run_experiment(experiment, options).detail == "jobs run: 1, up to date: 1"
