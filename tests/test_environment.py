"""The project files agree with each other, and the scripts find, make and keep the environment they should.

Nothing is installed here: a shell script plays the interpreter, notes what it is asked to do, and hands
questions about requirements to the real one.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from packaging.version import Version

from tasks import environment

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]
CONDA = yaml.safe_load((ROOT / "environment.yml").read_text())["dependencies"]
PYTEST = "-m pytest -n auto --dist worksteal"


def direct_requirements() -> list[Requirement]:
    return [Requirement(text) for text in PROJECT["dependencies"] + sum(EXTRAS.values(), [])]


def pins() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    return dict(line.split("==") for line in lines if line and not line.startswith("#"))


# pyproject.toml, constraints.txt, environment.yml


def test_every_direct_dependency_is_pinned_and_nothing_else():
    assert sorted(pins()) == sorted({requirement.name for requirement in direct_requirements()})


@pytest.mark.parametrize("requirement", direct_requirements(), ids=str)
def test_the_pin_lies_in_the_range(requirement):
    assert requirement.specifier.contains(pins()[requirement.name])


def test_a_package_has_one_range_in_all_extras():
    ranges: dict[str, SpecifierSet] = {}
    for requirement in direct_requirements():
        name = canonicalize_name(requirement.name)
        assert ranges.setdefault(name, requirement.specifier) == requirement.specifier, name


def test_conda_python_lies_in_requires_python():
    (python,) = (entry for entry in CONDA if isinstance(entry, str) and entry.startswith("python="))
    assert SpecifierSet(PROJECT["requires-python"]).contains(python.removeprefix("python="))


def test_conda_installs_this_project_with_the_tested_versions():
    (pip,) = (entry["pip"] for entry in CONDA if isinstance(entry, dict))
    assert pip[0] == "-c constraints.txt"
    extras = re.fullmatch(r"-e \.\[(.*)\]", pip[1])[1].split(",")
    assert set(extras) <= set(EXTRAS) and len(pip) == 2


# tasks/environment.py


def test_installed_requirements_have_no_problem():
    assert environment.first_problem([f"pytest=={metadata.version('pytest')}", "packaging"]) is None


def test_first_problem_names_a_missing_package():
    problem = environment.first_problem(["pytest", "no-such-package-anywhere>=1", "neither-this"])
    assert problem == "no-such-package-anywhere is not installed (needed: no-such-package-anywhere>=1)"


def test_first_problem_names_a_wrong_version():
    installed = metadata.version("pytest")
    assert environment.first_problem(["pytest<1"]) == f"pytest {installed} is installed (needed: pytest<1)"


def test_requirements_for_other_platforms_do_not_count():
    assert environment.first_problem(["no-such-package-anywhere; sys_platform == 'amiga'"]) is None


@pytest.mark.parametrize(
    ("version", "fits"), [("2.13.0+cpu", True), ("2.14.0.dev20260601", True), ("2.10.1", False)]
)
def test_local_and_development_versions(monkeypatch, version, fits):
    monkeypatch.setattr(environment.metadata, "version", lambda name: version)
    assert (environment.first_problem(["torch>=2.11,<2.16"]) is None) is fits


def test_without_packaging_no_environment_is_suitable(monkeypatch):
    monkeypatch.setitem(sys.modules, "packaging.requirements", None)
    assert environment.first_problem([]) == "packaging is not installed"


@pytest.mark.parametrize("minor", range(8, 18))
def test_python_problem_agrees_with_packaging(minor):
    requires = PROJECT["requires-python"]
    fits = SpecifierSet(requires).contains(Version(f"3.{minor}"))
    assert (environment.python_problem(requires, (3, minor)) is None) is fits


def test_python_problem_refuses_clauses_it_does_not_know():
    with pytest.raises(ValueError, match="requires-python: '~=3.11' is not understood"):
        environment.python_problem("~=3.11", (3, 12))


def test_stamp_changes_with_each_file_and_not_with_the_other_extras(tmp_path):
    for name in ("pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path)
    (before,) = environment.stamp(["dev"], tmp_path)
    assert before in environment.stamp(["experiments", "dev"], tmp_path)
    for name in ("pyproject.toml", "constraints.txt"):
        with (tmp_path / name).open("a") as file:
            file.write("\n# changed\n")
        (after,) = environment.stamp(["dev"], tmp_path)
        assert after != before
        before = after


def test_command_line(capsys):
    assert environment.main(["stamp", "--extras", "dev"]) == 0
    assert re.fullmatch(r"dev [0-9a-f]{64}\n", capsys.readouterr().out)
    assert environment.main(["check", "--extras", "nonsense"]) == 2
    assert "there is no extra 'nonsense'; allowed: bench, dev," in capsys.readouterr().err


def test_check_prints_what_is_missing(monkeypatch, capsys):
    monkeypatch.setattr(environment, "requirements", lambda extras: ["no-such-package-anywhere"])
    assert environment.main(["check", "--extras", "dev"]) == 1
    assert capsys.readouterr().out.startswith("no-such-package-anywhere is not installed")


def test_environment_py_needs_the_standard_library_alone():
    command = [sys.executable, "-I", "-S", str(ROOT / "tasks/environment.py"), "interpreter"]
    assert Path(subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()).exists()


# run_all.sh and run_tests.sh

FAKE_PYTHON = """#!/bin/sh
# plays an interpreter: answers questions, makes environments of itself, notes what pip and programs are asked
case "$*" in
  *"environment.py interpreter") echo "$0" ;;
  *"environment.py check"*) [ -z "$FAKE_UNFIT" ] || { echo "torch is not installed"; exit 1; } ;;
  *"environment.py stamp"*) exec "$REAL_PYTHON" "$@" ;;
  -c*) exit 0 ;;
  "-m venv "*) mkdir -p "$3/bin" && cp "$0" "$3/bin/python" ;;
  "-m pip "*) echo "$*" >>"$CALLS"; echo "$FAKE_PIP"
     case $FAKE_PIP in killed) kill -9 $PPID ;; ?*) exit 1 ;; esac ;;
  *) echo "$*" >>"$CALLS" ;;
esac
"""


class Checkout:
    """A copy of the scripts in a folder with a space in its name, called from another folder."""

    def __init__(self, folder: Path) -> None:
        self.root = folder / "a checkout"
        (self.root / "tasks").mkdir(parents=True)
        for name in ("pyproject.toml", "constraints.txt", "run_all.sh", "run_tests.sh",
                     "tasks/environment.py", "tasks/environment.sh"):  # fmt: skip
            shutil.copy(ROOT / name, self.root / name)
        self.calls = folder / "calls"
        self.venv = self.root / ".venv"
        self.bin = folder / "bin"
        self.fake(self.bin / "python3.12")

    def fake(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(FAKE_PYTHON)
        path.chmod(0o755)

    def run(self, script: str, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
        inherited = ("VIRTUAL_ENV", "CONDA_PREFIX", "ADASPLASH_VENV", "ADASPLASH_DATA")
        env = {key: value for key, value in os.environ.items() if key not in inherited}
        env |= {"PATH": f"{self.bin}:{os.defpath}", "CALLS": str(self.calls), "REAL_PYTHON": sys.executable}
        command = ["bash", str(self.root / script), *arguments]
        env |= variables
        return subprocess.run(command, cwd=self.bin, env=env, capture_output=True, text=True, timeout=60)

    def noted(self) -> list[str]:
        """What the fake interpreters were asked to do since the last time."""
        lines = self.calls.read_text().splitlines() if self.calls.exists() else []
        self.calls.unlink(missing_ok=True)
        return lines


@pytest.fixture
def checkout(tmp_path: Path) -> Checkout:
    return Checkout(tmp_path)


INSTALL = "-m pip install --no-input -c constraints.txt -e .[{}]"
RUN = "-m tasks run --scale smoke --all"


@pytest.mark.parametrize("script", ["run_all.sh", "run_tests.sh"])
def test_help_needs_no_environment(checkout, script):
    done = checkout.run(script, "--help")
    assert done.returncode == 0 and done.stdout.startswith(f"usage: ./{script}")
    assert not checkout.noted() and not checkout.venv.exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--frobnicate"], "unknown option --frobnicate"),
        (["--scale"], "--scale needs a value"),
        (["--scale", "huge"], "--scale: huge is not one of smoke, lab, paper"),
        (["--data-root", "no/such/folder"], "--data-root: no/such/folder is not a folder"),
    ],
)
def test_wrong_options_end_before_anything_is_made(checkout, arguments, message):
    done = checkout.run("run_all.sh", *arguments)
    assert done.returncode == 2
    assert done.stderr == f"error: {message} (./run_all.sh --help lists the options)\n"
    assert not checkout.noted() and not checkout.venv.exists()


def test_options_are_passed_on_and_folders_are_the_callers(checkout):
    checkout.run("run_all.sh", "--scale", "lab", "--only", "a*/t 4", "--data-root", ".", "--force")
    expected = f"-m tasks run --scale lab --all --only a*/t 4 --data-root {checkout.bin} --force"
    assert checkout.noted()[-1] == expected


def test_the_environment_is_made_once(checkout):
    first = checkout.run("run_tests.sh", "-x", "tests/kernels")
    assert checkout.noted() == [INSTALL.format("experiments,dev"), f"{PYTEST} -x tests/kernels"]
    assert first.returncode == 0 and "Making a Python environment in .venv" in first.stderr
    second = checkout.run("run_tests.sh")
    assert checkout.noted() == [PYTEST] and second.stderr == ""
    checkout.run("run_all.sh")  # asks for less than is there
    assert checkout.noted() == [RUN]


def test_more_extras_and_changed_versions_are_installed_on_top(checkout):
    checkout.run("run_all.sh")
    (checkout.venv / "kept").touch()
    checkout.run("run_tests.sh")
    assert checkout.noted()[-2:] == [INSTALL.format("experiments,dev"), PYTEST]
    with (checkout.root / "constraints.txt").open("a") as file:
        file.write("another==1\n")
    updated = checkout.run("run_all.sh")
    assert checkout.noted() == [INSTALL.format("experiments"), RUN]
    assert "Updating the Python environment in .venv" in updated.stderr and (checkout.venv / "kept").exists()


def test_a_killed_installation_is_started_over(checkout):
    assert checkout.run("run_all.sh", FAKE_PIP="killed").returncode != 0
    (checkout.venv / "half a package").touch()
    again = checkout.run("run_all.sh")
    assert again.returncode == 0 and not (checkout.venv / "half a package").exists()
    assert checkout.noted() == [INSTALL.format("experiments")] * 2 + [RUN]


def test_an_installation_under_way_is_left_alone(checkout):
    checkout.fake(checkout.venv / "bin/python")
    (checkout.venv / "adasplash-stamp").write_text(f"unfinished {os.getpid()}\n")
    done = checkout.run("run_all.sh")
    assert done.returncode == 1 and not checkout.noted()
    assert f"error: process {os.getpid()} is installing into .venv" in done.stderr


@pytest.mark.parametrize(
    ("output", "hint"),
    [
        ("[Errno 28] No space left on device", "the disk is full"),
        ("WARNING: Retrying after connection broken by 'NewConnectionError'", "is there a network"),
        ("ERROR: something else", "see the log (.venv/install.log)"),
    ],
)
def test_a_failed_installation_shows_why(checkout, output, hint):
    done = checkout.run("run_all.sh", FAKE_PIP=output)
    assert done.returncode == 1
    *_, tail, message = done.stderr.splitlines()
    assert tail == output
    assert message.startswith("error: the packages could not be installed") and hint in message


def test_a_folder_that_the_scripts_did_not_make_is_not_touched(checkout):
    checkout.venv.mkdir()
    (checkout.venv / "mine").touch()
    done = checkout.run("run_all.sh")
    assert done.returncode == 1 and ".venv was not made by this script" in done.stderr
    assert [path.name for path in checkout.venv.iterdir()] == ["mine"] and not checkout.noted()


def test_the_active_environment_is_used_when_it_suffices(checkout, tmp_path):
    checkout.fake(tmp_path / "envs/some env/bin/python")
    for variable in ("VIRTUAL_ENV", "CONDA_PREFIX"):
        done = checkout.run("run_all.sh", **{variable: str(tmp_path / "envs/some env")})
        assert done.stderr == "Using the active environment some env\n"
        assert checkout.noted() == [RUN] and not checkout.venv.exists()


def test_an_active_environment_that_does_not_suffice_is_named(checkout, tmp_path):
    checkout.fake(tmp_path / "envs/base/bin/python")
    done = checkout.run("run_all.sh", CONDA_PREFIX=str(tmp_path / "envs/base"), FAKE_UNFIT="1")
    assert done.stderr.startswith("Not using the active environment base: torch is not installed\nMaking")
    assert checkout.noted() == [INSTALL.format("experiments"), RUN]


def test_another_folder_for_the_environment(checkout, tmp_path):
    checkout.run("run_all.sh", ADASPLASH_VENV=str(tmp_path / "else where"))
    assert (tmp_path / "else where/bin/python").exists() and not checkout.venv.exists()


def test_no_python_at_all(checkout):
    (checkout.bin / "python3.12").unlink()
    for tool in ("bash", "basename", "dirname", "grep", "ls", "sed"):
        (checkout.bin / tool).symlink_to(shutil.which(tool))
    done = checkout.run("run_all.sh", PATH=str(checkout.bin))
    assert done.returncode == 1
    assert done.stderr.startswith(f"error: no Python {PROJECT['requires-python']} was found")
