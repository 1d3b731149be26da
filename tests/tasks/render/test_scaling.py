"""Scaling efficiency: tokens a second against those of as many single devices."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tasks.records import Record
from tasks.render.scaling import METRIC, with_scaling

BASE = Record("adasplash/table4_devices", "paper", "softmax", "tokens_per_s", 100.0, "tokens/s",
              {"devices": 1, "strategy": "one device", "nodes": 1, "micro_batch_size": 64}, 0, "config", "source",
              {"gpu": "A"}, "2026-01-01T00:00:00+00:00")  # fmt: skip


def on(devices: int, value: float | None, **changes) -> Record:
    params = BASE.params | {"devices": devices, "strategy": "ddp" if devices > 1 else "one device"}
    return replace(BASE, value=value, params=params | changes.pop("params", {}), **changes)


def shares(*records: Record) -> list[tuple]:
    found = with_scaling(records)
    assert tuple(found[: len(records)]) == records
    return [(r.params["devices"], r.value, r.status) for r in found[len(records) :] if r.metric == METRIC]


def test_the_share_of_single_devices():
    four = on(4, 300.0, params={"strategy": "fsdp", "nodes": 2})
    assert shares(on(1, 100.0), on(2, 190.0), four) == [
        (1, None, "not_applicable"), (2, pytest.approx(95), "ok"), (4, pytest.approx(75), "ok")]  # fmt: skip


def test_the_newest_single_device_counts():
    newer = on(1, 50.0, created="2026-01-02T00:00:00+00:00")
    assert shares(newer, on(2, 80.0), on(1, 100.0))[-1] == (2, pytest.approx(80), "ok")


@pytest.mark.parametrize(
    "other",
    [{"system": "entmax"}, {"seed": 1}, {"source_sha256": "b"}, {"env": {"gpu": "B"}}, {"metric": "step_s"},
     {"params": {"micro_batch_size": 32}}, {"value": None}],
)  # fmt: skip
def test_what_is_not_the_same_run_on_one_device_is_no_base(other):
    assert [s for s in shares(on(1, **{"value": 100.0} | other), on(2, 190.0)) if s[0] == 2] == []


def test_speeds_without_devices_are_left_alone():
    assert shares(replace(BASE, params={"n": 1024})) == []
