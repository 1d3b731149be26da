"""The program, from a config to records: what is recorded of systems that run, and of those that do not."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import tasks.kernel_bench.run as program
from tasks.__main__ import main
from tasks.config import CONFIGS, Experiment, load_experiment
from tasks.kernel_bench import score_passes, side_by_side
from tasks.kernel_bench.run import PROGRAMS
from tasks.kernel_bench.systems import ENTMAX, SYSTEMS, System
from tasks.kernel_bench.timing import PIECES, backward
from tasks.programs import Context
from tasks.records import read_records, records_path
from tasks.render import render_experiment
from tasks.render.metrics import load_metrics
from tasks.runner import DONE, SKIPPED, Options, run_experiment

SPARSITIES = ("block_sparsity", "block_sparsity_16", "block_sparsity_64", "block_sparsity_128")
METRICS = (*PIECES, "speedup", "score_passes", "peak_mib", "first_call_s", "rel_err", *SPARSITIES)
ON_GPU = torch.cuda.is_available()


@pytest.fixture
def make(write_tiny: Callable[[str, dict], Experiment], plain: Callable[..., dict]) -> Callable[..., Experiment]:
    """Write a config outside the tree with tiny settings, and load it."""

    return lambda **changes: write_tiny("adasplash2/figure_runtime", plain(**changes))


@pytest.fixture
def options(tmp_path: Path) -> Options:
    return Options("smoke", results=tmp_path / "results")


@pytest.fixture
def measure(make, options) -> Callable[..., dict]:
    """Run an experiment of one length; return its records by system and metric."""

    def run(*systems: str, **changes: Any) -> dict:
        changes = {"inputs": {"n": [8]}, "relative_to": None} | changes
        experiment = make(measure=list(systems), **changes)
        assert run_experiment(experiment, options).state == DONE
        found = records(experiment, options)
        return {(r.system, r.metric): r for r in found}

    return run


def records(experiment: Experiment, options: Options) -> list:
    return read_records(records_path(options.results, experiment.id, options.scale))


def test_the_smoke_run(tmp_path, capsys):
    """The real config through the command line, with the kernels in Triton's interpreter where there is no GPU."""
    config = CONFIGS / "adasplash2" / "figure_runtime.yaml"
    assert main(["run", str(config), "--scale", "smoke", "--results", str(tmp_path), "--no-render"]) == 0
    experiment = load_experiment(config)
    found = read_records(records_path(tmp_path, experiment.id, "smoke"))
    assert {(r.system, r.params["n"], r.metric) for r in found} == {
        ("adasplash", n, m)
        for n in (32, 64) for m in (*METRICS, "differing_runs", "graph_ms") if m != "block_sparsity_64"}  # fmt: skip
    on_gpu_alone = ("peak_mib", "graph_ms")
    for record in found:
        assert {"b", "h", "h_kv", "n", "d", "dtype", "causal", "alpha", "data", "query_scale"} <= set(record.params)
        assert (record.unit or None) == load_metrics()[record.metric].unit
        missing = record.metric in on_gpu_alone and not ON_GPU
        missing |= record.metric == "score_passes"  # asks for 16-bit inputs, too
        missing |= record.metric == "differing_runs" and record.params["n"] > 32
        assert record.status == ("not_applicable" if missing else "ok")
        if record.metric == "differing_runs" and record.status == "ok":
            assert (record.value, record.params["runs"]) == (0, 1)
        if record.metric in PIECES:
            assert record.value > 0 and set(record.stats) == {"n", "min", "q1", "q3", "max", "std"}
            assert record.params["statistic"] == "median"
        if record.metric == "speedup":
            assert (record.value, record.params["relative_to"]) == (1.0, "adasplash")
        if record.metric == "rel_err":
            parts = ("out", "dq", "dk", "dv")
            assert set(record.stats) == {*parts, *(f"{part}_rounding" for part in parts)}
            assert record.value == max(record.stats[part] for part in parts) < 1e-3
            assert (record.params["checked_rows"], record.params["checked_gradient_heads"]) == (record.params["n"], 1)
        if record.metric == "block_sparsity":
            assert 0 <= record.value <= 100 and record.params["tile"] == [64, 64]
    files = render_experiment(experiment, tmp_path, lambda e: True)
    table = next(f for f in files if f.suffix == ".md").read_text(encoding="utf-8")
    assert "AdaSplash" in table and "several measurements" not in table


def test_every_system_has_its_numbers(measure):
    found = measure("sort_torch", "bisection_torch", relative_to="bisection_torch", solver={
        "bisection_torch": {"iterations": 12}}, timing={"repeats": 3, "statistic": "mean"})  # fmt: skip
    assert set(found) == {(s, m) for s in ("sort_torch", "bisection_torch") for m in METRICS}
    sort, bisection = (found[s, "fwd_bwd_ms"] for s in ("sort_torch", "bisection_torch"))
    assert found["sort_torch", "speedup"].value == pytest.approx(bisection.value / sort.value)
    assert found["bisection_torch", "speedup"].value == 1.0
    assert (bisection.params["iterations"], "iterations" in sort.params) == (12, False)
    assert bisection.stats["n"] == 3
    for metric in SPARSITIES:  # it describes the inputs
        assert found["sort_torch", metric].value == found["bisection_torch", metric].value
    assert found["sort_torch", "block_sparsity"].params["tile"] == [2, 4]


def test_query_scales_are_cases_of_their_own(make, options):
    experiment = make(measure=["sort_torch"], inputs={"n": [32], "query_scale": [1, 8]})
    run_experiment(experiment, options)
    sparsity = {r.params["query_scale"]: r.value for r in records(experiment, options) if r.metric == "block_sparsity"}
    assert set(sparsity) == {1.0, 8.0}
    assert sparsity[8.0] > sparsity[1.0]


@pytest.mark.parametrize(
    ("system", "status", "reason"),
    [
        ("broken", "failed", "RuntimeError: went wrong second line"),
        ("unfit", "not_applicable", "takes no such thing"),
        ("unwritten", "not_applicable", "not written yet"),
        ("not_installed", "not_applicable", "No module named 'x'"),
        ("out_of_memory", "oom", "out of memory: CUDA out of memory"),
    ],
)
def test_a_system_that_does_not_run_stops_no_other(system, status, reason, measure, capsys):
    found = measure(system, "sort_torch", relative_to=system)
    for metric in (*PIECES, "speedup", "score_passes", "peak_mib", "first_call_s", "rel_err"):
        record = found[system, metric]
        assert (record.value, record.status, record.params["reason"]) == (None, status, reason)
    assert found["sort_torch", "fwd_ms"].status == "ok"
    assert found["sort_torch", "speedup"].params["reason"] == f"{system} has no time here"
    lines = [line for line in capsys.readouterr().out.splitlines() if reason in line]
    assert lines == [f"  {system}, n = 8: no speed recorded: {reason}"]


@pytest.mark.parametrize("system", ["wrong", "wrong_gradient", "not_finite"])
def test_a_wrong_system_gets_no_speed(system, measure, capsys):
    found = measure(system, "right", relative_to="right")
    for metric in (*PIECES, "speedup", "peak_mib"):
        record = found[system, metric]
        assert (record.value, record.status) == (None, "failed")
        assert record.params["reason"].startswith("wrong result: ")
    error = found[system, "rel_err"]
    if system == "not_finite":
        assert (error.value, error.status) == (None, "failed")
    else:
        assert error.status == "ok" and error.value == max(error.stats.values()) > 0.05
    assert found["right", "fwd_ms"].status == "ok"
    assert f"{system}, n = 8: no speed recorded: wrong result: " in capsys.readouterr().out


def test_a_first_call_that_is_not_a_users(measure, monkeypatch):
    """It has no value, so that no table compares it, but what it took is in the record."""
    known = SYSTEMS["right"]
    monkeypatch.setitem(SYSTEMS, "right", System(ENTMAX, known.build, prepared=lambda p: f"tuned for {p.n}"))
    record = measure("right")["right", "first_call_s"]
    assert (record.value, record.status, record.params["reason"]) == (None, "not_applicable", "tuned for 8")
    assert set(record.stats) == {"here_s"} and record.stats["here_s"] > 0
    usual = measure("sort_torch")["sort_torch", "first_call_s"]
    assert usual.status == "ok" and usual.stats is None


def test_a_system_that_runs_out_of_memory_while_timed(measure, capsys):
    """What its first call showed stays; the others are timed to the end."""
    found = measure("late", "sort_torch", relative_to="sort_torch", timing={"warmup": 1, "repeats": 4})
    for metric in (*PIECES, "speedup"):
        assert (found["late", metric].value, found["late", metric].status) == (None, "oom")
    assert found["late", "rel_err"].status == found["late", "first_call_s"].status == "ok"
    assert found["sort_torch", "fwd_ms"].stats["n"] == 4
    assert "late, n = 8: no speed recorded: out of memory" in capsys.readouterr().out


@pytest.mark.parametrize("drift", [False, True])
def test_runs_that_differ_are_counted(measure, monkeypatch, drift):
    """Five of them; one whose output changes by a bit from call to call differs each time."""
    calls = itertools.count()

    def build(problem):
        attention = SYSTEMS["sort_torch"].build(problem)
        return lambda q, k, v: attention(q, k, v) + (next(calls) * 1e-4 if drift else 0)

    monkeypatch.setitem(SYSTEMS, "right", System(ENTMAX, build))
    found = measure("right", determinism={"runs": 5, "longest": 8})["right", "differing_runs"]
    assert (found.value, found.unit, found.status, found.params["runs"]) == (5 * drift, "runs", "ok", 5)


def test_repeated_only_up_to_a_length_and_where_it_runs(measure):
    found = measure("right", "late", "broken", determinism={"runs": 5, "longest": 7})
    why = {name: (r.status, r.params["reason"]) for (name, metric), r in found.items() if metric == "differing_runs"}
    assert why == dict.fromkeys(("right", "late", "broken"), ("not_applicable", "asked for up to 7 tokens"))
    found = measure("right", "broken", determinism={"runs": 5, "longest": 8})
    assert found["right", "differing_runs"].value == 0
    assert found["broken", "differing_runs"].status == "failed"


def test_a_system_that_runs_out_of_memory_while_repeated(measure, monkeypatch):
    """Its times stay."""
    late = SYSTEMS["late"].build
    monkeypatch.setitem(SYSTEMS, "late", System(ENTMAX, lambda problem: late(problem, calls=5)))
    found = measure("late", determinism={"runs": 5, "longest": 8}, timing={"warmup": 0, "repeats": 1})
    assert found["late", "differing_runs"].status == "oom" and found["late", "fwd_ms"].status == "ok"


class Replay:
    """In place of a CUDA graph: as many calls."""

    def __init__(self, attention, tensors):
        self.call = lambda: attention(*tensors.leaves)
        self.out = self.call().detach()
        self.gradients = backward(self.call(), tensors)

    def replay(self):
        self.call()


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    """Let replays be measured on the CPU; return whose are to be wrong, whose fail later, and what was replayed."""
    seen = SimpleNamespace(wrong=(), breaks=False, replayed=0)

    def checked(attention, tensors, fault):
        graph = Replay(attention, tensors)
        if seen.wrong:
            graph.out = graph.out + 1
        if reason := fault(graph.out, graph.gradients):
            raise RuntimeError(reason)
        return graph

    def run_replay(graph, tensors, clock):
        seen.replayed += 1
        if seen.breaks:
            raise RuntimeError("went wrong\nsecond line")
        return [clock.mark(), clock.mark()]

    monkeypatch.setattr(side_by_side.graphs, "checked", checked)
    monkeypatch.setattr(side_by_side.graphs, "run_replay", run_replay)
    monkeypatch.setattr(side_by_side.SideBySide, "_no_graphs", lambda self: None)
    return seen


def test_replays_are_timed(measure, as_on_a_gpu):
    found = measure("right", "sort_torch", graphs={"longest": 8}, timing={"warmup": 1, "repeats": 3})
    for name in ("right", "sort_torch"):
        record = found[name, "graph_ms"]
        assert record.status == "ok" and record.value >= 0 and record.unit == "ms" and record.stats["n"] == 3
        assert record.params["statistic"] == "median"
    assert as_on_a_gpu.replayed == 2 * 4


@pytest.mark.parametrize(("how", "reason"), [("wrong", "wrong result: out is off by"),
                                             ("breaks", "RuntimeError: went wrong second line")])  # fmt: skip
def test_a_replay_that_fails_leaves_the_other_times(measure, as_on_a_gpu, capsys, how, reason):
    setattr(as_on_a_gpu, how, True)
    found = measure("right", "late", graphs={"longest": 8}, timing={"warmup": 0, "repeats": 1})
    record = found["right", "graph_ms"]
    assert record.status == "failed" and reason in record.params["reason"]
    assert found["right", "fwd_ms"].status == "ok"
    assert "right, n = 8: not replayed as a CUDA graph: " in capsys.readouterr().out
    assert found["late", "graph_ms"].status in ("failed", "oom")


def test_replays_up_to_a_length_and_on_a_gpu(measure, as_on_a_gpu):
    record = measure("right", graphs={"longest": 7})["right", "graph_ms"]
    assert (record.status, record.params["reason"]) == ("not_applicable", "asked for up to 7 tokens")
    assert not as_on_a_gpu.replayed


@pytest.mark.skipif(ON_GPU, reason="says what happens without a GPU")
def test_no_replays_without_a_gpu(measure):
    found = measure("right", "broken", graphs={"longest": 8})
    record = found["right", "graph_ms"]
    assert (record.status, record.params["reason"]) == ("not_applicable", "a CUDA graph needs a GPU")
    assert found["broken", "graph_ms"].status == "failed"


def test_score_passes(problem, monkeypatch):
    """At 2e12 operations a second: 64 of d = 16, all pairs or half of them."""
    dense = problem("cuda", dtype=torch.bfloat16, causal=False, b=3)
    assert score_passes.one_pass_ms(dense, 2e12) == pytest.approx(1e3 * 3 * 2 * 64 * 64 * 16 / 1e12)
    causal = replace(dense, causal=True)
    assert score_passes.one_pass_ms(causal, 2e12) == pytest.approx(1e3 * 3 * 2 * (64 * 65 / 2) * 16 / 1e12)
    assert score_passes.obstacle(dense) is None
    assert score_passes.obstacle(replace(dense, dtype=torch.float32)) == "the rate is that of 16-bit matrix products"
    assert score_passes.obstacle(replace(dense, device=torch.device("cpu"))).endswith("on a GPU only")


def test_score_passes_are_times_over_one_pass(measure, monkeypatch):
    monkeypatch.setattr(score_passes, "obstacle", lambda problem: None)
    monkeypatch.setattr(score_passes, "rate", lambda device: 3e12)
    found = measure("right", inputs={"n": [8], "causal": False})
    passes, one = found["right", "score_passes"], 1e3 * 2 * 8 * 8 * 2 * 4 / 3e12
    assert passes.value == pytest.approx(found["right", "fwd_ms"].value / one)
    assert passes.stats == {"one_pass_ms": pytest.approx(one), "matmul_tflops": 3.0}


def test_softmax_has_no_sparsity(measure):
    found = measure("fa2", "sort_torch")
    for metric in SPARSITIES:
        record = found["fa2", metric]
        assert (record.status, record.params["reason"]) == ("not_applicable", "no weight of softmax is zero")
    assert found["fa2", "rel_err"].params["alpha"] == 1.0


def test_a_killed_run_goes_on_with_the_next_case(make, options, monkeypatch):
    experiment = make(measure=["sort_torch", "bisection_torch"], inputs={"n": [8, 16]})
    real = program.SideBySide
    begun = []

    def stops_at_16(case, *arguments):
        begun.append(case.n)
        if case.n == 16 and begun.count(16) == 1:
            raise KeyboardInterrupt
        return real(case, *arguments)

    monkeypatch.setattr(program, "SideBySide", stops_at_16)
    with pytest.raises(KeyboardInterrupt):
        run_experiment(experiment, options)
    assert {(r.system, r.params["n"]) for r in records(experiment, options)} == {("sort_torch", 8),
                                                                               ("bisection_torch", 8)}  # fmt: skip
    outcome = run_experiment(experiment, options)
    assert (outcome.state, outcome.detail) == (DONE, "jobs run: 2, up to date: 2")
    assert begun == [8, 16, 16]  # once a case, whatever the number of systems
    assert run_experiment(experiment, options).state == SKIPPED
    assert len(records(experiment, options)) == 4 * len(METRICS)


def test_a_wrong_system_is_tried_again_without_timing_the_others(make, options, monkeypatch):
    experiment = make(measure=["right", "wrong"], relative_to="right", inputs={"n": [8]})
    run_experiment(experiment, options)
    monkeypatch.setattr("tasks.kernel_bench.side_by_side.interleave", lambda *a, **k: pytest.fail("timed"))
    outcome = run_experiment(experiment, options)
    assert outcome.detail == "jobs run: 1, up to date: 1"


def test_force_measures_anew(make, options, monkeypatch):
    experiment = make(measure=["sort_torch"], relative_to=None, inputs={"n": [8]})
    run_experiment(experiment, options)
    assert program._current is None  # no tensors are kept
    assert run_experiment(experiment, Options("smoke", results=options.results, force=True)).state == DONE
    first, second = ([r.value for r in records(experiment, options) if r.metric == m] for m in ("rel_err", "fwd_ms"))
    assert first[0] == first[1] and len(second) == 2


def test_obstacle(settings, monkeypatch):
    obstacle = PROGRAMS["attention_speed"].obstacle
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert obstacle(settings(), None) is None
    assert obstacle(settings(inputs={"n": [65536]}), None) == "needs a GPU: 9e+09 pairs of a query and a key"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert obstacle(settings(inputs={"n": [65536]}), None) is None


def test_identity_names_the_published_package(settings, monkeypatch):
    identity = PROGRAMS["attention_speed"].identity
    monkeypatch.setattr("tasks.kernel_bench.published.installed", lambda: "0.2.2")
    assert identity(settings(), None) == {}
    assert identity(settings(measure=["sort_torch", "adasplash_pypi_v1"]), None) == {"adasplash": "0.2.2"}


def test_parameters_are_the_same_in_every_run(make, options):
    """What differs between runs of one config goes into stats, or the tables would take them for other settings."""
    experiment = make(measure=["sort_torch"], inputs={"n": [8]})
    for _ in range(2):
        run_experiment(experiment, Options("smoke", results=options.results, force=True))
    spelled = [json.dumps([r.metric, r.params], sort_keys=True) for r in records(experiment, options)]
    half = len(spelled) // 2
    assert spelled[:half] == spelled[half:]


def test_a_context_of_its_own(settings, tmp_path, said):
    """Two runs in one process share nothing, though their settings are equal."""
    wanted = settings(inputs={"n": [8]})
    job = PROGRAMS["attention_speed"].jobs(wanted)[0]
    assert str(job) == "sort_torch, n = 8"
    program.attention_speed(job, wanted, Context(tmp_path, None, said.append))
    first = program._current
    other = PROGRAMS["attention_speed"].jobs(wanted)[1]
    program.attention_speed(other, wanted, Context(tmp_path, None, said.append))
    assert first is not None and program._current is not first
    program._current = None
