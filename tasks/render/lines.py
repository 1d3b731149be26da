"""Line plots: a line a series, a band for the spread over seeds, the paper's points as faint markers."""

from __future__ import annotations

import math
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator

from tasks.render.cells import Cell, is_number
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
    wrap,
)

MAX_TICKS = 12  # up to this many x values each gets its tick
MAX_MARKERS = 25  # a trace with more points is a bare line with a marker now and then


def draw_lines(picture: Picture) -> Figure:
    """Draw y against x, a line for each value of ``series`` and a plot for each value of ``panel``."""
    looks, panels = picture.looks(), _with_content(picture.panels())
    named = [(picture.label(picture.spec.series, s), s) for s in looks]
    rows, columns = layout(len(panels))
    labels = [label for label, _ in named] + ["the paper's points"]
    with matplotlib.rc_context(STYLE):
        each = 5.4 if columns == 1 else 3.4
        figure, axes = canvas(picture, each * columns + legend_width(labels),
                              3.7 if rows == 1 else 3.0 * rows, rows, columns, sharey=True)
        for spare in axes[len(panels):]:
            spare.set_visible(False)
        places = _places(picture)
        for ax, (value, cells) in zip(axes, panels, strict=False):
            _draw_panel(ax, picture, cells, looks, places, each)
            if ax not in axes[::columns]:
                ax.set_ylabel("")  # the first plot of the row says it
            if picture.spec.panel:
                ax.set_title("\n".join(wrap(picture.label(picture.spec.panel, value), 0.8 * each)))
        legend(axes[columns - 1], _entries(picture, named, looks))
        return figure


def _with_content(panels: list[tuple[Any, list[Cell]]]) -> list[tuple[Any, list[Cell]]]:
    """Leave out panels in which everything was found not to apply."""
    def empty(cells: list[Cell]) -> bool:
        return all(c.paper is None and c.measured is not None and c.measured.status == "not_applicable" for c in cells)

    return [(value, cells) for value, cells in panels if not empty(cells)]


def _places(picture: Picture) -> dict[Any, float]:
    """Map x values to places on the axis: numbers stand where they are, names stand in a row."""
    values = picture.values(picture.spec.x)
    numeric = all(is_number(v) for v in values)
    return {v: float(v) if numeric else float(i) for i, v in enumerate(values)}


def _draw_panel(ax: Axes, picture: Picture, cells: list[Cell], looks: dict[Any, Look],
                places: dict[Any, float], width: float) -> None:
    spec = picture.spec
    own_places = {x: places[x] for x in places if any(c.get(spec.x) == x for c in cells)}
    _axes(ax, picture, own_places, width)
    for i, (series, style) in enumerate(looks.items()):
        own = sorted((c for c in cells if c.get(spec.series) == series), key=lambda c: places[c.get(spec.x)])
        measured = [(places[c.get(spec.x)], c.measured) for c in own if c.measured]
        done = [(x, m.mean, m.std or 0.0) for x, m in measured if m.status == "ok"]
        if done:
            xs, ys, spread = (list(column) for column in zip(*done, strict=True))
            ax.plot(xs, ys, color=style.colour, marker=style.marker, linestyle=style.line, markersize=4.5,
                    linewidth=1.5, markevery=max(1, len(xs) // MAX_MARKERS), zorder=3)
            if any(spread):
                ax.fill_between(xs, *_band(ys, spread, spec.yscale == "log"), color=style.colour, alpha=0.18,
                                linewidth=0, zorder=1)
        _paper(ax, picture, [(places[c.get(spec.x)], c.paper) for c in own if c.paper], style)
        lost = [x for x, m in measured if m.status == "oom"]
        if not picture.measured:
            lost = [places[c.get(spec.x)] for c in own if c.paper and c.paper["status"] == "oom"]
        _out_of_memory(ax, lost, style, i)
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


def _out_of_memory(ax: Axes, xs: list[float], style: Look, index: int) -> None:
    """Mark runs that ran out of memory along the upper edge, each series in its own row."""
    if xs:
        ax.plot(xs, [0.985 - 0.03 * index] * len(xs), transform=ax.get_xaxis_transform(), linestyle="none",
                marker="x", color=style.colour, markersize=5, markeredgewidth=1.4, zorder=4, gid="oom")


def _axes(ax: Axes, picture: Picture, places: dict[Any, float], width: float) -> None:
    spec = picture.spec
    ax.grid(True)
    ax.set_xlabel("\n".join(wrap(picture.xlabel, 0.9 * width)))
    ax.set_ylabel(picture.value_label)
    if spec.yscale == "log":
        ax.set_yscale("log", nonpositive="mask")
    numeric = all(is_number(v) for v in places)
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


def _entries(picture: Picture, named: list[tuple[str, Any]], looks: dict[Any, Look]) -> list[tuple[Any, str]]:
    hollow = {"markersize": 7.5, "markerfacecolor": "none"}
    entries: list[tuple[Any, str]] = []
    for label, series in named:
        style = looks[series]
        entries.append((Line2D([], [], color=style.colour, marker=style.marker, linestyle=style.line,
                               **({"markersize": 4.5} if picture.measured else hollow)), label))
    if picture.measured and any(c.paper and c.paper["status"] == "ok" for c in picture.cells):
        entries.append((Line2D([], [], color="#555555", marker="o", linestyle="none", alpha=FAINT, **hollow),
                        "the paper's points"))
    sides = [(c.measured.status if c.measured else "") if picture.measured else (c.paper or {}).get("status")
             for c in picture.cells]
    if "oom" in sides:
        entries.append((Line2D([], [], color="#555555", marker="x", linestyle="none"), "out of memory"))
    return entries
