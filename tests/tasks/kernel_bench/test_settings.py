"""Settings as configs spell them, and the one line that says what is not accepted."""

from __future__ import annotations

import pytest

from tasks.config import find_experiments, from_plain
from tasks.errors import ConfigError
from tasks.kernel_bench.run import PROGRAMS
from tasks.kernel_bench.settings import SpeedSettings, Timing, cases

EXPERIMENTS = [e for e in find_experiments() if e.family == "kernel_bench" and e.program in PROGRAMS]


@pytest.mark.parametrize("scale", ["smoke", "lab", "paper"])
@pytest.mark.parametrize("experiment", EXPERIMENTS, ids=lambda e: e.id)
def test_configs(experiment, scale):
    program = PROGRAMS[experiment.program]
    settings = experiment.typed_settings(scale, program.settings)
    jobs = program.jobs(settings)
    asked = set(getattr(settings, "measure", experiment.systems))
    assert {job.system for job in jobs} == asked <= set(experiment.systems)
    assert len({(job.system, job.seed) for job in jobs}) == len(jobs) > 0


def test_every_program_is_used():
    assert {e.program for e in EXPERIMENTS} == set(PROGRAMS)


def test_accepted(settings):
    wanted = settings(inputs={"query_scale": [4, 1], "n": [16, 8], "data": "capture:a/b.safetensors"},
                      solver={"adasplash": {"iterations": 3}}, block_sparsity={"over": "causal_half"})  # fmt: skip
    assert wanted.timing.max_seconds > 0
    assert wanted.solver["adasplash"].iterations == 3
    assert [(c.n, c.query_scale) for c in cases(wanted.inputs)] == [(8, 4.0), (8, 1.0), (16, 4.0), (16, 1.0)]


def test_the_seed_of_a_case_depends_on_nothing_else(settings):
    few, many = (cases(settings(inputs={"n": n, "query_scale": s}).inputs) for n, s in (([16], [1]), ([8, 16], [4, 1])))
    assert set(few) < set(many)
    assert len({c.seed for c in many}) == len(many)
    assert not {c.seed for c in many} & {c.seed for c in cases(settings(inputs={"seed": 1}).inputs)}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"measure": []}, "measure: got [], allowed is one or more"),
        ({"measure": ["fa2", "fa2"]}, "measure: got ['fa2', 'fa2']"),
        ({"measure": ["fa2", "fa4"]}, "measure[1]: got 'fa4', allowed are fa2, cudnn, fa2_triton"),
        ({"relative_to": "fa2"}, "relative_to: got 'fa2', allowed are those in measure: sort_torch"),
        ({"solver": {"fa2": {"iterations": 3}}}, "solver.fa2: unknown, allowed are adasplash_pypi_v1"),
        ({"solver": {"adasplash": {"iterations": 0}}}, "solver.adasplash.iterations: got 0"),
        ({"solver": {"adasplash": {"steps": 1}}}, "solver.adasplash.steps: unknown key"),
        ({"inputs": {"n": []}}, "inputs.n: got []"),
        ({"inputs": {"n": [8, 8]}}, "inputs.n: got [8, 8]"),
        ({"inputs": {"n": [8, 0]}}, "inputs.n[1]: got 0, allowed is 1 or more"),
        ({"inputs": {"n": 8}}, "inputs.n: got 8"),
        ({"inputs": {"b": 0}}, "inputs.b: got 0"),
        ({"inputs": {"h": 0}}, "inputs.h: got 0"),
        ({"inputs": {"h_kv": 0}}, "inputs.h_kv: got 0"),
        ({"inputs": {"h": 3, "h_kv": 2}}, "inputs.h: got 3, allowed is a multiple of h_kv (2)"),
        ({"inputs": {"d": 0}}, "inputs.d: got 0, allowed is 1 to 256"),
        ({"inputs": {"d": 257}}, "inputs.d: got 257"),
        ({"inputs": {"dtype": "float64"}}, "inputs.dtype: got 'float64', allowed are float32, float16, bfloat16"),
        ({"inputs": {"alpha": 1}}, "inputs.alpha: got 1"),
        ({"inputs": {"alpha": 2.1}}, "inputs.alpha: got 2.1"),
        ({"inputs": {"data": "uniform"}}, "inputs.data: got 'uniform', allowed are gaussian and capture:PATH"),
        ({"inputs": {"data": "capture:"}}, "inputs.data: got 'capture:'"),
        ({"inputs": {"data": "capture:x", "b": 2}}, "inputs.b: got 2, allowed with captured data is 1"),
        ({"inputs": {"query_variance": 0}}, "inputs.query_variance: got 0"),
        ({"inputs": {"key_variance": -1}}, "inputs.key_variance: got -1"),
        ({"inputs": {"value_variance": 0}}, "inputs.value_variance: got 0"),
        ({"inputs": {"query_scale": []}}, "inputs.query_scale: got []"),
        ({"inputs": {"query_scale": [1, 0]}}, "inputs.query_scale[1]: got 0"),
        ({"inputs": {"seed": -1}}, "inputs.seed: got -1"),
        ({"inputs": {"heads": 2}}, "inputs.heads: unknown key"),
        ({"timing": {"warmup": -1}}, "timing.warmup: got -1"),
        ({"timing": {"repeats": 0}}, "timing.repeats: got 0, allowed is 1 or more"),
        ({"timing": {"statistic": "best"}}, "timing.statistic: got 'best', allowed are median, mean"),
        ({"timing": {"max_seconds": 0}}, "timing.max_seconds: got 0"),
        ({"block_sparsity": {"tile": [64]}}, "block_sparsity.tile: got [64], allowed are two"),
        ({"block_sparsity": {"tile": [64, 0]}}, "block_sparsity.tile: got [64, 0]"),
        ({"block_sparsity": {"over": "half"}}, "block_sparsity.over: got 'half', allowed are whole_square, causal"),
        ({"block_sparsity": {"also": [32]}}, "block_sparsity.also: got [32], allowed are 16, 64, 128"),
        ({"block_sparsity": {"over": "causal_half"}, "inputs": {"causal": False}}, "block_sparsity.over: got causal_"),
    ],
)  # fmt: skip
def test_refused(plain, changes, message):
    with pytest.raises(ConfigError) as caught:
        from_plain(SpeedSettings, plain(**changes), "test.yaml")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_not_a_number_is_refused():
    with pytest.raises(ValueError, match="^max_seconds: got nan"):
        Timing(0, 1, "median", float("nan"))
