"""The parity, by hand-made speedups."""

from __future__ import annotations

import dataclasses

import pytest

from tasks.config import FigureSpec, TableSpec
from tasks.render import render_experiment
from tasks.render.figures import draw_figure
from tasks.render.metrics import load_metrics
from tasks.render.parity import crossing, with_parity

LINES = FigureSpec("lines", "block_sparsity", "speedup", yscale="log")


@pytest.mark.parametrize(
    ("points", "parity"),
    [
        ([(50, 0.5), (90, 0.8), (95, 1.2)], 92.5),  # half of the way from 0.8 to 1.2
        ([(50, 0.5), (60, 0.9), (80, 1.3)], 65.0),  # a quarter
        ([(50, 0.5), (90, 1.0)], 90.0),
        ([(50, 0.9), (60, 1.1), (70, 0.8), (80, 1.2), (90, 2.0)], 75.0),  # for good, not for the first time
        ([(50, 1.0), (90, 2.0)], 50),
        ([(50, 1.5)], 50),
        ([(50, 0.5), (90, 0.9)], None),
        ([(50, 1.5), (90, 0.9)], None),
        ([(50, 0.9)], None),
    ],
)
def test_crossing(points, parity):
    assert crossing(points) == (None if parity is None else pytest.approx(parity))


@pytest.fixture
def curve(make_record):
    """Records of a system's speedups: (level asked for, measured, speedup or status)."""

    def make(system, *points, **changes):
        changes = {"metric": "speedup", "unit": "ratio", "alpha": 1.5, "relative_to": "softmax"} | changes
        return [make_record(system, *((None,) if isinstance(y, str) else (y,)), seed=int(10 * asked),
                            status=y if isinstance(y, str) else "ok", block_sparsity_asked=asked,
                            **({} if measured is None else {"block_sparsity": measured}), **changes)
                for asked, measured, y in points]  # fmt: skip

    return make


def parity(records):
    found = [r for r in with_parity(records) if r.metric == "parity_block_sparsity"]
    return found[0] if len(found) == 1 else found


def test_measured_levels_count_in_whatever_order(curve):
    found = parity(curve("entmax", (95, 94.0, 1.5), (50, 50.0, 0.25), (90, 90.0, 0.5)))
    assert (found.value, found.status, found.unit) == (92.0, "ok", "%")
    assert found.params == {"alpha": 1.5, "relative_to": "softmax", "reached": "between 90 and 94 %"}
    assert (found.system, found.seed, found.stats) == ("entmax", None, None)


def test_faster_everywhere_is_told(curve):
    found = parity(curve("entmax", (50, 50.0, 1.25), (90, 90.0, 2.0)))
    assert (found.value, found.status) == (50.0, "ok")
    assert found.params["reached"].startswith("at the lowest level measured")


def test_never_as_fast(curve):
    found = parity(curve("entmax", (50, 50.0, 0.25), (99, 98.5, 0.5)))
    assert (found.value, found.status) == (None, "not_applicable")
    assert found.params["reason"] == "slower than softmax at 98.5 %, the highest level measured"


def test_levels_without_a_speedup_are_passed_over(curve):
    found = parity(curve("entmax", (50, 50.0, 0.5), (70, 70.0, "oom"), (90, 90.0, 1.5), (95, None, 0.1)))
    assert found.value == pytest.approx(70.0)


@pytest.mark.parametrize(
    ("statuses", "status"),
    [(["oom", "oom"], "oom"), (["oom", "failed"], "failed"), (["not_applicable"], "not_applicable")],
)
def test_no_speedup_at_all(statuses, status, curve):
    found = parity(curve("entmax", *((50 + i, 50.0 + i, s) for i, s in enumerate(statuses)), reason="why"))
    assert (found.value, found.status, found.params["reason"]) == (None, status, "why")


def test_softmax_and_the_base_have_none(curve):
    assert parity(curve("softmax", (50, 50.0, 1.0))).status == "not_applicable"
    found = parity(curve("other", (50, 50.0, 2.0), alpha=1.0))
    assert (found.value, found.params["reason"]) == (None, "softmax has no block sparsity")


def test_the_newest_record_of_a_level_counts_and_curves_are_not_mixed(curve):
    old = curve("entmax", (50, 50.0, 0.5), (90, 90.0, 0.9), created="2026-01-01T00:00:00+00:00")
    new = curve("entmax", (90, 90.0, 1.5), created="2026-01-02T00:00:00+00:00")
    elsewhere = curve("entmax", (50, 50.0, 2.0), gpu="Another GPU")
    found = parity([*new, *old, *elsewhere])
    assert {r.env["gpu"]: r.value for r in found} == {"Some GPU": pytest.approx(70.0), "Another GPU": 50.0}


def test_other_records_are_left_alone(make_record):
    records = [make_record("entmax", 3.0), make_record("entmax", 2.0, metric="speedup", unit="ratio", n=8)]
    assert with_parity(records) == records


def test_it_stands_in_the_table_beside_the_curve(make_experiment, curve, store, results, monkeypatch):
    monkeypatch.setattr("tasks.render.load_metrics", load_metrics)
    experiment = make_experiment(table=TableSpec(("system",), ("metric",), ("parity_block_sparsity",)), figure=LINES)
    store(experiment, [*curve("entmax", (50, 50.0, 0.5), (99, 98.0, 1.5)), *curve("softmax", (50, 50.0, 1.0))])
    files = render_experiment(experiment, results, lambda e: True)
    table = next(f for f in files if f.suffix == ".md").read_text(encoding="utf-8")
    assert "| Entmax 1.5 | – | 74.0 |" in table and "| Softmax | – | n/a |" in table
    assert len([f for f in files if f.suffix == ".png"]) == 1


def test_the_figure_is_drawn_at_the_measured_levels(make_experiment, curve):
    records = curve("entmax", (50, 50.0, 0.5), (99, 98.0, 1.5))
    figure = draw_figure(make_experiment(figure=dataclasses.replace(LINES, yscale="linear")), with_parity(records),
                         "lab", load_metrics())  # fmt: skip
    assert [list(line.get_xdata()) for line in figure.axes[0].get_lines() if len(line.get_xdata())] == [[50.0, 98.0]]
