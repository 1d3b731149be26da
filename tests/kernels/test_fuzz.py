"""A few random cases, and the fuzzer itself: what it draws, what it calls a failure, and that it survives crashes."""

from __future__ import annotations

import itertools
import json
import re
from dataclasses import replace

import fuzz
import fuzz_cases
import pytest
import torch
from calls import KERNELS, bind
from fuzz_cases import COMPILED, INTERPRETED, Case, Limits
from fuzz_workers import Outcome, Report, run_cases

SMALL = Limits(length=20, pairs=500, tiles=(16,), heads=(2, 2))
SEEDS = range(24)
eager = bind("eager")  # right, and quicker than an interpreted kernel, where a test needs something to spoil


@pytest.mark.parametrize("seed", SEEDS)
def test_a_random_case(device, seed):
    case = Case.draw(seed, COMPILED if device == "cuda" else SMALL)
    outcome = fuzz.run(case, device)
    assert outcome.failure is None, str(case)


@pytest.mark.parametrize("limits", [COMPILED, INTERPRETED, SMALL], ids=["compiled", "interpreted", "small"])
def test_every_choice_is_drawn(limits):
    cases = [Case.draw(seed, limits) for seed in range(3000)]
    choices = {
        "method": KERNELS, "dtype": fuzz_cases.DTYPES, "shape": fuzz_cases.SHAPES, "head_dim": fuzz_cases.HEAD_DIMS,
        "alpha_kind": fuzz_cases.ALPHAS, "slopes": fuzz_cases.SLOPES, "masking": fuzz_cases.MASKINGS,
        "data": fuzz_cases.DATA, "layout": fuzz_cases.LAYOUTS, "batch": (1, 2, 3),
        "kv_heads": range(1, limits.heads[0] + 1),
        **{name: (False, True) for name in ("alpha_grad", "causal", "long_indices", "backward")},
    }  # fmt: skip
    for name, values in choices.items():
        assert {getattr(c, name) for c in cases} == set(values), name
    for name, value in itertools.product(("window", "scale"), (True, False)):
        assert any((getattr(c, name) is None) == value for c in cases), name
    assert {c.alpha[0] for c in cases} >= {1.0, 1.5, 2.0} and all(1 <= a <= 2 for c in cases for a in c.alpha)
    assert any(1 < c.alpha[0] < 1.001 for c in cases) and any(1.6 < c.alpha[0] < 2 for c in cases)
    reached = {
        "grouped queries": lambda c: c.heads > c.kv_heads > 1,
        "multi-query": lambda c: c.heads > c.kv_heads == 1,
        "one key": lambda c: c.n_k == 1,
        "one query": lambda c: c.n_q == 1,
        "longest": lambda c: max(c.n_q, c.n_k) == limits.length,
        "whole tiles": lambda c: c.n_q % limits.tiles[0] == 0,
        "one past a tile": lambda c: c.n_q > 1 and c.n_q % limits.tiles[0] == 1,
        "window of one": lambda c: c.window == 1,
        "window beyond the end": lambda c: (c.window or 0) > max(c.n_q, c.n_k),
        "all padding": lambda c: c.masking == "lengths" and 0 in c.ends,
        "empty packed sequence": lambda c: c.masking == "packed" and len(set(c.starts)) < len(c.starts),
        "tokens past the end": lambda c: c.masking == "packed" and c.starts[-1] < c.n_q,
        "keys packed unlike queries": lambda c: c.masking == "packed apart" and c.starts != c.ends,
        "decoding": lambda c: not c.backward and c.n_q <= 16 < c.n_k,
        "decoding with gradients": lambda c: c.backward and c.n_q <= 16 < c.n_k,
        "small scores": lambda c: c.spread < 0.05,
        "large scores": lambda c: c.spread > 500,
    }
    assert [name for name, holds in reached.items() if not any(map(holds, cases))] == []
    assert all(c.batch * c.heads * c.n_q * c.n_k <= limits.pairs for c in cases)
    assert all(1 <= n <= limits.length for c in cases for n in (c.n_q, c.n_k))


def test_a_seed_gives_the_same_tensors():
    for seed in range(20):
        case = Case.draw(seed, INTERPRETED)
        assert case == Case.draw(seed, INTERPRETED) and case != Case.draw(seed + 1, INTERPRETED)
        *tensors, options = case.tensors("cpu")
        *again, same = case.tensors("cpu")
        for x, y in zip([*tensors, *options.values()], [*again, *same.values()], strict=True):
            assert torch.equal(x, y) if isinstance(x, torch.Tensor) else x == y
        assert all(x.isfinite().all() for x in tensors)
        assert tensors[0].shape == (case.batch, case.heads, case.n_q, case.head_dim)


def test_layouts_are_what_they_say():
    def q(layout):
        cases = (Case.draw(seed, INTERPRETED) for seed in itertools.count())
        case = next(c for c in cases if c.layout == layout and min(c.n_q, c.heads, c.head_dim) > 1)
        return case.tensors("cpu")[0]

    assert q("contiguous").is_contiguous()
    x = q("heads last")
    assert x.transpose(1, 2).is_contiguous() and not x.is_contiguous()
    assert q("transposed").stride(-1) > 1
    x = q("sliced")
    assert x.storage_offset() == 1 and x.stride(2) > 2 * x.shape[-1]
    assert q("expanded").stride(1) == 0


@pytest.fixture(scope="module")
def plain_case() -> Case:
    """An ordinary causal case in float32 with gradients."""
    for seed in itertools.count():
        case = Case.draw(seed, INTERPRETED)
        usual = (case.dtype, case.data, case.masking, case.spread) == ("float32", "normal", "none", 1.0)
        if usual and case.causal and case.backward and case.window is None and case.n_q == case.n_k > 8:
            return case


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda *x, **o: 1.01 * eager(*x, **o), "times the allowed error: output"),
        (lambda *x, causal, **o: eager(*x, causal=not causal, **o), "times the allowed error: output"),
        (lambda q, k, v, **o: eager(q, k, v, **o) + 0.01 * (k - k.detach()).sum(), "times the allowed error: dk"),
        (lambda *x, **o: eager(*x, **o) / 0, "output, dq, dk, dv.* not finite"),
        (lambda *x, **o: torch.empty_like(x[0], requires_grad=True) + eager(*x, **o), "output not finite"),
        (lambda *x, **o: eager(*x, **o).double(), "AssertionError: output: got torch.float64"),
        (lambda *x, **o: eager(*x, window=0, **o), "ValueError: window: got 0"),
    ],
    ids=["scaled", "causal flipped", "one gradient", "infinite", "unwritten memory", "dtype", "exception"],
)  # fmt: skip
def test_what_is_wrong_is_a_failure(plain_case, wrong, message, monkeypatch):
    monkeypatch.setattr(torch, "empty_like", torch.zeros_like)  # not the conftest's, which is poisoned already
    assert fuzz.run(plain_case, "cpu", eager).failure is None
    outcome = fuzz.run(plain_case, "cpu", wrong)
    assert outcome.failure and re.search(message, outcome.failure), outcome.failure
    if "allowed" in message:
        assert outcome.ratio > 1


def test_gradients_of_forward_only_cases_are_left_alone(plain_case):
    def no_gradient(*x, **options):
        assert not torch.is_grad_enabled()
        return eager(*x, **options)

    assert fuzz.run(plain_case, "cpu", no_gradient).failure is not None
    assert fuzz.run(replace(plain_case, backward=False), "cpu", no_gradient).failure is None


RUNS = """
import os, signal, time
from fuzz_workers import Outcome

def run(seed):
    if seed == 3:
        os._exit(7)
    if seed == 5:
        os.kill(os.getpid(), signal.SIGKILL)
    if seed == 6:
        time.sleep(1000)
    return Outcome(seed / 10, "wrong" if seed == 8 else None)

def slow(seed):
    time.sleep(0.5)
    return Outcome(0.1)
"""


@pytest.fixture
def runs(tmp_path, monkeypatch):
    (tmp_path / "runs_for_workers.py").write_text(RUNS)
    monkeypatch.syspath_prepend(tmp_path)  # the workers' too
    import runs_for_workers

    return runs_for_workers


def test_a_crash_or_a_hang_is_a_failure_of_its_case_alone(runs):
    report = run_cases(runs.run, range(10), workers=2, seconds=1000, case_seconds=8)
    assert (report.asked, report.ran, report.passed) == (10, 10, False)
    assert {seed: outcome.failure for seed, outcome in report.failures.items()} == {
        3: "the worker process ended with exit status 7",
        5: "the worker process ended with signal 9",
        6: "did not end within 8 seconds",
        8: "wrong",
    }
    assert report.worst == (0.9, 9)


def test_cases_stop_when_the_time_is_up(runs):
    report = run_cases(runs.slow, range(1000), workers=1, seconds=2, case_seconds=100)
    assert 0 < report.ran < 10 and report.asked == 1000 and not report.failures and not report.passed
    assert f"{1000 - report.ran} of 1000 cases were not run: the time was up" in fuzz.summary(report, SMALL)


def test_summary_names_failures_and_totals():
    report = Report(asked=3)
    for seed, outcome in enumerate((Outcome(0.5), Outcome(2.0, "times"), Outcome(None, "ValueError: no"))):
        report.add(seed, outcome)
    text = fuzz.summary(report, SMALL)
    assert f"seed 1        ratio 2         {Case.draw(1, SMALL)}\n    times\n" in text
    assert f"seed 2        ratio -         {Case.draw(2, SMALL)}\n    ValueError: no\n" in text
    assert text.endswith("3 cases, 2 failures, largest ratio 2.000 (seed 1)")
    assert json.loads(fuzz.as_json(report)) == {"asked": 3, "ran": 3, "failed": [1, 2], "worst": 2.0, "worst_seed": 1}


def test_a_seed_on_the_command_line_brings_its_case_back(monkeypatch, capsys):
    monkeypatch.setattr(fuzz, "bind", lambda method: eager)
    assert fuzz.main(["--seed", "3", "--limits", "interpreted"]) == 0
    assert str(Case.draw(3, INTERPRETED)) in capsys.readouterr().out
    monkeypatch.setattr(fuzz, "bind", lambda method: lambda *x, **o: eager(*x, **o) / 0)
    assert fuzz.main(["--seed", "3", "--limits", "interpreted"]) == 1
