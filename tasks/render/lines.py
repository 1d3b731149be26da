"""Line plots: a line a series, a band for the spread over seeds, the paper's points as faint markers.

A run without a result leaves a gap in its line and, if it ran out of memory or failed, a cross above the data.
"""

from __future__ import annotations

import itertools
import math
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator

from tasks.render.cells import Cell, in_order, is_number
from tasks.render.picture import (
    FAINT,
    STYLE,
    Look,
    Picture,
    canvas,
    compact,
    fit_labels,
    layout,
    legend,
    legend_width,
    plain_log_ticks,
    wrap,
)

MAX_TICKS = 12  # up to this many x values each gets its tick
MAX_MARKERS = 25  # a trace with more points is a bare line with a marker now and then
CHARACTER = 0.09  # inches of a label on the x axis, space to the next included
PAPER = "paper"
CROSSES = {"oom": ("x", "out of memory"), "failed": ("+", "failed")}
TOP, ROW = 0.97, 0.045  # where the first row of crosses is, and how far apart they are, as shares of the height


def draw_lines(picture: Picture) -> Figure:
    """Draw y against x, a line for each value of ``series`` and a plot for each value of ``panel``."""
    looks, panels = picture.looks(), _with_content(picture.panels())
    named = [(picture.label(picture.spec.series, s), s) for s in looks if _shows(picture, s)]
    rows, columns = layout(len(panels))
    labels = [label for label, _ in named] + [PAPER]
    lost = {series: _lost(picture, series) for series in looks}
    rows_of = {series: row for row, series in enumerate(s for s in looks if lost[s])}
    with matplotlib.rc_context(STYLE):
        each = 5.4 if columns == 1 else 3.4
        figure, axes = canvas(picture, each * columns + legend_width(labels),
                              3.7 if rows == 1 else 3.0 * rows, rows, columns, sharey=True)
        for spare in axes[len(panels):]:
            spare.set_visible(False)
        for ax, (value, cells) in zip(axes, panels, strict=False):
            _draw_panel(ax, picture, cells, looks, rows_of, each)
            if ax not in axes[::columns]:
                ax.set_ylabel("")  # the first plot of the row says it
            if picture.spec.panel:
                ax.set_title("\n".join(wrap(picture.label(picture.spec.panel, value), 0.8 * each)))
        if rows_of:
            _make_room(axes[0], len(rows_of))  # all plots share the y axis
        for ax in axes[:len(panels)]:
            for axis, scale in ((ax.xaxis, ax.get_xscale()), (ax.yaxis, ax.get_yscale())):
                if scale == "log" and not isinstance(axis.get_major_locator(), FixedLocator):
                    plain_log_ticks(axis)
        legend(axes[columns - 1], _entries(picture, named, looks, {s for some in lost.values() for s in some}))
        return figure


def _with_content(panels: list[tuple[Any, list[Cell]]]) -> list[tuple[Any, list[Cell]]]:
    """Leave out panels in which everything was found not to apply."""
    def empty(cells: list[Cell]) -> bool:
        return all(c.paper is None and c.measured is not None and c.measured.status == "not_applicable" for c in cells)

    return [(value, cells) for value, cells in panels if not empty(cells)]


def _shows(picture: Picture, series: Any) -> bool:
    """Tell whether anything is drawn of a series; one that does not apply anywhere needs no place in the legend."""
    own = [c for c in picture.cells if c.get(picture.spec.series) == series]
    there = {c.measured.status for c in own if c.measured} | {c.paper["status"] for c in own if c.paper}
    return bool(there & {"ok", *CROSSES})


def _places(picture: Picture, cells: list[Cell], width: float) -> tuple[dict[Any, float], bool]:
    """Map x values to places on the axis: numbers stand where they are, names in a row; also say which.

    Numbers that crowd a logarithmic axis of this width (inches), as 99 and 99.9 do, stand in a row too.
    """
    values = in_order(picture.experiment, picture.spec.x, [c.get(picture.spec.x) for c in cells])
    numeric = all(is_number(v) for v in values)
    if numeric and picture.spec.xscale == "log" and 2 < len(values) <= MAX_TICKS and min(values) > 0:
        logs = [math.log(v) for v in values]
        needed = CHARACTER * max(len(compact(v)) for v in values) / width
        numeric = min(b - a for a, b in itertools.pairwise(logs)) > needed * (logs[-1] - logs[0])
    return {v: float(v) if numeric else float(i) for i, v in enumerate(values)}, numeric


def _status(picture: Picture, cell: Cell) -> str:
    """Return how what is drawn as this cell's line went; empty when there is nothing."""
    if picture.measured:
        return cell.measured.status if cell.measured else ""
    return cell.paper["status"] if cell.paper else ""


def _lost(picture: Picture, series: Any) -> set[str]:
    """Return which kinds of crosses a series has."""
    return {_status(picture, c) for c in picture.cells if c.get(picture.spec.series) == series} & set(CROSSES)


def _draw_panel(ax: Axes, picture: Picture, cells: list[Cell], looks: dict[Any, Look],
                rows_of: dict[Any, int], width: float) -> None:
    spec = picture.spec
    places, numeric = _places(picture, cells, width)
    _axes(ax, picture, places, numeric, width)
    for series, style in looks.items():
        own = sorted((c for c in cells if c.get(spec.series) == series), key=lambda c: places[c.get(spec.x)])
        measured = [(places[c.get(spec.x)], c.measured) for c in own if c.measured]
        # A number that is missing leaves a gap, rather than a line that leads across it.
        done = [(x, m.mean, m.std or 0.0) if m.status == "ok" else (x, math.nan, 0.0) for x, m in measured]
        if any(m.status == "ok" for _, m in measured):
            xs, ys, spread = (list(column) for column in zip(*done, strict=True))
            ax.plot(xs, ys, color=style.colour, marker=style.marker, linestyle=style.line, markersize=4.5,
                    linewidth=1.5, markevery=math.ceil(len(xs) / MAX_MARKERS), zorder=3)
            if any(spread):
                ax.fill_between(xs, *_band(ys, spread, spec.yscale == "log"), color=style.colour, alpha=0.18,
                                linewidth=0, zorder=1)
        _paper(ax, picture, [(places[c.get(spec.x)], c.paper) for c in own if c.paper], style)
        for status, (marker, _) in CROSSES.items():
            xs = [places[c.get(spec.x)] for c in own if _status(picture, c) == status]
            if xs:
                ax.plot(xs, [TOP - ROW * rows_of[series]] * len(xs), transform=ax.get_xaxis_transform(),
                        linestyle="none", marker=marker, color=style.colour, markersize=5, markeredgewidth=1.4,
                        zorder=4, gid=status)
    ax.margins(y=0.08)


def _band(ys: list[float], spread: list[float], logarithmic: bool) -> tuple[list[float], list[float]]:
    """Return the edges of the band; one that leaves a logarithmic axis ends at the line's lowest point."""
    low, high = [y - s for y, s in zip(ys, spread, strict=True)], [y + s for y, s in zip(ys, spread, strict=True)]
    if logarithmic:
        floor = min((y for y in ys if y > 0), default=math.nan)
        low = [max(edge, min(floor, y)) if y > 0 else math.nan for edge, y in zip(low, ys, strict=True)]
    return low, high


def _paper(ax: Axes, picture: Picture, points: list[tuple[float, dict]], style: Look) -> None:
    done = [(x, p["value"]) for x, p in points if p["status"] == "ok"]
    if done:
        alone = not picture.measured
        ax.plot(*zip(*done, strict=True), color=style.colour, marker=style.marker, markersize=7.5,
                markerfacecolor="none", markeredgewidth=1.1, linestyle=style.line if alone else "none",
                linewidth=1.0, alpha=None if alone else FAINT, zorder=2)


def _make_room(ax: Axes, rows: int) -> None:
    """Stretch the y axis upwards until ``rows`` rows of crosses lie above all data."""
    share = TOP - ROW * rows
    to_axis, back = (math.log10, lambda v: 10.0**v) if ax.get_yscale() == "log" else (float, float)
    low, high = (to_axis(edge) for edge in ax.get_ylim())
    ax.set_ylim(back(low), back(low + (high - low) / share))


def _axes(ax: Axes, picture: Picture, places: dict[Any, float], numeric: bool, width: float) -> None:
    spec = picture.spec
    ax.grid(True)
    in_a_row = " (evenly spaced)" if not numeric and all(is_number(v) for v in places) else ""
    ax.set_xlabel("\n".join(wrap(picture.xlabel + in_a_row, 0.9 * width)))
    ax.set_ylabel(picture.value_label)
    if spec.yscale == "log":
        ax.set_yscale("log", nonpositive="mask")
    if numeric and spec.xscale == "log":
        powers = all(v > 0 and float(v).is_integer() and int(v) & (int(v) - 1) == 0 for v in places)
        ax.set_xscale("log", base=2 if powers else 10, nonpositive="mask")
    if len(places) <= MAX_TICKS and (not numeric or spec.xscale == "log"):
        names = {place: compact(value) for value, place in places.items()}
        ax.xaxis.set_major_locator(FixedLocator(list(names)))
        ax.xaxis.set_minor_locator(NullLocator())
        ax.xaxis.set_major_formatter(FuncFormatter(lambda at, _: names.get(at, "")))
        fit_labels(ax, list(names.values()), width)
    elif spec.xscale == "linear" and all(isinstance(v, int) for v in places):
        ax.xaxis.set_major_locator(MaxNLocator("auto", integer=True))


def _entries(picture: Picture, named: list[tuple[str, Any]], looks: dict[Any, Look],
             lost: set[str]) -> list[tuple[Any, str]]:
    hollow = {"markersize": 7.5, "markerfacecolor": "none"}
    entries: list[tuple[Any, str]] = []
    for label, series in named:
        style = looks[series]
        entries.append((Line2D([], [], color=style.colour, marker=style.marker, linestyle=style.line,
                               **({"markersize": 4.5} if picture.measured else hollow)), label))
    if picture.measured and any(c.paper and c.paper["status"] == "ok" for c in picture.cells):
        entries.append((Line2D([], [], color="#555555", marker="o", linestyle="none", alpha=FAINT, **hollow),
                        PAPER))
    entries += [(Line2D([], [], color="#555555", marker=marker, linestyle="none"), name)
                for status, (marker, name) in CROSSES.items() if status in lost]
    return entries
