from __future__ import annotations

import statistics

import pytest

from tasks.errors import ConfigError, UserError
from tasks.render.cells import Provenance, collect, in_order


def only(cells):
    assert len(cells) == 1
    return cells[0]


def test_seeds_are_averaged_with_the_sample_deviation(make_experiment, make_record):
    values = [3.1, 3.4, 3.3]
    records = [make_record("softmax", v, seed=s, n=8) for s, v in enumerate(values)]
    measured = only(collect(make_experiment(), records, ["n"])).measured
    assert measured.values == values
    assert measured.mean == pytest.approx(statistics.mean(values))
    assert measured.std == pytest.approx(statistics.stdev(values))


def test_the_newest_record_of_a_seed_wins_wherever_it_stands(make_experiment, make_record):
    records = [
        make_record("softmax", 2.0, created="2026-01-03T00:00:00+00:00", n=8),
        make_record("softmax", 1.0, created="2026-01-02T00:00:00+00:00", n=8),
        make_record("softmax", 5.0, seed=1, created="2026-01-01T00:00:00+00:00", n=8),
        make_record("softmax", 6.0, seed=1, created="2026-01-01T00:00:00+00:00", n=8),  # same second: later
    ]
    assert only(collect(make_experiment(), records, ["n"])).measured.values == [2.0, 6.0]


def test_seeds_are_not_averaged_across_hidden_parameters(make_experiment, make_record):
    records = [make_record("softmax", 1.0, seed=0, n=8, batch=4, config="old"),
               make_record("softmax", 2.0, seed=1, n=8, batch=8, config="new")]
    measured = only(collect(make_experiment(), records, ["n"])).measured
    assert measured.values == [2.0]
    assert measured.passed_over == ()  # the other batch belongs to a config that is gone


def test_seeds_are_not_averaged_across_settings(make_experiment, make_record):
    records = [make_record("softmax", 1.0, seed=0, config="old"), make_record("softmax", 3.0, seed=1, config="old"),
               make_record("softmax", 2.0, seed=1, config="new")]
    assert only(collect(make_experiment(), records, [])).measured.values == [2.0]


def test_rivals_within_one_run_are_named(make_experiment, make_record):
    records = [make_record("softmax", 1.0, n=8, dtype="fp16"), make_record("softmax", 2.0, n=8, dtype="bf16")]
    measured = only(collect(make_experiment(), records, ["n"])).measured
    assert (measured.values, measured.passed_over) == ([2.0], ("dtype",))


def test_seeds_are_not_averaged_across_hardware(make_experiment, make_record):
    records = [make_record("softmax", 1.0, seed=0, gpu=None), make_record("softmax", 2.0, seed=1)]
    assert only(collect(make_experiment(), records, [])).measured.values == [2.0]


def test_a_final_number_stands_before_its_trace(make_experiment, make_record):
    records = [make_record("softmax", 1.5), *(make_record("softmax", 9.0 - s, step=s) for s in range(3))]
    measured = only(collect(make_experiment(), records, [])).measured
    assert (measured.values, measured.passed_over) == ([1.5], ())


def test_a_lost_seed_does_not_hide_the_others(make_experiment, make_record):
    records = [make_record("softmax", 1.0), make_record("softmax", None, seed=1, status="failed")]
    measured = only(collect(make_experiment(), records, [])).measured
    assert (measured.status, measured.values, measured.std) == ("ok", [1.0], None)


def test_paper_and_measured_meet_whatever_the_type_of_number(make_experiment, make_record):
    experiment = make_experiment(rows=[("softmax", "val_loss", 8, 3.5)])
    cell = only(collect(experiment, [make_record("softmax", 3.25, n=8.0)], ["n"]))
    assert (cell.paper["value"], cell.measured.mean) == (3.5, 3.25)


def test_two_reported_numbers_in_one_cell_are_refused(make_experiment):
    experiment = make_experiment(rows=[("softmax", "val_loss", 8, 3.5), ("softmax", "val_loss", 16, 3.6)])
    with pytest.raises(ConfigError, match="differ in n"):
        collect(experiment, [], [])


def test_parameters_that_are_lists_can_be_shown(make_experiment, make_record):
    cell = only(collect(make_experiment(), [make_record("softmax", 1.0, tile=[64, 64])], ["tile"]))
    assert cell.get("tile") == "[64, 64]"


def test_order_of_systems_numbers_and_names(make_experiment):
    experiment = make_experiment()
    assert in_order(experiment, "system", ["entmax", "other", "softmax"]) == ["softmax", "entmax", "other"]
    assert in_order(experiment, "n", [1024, None, 64, 256.0]) == [64, 256.0, 1024, None]
    assert in_order(experiment, "task", ["sst2", "cola", "sst2"]) == ["sst2", "cola"]


def test_provenance_says_where_numbers_come_from(make_experiment, make_record):
    records = [make_record("softmax", 1.0, created="2026-01-05T23:00:00+00:00"),
               make_record("entmax", 1.0, gpu=None),
               make_record("entmax", 1.0, gpu=None, seed=1)]
    said = list(Provenance.of(collect(make_experiment(), records, [])).sentences())
    assert said == ["hardware CPU and Some GPU", "torch 2.13.0, triton 3.7.1, python 3.11.9",
                    "measured 2026-01-02 to 2026-01-05", "1 to 2 seeds"]


def test_runs_without_a_seed_claim_none(make_experiment, make_record):
    cells = collect(make_experiment(), [make_record("softmax", 1.0, seed=None)], [])
    assert Provenance.of(cells).seeds == ()


def test_a_record_without_a_time_is_one_clear_error(make_experiment, make_record):
    with pytest.raises(UserError, match="created is 'yesterday'"):
        collect(make_experiment(), [make_record("softmax", 1.0, created="yesterday")], [])
