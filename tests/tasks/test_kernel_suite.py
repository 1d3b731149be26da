"""The command that runs the kernel tests counts what pytest reports and records it."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from tasks import kernel_suite
from tasks.records import read_records, records_path


def report(when, outcome):
    return SimpleNamespace(when=when, **{o: o == outcome for o in ("passed", "failed", "skipped")})


def test_counts_and_status_are_those_of_pytest(tmp_path, monkeypatch):
    def run(arguments, plugins):
        (counter,) = plugins
        assert arguments[0].endswith("tests/kernels") and arguments[1:] == ["-q"]
        for when, outcome in (("setup", "passed"), ("call", "passed"), ("teardown", "passed"),  # one test passed
                              ("setup", "passed"), ("call", "failed"),
                              ("setup", "failed"),  # an error in a fixture
                              ("setup", "skipped")):  # fmt: skip
            counter.pytest_runtest_logreport(report(when, outcome))
        counter.pytest_collectreport(report("collect", "failed"))
        return pytest.ExitCode.TESTS_FAILED

    monkeypatch.setattr(pytest, "main", run)
    assert kernel_suite.main(["--results", str(tmp_path), "--", "-q"]) == 1
    records = read_records(records_path(tmp_path, kernel_suite.EXPERIMENT, "paper"))
    assert {r.metric: r.value for r in records} == {"passed": 1, "failed": 3, "skipped": 1}
    assert {r.experiment for r in records} == {"kernels/suite"}
