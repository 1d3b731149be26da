from __future__ import annotations

import pytest

from tasks.errors import ConfigError, UserError
from tasks.render.metrics import Metric, load_metrics, metric_of


def test_the_shipped_list_is_valid_and_gives_every_metric_a_label():
    metrics = load_metrics()
    assert metrics
    assert all(m.label and m.digits is not None for m in metrics.values())


@pytest.mark.parametrize(("text", "message"), [
    ("a: {label: A, digit: 2}", r"a\.digit: unknown key"),
    ("a: {unit: ms}", r"a\.label: missing"),
    ("a: {label: A, better: faster}", r"a\.better: got 'faster'"),
    ("a: {label: A, digits: 40}", r"a\.digits: got 40"),
    ("- a", "got"),
    ("a: [", "cannot be read"),
])
def test_mistakes_in_the_list_are_named(tmp_path, text, message):
    path = tmp_path / "metrics.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message):
        load_metrics(path)


def test_a_missing_list_is_named(tmp_path):
    with pytest.raises(ConfigError, match="gone.yaml"):
        load_metrics(tmp_path / "gone.yaml")


def test_values_show_their_digits_and_small_ones_do_not_become_zero():
    metric = Metric("Error", "s", 2)
    assert [metric.text(v) for v in (1.005, 12.0, 0.0, 3e-7)] == ["1.00", "12.00", "0.00", "3.0e-07"]
    assert [metric.short(v) for v in (0.25, 0.0, 3e-7, -3e-7)] == ["0.25", "0.00", "<0.01", ">-0.01"]
    assert Metric("Error").text(0.123456) == "0.1235"
    assert Metric("Loss", "nats", 3, "lower").heading == "Loss (nats) ↓"


def test_an_unlisted_metric_goes_by_its_name_and_its_records_unit(make_record):
    assert metric_of("new", {}, [make_record("a", 1.0, metric="new", unit="ms")]).title == "new (ms)"


def test_a_record_in_another_unit_than_the_papers_number_is_refused(metrics, make_record):
    with pytest.raises(UserError, match="fwd_ms: a record's unit is 's', expected is 'ms'"):
        metric_of("fwd_ms", metrics, [make_record("a", 1.0, metric="fwd_ms", unit="s")])
