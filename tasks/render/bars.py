"""Bar charts: a group a value of x, a bar a series, the paper's number as a diamond on the bar."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import FixedLocator

from tasks.render.cells import Cell
from tasks.render.grid import STATUS_TEXT
from tasks.render.picture import (
    STYLE,
    TEXT_PT,
    Look,
    Picture,
    canvas,
    compact,
    fit_labels,
    legend,
    legend_width,
    plain_log_ticks,
)

GROUP = 0.84  # share of the distance between groups that their bars cover
SMALLEST_PT = 4.5
AXES_POINTS = 190  # about the height of a plot; only decides whether a number would cover a diamond
BAR_IN = 0.34  # inches a bar gets, so that the number on it stays legible


def draw_bars(picture: Picture) -> Figure:
    """Draw a bar for each value of ``series`` over each x, and a plot for each value of ``panel``."""
    looks, panels, xs = picture.looks(), picture.panels(), picture.values(picture.spec.x)
    names = [picture.label(picture.spec.series, s) for s in looks]
    wide = min(max(4.2, len(xs) * (len(looks) + 0.5) * BAR_IN), 9.0)
    with matplotlib.rc_context(STYLE):
        figure, axes = canvas(picture, wide + legend_width([*names, "the paper's number"]),
                              3.6 if len(panels) == 1 else 2.8 * len(panels), rows=len(panels), sharey=True)
        drawn = []
        for ax, (value, cells) in zip(axes, panels, strict=True):
            drawn.append(_draw_panel(ax, picture, cells, looks, xs, wide))
            if picture.spec.panel:
                ax.set_title(picture.label(picture.spec.panel, value))
        for ax, bars in zip(axes, drawn, strict=True):  # once the shared axis has its final range
            if ax.get_yscale() == "log":
                plain_log_ticks(ax.yaxis)
            _write_values(ax, picture, bars, bar_points=wide * 72 * 0.8 / len(xs) * GROUP / len(looks))
        entries: list[tuple[Any, str]] = [
            (Patch(facecolor=s.colour, hatch=s.hatch, edgecolor="white"), name)
            for s, name in zip(looks.values(), names, strict=True)]
        if picture.measured and any(c.paper and c.paper["status"] == "ok" for c in picture.cells):
            entries.append((_diamond([], []), "the paper's number"))
        legend(axes[0], entries)
        return figure


def _draw_panel(ax: Axes, picture: Picture, cells: list[Cell], looks: dict[Any, Look], xs: list[Any],
                wide: float) -> list[Bar]:
    spec, step = picture.spec, GROUP / len(looks)
    ax.grid(True, axis="y")
    ax.set_xlabel(picture.xlabel)
    ax.set_ylabel(picture.value_label)
    if spec.yscale == "log":
        ax.set_yscale("log", nonpositive="clip")  # a bar starts at 0, which a mask would take with the bar
    ax.xaxis.set_major_locator(FixedLocator(range(len(xs))))
    labels = [picture.label("system", x) if spec.x == "system" else compact(x) for x in xs]
    ax.set_xticklabels(labels)
    fit_labels(ax, labels, wide)
    ax.tick_params(axis="x", length=0)
    ax.set_xlim(-0.5, len(xs) - 0.5)
    order, bars = list(looks), []
    for cell in cells:
        index = order.index(cell.get(spec.series))
        bar = Bar.of(cell, picture, xs.index(cell.get(spec.x)) - GROUP / 2 + step * (index + 0.5))
        bars.append(bar)
        _draw_bar(ax, bar, looks[order[index]], step)
    ax.margins(y=0.12)
    return bars


@dataclass(frozen=True)
class Bar:
    """What one bar shows; ``marked`` is the paper's number beside a measured one."""

    at: float
    status: str
    value: float | None
    error: float | None
    marked: float | None

    @classmethod
    def of(cls, cell: Cell, picture: Picture, at: float) -> Bar:
        """Read a cell; in a figure of the paper's numbers alone they are the bars."""
        paper = cell.paper["value"] if cell.paper else None
        if not picture.measured:
            return cls(at, cell.paper["status"] if cell.paper else "", paper, None, None)
        if cell.measured is None or cell.measured.status != "ok":
            return cls(at, cell.measured.status if cell.measured else "not run", None, None, paper)
        return cls(at, "ok", cell.measured.mean, cell.measured.std, paper)


def _draw_bar(ax: Axes, bar: Bar, style: Look, step: float) -> None:
    if bar.value is not None:
        ax.bar(bar.at, bar.value, step * 0.92, color=style.colour, hatch=style.hatch, edgecolor="white",
               linewidth=0.4, yerr=bar.error, error_kw={"capsize": 2, "linewidth": 0.9, "ecolor": "#333333"},
               zorder=2)
    elif bar.status:
        ax.text(bar.at, 0.02, STATUS_TEXT.get(bar.status, bar.status), transform=ax.get_xaxis_transform(),
                rotation=90, ha="center", va="bottom", fontsize=TEXT_PT - 1.5, color=style.colour)
    if bar.marked is not None:
        ax.add_line(_diamond([bar.at], [bar.marked]))
        ax.update_datalim([(bar.at, bar.marked)])


def _write_values(ax: Axes, picture: Picture, bars: list[Bar], bar_points: float) -> None:
    """Write each bar's value above it, or above the diamond where that is in the way."""
    shown = {bar: picture.metric.text(bar.value) for bar in bars if bar.value is not None}
    size = min(TEXT_PT - 1.5, bar_points / (0.62 * max((len(t) for t in shown.values()), default=1)))
    if size < SMALLEST_PT:
        return
    ax.get_ylim()  # brings the transformation below up to date
    to_axes = ax.transData + ax.transAxes.inverted()

    def height(value: float) -> float:
        return float(to_axes.transform((0.0, value))[1]) * AXES_POINTS

    for bar, text in shown.items():
        top = bar.value + (bar.error or 0.0)
        covered = bar.marked is not None and -4 < height(bar.marked) - height(top) < size + 7
        ax.annotate(text, (bar.at, bar.marked if covered else top), (0, 5 if covered else 2.5),
                    textcoords="offset points", ha="center", fontsize=size, zorder=5)


def _diamond(xs: list[float], ys: list[float]) -> Line2D:
    return Line2D(xs, ys, marker="D", linestyle="none", markersize=5, markerfacecolor="white", alpha=0.8,
                  markeredgecolor="#333333", markeredgewidth=1.0, zorder=4)
