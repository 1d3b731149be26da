"""The command line, in this process; what only a process of its own can show is run in one."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import tasks.__main__ as command_line
import tasks.doctor
import tasks.records
import tasks.status
from tasks.__main__ import main
from tasks.config import REPOSITORY, find_experiments
from tasks.programs import is_implemented
from tasks.records import read_records, records_path

TABLE4 = "configs/adasplash/table4.yaml"


@pytest.fixture
def results(tmp_path) -> Path:
    return tmp_path / "results"


@pytest.fixture
def fakes(make_fake, monkeypatch):
    """Let ``--all`` and ``list`` find these experiments in place of the real ones: fake0, fake1, ..., one a job."""

    def make(*does, **settings):
        found = [make_fake(name, identity=f"adasplash/fake{i}", **settings) for i, name in enumerate(does)]
        monkeypatch.setattr(command_line, "find_experiments", lambda root=None: found)
        return found

    return make


def refused(capsys, *arguments) -> str:
    """Return what follows ``error: `` on the one line that the command prints."""
    assert main([str(a) for a in arguments]) == 2
    printed = capsys.readouterr()
    assert printed.out == "" and printed.err.startswith("error: ") and printed.err.endswith("\n")
    assert printed.err.count("\n") == 1
    return printed.err.removeprefix("error: ").removesuffix("\n")


# In a process of its own


def test_a_missing_data_root_is_one_line(tmp_path):
    missing = tmp_path / "nowhere"
    command = [sys.executable, "-m", "tasks", "run", TABLE4, "--scale", "smoke", "--data-root", str(missing)]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f"error: data_root: no such folder: {missing} (from --data-root)\n"


def test_the_families_load_in_a_checkout_that_is_not_installed(write_config):
    path = write_config(change=lambda c: c.update(family="language_modeling", program="no_such_program"))
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    command = [sys.executable, "-m", "tasks", "run", str(path)]
    done = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert "adasplash/fake is not implemented yet: the family 'language_modeling' has no program" in done.stderr


# list


def test_list_shows_every_experiment_on_a_line(capsys):
    assert main(["list"]) == 0
    heading, *lines, last = capsys.readouterr().out.splitlines()
    assert heading.split() == ["experiment", "paper", "family", "scales", "state", "what", "it", "reproduces"]
    experiments = find_experiments()
    assert len(lines) == len(experiments) >= 20
    starts = [re.search(rf"\b{word}\b", heading).start() for word in ("paper", "family", "scales", "state", "what")]
    columns = [[line[a:b].strip() for a, b in zip([0, *starts], [*starts, None], strict=True)] for line in lines]
    assert [c[:4] for c in columns] == [[e.id, e.paper, e.family, "smoke lab paper"] for e in experiments]
    assert all(c[4] == "not implemented" or c[4].startswith(("ready", "measured: ")) for c in columns)
    assert [c[5] for c in columns] == [f"{e.item}: {e.title}" for e in experiments]
    ready = sum(c[4] != "not implemented" for c in columns)
    assert last == f"{len(lines)} experiments, {ready} of them implemented"


def test_list_says_what_was_measured(fakes, results, monkeypatch, capsys):
    monkeypatch.setattr(tasks.status, "RESULTS", results)
    fakes("a", "raises", "b")
    main(["run", "--all", "--only", "fake0", "--results", str(results), "--no-render"])
    main(["run", "--all", "--only", "fake1", "--results", str(results), "--no-render"])
    capsys.readouterr()
    assert main(["list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert ["measured: smoke" in line for line in lines[1:4]] == [True, False, False]
    assert ["ready" in line for line in lines[1:4]] == [False, True, True]  # one failed: nothing was measured
    path = records_path(results, "adasplash/fake0", "smoke")
    path.write_text("{\n")
    assert "smoke.jsonl:1: not a record" in refused(capsys, "list")


@pytest.mark.parametrize(("pattern", "expected"), [
    ("fake1", ["adasplash/fake1"]), ("adasplash/*1", ["adasplash/fake1"]), ("fake[02]", ["adasplash/fake0"]),
    ("helmet", ["adasplash/fake0", "adasplash/fake1"]), ("fake", ["adasplash/fake0", "adasplash/fake1"]),
])  # fmt: skip
def test_only_selects_by_part_or_pattern(fakes, capsys, pattern, expected):
    fakes("a", "b")
    if "[" in pattern:
        pattern = f"*{pattern}"
    assert main(["list", "--only", pattern]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()[1:-1]] == expected


# run: mistakes


def test_run_wants_configs_or_all(capsys):
    assert refused(capsys, "run").startswith("run: got neither, allowed are either config files or --all")
    assert refused(capsys, "run", TABLE4, "--all").startswith("run: got both, ")
    assert refused(capsys, "run", "--only", "x") == "--only: goes with --all"
    assert refused(capsys, "run", TABLE4, "--only", "x") == "--only: goes with --all"
    assert refused(capsys, "run", "--all", "--seeds", "1") == "--seeds: goes with config files, not with --all"


def test_only_that_matches_nothing_is_named(fakes, capsys):
    fakes("a")
    expected = "--only: nothing matches 'nix'; python -m tasks list shows what there is"
    assert refused(capsys, "run", "--all", "--only", "nix") == expected
    assert refused(capsys, "list", "--only", "nix") == expected


def test_an_unknown_scale_is_named(capsys):
    with pytest.raises(SystemExit) as caught:
        main(["run", TABLE4, "--scale", "huge"])
    assert caught.value.code == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert "--scale" in last and "'huge'" in last and "smoke" in last


@pytest.mark.parametrize("arguments", [[], ["nix"], ["run", "--nix"]])
def test_an_unknown_command_or_option_is_refused(arguments, capsys):
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2 and "usage: python -m tasks" in capsys.readouterr().err


def test_a_config_that_is_not_there_is_named(capsys, tmp_path):
    assert refused(capsys, "run", tmp_path / "x.yaml") == f"config: no such file: {tmp_path / 'x.yaml'}"
    assert refused(capsys, "run", tmp_path) == f"config: {tmp_path} is a folder, a YAML file is needed"


def test_a_wrong_data_folder_is_named(capsys, monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    assert refused(capsys, "run", TABLE4, "--data-root", tmp_path / "file").startswith("data_root: not a folder: ")
    monkeypatch.setenv("ADASPLASH_DATA", str(tmp_path / "gone"))
    expected = f"data_root: no such folder: {tmp_path / 'gone'} (from ADASPLASH_DATA)"
    assert refused(capsys, "run", TABLE4) == expected
    assert refused(capsys, "doctor") == expected


def test_a_wrong_setting_is_one_line(capsys, write_config, fake_family, results):
    path = write_config(change=lambda c: c.update(common={"does": ["a"], "value": "high"}))
    text = refused(capsys, "run", path, "--results", results)
    assert text == f"{path}: common.value: got 'high' (str), allowed is a number"
    assert not results.exists()


def test_a_user_error_of_a_job_is_one_line(capsys, make_fake, results):
    path = make_fake("a", "user_error").path
    assert main(["run", str(path), "--results", str(results)]) == 2
    printed = capsys.readouterr()
    assert printed.err == "error: data.local: no folder lm/nowhere\n"
    assert len(read_records(records_path(results, "adasplash/fake", "smoke"))) == 1


def test_an_error_of_several_lines_is_printed_on_one(capsys, monkeypatch):
    def fail():
        raise command_line.ConfigError("first\nsecond")

    monkeypatch.setattr(command_line, "find_experiments", fail)
    assert refused(capsys, "list") == "first second"


def test_what_is_not_implemented_is_named(capsys, results, write_config):
    path = write_config(change=lambda c: c.update(family="language_modeling", program="no_such_program"))
    text = refused(capsys, "run", path, "--results", results)
    assert text.startswith(f"{path}: adasplash/fake is not implemented yet: the family 'language_modeling' has no "
                           "program 'no_such_program', only ")  # fmt: skip
    waiting = [e for e in find_experiments() if not is_implemented(e)]
    for experiment in waiting:
        text = refused(capsys, "run", experiment.path, "--results", results)
        assert text.startswith(f"{experiment.file}: {experiment.id} is not implemented yet: the family ")
    assert not results.exists()


def test_several_configs_are_checked_before_any_runs(capsys, make_fake, write_config, results, ran):
    good = make_fake("a").path
    missing = write_config("adasplash/other", lambda c: c.update(program="other"))
    assert "adasplash/other is not implemented yet" in refused(capsys, "run", good, missing, "--results", results)
    assert ran() == []


def test_asking_for_what_is_not_implemented_alone_is_refused(fakes, capsys, results, monkeypatch):
    fakes("a", "b")
    monkeypatch.setattr("tasks.programs.is_implemented", lambda e: False)
    text = refused(capsys, "run", "--all", "--results", results)
    assert text == "--only: not implemented yet: adasplash/fake0, adasplash/fake1"


# run: outcomes


def run(*arguments) -> int:
    return main(["run", *(str(a) for a in arguments)])


def test_kernels_tune_themselves_once(make_fake, results, monkeypatch, tmp_path):
    experiment = make_fake("a")
    monkeypatch.setenv("TRITON_HOME", str(tmp_path))
    own = str(tmp_path / ".triton" / "cache")  # where Triton itself would look
    for given, found in (({}, ("1", own)), ({"AUTOTUNING": "0", "DIR": "elsewhere"}, ("0", "elsewhere"))):
        for name in ("AUTOTUNING", "DIR"):
            monkeypatch.setenv(f"TRITON_CACHE_{name}", "")  # so that it is taken back, whoever sets it
            monkeypatch.delenv(f"TRITON_CACHE_{name}")
        for name, value in given.items():
            monkeypatch.setenv(f"TRITON_CACHE_{name}", value)
        assert run(experiment.path, "--results", results, "--no-render") == 0
        assert (os.environ["TRITON_CACHE_AUTOTUNING"], os.environ["TRITON_CACHE_DIR"]) == found


def test_nobody_needs_a_home(make_fake, results, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", "")
    monkeypatch.delenv("TRITON_CACHE_DIR")
    monkeypatch.delenv("TRITON_HOME", raising=False)
    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.setattr("pwd.getpwuid", lambda uid: {}[uid])  # as for a container's user without a name
    with pytest.raises(RuntimeError):
        Path.home()
    assert run(make_fake("a").path, "--results", results, "--no-render") == 0
    assert "TRITON_CACHE_DIR" not in os.environ


def test_one_config_runs_and_says_how_it_ended(make_fake, results, capsys):
    path = make_fake("a", "b").path
    assert run(path, "--results", results, "--no-render") == 0
    out = capsys.readouterr().out
    assert re.search(r"^adasplash/fake +done +0 +jobs run: 2, up to date: 0", out, re.MULTILINE)
    assert "\n1 done, 0 up to date, 0 failed\n" in out
    assert run(path, "--results", results, "--no-render") == 0
    out = capsys.readouterr().out
    assert re.search(r"^adasplash/fake +up to date +0 +jobs recorded earlier: 2", out, re.MULTILINE)
    assert run(path, "--results", results, "--no-render", "--force") == 0
    assert "1 done, 0 up to date" in capsys.readouterr().out


def test_a_failure_is_the_exit_status_and_in_the_summary(make_fake, results, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "400")
    experiment = make_fake("raises", "a")
    module = sys.modules[tasks.programs.find_program(experiment).run.__module__]

    def raise_brackets():
        raise ValueError("got shape [batch, heads] of [/tmp/x], [bold]no[/bold]")

    module.ACTS["raises"] = raise_brackets
    assert run(experiment.path, "--results", results, "--no-render") == 1
    out = " ".join(capsys.readouterr().out.split())
    assert "adasplash/fake failed 0 " in out
    summary = out[out.index("adasplash/fake failed"):]
    assert "ValueError: got shape [batch, heads] of [/tmp/x], [bold]no[/bold]" in summary  # rich would eat brackets
    assert "0 done, 0 up to date, 1 failed" in out


def test_all_runs_every_one_and_lists_what_waits(fakes, make_fake, results, capfd, monkeypatch):
    found = fakes("a", "kill", "b")
    monkeypatch.setattr("tasks.programs.is_implemented", lambda e: e is not found[2])
    assert run("--all", "--results", results, "--no-render") == 1
    out = capfd.readouterr().out
    assert re.search(r"^adasplash/fake0 +done", out, re.MULTILINE)
    assert re.search(r"^adasplash/fake1 +failed +\d+ +its process was ended by SIGKILL", out, re.MULTILINE)
    assert "1 done, 0 up to date, 1 failed, 1 not implemented yet" in out
    assert "not implemented yet: adasplash/fake2" in out.splitlines()


def test_an_interrupt_ends_with_130_and_finished_jobs_stay(make_fake, results, capsys):
    path = make_fake("a", "interrupt").path
    assert run(path, "--results", results) == 130
    printed = capsys.readouterr()
    assert "interrupted; finished jobs are recorded" in printed.err and "Traceback" not in printed.err
    assert [r.system for r in read_records(records_path(results, "adasplash/fake", "smoke"))] == ["a"]


def test_rendering_that_fails_does_not_swallow_the_summary(make_fake, results, capsys, monkeypatch):
    def fail(*_):
        raise command_line.UserError("not rendered: adasplash/other: broken")

    monkeypatch.setattr(command_line, "_render_into", fail)
    assert run(make_fake("a").path, "--results", results) == 2
    printed = capsys.readouterr()
    assert "1 done, 0 up to date, 0 failed" in printed.out
    assert printed.err == "error: not rendered: adasplash/other: broken\n"


def test_run_renders_what_it_ran_and_says_where(fakes, results, capsys):
    experiment = fakes("a", "b")[0]
    assert run(experiment.path, "--results", results) == 0
    out = capsys.readouterr().out.splitlines()
    assert out[-2:] == [f"table:  {results}/tables/adasplash/fake0.md", f"index:  {results}/README.md"]
    assert all(Path(line.split()[1]).is_file() for line in out[-2:])


# render and doctor


def test_render_works_without_any_results(results, capsys):
    assert main(["render", "--results", str(results)]) == 0
    count, where = re.fullmatch(r"(\d+) files rendered; the index is (.*)\n", capsys.readouterr().out).groups()
    files = [p for p in results.rglob("*") if p.is_file()]
    assert len(files) == int(count) and Path(where) == results / "README.md" in files
    index = (results / "README.md").read_text()
    assert all(e.title.split("|")[0] in index for e in find_experiments())
    assert not (results / "records").exists()


def test_render_into_a_place_that_cannot_be_written_is_one_line(tmp_path, fakes, capsys):
    fakes("a")
    (tmp_path / "file").touch()
    assert str(tmp_path / "file") in refused(capsys, "render", "--results", tmp_path / "file")


def test_doctor_says_what_each_scale_can_run_without_a_gpu(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(tasks.doctor.torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(tasks.doctor, "environment", tasks.records.environment.__wrapped__)
    monkeypatch.delenv("ADASPLASH_DATA", raising=False)
    monkeypatch.setattr("tasks.data.sources.hub_commit", lambda *_: None)  # as if the hub answered
    monkeypatch.setattr(tasks.doctor, "RESULTS", tmp_path / "not" / "there")
    assert main(["doctor"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("GPU     none: ")
    assert re.search(r"^  torch +\d", out, re.MULTILINE) and re.search(r"^disk +\d+ GiB free", out, re.MULTILINE)
    assert re.search(r"^adasplash/table4 +can run +no \(\d+\) +no \(\d+\) *$", out, re.MULTILINE)
    assert re.search(r"^\(1\) needs a GPU", out, re.MULTILINE)
    experiments = find_experiments()
    waiting = sum(not is_implemented(e) for e in experiments)
    assert f"\nnot implemented yet: {waiting} of {len(experiments)} experiments" in out


def test_doctor_says_why_not(fakes, capsys, monkeypatch, tmp_path):
    (tmp_path / "data" / "lm" / "novels").mkdir(parents=True)
    found = fakes("a", "b", "a", obstacle="needs [8] GPUs and [gold]")
    monkeypatch.setattr(tasks.doctor, "is_implemented", lambda e: e is not found[2])
    assert main(["doctor", "--data-root", str(tmp_path / "data")]) == 0
    out = capsys.readouterr().out
    assert f"data    {tmp_path / 'data'}: lm/novels\n" in out
    table = [line.split() for line in out.splitlines() if line.startswith("adasplash/")]
    assert table == [[f"adasplash/fake{i}", *["no", "(1)"] * 3] for i in range(2)]
    assert out.splitlines()[-2:] == [
        "(1) needs [8] GPUs and [gold]",
        "not implemented yet: 1 of 3 experiments (python -m tasks list)",
    ]
