"""Run the kernel tests and record how they ended: ``python -m tasks.kernel_suite [--fuzz N]``.

On a GPU the tests compile the kernels, so one command tells whether the package works there. The records go beside
the benchmark numbers, as experiment ``kernels/suite``: how many tests passed, failed and were skipped; with
``--fuzz``, how many random calls ran and failed too; and the largest error of any call, relative to what it is allowed
(tests/kernels/oracle.py). What did not run has no record.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tasks.code_used import code_sha256
from tasks.config import REPOSITORY
from tasks.records import RESULTS, Measurement, Provenance, append_records, records_path, sha256_of

EXPERIMENT, SYSTEM = "kernels/suite", "kernel tests"
TESTS = REPOSITORY / "tests" / "kernels"
REPORT_TO = "ADASPLASH_ERROR_RATIOS"  # tests/kernels/oracle.py writes largest ratios below this folder


@dataclass(frozen=True)
class Worst:
    """The largest error / allowed, and the test or the fuzzer's seed that gave it."""

    ratio: float
    source: dict[str, Any]


@dataclass(frozen=True)
class Fuzz:
    """What the fuzzer says of its cases."""

    asked: int
    ran: int
    failed: list[int]
    worst: float | None
    worst_seed: int | None


class _Counter:
    """A pytest plugin that counts outcomes; errors in fixtures count as failures."""

    def __init__(self) -> None:
        self.counts = {"passed": 0, "failed": 0, "skipped": 0}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            self.counts["failed"] += 1
        elif report.skipped:
            self.counts["skipped"] += 1
        elif report.when == "call":
            self.counts["passed"] += 1

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            self.counts["failed"] += 1


def main(arguments: Sequence[str] | None = None) -> int:
    """Run tests/kernels, then the fuzzer if asked for, and append what they found.

    Returns:
        pytest's exit status if it is not 0; else 1 if a random call failed or not all of them ran.
    """
    parser = argparse.ArgumentParser(prog="python -m tasks.kernel_suite", description=__doc__.split("\n\n")[0])
    parser.add_argument("--results", type=Path, default=RESULTS, metavar="DIR", help="default: results/")
    parser.add_argument("--fuzz", type=_positive, metavar="N", help="make N random calls after the tests")
    parser.add_argument("--fuzz-seed", type=int, default=0, metavar="SEED", help="of the first; default %(default)s")
    parser.add_argument("--fuzz-seconds", type=float, metavar="S", help="start no random call after these")
    parser.add_argument("--workers", type=_positive, metavar="W", help="processes that make random calls")
    parser.add_argument("pytest_arguments", nargs="*", help="passed on to pytest, after --")
    options = parser.parse_args(arguments)
    params = {"arguments": list(options.pytest_arguments)}
    fuzz_params = params if options.fuzz is None else params | {"asked": options.fuzz, "first_seed": options.fuzz_seed}
    provenance = Provenance(
        experiment=EXPERIMENT, scale="paper", system=SYSTEM, seed=None,
        config_sha256=sha256_of(fuzz_params | {"tests": _hash(TESTS)}), source_sha256=code_sha256(),
    )  # fmt: skip

    def record(measurements: Sequence[Measurement]) -> None:
        append_records(records_path(options.results, EXPERIMENT, "paper"), provenance.records(measurements))

    counter = _Counter()
    with tempfile.TemporaryDirectory() as folder:
        status = _run_pytest(options.pytest_arguments, counter, folder)
        worst = _worst_of_tests(Path(folder))
    # at once: whatever becomes of the fuzzer, this is known
    record([Measurement(name, float(count), "tests", params) for name, count in counter.counts.items()])
    measured = []
    if options.fuzz is not None and status != pytest.ExitCode.INTERRUPTED:
        fuzz = _run_fuzz(options)
        if fuzz is None or fuzz.ran == 0:
            print("kernel suite: the fuzzer did not run a case, so nothing of it is recorded", file=sys.stderr)
            status = status or 1
        else:
            measured, worst_of_fuzz = _measure(fuzz, fuzz_params)
            worst = max(filter(None, (worst, worst_of_fuzz)), key=lambda w: w.ratio, default=None)
        if fuzz is not None and (fuzz.failed or fuzz.ran < fuzz.asked):
            print(f"kernel suite: {fuzz.ran} of {fuzz.asked} random calls ran, {len(fuzz.failed)} failed",
                  file=sys.stderr)  # fmt: skip
            status = status or 1
    if worst is not None:
        measured.append(Measurement("max_error_ratio", worst.ratio, "ratio", fuzz_params | worst.source))
    record(measured)
    return status


def _measure(fuzz: Fuzz, params: dict[str, Any]) -> tuple[list[Measurement], Worst | None]:
    """Return the fuzzer's counts as measurements, and its largest ratio."""
    params = params | {"worst_seed": fuzz.worst_seed}
    counts = [
        Measurement("fuzz_cases", float(fuzz.ran), "cases", params),
        Measurement("fuzz_failures", float(len(fuzz.failed)), "cases", params | {"failed": fuzz.failed}),
    ]
    return counts, None if fuzz.worst is None else Worst(fuzz.worst, {"worst_seed": fuzz.worst_seed})


def _positive(text: str) -> int:
    if (number := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"got {text}, allowed is 1 or more")
    return number


def _run_pytest(arguments: Sequence[str], counter: _Counter, folder: str) -> int:
    """Run the tests, which leave their largest ratios in ``folder``; workers of pytest-xdist inherit the variable."""
    before = os.environ.get(REPORT_TO)
    os.environ[REPORT_TO] = folder
    try:
        return int(pytest.main([str(TESTS), *arguments], plugins=[counter]))
    finally:
        if before is None:
            del os.environ[REPORT_TO]
        else:
            os.environ[REPORT_TO] = before


def _worst_of_tests(folder: Path) -> Worst | None:
    """Return the largest ratio that any process of the tests wrote."""
    found = [tuple(pair) for path in folder.glob("*.json") for pair in json.loads(path.read_text("utf-8")).values()]
    if not found:
        return None
    ratio, test = max(found)
    return Worst(ratio, {"worst_test": test})


def _run_fuzz(options: argparse.Namespace) -> Fuzz | None:
    """Run the fuzzer in a process of its own; None if it ended without a report."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder, "report.json")
        command = [sys.executable, str(TESTS / "fuzz.py"), "--json", str(report)]
        values = {"cases": options.fuzz, "seed": options.fuzz_seed, "seconds": options.fuzz_seconds,
                  "workers": options.workers}  # fmt: skip
        for name, value in values.items():
            command += [] if value is None else [f"--{name}", str(value)]
        path = os.pathsep.join([str(REPOSITORY / "kernels"), *filter(None, [os.environ.get("PYTHONPATH")])])
        sys.stdout.flush()
        subprocess.run(command, env=os.environ | {"PYTHONPATH": path}, check=False)
        return Fuzz(**json.loads(report.read_text("utf-8"))) if report.exists() else None


def _hash(folder: Path) -> str:
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*.py")):
        digest.update(path.relative_to(folder).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()


if __name__ == "__main__":
    sys.exit(main())
