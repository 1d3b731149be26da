"""Several devices: how processes learn which one they are, and what the runner lets each of them do."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tasks.__main__ import main
from tasks.config import load_experiment
from tasks.distributed import Devices, local_rank, rank
from tasks.errors import ConfigError, UserError
from tasks.records import read_records, records_path
from tasks.runner import DONE, log_path, run_experiment

TORCHRUN = {"TORCHELASTIC_RUN_ID": "none", "WORLD_SIZE": "4", "RANK": "3", "LOCAL_RANK": "1"}
SRUN = {"SLURM_STEP_NUM_TASKS": "4", "SLURM_NTASKS": "4", "SLURM_PROCID": "3", "SLURM_LOCALID": "1"}
SBATCH = {"SLURM_NTASKS": "4", "SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "1"}  # a script that calls no srun


@pytest.fixture(autouse=True)
def alone(monkeypatch):
    for name in {**TORCHRUN, **SRUN}:
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def started_by(monkeypatch):
    def start(variables: dict[str, str]) -> None:
        for name, value in variables.items():
            monkeypatch.setenv(name, value)

    return start


@pytest.mark.parametrize("variables", [TORCHRUN, SRUN], ids=["torchrun", "srun"])
def test_which_process_this_is(variables, started_by):
    assert (rank(), local_rank()) == (0, 0)
    Devices().check_launch()
    started_by(variables)
    assert (rank(), local_rank()) == (3, 1)
    Devices(4).check_launch()
    Devices(2, 2).check_launch()
    for wrong in (Devices(), Devices(4, 2)):
        with pytest.raises(ConfigError, match=rf"^--devices: got {wrong.count} on .* but 4 processes were started"):
            wrong.check_launch()


def test_a_batch_script_is_one_process(started_by):
    started_by(SBATCH)
    assert rank() == 0
    Devices().check_launch()
    with pytest.raises(ConfigError, match="but this is one process; start as many as devices: torchrun"):
        Devices(4).check_launch()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0,), "--devices: got 0, allowed is 1 or more"),
        ((1, -1), "--num-nodes: got -1"),
        ((1, 1, "dp"), "--strategy: got 'dp', allowed are auto, ddp, fsdp$"),
    ],
)
def test_refused(arguments, message):
    with pytest.raises(ConfigError, match=f"^{message}"):
        Devices(*arguments)


@pytest.fixture
def make_shared(make_fake, write_config):
    """Make an experiment that may run in several processes."""

    def make(*does: str):
        make_fake(*does)
        path = write_config("adasplash/fake", lambda c: c.update(program="shared", common={"does": list(does)}))
        return load_experiment(path, path.parents[1])

    return make


def test_only_the_first_process_records_and_speaks(make_shared, options, ran, started_by, capsys):
    experiment = make_shared("a", "b")
    options = replace(options, devices=Devices(4))
    started_by(TORCHRUN)
    assert run_experiment(experiment, options).state == DONE
    assert ran() == ["a (seed 0)", "b (seed 0)"]
    path = records_path(options.results, experiment.id, "smoke")
    assert not path.exists() and capsys.readouterr().out == ""
    assert log_path(experiment, options).name == "adasplash-fake-smoke-process3.log"
    started_by({"RANK": "0"})
    assert run_experiment(experiment, options).state == DONE
    assert [r.system for r in read_records(path)] == ["a", "b"]
    assert "a (seed 0): job 1 of 2" in capsys.readouterr().out


def test_records_do_not_depend_on_the_devices(make_shared, options, ran, started_by):
    experiment = make_shared("a")
    run_experiment(experiment, options)
    ran()
    started_by(TORCHRUN)
    run_experiment(experiment, replace(options, devices=Devices(4)))
    assert ran() == []


@pytest.mark.parametrize(("number", "recorded"), [("0", ["failed"]), ("3", [])])
def test_a_job_that_fails_ends_the_process(number, recorded, make_shared, options, ran, started_by):
    """The others may be waiting for it; whoever started them ends them."""
    experiment = make_shared("raises", "b")
    started_by(TORCHRUN | {"RANK": number})
    with pytest.raises(UserError, match=rf"^raises \(seed 0\): failed in process {number}: RuntimeError: went wrong"):
        run_experiment(experiment, replace(options, devices=Devices(4)))
    assert ran() == ["raises (seed 0)"]
    assert [r.status for r in read_records(records_path(options.results, experiment.id, "smoke"))] == recorded


def test_programs_of_one_device_are_refused(make_fake, options, ran, started_by):
    started_by(TORCHRUN)
    with pytest.raises(UserError, match="--devices: got 4 in all, allowed is 1: the program fake uses one device"):
        run_experiment(make_fake("a"), replace(options, devices=Devices(4)))
    assert ran() == []


def test_one_config_at_a_time(started_by, capsys):
    started_by(TORCHRUN)
    assert main(["run", "--all", "--devices", "4"]) == 2
    assert capsys.readouterr().err.startswith("error: --devices: got 4 in all, allowed is 1 unless one config file")
