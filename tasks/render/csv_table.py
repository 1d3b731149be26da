"""Tables as tidy CSV: one number a line, at full precision."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Sequence
from typing import Any

from tasks.config import Experiment
from tasks.render.cells import NAMED, Cell, Provenance
from tasks.render.grid import Grid, Key

PARAMETER = "param."  # keeps a parameter called n or value apart from the columns of that name
FIRST = ("experiment", "scale", "source", "system", "metric", "unit")
LAST = ("value", "std", "seeds", "min", "max", "status", "hardware", "measured")


def document(experiment: Experiment, grids: Sequence[Grid], missing: Sequence[str]) -> str:
    """Write every cell of every scale; an absent number has an empty ``value``.

    ``source`` is paper or measured; lines of the paper have no scale. Of measured cells ``value`` is the mean
    over seeds, ``std`` the sample standard deviation, ``min`` and ``max`` the extremes; ``status`` is ok,
    oom, failed, not_applicable or not_run.
    """
    lines = list(_lines(grids))
    params = list(dict.fromkeys(k for line in lines for k in line if k.startswith(PARAMETER)))
    out = io.StringIO()
    writer = csv.DictWriter(out, [*FIRST, *params, *LAST], restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows({"experiment": experiment.id, **line} for line in lines)
    return out.getvalue()


def _lines(grids: Sequence[Grid]) -> Iterator[dict[str, Any]]:
    seen = set()
    for grid in grids:  # every grid holds the same reported numbers; they are written once
        for line in (_paper(c, grid) for c in _cells(grid) if c.paper):
            if tuple(line.items()) not in seen:
                seen.add(tuple(line.items()))
                yield line
    for grid in grids:
        for cell in _cells(grid):
            yield _measured(cell, grid)


def _cells(grid: Grid) -> Iterator[Cell]:
    for row in grid.rows:
        for column in grid.columns:
            yield grid.cells.get((row, column)) or _absent(grid, row, column)


def _absent(grid: Grid, row: Key, column: Key) -> Cell:
    named = dict(zip(grid.spec.rows + grid.spec.columns, row + column, strict=True))
    only = next(iter(grid.metrics)) if len(grid.metrics) == 1 else ""
    return Cell(named.get("system", ""), named.get("metric", only),
                {k: v for k, v in named.items() if k not in NAMED and v is not None})


def _shared(cell: Cell, grid: Grid, params: dict[str, Any]) -> dict[str, Any]:
    metric = grid.metrics.get(cell.metric)
    return {"system": cell.system, "metric": cell.metric, "unit": (metric and metric.unit) or "",
            **{f"{PARAMETER}{k}": v for k, v in params.items()}}


def _paper(cell: Cell, grid: Grid) -> dict[str, Any]:
    assert cell.paper is not None
    value = cell.paper["value"]
    return {"scale": "", "source": "paper", **_shared(cell, grid, cell.paper["params"]),
            "value": "" if value is None else value, "status": cell.paper["status"]}


def _measured(cell: Cell, grid: Grid) -> dict[str, Any]:
    line: dict[str, Any] = {"scale": grid.scale or "", "source": "measured"}
    if cell.measured is None:
        return line | _shared(cell, grid, cell.params) | {"status": "not_run"}
    line |= _shared(cell, grid, cell.measured.records[-1].params | cell.params)
    origin = Provenance.of([cell])
    line |= {"status": cell.measured.status, "hardware": " and ".join(origin.hardware),
             "measured": origin.dates[-1]}
    values = cell.measured.values
    if values:
        std = cell.measured.std
        line |= {"value": cell.measured.mean, "std": "" if std is None else std, "seeds": len(values),
                 "min": min(values), "max": max(values)}
    return line
