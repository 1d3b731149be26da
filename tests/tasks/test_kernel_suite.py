"""The command that runs the kernel tests and the fuzzer records what they report, and nothing that did not run."""

from __future__ import annotations

import json
import os
from pathlib import Path
from types import SimpleNamespace

import oracle
import pytest

from tasks import kernel_suite
from tasks.records import read_records, records_path
from tasks.render.metrics import load_metrics

FUZZER = """
import json, os, signal, sys
arguments = dict(zip(sys.argv[1::2], sys.argv[2::2]))
told = open(os.path.join(os.path.dirname(__file__), "told.json"), "w")
json.dump([arguments, os.environ["PYTHONPATH"]], told)
told.close()
{body}
report = dict(asked=9, ran={ran}, failed={failed}, worst={worst}, worst_seed={seed})
open(arguments["--json"], "w").write(json.dumps(report))
sys.exit(1 if {failed} else 0)
"""


def report(when, outcome):
    return SimpleNamespace(when=when, **{o: o == outcome for o in ("passed", "failed", "skipped")})


@pytest.fixture
def suite(tmp_path, monkeypatch):
    """Return a function that runs the command on a fake suite and fuzzer: its status, its records by metric."""
    folder, results = tmp_path / "kernels", tmp_path / "results"
    folder.mkdir()
    monkeypatch.setattr(kernel_suite, "TESTS", folder)

    def run(*arguments, status=0, ratios=(), ran=9, failed=(), worst=0.4, seed=5, body=""):
        values = dict(body=body, ran=ran, failed=list(failed), worst=worst, seed=seed)
        (folder / "fuzz.py").write_text(FUZZER.format(**values))

        def fake_pytest(given, plugins):
            for number, pairs in enumerate(ratios):
                Path(os.environ[oracle.REPORT_TO], f"{number}.json").write_text(json.dumps(pairs))
            (counter,) = plugins
            counter.pytest_runtest_logreport(report("call", "passed" if status == 0 else "failed"))
            return status

        monkeypatch.setattr(pytest, "main", fake_pytest)
        code = kernel_suite.main(["--results", str(results), *arguments])
        return code, {r.metric: r for r in read_records(records_path(results, kernel_suite.EXPERIMENT, "paper"))}

    run.folder = folder
    return run


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


def test_largest_ratio_of_all_test_processes(suite):
    code, records = suite(ratios=[{"dq": [0.3, "a"], "dk": [0.7, "b"]}, {"dq": [0.6, "c"]}])
    assert code == 0 and set(records) == {"passed", "failed", "skipped", "max_error_ratio"}
    assert records["max_error_ratio"].value == 0.7
    assert records["max_error_ratio"].params == {"arguments": [], "worst_test": "b"}
    assert kernel_suite.REPORT_TO == oracle.REPORT_TO and oracle.REPORT_TO not in os.environ


def test_ratios_of_real_tests_arrive(tmp_path, monkeypatch):
    """Through pytest itself, in a folder of one passing test and one whose error is too large."""
    (tmp_path / "test_two.py").write_text(
        "import oracle\n"
        "from calls import bind, random_qkv\n"
        "import pytest\n"
        "eager = bind('eager')\n"
        "@pytest.mark.parametrize('factor', [1.0, 2.0])\n"
        "def test_eager(factor):\n"
        "    oracle.check_against_oracle(lambda *x, **o: factor * eager(*x, **o), eager, *random_qkv('cpu', 5))\n"
    )
    monkeypatch.setattr(kernel_suite, "TESTS", tmp_path)
    monkeypatch.setattr(oracle, "WORST", {})
    arguments = ["--results", str(tmp_path / "results"), "--", "-q", "-p", "no:cacheprovider"]
    assert kernel_suite.main(arguments) == 1
    records = read_records(records_path(tmp_path / "results", kernel_suite.EXPERIMENT, "paper"))
    values = {r.metric: r.value for r in records}
    assert (values["passed"], values["failed"]) == (1, 1) and values["max_error_ratio"] > 1e3
    assert records[-1].params["worst_test"].endswith("::test_eager[2.0]")


def test_fuzz_is_recorded_with_its_seeds(suite):
    code, records = suite("--fuzz", "9", "--fuzz-seed", "4", "--fuzz-seconds", "60", "--workers", "3", "--", "-q",
                          ratios=[{"dq": [0.3, "a"]}])  # fmt: skip
    assert code == 0
    assert {m: r.value for m, r in records.items()} == {
        "passed": 1, "failed": 0, "skipped": 0, "fuzz_cases": 9, "fuzz_failures": 0, "max_error_ratio": 0.4,
    }  # fmt: skip
    asked = {"arguments": ["-q"], "asked": 9, "first_seed": 4, "worst_seed": 5}
    assert records["max_error_ratio"].params == records["fuzz_cases"].params == asked
    assert records["fuzz_failures"].params == asked | {"failed": []} and records["passed"].params == {
        "arguments": ["-q"]
    }
    arguments, path = json.loads((suite.folder / "told.json").read_text())
    del arguments["--json"]
    assert arguments == {"--cases": "9", "--seed": "4", "--seconds": "60.0", "--workers": "3"}
    assert Path(path.split(os.pathsep)[0], "adasplash_kernels").is_dir()
    metrics = load_metrics()
    assert all(metrics[m].unit == r.unit for m, r in records.items())


def test_the_largest_ratio_may_be_a_tests(suite):
    _, records = suite("--fuzz", "9", ratios=[{"dq": [0.5, "a"]}])
    assert records["max_error_ratio"].value == 0.5 and records["max_error_ratio"].params["worst_test"] == "a"
    assert "worst_seed" not in records["max_error_ratio"].params


@pytest.mark.parametrize(
    ("outcome", "said"),
    [({"failed": [7, 8]}, "9 of 9 random calls ran, 2 failed"), ({"ran": 6}, "6 of 9 random calls ran, 0 failed")],
    ids=["a case failed", "time was up"],
)
def test_a_failure_or_a_case_that_did_not_run_fails_the_command(suite, capsys, outcome, said):
    code, records = suite("--fuzz", "9", **outcome)
    assert code == 1 and said in capsys.readouterr().err
    assert records["fuzz_cases"].value == outcome.get("ran", 9)
    assert records["fuzz_failures"].params["failed"] == outcome.get("failed", [])


@pytest.mark.parametrize("outcome", [{"body": "os.kill(os.getpid(), signal.SIGKILL)"}, {"ran": 0, "worst": None}],
                         ids=["killed", "no case ran"])  # fmt: skip
def test_tests_are_recorded_and_no_fuzz_is_claimed_if_it_did_not_run(suite, capsys, outcome):
    code, records = suite("--fuzz", "9", ratios=[{"dq": [0.3, "a"]}], **outcome)
    assert code == 1 and "the fuzzer did not run a case" in capsys.readouterr().err
    assert {m: r.value for m, r in records.items()} == {"passed": 1, "failed": 0, "skipped": 0, "max_error_ratio": 0.3}


def test_tests_are_recorded_before_the_fuzzer_starts(suite, monkeypatch, tmp_path):
    def interrupted(options):
        raise KeyboardInterrupt

    monkeypatch.setattr(kernel_suite, "_run_fuzz", interrupted)
    with pytest.raises(KeyboardInterrupt):
        suite("--fuzz", "9")
    records = read_records(records_path(tmp_path / "results", kernel_suite.EXPERIMENT, "paper"))
    assert {r.metric for r in records} == {"passed", "failed", "skipped"}


def test_status_of_failing_tests_outlives_a_good_fuzz(suite):
    code, records = suite("--fuzz", "9", status=1)
    assert code == 1 and records["failed"].value == 1 and records["fuzz_failures"].value == 0


def test_interrupted_tests_start_no_fuzz(suite):
    code, records = suite("--fuzz", "9", status=int(pytest.ExitCode.INTERRUPTED))
    assert code == 2 and set(records) == {"passed", "failed", "skipped"}


@pytest.mark.parametrize("arguments", [("--fuzz", "0"), ("--fuzz", "-3"), ("--fuzz", "5", "--workers", "0")])
def test_no_cases_or_no_workers_are_refused(suite, capsys, arguments):
    with pytest.raises(SystemExit):
        suite(*arguments)
    assert "allowed is 1 or more" in capsys.readouterr().err
