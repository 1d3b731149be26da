from __future__ import annotations

import pytest

from tasks.config import FigureSpec, TableSpec
from tasks.render.outcome import outcome

TABLE = TableSpec(("system",), ("metric", "n"), ("fwd_ms", "accuracy", "val_loss"))
PAPER = [("softmax", "fwd_ms", 8, 10), ("softmax", "fwd_ms", 16, 40), ("entmax", "fwd_ms", 8, 5),
         ("entmax", "fwd_ms", 16, "oom"), ("entmax", "accuracy", 8, 70), ("softmax", "accuracy", 8, 60)]


@pytest.fixture
def say(make_experiment, metrics):
    def sentence(records, rows=PAPER, scale="lab", **more):
        by_scale = {"smoke": [], "lab": [], "paper": [], scale: records, **more}
        return outcome(make_experiment(rows=rows, table=TABLE), by_scale, metrics)

    return sentence


@pytest.fixture
def record(make_record):
    def make(system, value, n, metric="fwd_ms", **changes):
        unit = {"fwd_ms": "ms", "graph_ms": "ms", "accuracy": "%", "speedup": "ratio"}[metric]
        return make_record(system, value, metric=metric, unit=unit, n=n, **changes)

    return make


def test_times_are_divided_and_speeds_compared_where_both_have_numbers(say, record):
    records = [record("softmax", 2.0, 8), record("softmax", 4.0, 16), record("entmax", 0.5, 8),
               record("entmax", 1.0, 16), record("entmax", 7.0, 32)]  # the paper has no time at 32, nor entmax's at 16
    assert say(records) == (
        "At lab scale (reduced settings), measured over reported: Forward 0.1 (median; 0.1 to 0.2; 3 of 3 reported "
        "cells). Forward, times as fast as Softmax – Entmax 1.5: 4 (paper 2). Forward grows with this power of the "
        "length (fitted from 8 to 32) – Entmax 1.5: 1.90.")


def test_shares_are_subtracted(say, record):
    records = [record("entmax", 73.0, 8, "accuracy"), record("softmax", 59.5, 8, "accuracy")]
    assert say(records, scale="paper") == (
        "At paper scale, measured less reported: Accuracy +1.2 points (median; -0.5 to +3; 2 of 2 reported cells).")


def test_a_cell_without_a_result_is_not_counted(say, record):
    records = [record("softmax", 2.0, 8), record("softmax", None, 16, status="oom")]
    assert say(records) == (
        "At lab scale (reduced settings), measured over reported: Forward 0.2 (1 of 3 reported cells).")


def test_seeds_are_averaged(say, record):
    records = [record("softmax", value, 8, seed=seed) for seed, value in enumerate((1.0, 2.0, 6.0))]
    assert "Forward 0.3 (1 of 3" in say(records)


def test_paper_scale_comes_first_and_smoke_says_nothing(say, record):
    assert say([record("softmax", 2.0, 8)], scale="smoke") == ""
    both = say([record("softmax", 2.0, 8)], scale="paper", lab=[record("softmax", 4.0, 8)])
    assert both.startswith("At paper scale, measured over reported: Forward 0.2")
    lost = say([record("softmax", None, 8, status="oom")], scale="paper", lab=[record("softmax", 4.0, 8)])
    assert lost.startswith("At lab scale (reduced settings), measured over reported: Forward 0.4")


def test_speeds_relative_to_a_system_that_the_records_name(say, record):
    records = [record("softmax", 2.0, 8), record("entmax", 0.5, 8),
               record("softmax", 0.25, 8, "speedup", relative_to="entmax")]
    assert say(records).endswith("Forward, times as fast as Entmax 1.5 – Softmax: 0.25 (paper 0.5).")


def test_speedups_of_which_the_paper_gives_no_numbers(say, record):
    records = [record("entmax", value, n, "speedup", relative_to="softmax") for n, value in ((8, 0.75), (16, 2.0))]
    records += [record("softmax", 1.0, 8, "speedup", relative_to="softmax")]
    assert say(records, rows=()) == ("At lab scale (reduced settings), times as fast as Softmax, of which the paper "
                                     "gives no numbers – Entmax 1.5: 0.75 to 2.")


def test_speedups_over_a_system_that_the_paper_does_not_time(say, record):
    records = [record("entmax", 0.5, 8), record("entmax", 3.0, 8, "speedup", relative_to="softmax")]
    text = say(records, rows=[("entmax", "fwd_ms", 8, 5)])
    assert text.endswith("Times as fast as Softmax, of which the paper gives no numbers – Entmax 1.5: 3.")


def test_nothing_is_said_of_nothing(say, record):
    assert say([]) == ""
    assert say([record("softmax", 2.0, 8)], rows=()) == ""


def test_growth_is_fitted_to_the_longer_half_of_the_lengths(say, record):
    """A cube for the one, a square for the other; what is measured at the short lengths does not count."""
    lengths = (8, 16, 32, 64, 128, 256)
    records = [record("softmax", float(n) ** 3 if n > 32 else 1.0, n) for n in lengths]
    records += [record("entmax", float(n) ** 2, n) for n in lengths[:-1]] + [record("entmax", None, 256, status="oom")]
    found = say(records, rows=[])
    assert found == ("At lab scale (reduced settings), forward grows with this power of the length (fitted from 32 to "
                     "256) – Softmax: 3.00; Entmax 1.5: 2.00.")
    assert say([record("softmax", 1.0, n) for n in (8, 16)], rows=[]) == ""


def test_the_time_that_the_figure_is_of_is_the_one_spoken_of(make_experiment, metrics, record):
    """Of systems that it has no time of, nothing is said; without the base's, the speedups are."""
    figure = FigureSpec("lines", "n", "graph_ms")
    experiment = make_experiment(table=TableSpec(("system",), ("metric", "n"), ("fwd_ms", "graph_ms")), figure=figure,
                                 systems={"softmax": "Softmax", "entmax": "Entmax 1.5", "old": "Old"})  # fmt: skip
    records = [record("entmax", 0.5, 8, "speedup", relative_to="softmax")]
    for n in (8, 16, 32):
        records += [record(s, 1.0, n) for s in ("softmax", "entmax", "old")]  # the host's, let us say
        records += [record("softmax", n / 8, n, "graph_ms"), record("entmax", n**2 / 256, n, "graph_ms")]
        records += [record("old", None, n, "graph_ms", status="not_applicable")]
    assert outcome(experiment, {"paper": records}, metrics) == (
        "At paper scale, graph_ms, times as fast as Softmax, of which the paper gives no numbers – Entmax 1.5: 1 to 4. "
        "graph_ms grows with this power of the length (fitted from 8 to 32) – Softmax: 1.00; Entmax 1.5: 2.00.")
    launched = [r for r in records if r.metric != "graph_ms"]
    assert outcome(experiment, {"paper": launched}, metrics).startswith(
        "At paper scale, times as fast as Softmax, of which the paper gives no numbers – Entmax 1.5: 0.5. Forward ")
