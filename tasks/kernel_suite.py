"""Run the kernel tests and record how they ended: ``python -m tasks.kernel_suite``.

On a GPU the tests compile the kernels, so one command tells whether the package works there. The records go beside
the benchmark numbers, as experiment ``kernels/suite``: how many tests passed, failed and were skipped.
"""

from __future__ import annotations

import argparse
import hashlib
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from tasks.config import REPOSITORY
from tasks.records import RESULTS, Measurement, Provenance, append_records, code_sha256, records_path, sha256_of

EXPERIMENT, SYSTEM = "kernels/suite", "kernel tests"


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
    """Run tests/kernels, append the counts, and return pytest's exit status."""
    parser = argparse.ArgumentParser(prog="python -m tasks.kernel_suite", description=__doc__)
    parser.add_argument("--results", type=Path, default=RESULTS, metavar="DIR", help="default: results/")
    parser.add_argument("pytest_arguments", nargs="*", help="passed on to pytest, after --")
    options = parser.parse_args(arguments)
    folder = REPOSITORY / "tests" / "kernels"
    counter = _Counter()
    status = int(pytest.main([str(folder), *options.pytest_arguments], plugins=[counter]))
    provenance = Provenance(
        experiment=EXPERIMENT, scale="paper", system=SYSTEM, seed=None,
        config_sha256=sha256_of({"arguments": options.pytest_arguments, "tests": _hash(folder)}),
        source_sha256=code_sha256(),
    )  # fmt: skip
    measurements = [Measurement(name, float(count), "tests", {"arguments": list(options.pytest_arguments)})
                    for name, count in counter.counts.items()]  # fmt: skip
    append_records(records_path(options.results, EXPERIMENT, "paper"), provenance.records(measurements))
    return status


def _hash(folder: Path) -> str:
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*.py")):
        digest.update(path.relative_to(folder).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()


if __name__ == "__main__":
    sys.exit(main())
