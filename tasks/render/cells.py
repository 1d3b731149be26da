"""From records to cells: a paper's number and the one measured here, for each system, metric and setting.

Tables and figures see records only through `collect`, so both show the same numbers.
"""

from __future__ import annotations

import json
import statistics
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from tasks.config import Experiment
from tasks.errors import ConfigError, UserError
from tasks.records import Record

NAMED = ("system", "metric")  # the fields of a cell that are not parameters


@dataclass(frozen=True)
class Measured:
    """The newest record of every seed of one cell."""

    records: tuple[Record, ...]
    passed_over: tuple[str, ...] = ()  # parameters in which other records of the same run differ

    @property
    def values(self) -> list[float]:
        """One value a seed that ran through."""
        return [float(r.value) for r in self.records if r.status == "ok" and r.value is not None]

    @property
    def status(self) -> str:
        """Status of the cell: ok when any seed is, else the one that says most."""
        found = {r.status for r in self.records}
        return next(s for s in ("ok", "failed", "oom", "not_applicable") if s in found)

    @property
    def mean(self) -> float:
        """Mean over seeds."""
        return statistics.fmean(self.values)

    @property
    def std(self) -> float | None:
        """Sample standard deviation over seeds, None for a single one."""
        return statistics.stdev(self.values) if len(self.values) > 1 else None


@dataclass
class Cell:
    """One place of a table or point of a figure. Either side may be missing."""

    system: str
    metric: str
    params: dict[str, Any]
    paper: dict[str, Any] | None = None  # as Reported.cells yields it
    measured: Measured | None = None

    def get(self, name: str) -> Any:
        """Return the value of a field: ``system``, ``metric`` or a parameter (None if the cell lacks it)."""
        return getattr(self, name) if name in NAMED else self.params.get(name)


def collect(experiment: Experiment, records: Iterable[Record], fields: Iterable[str],
            metrics: Sequence[str] = ()) -> list[Cell]:
    """Sort reported numbers and records into cells that differ in system, metric and ``fields``.

    The newest record of a seed wins. Seeds are never averaged across settings, across hardware, or across
    parameters outside ``fields``: where records of a cell differ in these, those of the newest run are shown.

    Args:
        experiment: says what the paper reports.
        records: of one scale, in the order they were written.
        fields: names of parameters; ``system`` and ``metric`` may be among them.
        metrics: the metrics of interest; empty means all.

    Raises:
        ConfigError: two reported numbers fall into the same cell.
    """
    names = [f for f in dict.fromkeys(fields) if f not in NAMED and f]
    cells: dict[tuple, Cell] = {}

    def cell_at(system: str, metric: str, params: dict[str, Any]) -> tuple[tuple, Cell]:
        shown = {n: _frozen(params[n]) for n in names if params.get(n) is not None}
        key = (system, metric, tuple(shown.items()))
        return key, cells.setdefault(key, Cell(system, metric, shown))

    for reported in experiment.reported.cells() if experiment.reported else ():
        if metrics and reported["metric"] not in metrics:
            continue
        _, cell = cell_at(reported["system"], reported["metric"], reported["params"])
        if cell.paper is not None:
            other = cell.paper["params"]
            differs = [n for n, value in reported["params"].items() if value != other.get(n)]
            raise ConfigError(
                f"{experiment.file}: render: two reported numbers of {cell.system}, {cell.metric} "
                f"share a cell; they differ in {', '.join(differs) or 'nothing'}")
        cell.paper = reported
    groups: dict[tuple, list[Record]] = defaultdict(list)
    for record in records:
        if not metrics or record.metric in metrics:
            groups[cell_at(record.system, record.metric, record.params)[0]].append(record)
    for key, group in groups.items():
        cells[key].measured = _newest(group, names)
    return list(cells.values())


def setting(cell: Cell) -> tuple[tuple[str, Any], ...]:
    """Return the parameters of a cell as a key, the same for every system and metric."""
    return tuple(sorted(cell.params.items()))


def _frozen(value: Any) -> Any:
    """Make a parameter usable as a key; a list or mapping is shown as JSON."""
    return json.dumps(value, sort_keys=True) if isinstance(value, list | dict) else value


def _newest(group: list[Record], names: Sequence[str]) -> Measured:
    """Choose the newest run and one value of each parameter not shown, then the newest record of each seed."""
    ordered = [r for _, r in sorted(enumerate(group), key=lambda pair: (written(pair[1]), pair[0]))]

    def rest(record: Record) -> dict[str, Any]:
        return {k: v for k, v in record.params.items() if k not in names}

    def variant(record: Record) -> str:
        return json.dumps([rest(record), record.env.get("gpu")], sort_keys=True, default=str)

    same_run = [r for r in ordered if r.config_sha256 == ordered[-1].config_sha256
                and r.env.get("gpu") == ordered[-1].env.get("gpu")]
    # A number with fewer parameters sums up those with more (a final loss beside a trace over steps).
    fewest = min(len(r.params) for r in same_run)
    chosen = [r for r in same_run if len(r.params) == fewest][-1]
    rivals = [r for r in same_run if len(r.params) == fewest and variant(r) != variant(chosen)]
    differing = {k for r in rivals for k in rest(r).keys() | rest(chosen).keys()
                 if rest(r).get(k) != rest(chosen).get(k)}
    seeds = {r.seed: r for r in same_run if variant(r) == variant(chosen)}
    ranked = sorted(seeds.items(), key=lambda item: (item[0] is not None, item[0] or 0))
    return Measured(tuple(r for _, r in ranked), tuple(sorted(differing)))


def written(record: Record) -> datetime:
    """Return when a record was made.

    Raises:
        UserError: the record does not say so in ISO 8601.
    """
    try:
        when = datetime.fromisoformat(record.created)
    except (TypeError, ValueError):
        raise UserError(f"{record.experiment}, {record.scale}: a record's created is {record.created!r}, "
                        "allowed is a time in ISO 8601") from None
    return when if when.tzinfo else when.replace(tzinfo=UTC)


def in_order(experiment: Experiment, name: str, values: Iterable[Any],
             metrics: Sequence[str] = ()) -> list[Any]:
    """Order a field's values: systems and metrics as the config lists them, numbers by size, else first seen.

    A None (the cell lacks the parameter) comes last.
    """
    seen = list(dict.fromkeys(values))
    if name in NAMED:
        listed = list(experiment.systems) if name == "system" else list(metrics)
        return sorted(seen, key=lambda v: listed.index(v) if v in listed else len(listed))
    present = [v for v in seen if v is not None]
    if all(is_number(v) for v in present):
        present.sort()
    return present + [None] * (len(seen) > len(present))


def is_number(value: Any) -> bool:
    """Tell a number from text and from true or false."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def show(value: Any) -> str:
    """Write a parameter's value for people; None is empty."""
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:g}" if isinstance(value, float) else str(value)


@dataclass(frozen=True)
class Provenance:
    """Where the shown numbers come from, in words."""

    hardware: tuple[str, ...]
    software: tuple[str, ...]
    dates: tuple[str, ...]
    seeds: tuple[int, ...] = field(default=())  # how many a cell has: least and most

    @classmethod
    def of(cls, cells: Iterable[Cell]) -> Provenance:
        """Sum up the records behind ``cells``."""
        shown = [c.measured for c in cells if c.measured]
        records = [r for m in shown for r in m.records]
        counts = [len(m.values) for m in shown if m.status == "ok" and m.records[0].seed is not None]
        return cls(
            hardware=tuple(sorted({r.env.get("gpu") or "CPU" for r in records})),
            software=tuple(sorted({_versions(r) for r in records} - {""})),
            dates=tuple(sorted({written(r).date().isoformat() for r in records})),
            seeds=(min(counts), max(counts)) if counts else (),
        )

    def sentences(self) -> Iterator[str]:
        """Yield hardware, software, dates and seeds, each as a short phrase."""
        if self.hardware:
            yield "hardware " + " and ".join(self.hardware)
        if self.software:
            yield " or ".join(self.software)
        if self.dates:
            yield "measured " + " to ".join(dict.fromkeys((self.dates[0], self.dates[-1])))
        if self.seeds:
            low, high = self.seeds
            yield (f"{low} to {high} seeds" if low != high else f"{low} seed" + "s" * (low != 1))


def _versions(record: Record) -> str:
    names = ("torch", "triton", "python", "driver")
    return ", ".join(f"{n} {record.env[n]}" for n in names if record.env.get(n))
