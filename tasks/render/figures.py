"""Figures: one file a scale, the paper's numbers drawn faintly beside the measured ones."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from matplotlib.figure import Figure

from tasks.config import Experiment, FigureSpec
from tasks.errors import ConfigError
from tasks.records import Record
from tasks.render.bars import draw_bars
from tasks.render.cells import NAMED, Cell, Provenance, collect
from tasks.render.files import write_if_changed
from tasks.render.heatmap import draw_heatmap
from tasks.render.lines import draw_lines
from tasks.render.metrics import Metric, metric_of
from tasks.render.picture import Picture, to_png, to_svg

KINDS: Mapping[str, Callable[[Picture], Figure]] = {
    "lines": draw_lines, "bars": draw_bars, "heatmap": draw_heatmap,
}
REPORTED = "reported"  # in place of the scale in the name of a figure that holds the paper's numbers alone


def picture_of(experiment: Experiment, records: Sequence[Record], scale: str | None,
               metrics: Mapping[str, Metric]) -> Picture | None:
    """Gather what a figure shows; None when there is nothing to show.

    Args:
        scale: the records' scale; None draws the paper's numbers alone.

    Raises:
        ConfigError: ``render.figure`` lacks a field, or a field leaves several systems in one place.
    """
    spec = experiment.render.figure
    assert spec is not None, "the caller asks only for experiments with a figure"
    _check(experiment, spec)
    heat = spec.kind == "heatmap"
    name, axes = (spec.metric, (spec.x, spec.y)) if heat else (spec.y, (spec.x,))
    groups = (spec.panel,) if heat else (spec.series, spec.panel)
    placed = [r for r in records if all(a in NAMED or r.params.get(a) is not None for a in axes)]
    cells = collect(experiment, placed, [*axes, *groups], [name])
    cells = [c for c in cells if all(c.get(a) is not None for a in axes)]
    if "system" not in (*axes, *groups) and len({c.system for c in cells}) > 1:
        raise ConfigError(f"{experiment.file}: render.figure: several systems share a place; name system as "
                          f"{'panel' if heat else 'series or panel'}")
    shown = [c for c in cells if c.measured] if scale else [c for c in cells if c.paper]
    if not any(c.measured.status == "ok" if c.measured else c.paper for c in shown):
        return None
    return Picture(
        experiment, spec, cells, metric_of(name, metrics, placed), title=_title(experiment, scale, records),
        small_print=_small_print(experiment, spec, cells, scale), measured=scale is not None)


def _check(experiment: Experiment, spec: FigureSpec) -> None:
    where = f"{experiment.file}: render.figure"
    if spec.kind == "heatmap" and not spec.metric:
        raise ConfigError(f"{where}.metric: missing, a heatmap colours one metric")
    for key in ("xscale", "yscale"):
        if getattr(spec, key) not in ("linear", "log"):
            raise ConfigError(f"{where}.{key}: got {getattr(spec, key)!r}, allowed are linear, log")


def _title(experiment: Experiment, scale: str | None, records: Sequence[Record]) -> str:
    title = f"{experiment.paper}, {experiment.item}: {experiment.title}"
    if scale:
        return title
    return title + (" (nothing measured here)" if records else " (not run here)")


def _small_print(experiment: Experiment, spec: FigureSpec, cells: Sequence[Cell], scale: str | None) -> str:
    said = []
    if scale:
        said += [f"Scale {scale}", *Provenance.of(cells).sentences()]
        if any(c.measured and c.measured.std is not None for c in cells):
            said.append({"lines": "bands: ± standard deviation over seeds", "heatmap": "mean over seeds",
                         "bars": "error bars: ± standard deviation over seeds"}[spec.kind])
        names = sorted({n for c in cells if c.measured for n in c.measured.passed_over})
        if names:
            said.append(f"of measurements that differ in {', '.join(names)} the newest is drawn")
    lost = sum(c.measured.mean <= 0 for c in cells if c.measured and c.measured.status == "ok")
    if lost and scale and spec.kind != "heatmap" and spec.yscale == "log":
        said.append(f"{lost} value{'s' * (lost != 1)} of 0 or less not on the logarithmic axis")
    if any(c.paper for c in cells) and experiment.reported:
        marks = {"lines": "faint markers", "bars": "diamonds"}.get(spec.kind, "paper")
        said.append(f"{marks if scale else 'Paper'}: {experiment.reported.source}")
    return "; ".join(said)


def draw_figure(experiment: Experiment, records: Sequence[Record], scale: str | None,
                metrics: Mapping[str, Metric]) -> Figure | None:
    """Draw one scale's figure; None when there is nothing to show."""
    picture = picture_of(experiment, records, scale, metrics)
    return picture and KINDS[picture.spec.kind](picture)


def render_figures(experiment: Experiment, records: Mapping[str, Sequence[Record]], results_root: Path,
                   metrics: Mapping[str, Metric]) -> dict[str, list[Path]]:
    """Write ``figures/<experiment id>.<scale>.png`` and ``.svg``; return the files of each scale.

    When no scale has a measured number, the paper's own, if public, are drawn as ``<item>.reported.*``; those
    files go once there is a measured one.
    """
    if experiment.render.figure is None:
        return {}
    base = results_root / "figures" / experiment.id
    drawn = {scale: draw_figure(experiment, records[scale], scale, metrics) for scale in records}
    if not any(drawn.values()):
        everything = [r for some in records.values() for r in some]
        drawn = {REPORTED: draw_figure(experiment, everything, None, metrics)}
    written = {}
    for scale, figure in drawn.items():
        if figure is not None:
            written[scale] = [write_if_changed(base.with_name(f"{base.name}.{scale}.{suffix}"), save(figure))
                              for suffix, save in (("png", to_png), ("svg", to_svg))]
    if REPORTED not in written:
        for suffix in ("png", "svg"):
            base.with_name(f"{base.name}.{REPORTED}.{suffix}").unlink(missing_ok=True)
    return written
