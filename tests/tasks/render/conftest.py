"""Synthetic experiments and records; nothing here was measured."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest

import tasks.render
from tasks.config import Experiment, FigureSpec, Render, Reported, TableSpec
from tasks.records import Record, append_records, records_path
from tasks.render.metrics import Metric

METRICS = {
    "val_loss": Metric("Validation loss", "nats", 3, "lower"),
    "accuracy": Metric("Accuracy", "%", 1, "higher"),
    "fwd_ms": Metric("Forward", "ms", 2, "lower"),
    "ratio": Metric("Non-zero ratio", None, 2),
}


@pytest.fixture
def metrics() -> dict[str, Metric]:
    return METRICS


@pytest.fixture
def make_experiment(tmp_path: Path) -> Callable[..., Experiment]:
    """Make an experiment; ``rows`` are the paper's numbers as (system, metric, n, value)."""

    def make(identity: str = "adasplash/table4", rows: Iterable[tuple] = (), table: TableSpec | None = None,
             figure: FigureSpec | None = None, **changes: Any) -> Experiment:
        rows = tuple(rows)
        if table is None and figure is None:
            table = TableSpec(("system",), ("metric", "n"), ("val_loss",))
        reported = Reported("The paper, Table 4", ("system", "metric", "n", "value"), rows) if rows else None
        fields: dict[str, Any] = {
            "path": tmp_path / "config.yaml", "id": identity, "paper": "AdaSplash", "item": "Table 4",
            "title": "A title", "family": "kernel_bench", "program": "bench", "notes": (),
            "systems": {"softmax": "Softmax", "entmax": "Entmax 1.5"}, "render": Render(table, figure),
            "reported": reported,
        }
        return Experiment(**{**fields, **changes})

    return make


@pytest.fixture
def make_record() -> Callable[..., Record]:
    """Make a record of table 4 at lab scale; a value of None needs a status."""

    def make(system: str, value: float | None, metric: str = "val_loss", seed: int | None = 0,
             status: str = "ok", gpu: str | None = "Some GPU", unit: str = "nats", scale: str = "lab",
             created: str = "2026-01-02T03:04:05+00:00", config: str = "c", **params: Any) -> Record:
        return Record(
            experiment="adasplash/table4", scale=scale, system=system, metric=metric, value=value, unit=unit,
            params=params, seed=seed, config_sha256=config, source_sha256="s", created=created, status=status,
            env={"gpu": gpu, "driver": None, "torch": "2.13.0", "triton": "3.7.1", "python": "3.11.9"})

    return make


@pytest.fixture
def results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty results folder, with the metrics above in place of the shipped list."""
    monkeypatch.setattr(tasks.render, "load_metrics", lambda: METRICS)
    return tmp_path / "results"


@pytest.fixture
def store(results: Path) -> Callable[..., None]:
    """Append records of an experiment at a scale below ``results``."""

    def put(experiment: Experiment, records: Iterable[Record], scale: str = "lab") -> None:
        append_records(records_path(results, experiment.id, scale), records)

    return put
