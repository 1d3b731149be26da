from __future__ import annotations

import pytest

from tasks.claim import Claim
from tasks.config import TableSpec
from tasks.render.claims import verdicts

TARGET = Claim("three times as fast", "ratio", "fwd_ms", "softmax", over="entmax", target=3)
TABLE = TableSpec(("system",), ("metric", "n"), ("fwd_ms", "accuracy"))
RATIO = Claim("five times as fast", "ratio", "fwd_ms", "softmax", 5, over="entmax")
CROSSING = Claim("faster above 60 %", "crossing", "fwd_ms", "softmax", 60, over="entmax", along="accuracy")


@pytest.fixture
def judge(make_experiment, metrics):
    def verdict(claim, records, scale="lab", **more):
        experiment = make_experiment(table=TABLE, claims=(claim,))
        (found,) = verdicts(experiment, {"smoke": [], "lab": [], "paper": [], scale: records, **more}, metrics)
        assert found.claim is claim and found.text == f"{found.outcome}: {found.detail}"
        return found.text

    return verdict


@pytest.fixture
def times(make_record):
    def records(softmax, entmax, n=8, **changes):
        return [make_record(system, value, metric="fwd_ms", unit="ms", n=n, **changes)
                for system, value in (("softmax", softmax), ("entmax", entmax))]

    return records


@pytest.fixture
def points(times, make_record):
    """Points (share, ratio), each at a length of its own; a ratio of None is a run out of memory."""
    def records(*pairs):
        made = []
        for n, (share, ratio) in enumerate(pairs):
            slow, fast = times(3 * (ratio or 1), 3.0, n=n)
            if ratio is None:
                slow = make_record("softmax", None, metric="fwd_ms", status="oom", n=n)
            made += [slow, fast, make_record("softmax", share, metric="accuracy", unit="%", n=n)]
        return made

    return records


@pytest.mark.parametrize(("softmax", "entmax", "expected"), [
    (30.0, 5.0, "reproduced: 6 times"),
    (8.5, 2.0, "reproduced: 4.25 times"),  # 85 % of five
    (8.4, 2.0, "different: 4.2 times"),
    (2.02, 2.0, "different: 1.01 times"),
    (2.0, 2.0, "not reproduced: 1 times"),
    (1.0, 2.0, "not reproduced: 0.5 times"),
])
def test_a_ratio(judge, times, softmax, entmax, expected):
    assert judge(RATIO, times(softmax, entmax)) == f"{expected} (lab scale; the paper: 5 times)"


def test_a_ratio_of_means_over_seeds(judge, times):
    records = [*times(10.0, 1.0, seed=0), *times(14.0, 2.0, seed=1), *times(30.0, 3.0, seed=2)]
    assert judge(RATIO, records) == "reproduced: 9 times (lab scale; the paper: 5 times)"  # 18 / 2


def test_the_least_of_several_settings_decides(judge, times):
    records = [*times(30.0, 5.0, n=8), *times(9.0, 3.0, n=16)]
    assert judge(RATIO, records).startswith("different: 6 times at n 8, 3 times at n 16 (")
    records += [r for n in (32, 64, 128) for r in times(7.0, 1.0, n=n)]
    assert judge(RATIO, records).startswith("different: 3 to 7 times over 5 settings (")
    chosen = Claim("at 16", "ratio", "fwd_ms", "softmax", 5, over="entmax", where={"n": 16})
    assert judge(chosen, records).startswith("different: 3 times (")


def test_one_setting_may_be_of_all_together(judge, make_record):
    records = [make_record(system, value, metric="fwd_ms", unit="ms", **params)
               for params in ({"n": 8}, {}) for system, value in (("softmax", 8.0), ("entmax", 1.0 + len(params)))]
    assert judge(RATIO, records).startswith("different: 4 times at n 8, 8 times in all (")


def test_settings_are_not_mixed(judge, times):
    softmax_at_8, entmax_at_16 = times(30.0, 1.0)[:1], times(30.0, 1.0, n=16)[1:]
    assert judge(RATIO, softmax_at_8 + entmax_at_16) == (
        "not run: one of the two systems has no value (lab scale; the paper: 5 times)")


def test_a_point_without_a_value_is_told(judge, times, make_record):
    records = [*times(30.0, 5.0), make_record("softmax", None, metric="fwd_ms", status="failed", n=16)]
    assert judge(RATIO, records) == "reproduced: 6 times; 1 point without a value (lab scale; the paper: 5 times)"


def test_paper_scale_comes_before_lab_and_smoke_proves_nothing(judge, times, make_record):
    good, bad = times(30.0, 5.0), times(1.0, 5.0)
    assert judge(RATIO, good, "paper", lab=bad).startswith("reproduced: 6 times (paper scale")
    assert judge(RATIO, good, "smoke") == "not run: no records of lab or paper scale (the paper: 5 times)"
    lost = [make_record("softmax", None, metric="fwd_ms", status="oom", n=8)]
    assert judge(RATIO, lost, "paper", lab=bad).startswith("not reproduced: 0.2 times (lab scale")
    assert judge(RATIO, lost, "paper").startswith("not run: one of the two systems has no value (paper scale")


@pytest.mark.parametrize(("pairs", "expected"), [
    ([(50, 0.9), (58, 1.0), (70, 1.2)], "reproduced: at least 1 from 58 % accuracy on, less at 50 %"),
    ([(70, 1.2), (65, 1.1), (50, 0.9)], "reproduced: at least 1 from 65 % accuracy on, less at 50 %"),  # any order
    ([(50, 0.9), (65.1, 1.0)], "different: at least 1 from 65.1 % accuracy on, less at 50 %"),
    ([(50, 1.1), (60, 0.9), (70, 1.2)], "different: at least 1 from 70 % accuracy on, less at 60 %"),  # and all higher
    ([(50, 1.1), (60, 1.2), (70, 0.9)], "not reproduced: 0.9 times at 70 % accuracy, the highest measured"),
    ([(50, 0.8), (55, 0.9)], "not run: 0.9 times at 55 % accuracy, the highest measured"),  # the claim is of 60 %
    ([(50, 0.8), (59.9, 0.9)], "not run: 0.9 times at 59.9 % accuracy, the highest measured"),
    ([(50, 0.8), (59.96, 0.9)], "not reproduced: 0.9 times at 60 % accuracy, the highest measured"),  # as it reads
    ([(50, 1.1), (55, 1.2)], "reproduced: at least 1 at every measured accuracy, from 50 % on"),
    ([(80, 1.1), (90, 1.2)], "not run: at least 1 at every measured accuracy, from 80 % on"),
    ([(50, 0.9), (60, 1.1), (60, 0.95), (70, 1.2)], "different: at least 1 from 70 % accuracy on, less at 60 %"),
    ([(50, 0.9), (60, 1.1), (70, None)],
     "reproduced: at least 1 from 60 % accuracy on, less at 50 %; 1 point without a value"),
    ([(70, None)], "not run: no point has a value; 1 point without a value"),
])
def test_a_crossing(judge, points, pairs, expected):
    assert judge(CROSSING, points(*pairs)) == f"{expected} (lab scale; the paper: 60 %)"


def test_a_crossing_of_one_metric_along_a_parameter(judge, make_record):
    claim = Claim("parity at 95", "crossing", "fwd_ms", "softmax", 95, along="n")
    records = [make_record("softmax", value, metric="fwd_ms", unit="ms", n=n)
               for n, value in ((50.0, 0.3), (90.0, 0.95), (97.5, 1.5))]
    records += [make_record("entmax", 0.1, metric="fwd_ms", unit="ms", n=99.0)]
    assert judge(claim, records) == (
        "reproduced: at least 1 from 97.5 n on, less at 90 (lab scale; the paper: 95)")


@pytest.mark.parametrize(("softmax", "expected"), [(6.0, "met: 3 times"), (5.9, "not met: 2.95 times")])
def test_a_target_is_met_or_not(judge, times, softmax, expected):
    assert judge(TARGET, times(softmax, 2.0)) == f"{expected} (lab scale; the target: 3 times)"
    assert judge(TARGET, []) == "not run: no records of lab or paper scale (the target: 3 times)"


@pytest.mark.parametrize(("power", "expected"), [(1.5, "met"), (2.0, "met"), (2.5, "not met")])
def test_an_exponent_is_fitted(judge, make_record, power, expected):
    claim = Claim("at most the square", "exponent", "fwd_ms", "entmax", along="n", target=2.000001)
    records = [make_record("entmax", 3 * n**power, metric="fwd_ms", unit="ms", n=n) for n in (8, 16, 64)]
    records += [make_record("entmax", None, metric="fwd_ms", status="oom", n=128)]
    assert judge(claim, records) == (
        f"{expected}: grows as n to the power of {power:.2f}, from 8 to 64; 1 point without a value "
        "(lab scale; the target: 2)")
    assert judge(claim, records[:1]).startswith("not run: fewer than two points have a value")


def test_the_exponent_is_that_of_the_closest_power(judge, make_record):
    """By least squares of logarithms, against numpy."""
    import numpy

    values = {8: 3.0, 16: 9.0, 64: 40.0, 512: 100.0}
    records = [make_record("entmax", value, metric="fwd_ms", unit="ms", n=n) for n, value in values.items()]
    slope = numpy.polyfit(*(numpy.log([*x]) for x in (values.keys(), values.values())), 1)[0]
    claim = Claim("grows little", "exponent", "fwd_ms", "entmax", along="n", target=9)
    assert f"to the power of {slope:.2f}," in judge(claim, records)


@pytest.mark.parametrize(("target", "outcome"), [(5, "met"), (4.9, "not met")])
def test_the_most(judge, make_record, target, outcome):
    claim = Claim("no more", "most", "fwd_ms", "entmax", target=target)
    records = [make_record("entmax", value, metric="fwd_ms", unit="ms", n=n) for n, value in ((8, 5.0), (16, 4.0))]
    records += [make_record("softmax", 9.0, metric="fwd_ms", unit="ms", n=8),
                make_record("entmax", None, metric="fwd_ms", status="oom", n=32)]
    assert judge(claim, records) == (
        f"{outcome}: at most 5 ms at n 8; 1 point without a value (lab scale; the target: {target} ms)")
    assert judge(claim, records[-1:]) == f"not run: no setting has a value (lab scale; the target: {target} ms)"


def test_nothing_is_a_most_too(judge, make_record):
    claim = Claim("none", "most", "fwd_ms", "entmax", target=0)
    found = judge(claim, [make_record("entmax", 0.0, metric="fwd_ms", unit="ms", n=8)])
    assert found == "met: at most 0 ms anywhere (lab scale; the target: 0 ms)"
