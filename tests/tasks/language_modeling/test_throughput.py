"""Training for a few steps, on as many devices as there are: what is recorded of it."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from tasks import matmul_rate
from tasks.config import from_plain
from tasks.distributed import Devices
from tasks.errors import ConfigError
from tasks.language_modeling import throughput, training
from tasks.language_modeling.run import PROGRAMS
from tasks.language_modeling.settings import ThroughputSettings
from tasks.programs import Job

PROGRAM = PROGRAMS["throughput"]


@pytest.fixture(autouse=True)
def small_product(monkeypatch):
    monkeypatch.setitem(matmul_rate._SIZES, "cpu", (16, 2))


@pytest.fixture
def wanted(plain):
    def make(**changes) -> ThroughputSettings:
        return from_plain(ThroughputSettings, plain(**{"measure": ["softmax"]} | changes), "test.yaml")

    return make


def test_the_systems_named_are_trained_and_timed(wanted, context, said):
    settings = wanted()
    assert PROGRAM.jobs(settings) == [Job("softmax", 0)]
    found = {m.metric: m for m in PROGRAM.run(Job("softmax", 0), settings, context)}
    assert list(found) == ["step_s", "tokens_per_s", "mfu", "peak_gb", "matmul_tflops", "val_loss"]
    step, speed = found["step_s"], found["tokens_per_s"]
    assert step.stats["n"] == 5 and step.stats["min"] <= step.value <= step.stats["max"]
    assert speed.value == pytest.approx(4 * 16 / step.value)
    count = step.params["parameters"]
    rate = found["matmul_tflops"].value * 1e12
    flops = 6 * count + 12 * 1 * 16 * 16
    assert found["mfu"].value == pytest.approx(100 * speed.value * flops / rate)
    assert found["peak_gb"].status == ("ok" if torch.cuda.is_available() else "not_applicable")
    assert found["val_loss"].value > 0
    for m in found.values():
        assert (m.params["strategy"], m.params["devices"], m.params["nodes"]) == ("one device", 1, 1)
        assert (m.params["batch_size"], m.params["micro_batch_size"], m.params["compile"]) == (4, 2, False)


@pytest.mark.parametrize(
    ("devices", "strategy"),
    [(Devices(2), "ddp"), (Devices(2, strategy="ddp"), "ddp"), (Devices(1, 2, "fsdp"), "fsdp")],
)
def test_several_devices_share_what_is_counted(devices, strategy, wanted, context, monkeypatch):
    """Of a training whose times are known; the rate is that of one device."""
    run = training.TrainedRun(None, {11: 1.0}, [2.0, 1.0, 4.0], 3.0, {"devices": devices.world, "parameters": 1000})
    asked = []
    monkeypatch.setattr(throughput, "trained", lambda *a, **options: asked.append(options) or run)
    monkeypatch.setattr(throughput, "matmul_rate", lambda device: 1e6)
    found = {m.metric: m for m in PROGRAM.run(Job("softmax", 0), wanted(), replace(context, devices=devices))}
    assert asked == [{"by_devices": True}]
    assert found["tokens_per_s"].value == 4 * 16 / 2.0
    assert found["mfu"].value == pytest.approx(100 * 32 * (6000 + 12 * 16 * 16) / 2 / 1e6)
    assert {m.params["strategy"] for m in found.values()} == {strategy}
    assert found["val_loss"].params["nodes"] == devices.nodes


def test_a_run_on_other_devices_does_not_serve(wanted, train, watch, context):
    """Where its time is what counts."""
    settings = wanted()
    run = train(settings)
    run.folder.rename(run.folder.with_name(run.folder.name + "-2-devices"))
    seen = watch()
    training.trained(settings, Job("softmax", 0), context, by_devices=True)
    assert seen
    seen.clear()
    training.trained(settings, Job("softmax", 0), context, by_devices=True)
    assert seen == []


def test_a_run_resumed_past_the_timed_steps_has_no_speed(wanted, context, monkeypatch):
    run = training.TrainedRun(None, {11: 1.0}, [], None, {"devices": 1, "parameters": 1000})
    monkeypatch.setattr(throughput, "trained", lambda *a, **options: run)
    status = {m.metric: m.status for m in PROGRAM.run(Job("softmax", 0), wanted(), context)}
    assert {name for name, s in status.items() if s == "ok"} == {"matmul_tflops", "val_loss"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"measure": []}, "measure: got \\[\\], allowed are one or more"),
     ({"measure": ["softmax", "nix"]}, "measure\\[1\\]: got 'nix', allowed are softmax, entmax"),
     ({"train": {"timing_skip_steps": 7}}, "train.steps: got 11, allowed is at least .* \\(12\\)")],
)  # fmt: skip
def test_settings_that_cannot_be(wanted, changes, message):
    with pytest.raises(ConfigError, match=message):
        wanted(**changes)
