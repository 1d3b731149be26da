"""The layout of a table: which cell stands where and what is written in it. Formats only spell it out."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from tasks.config import Experiment, TableSpec
from tasks.errors import ConfigError
from tasks.records import Record
from tasks.render.cells import NAMED, Cell, Provenance, collect, in_order, show
from tasks.render.metrics import Metric, metric_of

NOT_REPORTED = "–"
NOT_RUN = "not run"
STATUS_TEXT = {"oom": "OOM", "failed": "failed", "not_applicable": "n/a"}
SIDES = ("paper", "measured")

Key = tuple[Any, ...]


@dataclass(frozen=True)
class Grid:
    """One table: the cells of one scale (None: nothing was measured) laid out by two sets of fields."""

    experiment: Experiment
    spec: TableSpec
    scale: str | None
    metrics: dict[str, Metric]
    rows: list[Key]
    columns: list[Key]
    cells: dict[tuple[Key, Key], Cell]

    @property
    def common_metric(self) -> Metric | None:
        """The metric of every cell; it stands in the corner, not in each column's heading."""
        alone = len(self.metrics) == 1 and "metric" not in self.spec.rows
        spelled_out = self.spec.columns == ("metric",)
        return next(iter(self.metrics.values())) if alone and not spelled_out else None

    @property
    def row_headings(self) -> list[list[str]]:
        """Heading of each leading column, as lines; the last one also bears a metric common to all cells."""
        headings = [[f.capitalize() if f in NAMED else f] for f in self.spec.rows]
        if self.common_metric:
            headings[-1].append(self.common_metric.heading)
        return headings

    def row_labels(self, row: Key) -> list[str]:
        """What stands in the leading columns of a row."""
        return [self._label(f, v) for f, v in zip(self.spec.rows, row, strict=True)]

    def column_labels(self, column: Key) -> list[str]:
        """Lines of a column's heading; a number carries its parameter's name."""
        pairs = [(f, v) for f, v in zip(self.spec.columns, column, strict=True)
                 if v is not None and not (f == "metric" and self.common_metric)]
        return [self._label(f, v) if f in NAMED or isinstance(v, str) else f"{f} = {show(v)}"
                for f, v in pairs]

    def _label(self, name: str, value: Any) -> str:
        if name == "system":
            return self.experiment.systems.get(value, str(value))
        return self.metrics[value].heading if name == "metric" else show(value)

    def texts(self, row: Key, column: Key) -> tuple[str, str]:
        """Return the paper's and the measured cell as text."""
        cell = self.cells.get((row, column))
        if cell is None:
            return NOT_REPORTED, NOT_RUN
        return paper_text(cell, self.metrics[cell.metric]), measured_text(cell, self.metrics[cell.metric])

    def blocks(self) -> list[Grid]:
        """Cut a grid with metrics across and parameters below them into one a metric, which a page can hold."""
        if "metric" not in self.spec.columns or len(self.spec.columns) == 1 or len(self.metrics) == 1:
            return [self]
        at = self.spec.columns.index("metric")
        return [
            replace(self, metrics={name: metric}, columns=[c for c in self.columns if c[at] == name],
                    cells={place: cell for place, cell in self.cells.items() if cell.metric == name})
            for name, metric in self.metrics.items()
        ]

    def provenance(self) -> Provenance:
        """Where this grid's measured numbers come from."""
        return Provenance.of(self.cells.values())

    def caption(self) -> str:
        """One paragraph: scale, hardware, versions, dates, seeds, and what the numbers are."""
        if self.scale is None:
            said = ["Not run at any scale"]
        else:
            said = [f"Scale {self.scale}", *self.provenance().sentences()]
        if max(self.provenance().seeds, default=1) > 1:
            said.append("measured cells are mean ± standard deviation over (n) seeds")
        if self.experiment.reported:
            said.append(f"paper: {self.experiment.reported.source}")
        else:
            said.append("the paper's numbers are not public")
        return "; ".join(said) + "."

    def footnote(self) -> str:
        """Say where a cell had several numbers to choose from; empty when none had."""
        names = sorted({n for c in self.cells.values() if c.measured for n in c.measured.passed_over})
        return f"Some cells stand for several measurements that differ in {', '.join(names)}; " \
               "the newest is shown." if names else ""


def paper_text(cell: Cell, metric: Metric) -> str:
    """Write the paper's number with the digits it has there; trailing zeros are lost."""
    if cell.paper is None:
        return NOT_REPORTED
    status = cell.paper["status"]
    return f"{cell.paper['value']:.12g}" if status == "ok" else STATUS_TEXT[status]


def measured_text(cell: Cell, metric: Metric) -> str:
    """Write the measured number: mean ± standard deviation (seeds), or why there is none."""
    measured = cell.measured
    if measured is None:
        return NOT_RUN
    if measured.status != "ok":
        return STATUS_TEXT[measured.status]
    text, count = metric.text(measured.mean), len(measured.values)
    lost = len(measured.records) - count
    if measured.std is not None:
        text += f" ± {metric.spread(measured.std)}"
    if count > 1 or lost:
        text += f" ({count}{f', {lost} without result' if lost else ''})"
    return text


def make_grid(experiment: Experiment, records: Sequence[Record], scale: str | None,
              metrics: Mapping[str, Metric]) -> Grid:
    """Lay out the reported numbers and the records of one scale.

    Raises:
        ConfigError: several systems or metrics would share a cell, as no side of the table names that field.
    """
    spec = experiment.render.table
    assert spec is not None, "the caller asks only for experiments with a table"
    cells = collect(experiment, records, spec.rows + spec.columns, spec.metrics)
    order = spec.metrics or tuple(dict.fromkeys(c.metric for c in cells))
    placed: dict[tuple[Key, Key], Cell] = {}
    for cell in cells:
        place = (_key(cell, spec.rows), _key(cell, spec.columns))
        other = placed.setdefault(place, cell)
        if other is not cell:
            name = "system" if other.system != cell.system else "metric"
            raise ConfigError(f"{experiment.file}: render.table: {name} {getattr(other, name)} and "
                              f"{getattr(cell, name)} share a cell; name {name} in rows or columns")
    return Grid(
        experiment, spec, scale,
        metrics={name: metric_of(name, metrics, records) for name in order},
        rows=_keys(experiment, spec.rows, [row for row, _ in placed], order),
        columns=_keys(experiment, spec.columns, [column for _, column in placed], order),
        cells=placed,
    )


def _key(cell: Cell, names: Sequence[str]) -> Key:
    return tuple(cell.get(n) for n in names)


def _keys(experiment: Experiment, names: Sequence[str], seen: Iterable[Key],
          metrics: Sequence[str]) -> list[Key]:
    """Order the keys of one side, and add one for every listed system or metric of which nothing is known."""
    keys = list(dict.fromkeys(seen))
    listed = {"system": list(experiment.systems), "metric": list(metrics)}

    def named(key: Key) -> Key:
        return tuple(v for n, v in zip(names, key, strict=True) if n in NAMED)

    known = {named(k) for k in keys}
    keys += [k for k in itertools.product(*(listed.get(n, [None]) for n in names)) if named(k) not in known]
    ranks = [{v: i for i, v in enumerate(in_order(experiment, n, [k[j] for k in keys], metrics))}
             for j, n in enumerate(names)]
    return sorted(keys, key=lambda k: [rank[v] for rank, v in zip(ranks, k, strict=True)])


def grids(experiment: Experiment, records: Mapping[str, Sequence[Record]],
          metrics: Mapping[str, Metric]) -> Iterator[Grid]:
    """Yield a grid for every scale with records; without any, one that holds the paper's numbers alone."""
    measured = [scale for scale in records if records[scale]]
    for scale in measured or [None]:
        yield make_grid(experiment, records[scale] if scale else (), scale, metrics)
