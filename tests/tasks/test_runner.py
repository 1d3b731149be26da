from __future__ import annotations

import logging
import sys
import warnings
from dataclasses import replace
from pathlib import Path

import pytest

import tasks.records
from tasks.config import load_experiment
from tasks.distributed import Devices
from tasks.errors import ConfigError, NotImplementedYet, UserError
from tasks.programs import find_program, is_implemented
from tasks.records import read_records, records_path
from tasks.runner import DONE, FAILED, SKIPPED, log_path, plan, run_experiment, run_many, shown


def states(experiment, options) -> list[tuple]:
    """System, seed, metric and status of every record."""
    found = read_records(records_path(options.results, experiment.id, options.scale))
    return [(r.system, r.seed, r.metric, r.status) for r in found]


# One experiment


def test_every_job_is_run_and_recorded(make_fake, options, ran, capsys):
    experiment = make_fake("a", "b", seeds=[0, 1], value=2.5)
    outcome = run_experiment(experiment, options)
    assert (outcome.state, outcome.detail) == (DONE, "jobs run: 4, up to date: 0")
    assert ran() == ["a (seed 0)", "a (seed 1)", "b (seed 0)", "b (seed 1)"]
    assert states(experiment, options) == [(s, i, "val_loss", "ok") for s in "ab" for i in (0, 1)]
    record = read_records(records_path(options.results, experiment.id, "smoke"))[0]
    assert (record.experiment, record.scale, record.value) == ("adasplash/fake", "smoke", 2.5)
    assert capsys.readouterr().out.splitlines()[0] == "  a (seed 0): job 1 of 4"


def test_what_is_recorded_is_not_run_again(make_fake, options, ran):
    experiment = make_fake("a", "b")
    run_experiment(experiment, options)
    ran()
    outcome = run_experiment(experiment, options)
    assert outcome.state == SKIPPED and ran() == []
    assert len(states(experiment, options)) == 2


def test_force_runs_again(make_fake, options, ran):
    experiment = make_fake("a", "b")
    run_experiment(experiment, options)
    ran()
    assert run_experiment(experiment, replace(options, force=True)).state == DONE
    assert ran() == ["a (seed 0)", "b (seed 0)"]
    assert len(states(experiment, options)) == 4


def test_only_jobs_that_are_due_run(make_fake, options, ran):
    run_experiment(make_fake("a"), options)
    experiment = make_fake("a")
    records = records_path(options.results, experiment.id, "smoke")
    last = records.read_text()
    records.write_text(last + last.replace('"system": "a"', '"system": "b"'))
    ran()
    assert run_experiment(make_fake("a"), options).state == SKIPPED
    records.write_text(last.replace('"system": "a"', '"system": "b"'))
    assert run_experiment(make_fake("a"), options).state == DONE
    assert ran() == ["a (seed 0)"]


def test_seeds_leave_the_other_jobs_to_later(make_fake, options, ran):
    experiment = make_fake("a", "b", seeds=[0, 1, 2])
    outcome = run_experiment(experiment, replace(options, seeds=frozenset([2, 0])))
    assert outcome.detail == "jobs run: 4, up to date: 0"
    assert ran() == ["a (seed 0)", "a (seed 2)", "b (seed 0)", "b (seed 2)"]
    assert run_experiment(experiment, replace(options, seeds=frozenset([0]))).state == SKIPPED
    assert run_experiment(experiment, options).detail == "jobs run: 2, up to date: 4"
    assert ran() == ["a (seed 1)", "b (seed 1)"]
    with pytest.raises(ConfigError, match=r"scale smoke: --seeds: got 3, 7, allowed are 0, 1, 2$"):
        plan(experiment, replace(options, seeds=frozenset([7, 1, 3])))
    names = {log_path(experiment, replace(options, seeds=seeds)) for seeds in (None, frozenset([0]), frozenset([0, 1]))}
    assert len(names) == 3


def test_other_devices_are_other_records_where_devices_count(make_fake, options, ran, monkeypatch):
    experiment = make_fake("a")
    program = find_program(experiment)
    for by_devices, again in ((False, []), (True, ["a (seed 0)"])):
        chosen = replace(program, distributed=True, by_devices=by_devices)
        monkeypatch.setattr("tasks.runner.find_program", lambda _, chosen=chosen: chosen)
        run_experiment(experiment, options)
        ran()
        for devices in (Devices(2), Devices(2, strategy="fsdp"), Devices(1, 2)):
            run_experiment(experiment, replace(options, devices=devices))
            assert ran() == again
            assert run_experiment(experiment, replace(options, devices=devices)).state == SKIPPED


CHANGES = {
    "settings": lambda fake, options, patch, machine: (fake("a", value=2.0), options),
    "seed": lambda fake, options, patch, machine: (fake("a", seeds=[1]), options),
    "scale": lambda fake, options, patch, machine: (fake("a"), replace(options, scale="lab")),
    "experiment": lambda fake, options, patch, machine: (fake("a", identity="adasplash/other"), options),
    "data": lambda fake, options, patch, machine: (fake("a"), replace(options, data_root=Path("elsewhere"))),
    "device": lambda fake, options, patch, machine: machine.update(gpu="Some GPU") or (fake("a"), options),
    "code": lambda fake, options, patch, machine: (
        patch.setattr(tasks.runner, "code_sha256", lambda package: "other") or (fake("a"), options)),
}  # fmt: skip


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_of_what_decides_the_outcome_runs_again(make_fake, options, ran, machine, monkeypatch, change):
    run_experiment(make_fake("a"), options)
    assert [fresh for *_, fresh in plan(make_fake("a"), options)[2]] == [True]
    ran()
    experiment, options = CHANGES[change](make_fake, options, monkeypatch, machine)
    assert [fresh for *_, fresh in plan(experiment, options)[2]] == [False]
    assert run_experiment(experiment, options).state == DONE
    assert len(ran()) == 1
    assert run_experiment(experiment, options).state == SKIPPED


def test_a_change_in_a_base_runs_again(make_fake, write_config, options):
    base = make_fake("a", identity="adasplash/base").path
    path = write_config(change=lambda config: config.update(base="adasplash/base"))
    run_experiment(load_experiment(path, path.parents[1]), options)
    assert run_experiment(load_experiment(path, path.parents[1]), options).state == SKIPPED
    base.write_text(base.read_text().replace("common:", "common:\n  value: 2.0"))
    assert run_experiment(load_experiment(path, path.parents[1]), options).state == DONE


def test_a_comment_in_the_config_runs_nothing_again(make_fake, options):
    """Settings decide the outcome; what is said of it, how it is drawn and what the paper reports do not."""
    experiment = make_fake("a")
    run_experiment(experiment, options)
    experiment.path.write_text(experiment.path.read_text() + "# a comment\n")
    assert [fresh for *_, fresh in plan(experiment, options)[2]] == [True]


def test_another_program_runs_again(make_fake, options):
    experiment = make_fake("a")
    run_experiment(experiment, options)
    with pytest.MonkeyPatch.context() as patch:
        found = tasks.runner.find_program(experiment)
        patch.setattr(tasks.runner, "find_program", lambda experiment: found)
        jobs = plan(replace(experiment, program="other"), options)[2]
    assert [fresh for *_, fresh in jobs] == [False]


def test_a_job_that_raises_is_recorded_as_failed_and_the_others_run(make_fake, options, capsys):
    experiment = make_fake("a", "raises", "b")
    outcome = run_experiment(experiment, options)
    log = log_path(experiment, options)
    assert outcome.state == FAILED
    assert outcome.detail.endswith(f"raises (seed 0): RuntimeError: went wrong (log: {log})")
    assert outcome.detail.startswith("1 of 3 jobs")
    assert states(experiment, options) == [
        ("a", 0, "val_loss", "ok"), ("raises", 0, "job", "failed"), ("b", 0, "val_loss", "ok")]  # fmt: skip
    failed = read_records(records_path(options.results, experiment.id, "smoke"))[1]
    assert (failed.value, failed.params) == (None, {"reason": "RuntimeError: went wrong"})
    assert "  raises (seed 0): failed: RuntimeError: went wrong" in capsys.readouterr().out.splitlines()
    text = log.read_text()
    assert "Traceback (most recent call last)" in text and "in raises" in text and "second line" in text


@pytest.mark.parametrize(("does", "reason"), [
    ("not_finite", "ValueError: value: val_loss is nan"),
    ("infinite_param", "ValueError: Out of range float values are not JSON compliant"),
    ("not_json", "TypeError: Object of type object is not JSON serializable"),
    ("nothing", "ValueError: the program returned no measurements"),
    ("leave", "SystemExit: 3"),
])  # fmt: skip
def test_a_job_without_a_usable_outcome_is_recorded_as_failed(make_fake, options, does, reason):
    experiment = make_fake(does, "b")
    outcome = run_experiment(experiment, options)
    assert outcome.state == FAILED and f"{does} (seed 0): {reason}" in outcome.detail
    assert states(experiment, options) == [(does, 0, "job", "failed"), ("b", 0, "val_loss", "ok")]


def test_a_failed_job_is_run_again_until_it_succeeds(make_fake, options, ran, monkeypatch):
    monkeypatch.setenv("FAKE_FAILS", "1")
    experiment = make_fake("a", "raises_when_told")
    assert run_experiment(experiment, options).state == FAILED
    ran()
    assert run_experiment(experiment, options).state == FAILED
    assert ran() == ["raises_when_told (seed 0)"]
    monkeypatch.delenv("FAKE_FAILS")
    assert run_experiment(experiment, options).state == DONE
    assert run_experiment(experiment, options).state == SKIPPED


def test_running_out_of_memory_is_an_outcome_and_not_repeated(make_fake, options, ran):
    experiment = make_fake("out_of_memory")
    assert run_experiment(experiment, options).state == DONE
    assert states(experiment, options) == [("out_of_memory", 0, "val_loss", "oom")]
    assert run_experiment(experiment, options).state == SKIPPED
    assert len(ran()) == 1


def test_a_user_error_stops_the_experiment_and_finished_jobs_stay(make_fake, options, ran):
    experiment = make_fake("a", "user_error", "b")
    with pytest.raises(UserError, match="data.local: no folder lm/nowhere"):
        run_experiment(experiment, options)
    assert ran() == ["a (seed 0)", "user_error (seed 0)"]
    assert states(experiment, options) == [("a", 0, "val_loss", "ok")]


@pytest.mark.parametrize("does", ["interrupt", "interrupt_as_lightning_does"])
def test_an_interrupt_stops_and_the_next_run_resumes(make_fake, options, ran, does):
    experiment = make_fake("a", does, "b")
    with pytest.raises(KeyboardInterrupt):
        run_experiment(experiment, options)
    assert states(experiment, options) == [("a", 0, "val_loss", "ok")]
    ran()
    with pytest.raises(KeyboardInterrupt):
        run_experiment(experiment, options)
    assert ran() == [f"{does} (seed 0)"]


def test_what_this_machine_cannot_run_is_refused_unless_it_is_recorded(make_fake, options, machine, ran):
    with pytest.raises(UserError, match=r"fake\.yaml: scale smoke: cannot run here: needs a GPU"):
        run_experiment(make_fake("a", obstacle="needs a GPU"), options)
    assert ran() == [] and not options.results.exists()


def test_settings_that_ask_for_no_job_are_refused(make_fake, options):
    with pytest.raises(ConfigError, match=r"fake\.yaml: scale smoke: the settings ask for no job"):
        run_experiment(make_fake(), options)


def test_a_corrupt_record_file_is_named_before_anything_runs(make_fake, options, ran):
    experiment = make_fake("a")
    run_experiment(experiment, options)
    path = records_path(options.results, experiment.id, "smoke")
    path.write_text("{\n" + path.read_text())
    ran()
    with pytest.raises(UserError, match=r"smoke\.jsonl:1: not a record"):
        run_experiment(experiment, options)
    assert ran() == []


def test_a_log_that_cannot_be_written_is_named(make_fake, options):
    options.results.mkdir()
    options.workspace.touch()
    with pytest.raises(UserError, match=r"fake-smoke\.log: cannot write the log: "):
        run_experiment(make_fake("a"), options)


def test_warnings_and_log_messages_go_to_the_log(make_fake, options, capsys):
    experiment = make_fake("a")
    level = logging.getLogger().level
    module = sys.modules[find_program(experiment).run.__module__]

    def talk():
        logging.getLogger("some.library").info("a message")
        warnings.warn("a warning", stacklevel=1)

    module.ACTS["a"] = talk
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        run_experiment(experiment, options)
    assert logging.getLogger().level == level
    text = log_path(experiment, options).read_text()
    assert "INFO some.library: a message" in text and "a warning" in text
    printed = capsys.readouterr()
    assert "a warning" not in printed.out + printed.err
    assert not [h for h in logging.getLogger().handlers if isinstance(h, logging.FileHandler) and "fake" in str(h)]


def test_paths_are_shown_relative_to_the_repository(tmp_path):
    repository = Path(tasks.records.REPOSITORY)
    assert shown(repository / "results" / "x") == "results/x"
    assert shown(tmp_path / "x") == str(tmp_path / "x")


# Programs


def test_a_family_or_program_without_code_is_named(make_fake, monkeypatch):
    experiment = make_fake("a")
    assert is_implemented(experiment)
    other = replace(experiment, program="other")
    assert not is_implemented(other)
    with pytest.raises(NotImplementedYet, match=r"adasplash/fake is not implemented yet: .* no program 'other'.*fake"):
        find_program(other)
    monkeypatch.setitem(tasks.programs._PACKAGES, "helmet", "no_such_package.at_all")
    assert not is_implemented(experiment)
    with pytest.raises(NotImplementedYet, match=r"adasplash/fake is not implemented yet: the family 'helmet' has no"):
        find_program(experiment)


def test_code_that_lacks_a_package_is_code_and_the_package_is_named(make_fake, tmp_path):
    experiment = make_fake("a")
    (tmp_path / "import/fake_family/run.py").write_text("import a_package_nobody_has\n")
    assert is_implemented(experiment)
    with pytest.raises(UserError, match="adasplash/fake cannot run here: .* No module named 'a_package_nobody_has'"):
        find_program(experiment)


# Many experiments, each in a child


@pytest.fixture
def many(make_fake, write_config):
    """Make experiments called fake0, fake1, ..., one a job."""

    def make(*does):
        return [make_fake(name, identity=f"adasplash/fake{i}") for i, name in enumerate(does)]

    return make


def test_a_killed_child_is_reported_and_the_next_experiment_runs(many, options, capfd):
    first, second, third, fourth = many("a", "kill", "raises", "b")
    outcomes = run_many([first, second, third, fourth], options)
    assert [o.state for o in outcomes] == [DONE, FAILED, FAILED, DONE]
    log = log_path(second, options)
    assert outcomes[1].detail == ("its process was ended by SIGKILL: often the system, out of memory "
                                  f"(log: {log})")  # fmt: skip
    assert "raises (seed 0): RuntimeError: went wrong (log: " in outcomes[2].detail
    assert [states(e, options) for e in (first, second, third, fourth)] == [
        [("a", 0, "val_loss", "ok")], [], [("raises", 0, "job", "failed")], [("b", 0, "val_loss", "ok")]]  # fmt: skip
    printed = capfd.readouterr()
    assert "[2/4] adasplash/fake1: A table made for the tests" in printed.out
    assert printed.out.index("[1/4]") < printed.out.index("a (seed 0): job 1 of 1") < printed.out.index("[2/4]")
    assert "Traceback" not in printed.err


def test_user_errors_of_children_are_told_and_do_not_stop_the_others(many, make_fake, options, capfd):
    first, last = many("user_error", "a")
    refused = make_fake("a", identity="adasplash/refused", obstacle="needs a GPU")
    broken = load_experiment(make_fake("bug", identity="adasplash/broken").path)
    outcomes = run_many([first, refused, broken, last], options)
    assert [o.state for o in outcomes] == [FAILED, FAILED, FAILED, DONE]
    assert outcomes[0].detail == "data.local: no folder lm/nowhere"
    assert "scale smoke: cannot run here: needs a GPU" in outcomes[1].detail
    assert outcomes[2].detail == "its process ended with exit status 1"
    printed = capfd.readouterr()
    assert printed.err.count("Traceback") == 1 and "a bug in jobs" in printed.err


def test_what_is_up_to_date_starts_no_child(many, options, monkeypatch):
    experiments = many("a", "b")
    for experiment in experiments:
        run_experiment(experiment, options)
    monkeypatch.setattr(sys, "executable", "/no/such/python")
    assert [o.state for o in run_many(experiments, options)] == [SKIPPED, SKIPPED]


def test_children_get_the_options(many, options, tmp_path, ran):
    experiments = many("a", "b")
    options = replace(options, scale="lab", data_root=tmp_path, force=True)
    run_experiment(experiments[0], options)
    outcomes = run_many(experiments, options)
    assert [o.state for o in outcomes] == [DONE, DONE]
    assert len(states(experiments[0], options)) == 2
    assert ran() == ["a (seed 0)", "a (seed 0)", "b (seed 0)"]
    options = replace(options, force=False)
    assert run_experiment(experiments[1], options).state == SKIPPED  # the child had the same data: the same hash


def test_an_interrupted_child_stops_all(many, options, ran, capfd):
    with pytest.raises(KeyboardInterrupt):
        run_many(many("a", "interrupt", "b"), options)
    assert ran() == ["a (seed 0)", "interrupt (seed 0)"]
    assert "interrupted; finished jobs are recorded" in capfd.readouterr().err
