"""From records to tables, figures and the index of results. The only reader of ``results/records``."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

from tasks.config import SCALES, Experiment
from tasks.errors import UserError
from tasks.records import read_records, records_path
from tasks.render.claims import verdicts
from tasks.render.figures import render_figures
from tasks.render.metrics import load_metrics
from tasks.render.outcome import outcome
from tasks.render.parity import with_parity
from tasks.render.report import Rendered, write_overview, write_report
from tasks.render.scaling import with_scaling
from tasks.render.tables import render_tables

__all__ = ["render_all", "render_experiment"]


def render_experiment(experiment: Experiment, results_root: Path,
                      implemented: Callable[[Experiment], bool]) -> list[Path]:
    """Write the tables and figures of one experiment below ``results_root``; the index stays as it is.

    Args:
        experiment: what to render.
        results_root: holds ``records/`` and receives ``tables/`` and ``figures/``.
        implemented: tells whether an experiment has code that runs it (only the index shows it).

    Returns:
        The files that show the experiment. One whose content did not change is listed but not written again.

    Raises:
        UserError: a record file is corrupt (the message names file and line), a metric comes in the wrong
            unit, or ``render`` in the config does not fit the records.
    """
    del implemented
    return _render(experiment, results_root).files


def render_all(experiments: Iterable[Experiment], results_root: Path,
               implemented: Callable[[Experiment], bool], readme: Path | None = None) -> list[Path]:
    """Write tables and figures of all experiments and ``README.md``, the index.

    Args:
        experiments: what to render.
        results_root: holds ``records/`` and receives everything else.
        implemented: tells whether an experiment has code that runs it.
        readme: another README that carries the overview between marks (see report.py); None leaves it alone.

    Returns:
        All rendered files, the index last.

    Raises:
        UserError: some experiment could not be rendered; raised after all others and the index have been
            written.
    """
    rendered = []
    for experiment in experiments:
        try:
            rendered.append(_render(experiment, results_root))
        except UserError as error:
            rendered.append(Rendered(experiment, error=str(error).replace(f"{results_root}/", "")))
    index = write_report(rendered, results_root, implemented)
    if readme is not None:
        write_overview(readme, rendered, results_root, implemented)
    broken = [f"{one.experiment.id}: {one.error}" for one in rendered if one.error]
    if broken:
        raise UserError("not rendered: " + "; ".join(broken))
    return [path for one in rendered for path in one.files] + [index]


def _render(experiment: Experiment, results_root: Path) -> Rendered:
    metrics = load_metrics()
    records = {scale: read_records(records_path(results_root, experiment.id, scale)) for scale in SCALES}
    shown = {scale: with_scaling(with_parity(found)) for scale, found in records.items()}
    tables, grids = render_tables(experiment, shown, results_root, metrics)
    figures = render_figures(experiment, shown, results_root, metrics)
    return Rendered(experiment, records, tables, grids, figures, outcome=outcome(experiment, shown, metrics),
                    verdicts=verdicts(experiment, shown, metrics))
