"""Does the running interpreter satisfy pyproject.toml? Asked by run_all.sh and run_tests.sh.

It runs before anything is installed, so it imports the standard library alone, and nothing else of `tasks`.
`packaging`, which reads requirements, comes with every environment that has the dependencies; where it is
missing, so are they.

    python tasks/environment.py interpreter            within requires-python? prints the interpreter to use
    python tasks/environment.py check --extras a,b     exit 0, or 1 and the first requirement that is not met
    python tasks/environment.py stamp --extras a,b     what an environment made for these extras is known by
"""

from __future__ import annotations

import argparse
import hashlib
import re
import sys
import tomllib
from collections.abc import Iterable, Sequence
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def read_project(root: Path = ROOT) -> dict:
    """The [project] table of pyproject.toml."""
    return tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def requirements(extras: Iterable[str], root: Path = ROOT) -> list[str]:
    """The base dependencies, then those of `extras`. Raises ValueError for an extra that does not exist."""
    project = read_project(root)
    optional = project["optional-dependencies"]
    found = list(project["dependencies"])
    for extra in extras:
        if extra not in optional:
            raise ValueError(f"extras: there is no extra {extra!r}; allowed: {', '.join(sorted(optional))}")
        found += optional[extra]
    return found


def python_problem(requires: str, version: tuple[int, int]) -> str | None:
    """Why Python `version` lies outside `requires` (clauses >=X.Y and <X.Y), or None when it lies inside."""
    for clause in requires.split(","):
        match = re.fullmatch(r"\s*(>=|<)\s*(\d+)\.(\d+)\s*", clause)
        if match is None:
            raise ValueError(f"requires-python: {clause!r} is not understood; allowed: >=X.Y and <X.Y")
        bound = (int(match[2]), int(match[3]))
        if (version >= bound) is not (match[1] == ">="):
            return f"Python {version[0]}.{version[1]} is not {requires}"
    return None


def first_problem(wanted: Iterable[str]) -> str | None:
    """The first of the `wanted` requirements (PEP 508) that this interpreter lacks, in words, or None."""
    try:
        from packaging.requirements import Requirement
    except ImportError:
        return "packaging is not installed"
    for text in wanted:
        requirement = Requirement(text)
        if requirement.marker is not None and not requirement.marker.evaluate():
            continue
        try:
            version = metadata.version(requirement.name)
        except metadata.PackageNotFoundError:
            version = None
        if version is None:  # also what a half-removed installation answers
            return f"{requirement.name} is not installed (needed: {text})"
        if not requirement.specifier.contains(version, prereleases=True):
            return f"{requirement.name} {version} is installed (needed: {text})"
    return None


def stamp(extras: Iterable[str], root: Path = ROOT) -> list[str]:
    """A line for each extra, `<extra> <sha256>`, that changes with pyproject.toml and constraints.txt.

    One for each, so that an environment made for more extras than are asked for is recognised.
    """
    requirements(extras := sorted(extras), root)  # refuses unknown extras
    files = [(root / name).read_bytes() for name in ("pyproject.toml", "constraints.txt")]
    lines = []
    for extra in extras:
        parts = [hashlib.sha256(part).hexdigest() for part in (*files, extra.encode())]
        lines.append(f"{extra} {hashlib.sha256(' '.join(parts).encode()).hexdigest()}")
    return lines


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Does this interpreter satisfy pyproject.toml?")
    parser.add_argument("command", choices=("interpreter", "check", "stamp"))
    parser.add_argument("--extras", default="", help="comma-separated extras of pyproject.toml")
    options = parser.parse_args(arguments)
    extras = [extra for extra in options.extras.split(",") if extra]

    try:
        wanted = requirements(extras)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if options.command == "stamp":
        print("\n".join(stamp(extras)))
        return 0
    problem = python_problem(read_project()["requires-python"], sys.version_info[:2])
    if problem is None and options.command == "check":
        problem = first_problem(wanted)
    if problem is not None:
        print(problem)
        return 1
    if options.command == "interpreter":
        # not that of a virtual environment, which may be the one about to be made anew
        print(getattr(sys, "_base_executable", sys.executable))
    return 0


if __name__ == "__main__":
    sys.exit(main())
