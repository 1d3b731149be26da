"""Several processes train as one does: the same windows in every step, the same losses, resumed at the same step."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import defaultdict
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml

from tasks.config import REPOSITORY
from tasks.distributed import Devices
from tasks.errors import ConfigError, DataError
from tasks.language_modeling import data as data_module
from tasks.language_modeling import training
from tasks.language_modeling.data import TextDataModule, TrainingOrder
from tasks.programs import Context, Job
from tasks.records import read_records

STEPS, CHECKPOINT_EVERY, KILLED_AT = 11, 3, 8


@pytest.mark.parametrize(("world", "micro"), [(1, 4), (2, 1), (2, 3), (3, 2), (4, 1)])
@pytest.mark.parametrize("consumed_steps", [0, 2])
def test_a_step_has_the_same_windows_however_many_share_it(world, micro, consumed_steps):
    """Steps of 12 windows in passes of 34: some steps lie across two passes."""
    batch, steps = 12, 6
    whole = list(TrainingOrder(34, batch * steps, seed=3))
    shares = [list(TrainingOrder(34, batch * steps, 3, consumed_steps * batch, micro, r, world)) for r in range(world)]
    assert {len(TrainingOrder(34, batch * steps, 3, 0, micro, r, world)) for r in range(world)} == {72 // world}
    each = batch // world
    for number, step in enumerate(range(consumed_steps, steps)):
        mine = [share[number * each:(number + 1) * each] for share in shares]
        assert sorted(sum(mine, [])) == sorted(whole[step * batch:(step + 1) * batch])
        assert mine[0][:micro] == whole[step * batch:][:micro]
        assert mine[-1][-micro:] == whole[:(step + 1) * batch][-micro:]
    assert all(len(share) == (steps - consumed_steps) * each for share in shares)


def test_validation_is_shared_without_a_window_twice(settings, texts, tmp_path, monkeypatch):
    windows = []
    for number in range(3):
        monkeypatch.setattr(data_module, "rank", lambda number=number: number)
        data = TextDataModule(settings(), texts, tmp_path / "data", 0, world=3)
        data.prepare_data()
        windows += [tuple(w.tolist()) for batch in data.val_dataloader() for w in batch]
    assert sorted(windows) == sorted(tuple(w.tolist()) for w in data.valid_blocks) and len(windows) == 13
    with pytest.raises(DataError, match="^data.max_valid_tokens: the validation text has 13 windows, allowed with 14"):
        TextDataModule(settings(), texts, tmp_path / "data", 0, world=14).prepare_data()


@pytest.mark.parametrize(("world", "micro"), [(2, 1), (2, 2), (3, 1), (3, 2), (4, 4), (13, 1)])
def test_a_sharded_model_is_validated_in_as_many_batches(settings, texts, tmp_path, monkeypatch, world, micro):
    """By each process, of 13 windows. Those that count are each window once."""
    windows, batches = [], set()
    for number in range(world):
        monkeypatch.setattr(data_module, "rank", lambda number=number: number)
        wanted = settings(train={"micro_batch_size": micro, "batch_size": micro})
        data = TextDataModule(wanted, texts, tmp_path / "data", 0, world=world, together=True)
        data.prepare_data()
        loaded = list(data.val_dataloader())
        batches.add(len(loaded))
        windows += [tuple(w.tolist()) for i, batch in enumerate(loaded) if data.counts(i) for w in batch]
    assert len(batches) == 1
    assert sorted(windows) == sorted(tuple(w.tolist()) for w in data.valid_blocks)


def test_batches_that_cannot_be_shared(settings, texts, tmp_path):
    context = Context(tmp_path, texts, print, Devices(3))
    with pytest.raises(ConfigError, match=r"^train.batch_size: got 4, allowed with 3 devices is .* \(6\)"):
        training.trained(settings(), Job("softmax", 0), context)


def test_a_sharded_model_has_no_scaled_gradients(settings, texts, tmp_path):
    context = Context(tmp_path, texts, print, Devices(2, strategy="fsdp"))
    with pytest.raises(ConfigError, match="^train.precision: got '16-mixed', allowed with --strategy fsdp are 32-true"):
        training.trained(settings(train={"precision": "16-mixed"}), Job("softmax", 0), context)


@pytest.mark.parametrize("suffix", ["-2-devices", ""])
def test_a_finished_run_serves_any_number_of_devices(suffix, settings, train, watch, context):
    run = train(settings())
    assert run.facts["devices"] == 1
    run.folder.rename(run.folder.with_name(run.folder.name + suffix))
    seen = watch()
    assert train(settings()).curve == run.curve
    assert train(settings(), where=replace(context, devices=Devices(2))).curve == run.curve
    assert seen == []


SCRIPT = """
import json, os, sys
from pathlib import Path
import torch
from tasks.__main__ import main
from tasks.language_modeling import training

torch.set_num_threads(1)
folder, killed_at, arguments = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3:]
rank = os.environ.get("RANK", "0")

class Watched(training.CausalLanguageModel):
    def training_step(self, batch, batch_idx):
        if self.global_step == killed_at and rank == "1":
            os._exit(7)
        with open(folder / f"seen-{rank}.jsonl", "a") as file:
            file.write(json.dumps([self.global_step, batch.tolist()]) + "\\n")
        return super().training_step(batch, batch_idx)

training.CausalLanguageModel = Watched
sys.exit(main(["run", *arguments, "--no-render"]))
"""


@pytest.fixture
def start(plain, texts, tmp_path) -> Callable[..., subprocess.CompletedProcess]:
    """Return a function that runs an experiment in so many processes."""
    script, config = tmp_path / "script.py", tmp_path / "tiny.yaml"
    script.write_text(SCRIPT)
    settings = plain(variants={"it": {"attention": "adasplash", "method": "eager"}},
                     train={"micro_batch_size": 1, "checkpoint_every": CHECKPOINT_EVERY, "lr": 1e-3},
                     captures={"system": "it", "every_steps": 5, "sequences": 1, "folder": "captured/tiny"},
                     )  # fmt: skip
    config.write_text(yaml.safe_dump({
        "experiment": "here/tiny", "paper": "AdaSplash", "item": "Table 0", "title": "Tiny",
        "family": "language_modeling", "program": "train", "notes": [], "systems": {"it": "It"}, "reported": None,
        "common": settings, "scales": {"smoke": {}, "lab": {}, "paper": {}},
        "render": {"table": {"rows": ["system"], "columns": ["metric"], "metrics": ["val_loss"]}},
    }))  # fmt: skip

    def run(folder: Path, processes: int, killed_at: int = -1, launch: bool = True,
            strategy: str = "auto") -> subprocess.CompletedProcess:  # fmt: skip
        folder.mkdir(exist_ok=True)
        paths = [str(REPOSITORY), str(REPOSITORY / "kernels"), os.environ.get("PYTHONPATH", "")]
        torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
        command = [sys.executable, *(torchrun if processes > 1 and launch else []), str(script), str(folder),
                   str(killed_at), str(config), "--data-root", str(texts), "--results", str(folder),
                   "--devices", str(processes), "--strategy", strategy]  # fmt: skip
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
        return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)

    return run


def windows_by_step(folder: Path, processes: int) -> dict[int, list]:
    steps = defaultdict(list)
    for rank in range(processes):
        for line in (folder / f"seen-{rank}.jsonl").read_text().splitlines():
            step, windows = json.loads(line)
            steps[step] += windows
    return {step: sorted(windows) for step, windows in steps.items()}


@pytest.mark.skipif(torch.cuda.device_count() == 1, reason="NCCL refuses two processes on one GPU")
@pytest.mark.parametrize("strategy", ["auto", "fsdp"])
def test_two_processes_train_as_one(start, tmp_path, strategy):
    one, two = tmp_path / "one", tmp_path / "two"
    alone = start(one, 1)
    assert alone.returncode == 0, alone.stderr
    killed = start(two, 2, killed_at=KILLED_AT, strategy=strategy)
    assert killed.returncode != 0
    records = two / "records/here/tiny/smoke.jsonl"
    assert {r.status for r in read_records(records)} <= {"failed"}  # where the other one was left time to notice
    before = windows_by_step(two, 2)
    for file in two.glob("seen-*"):
        file.unlink()
    resumed = start(two, 2, strategy=strategy)
    assert resumed.returncode == 0, resumed.stderr
    assert resumed.stdout.count("resuming from an earlier, interrupted run") == 1  # said by one process
    after, whole = windows_by_step(two, 2), windows_by_step(one, 1)
    assert sorted(after) == list(range(KILLED_AT // CHECKPOINT_EVERY * CHECKPOINT_EVERY, STEPS))
    assert {s: before[s] for s in range(KILLED_AT)} | after == whole
    [run], [other] = ([*folder.glob("work/language_modeling/*/run.json")] for folder in (one, two))
    curve, other_curve = (json.loads(path.read_text())["curve"] for path in (run, other))
    assert list(other_curve) == list(curve) == ["2", "4", "6", "8", "10", "11"]
    assert list(other_curve.values()) == pytest.approx(list(curve.values()), rel=1e-5)
    assert curve["2"] - curve["11"] > 1e-2  # it learns, so that another order would show
    kept = [sorted(path.name for path in folder.glob("work/captured/tiny/*")) for folder in (one, two)]
    assert kept == [["step-10.safetensors", "step-5.safetensors"]] * 2
    written = [r for r in read_records(records) if r.status != "failed"]
    assert [(r.metric, r.params["devices"]) for r in written] == [("val_loss", 2), ("step_s", 2), ("peak_gb", 2)]
    assert {r.params.get("strategy") for r in written} == {"fsdp" if strategy == "fsdp" else None}
    assert written[0].config_sha256 == read_records(one / "records/here/tiny/smoke.jsonl")[0].config_sha256


def test_processes_that_nobody_started(start, tmp_path):
    refused = start(tmp_path / "results", 2, launch=False)
    assert refused.returncode == 2
    assert refused.stderr.startswith("error: --devices: got 2 on 1 node(s), but this is one process; start as many as")
