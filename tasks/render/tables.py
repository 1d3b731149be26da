"""Tables that set the paper's number beside the measured one, as Markdown, CSV and LaTeX."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from tasks.config import Experiment
from tasks.records import Record
from tasks.render import csv_table, latex, markdown
from tasks.render.files import write_if_changed
from tasks.render.grid import Grid, grids
from tasks.render.metrics import Metric


def render_tables(experiment: Experiment, records: Mapping[str, Sequence[Record]], results_root: Path,
                  metrics: Mapping[str, Metric]) -> tuple[list[Path], list[Grid]]:
    """Write ``tables/<experiment id>.md``, ``.csv`` and ``.tex``; return them with the grids they hold.

    An experiment without a table has neither.
    """
    if experiment.render.table is None:
        return [], []
    made = list(grids(experiment, records, metrics))
    base = results_root / "tables" / experiment.id
    writers = {".md": markdown.document, ".csv": csv_table.document, ".tex": latex.document}
    missing = [scale for scale in records if not records[scale]]
    return [write_if_changed(base.with_name(base.name + suffix), writer(experiment, made, missing))
            for suffix, writer in writers.items()], made
