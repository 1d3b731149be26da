"""Heat maps: a panel a system, one colour bar for all, the paper's values in panels of their own."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullLocator

from tasks.render.cells import Cell
from tasks.render.grid import STATUS_TEXT
from tasks.render.picture import STYLE, TEXT_PT, Picture, canvas, compact, layout, wrap

COLOURS = "cividis"  # even in lightness and the same to colour-blind eyes
PANEL_IN = 3.3
MAX_ANNOTATED = 400  # cells in a panel
SMALLEST_PT, LARGEST_PT = 4.8, 8.5
STEPS = (1, 2, 4, 5, 8, 10, 16, 20, 32, 40, 50, 64, 100, 128, 200, 256)  # label every so many cells
VECTOR_CELLS = 1024  # a panel with more cells goes into an SVG as pixels

Panel = tuple[str, np.ndarray, dict[tuple[int, int], str]]  # title, values (NaN: absent), absent cells' texts


def draw_heatmap(picture: Picture) -> Figure:
    """Colour ``metric`` over x and y, a panel for each value of ``panel``."""
    xs, ys = picture.values(picture.spec.x), picture.values(picture.spec.y)
    panels = _panels(picture, xs, ys)
    rows, columns = layout(len(panels))
    finite = np.concatenate([p[1][np.isfinite(p[1])] for p in panels])
    low, high = float(finite.min()), float(finite.max())
    norm = Normalize(low, high if high > low else low + 1.0)
    tall = PANEL_IN * min(max(len(ys) / len(xs), 0.45), 1.4)
    with matplotlib.rc_context(STYLE):
        figure, axes = canvas(picture, max(PANEL_IN * columns + 1.2, 5.0), (tall + 0.45) * rows + 0.35,
                              rows, columns, sharex=True, sharey=True)
        size = _text_size(picture, panels, tall)
        for spare in axes[len(panels):]:
            spare.set_visible(False)
        for ax, (title, values, absent) in zip(axes, panels, strict=False):
            mesh = ax.pcolormesh(np.ma.masked_invalid(values), cmap=COLOURS, norm=norm,
                                 rasterized=values.size > VECTOR_CELLS)
            ax.set_title("\n".join(wrap(title, 0.85 * PANEL_IN)))
            ax.set_facecolor("#e8e8e8")  # shows where a cell has no value
            if size:
                _annotate(ax, picture, values, absent, norm, size)
            _ticks(ax, xs, ys, tall)
        for i, ax in enumerate(axes[:len(panels)]):
            if i + columns >= len(panels):
                ax.set_xlabel("\n".join(wrap(picture.xlabel, 0.9 * PANEL_IN)))
                ax.tick_params(labelbottom=True)  # a hidden panel below takes the shared labels with it
            if i % columns == 0:
                ax.set_ylabel("\n".join(wrap(picture.spec.ylabel or picture.spec.y, 0.9 * tall)))
        bar = figure.colorbar(mesh, ax=axes, fraction=0.05, pad=0.02, aspect=28)
        bar.set_label(picture.value_label)
        bar.outline.set_visible(False)  # type: ignore[operator]
        return figure


def _panels(picture: Picture, xs: list[Any], ys: list[Any]) -> list[Panel]:
    panels = []
    for value, cells in picture.panels():
        title = picture.label(picture.spec.panel, value) if picture.spec.panel else ""
        if picture.measured and any(c.measured for c in cells):
            panels.append((title or "measured", *_matrix(picture, cells, xs, ys, _measured_value)))
        if any(c.paper for c in cells):
            name = f"{title} (paper)" if title else "paper"
            panels.append((name, *_matrix(picture, cells, xs, ys, _paper_value)))
    return panels


def _measured_value(cell: Cell) -> tuple[float | None, str]:
    if cell.measured is None:
        return None, ""
    if cell.measured.status == "ok":
        return cell.measured.mean, ""
    return None, STATUS_TEXT[cell.measured.status]


def _paper_value(cell: Cell) -> tuple[float | None, str]:
    if cell.paper is None:
        return None, ""
    return cell.paper["value"], STATUS_TEXT.get(cell.paper["status"], "")


def _matrix(
    picture: Picture, cells: list[Cell], xs: list[Any], ys: list[Any],
    read: Callable[[Cell], tuple[float | None, str]],
) -> tuple[np.ndarray, dict[tuple[int, int], str]]:
    values = np.full((len(ys), len(xs)), np.nan)
    absent = {}
    for cell in cells:
        at = ys.index(cell.get(picture.spec.y)), xs.index(cell.get(picture.spec.x))
        value, text = read(cell)
        if value is not None:
            values[at] = value
        elif text:
            absent[at] = text
    return values, absent


def _text_size(picture: Picture, panels: list[Panel], tall: float) -> float | None:
    """Return the size in points at which every value fits into its cell, None when that is not legible."""
    rows, columns = panels[0][1].shape
    texts = [picture.metric.short(float(v)) for _, values, _ in panels for v in values[np.isfinite(values)]]
    plain = [t for t in texts if t[0] not in "<>"] or texts  # the few bounds are set smaller than the values
    size = min(_fitting(max(plain, key=len), columns), 0.7 * tall * 72 / rows)
    return size if size >= SMALLEST_PT and rows * columns <= MAX_ANNOTATED else None


def _fitting(text: str, columns: int) -> float:
    """Return the size in points at which a text is as wide as a cell, or the largest in use."""
    return min(LARGEST_PT, 0.88 * PANEL_IN * 72 / columns / (0.64 * len(text)))


def _annotate(ax: Axes, picture: Picture, values: np.ndarray, absent: dict[tuple[int, int], str],
              norm: Normalize, size: float) -> None:
    """Write each value into its cell, and why an absent one is absent."""
    texts = {at: picture.metric.short(float(v)) for at, v in np.ndenumerate(values) if np.isfinite(v)}
    for (y, x), text in {**texts, **absent}.items():
        dark = (y, x) in texts and norm(values[y, x]) < 0.55
        ax.text(x + 0.5, y + 0.5, text, ha="center", va="center",
                fontsize=min(size, _fitting(text, values.shape[1])), color="white" if dark else "black")


def _ticks(ax: Axes, xs: list[Any], ys: list[Any], tall: float) -> None:
    """Label cells with their values, thinned out evenly where they would touch."""
    for axis, values, room in ((ax.xaxis, xs, PANEL_IN * 72 * 0.9), (ax.yaxis, ys, tall * 72)):
        labels = [compact(v) for v in values]
        widest = max(len(label) for label in labels) * 5.2 + 6 if axis is ax.xaxis else TEXT_PT * 1.4
        every = _step(labels, len(labels) * widest / room)
        axis.set_major_locator(FixedLocator([i + 0.5 for i in range(0, len(values), every)]))
        axis.set_minor_locator(NullLocator())
        axis.set_ticklabels(labels[::every])
    ax.tick_params(length=0)


def _step(labels: list[str], least: float) -> int:
    """Return a step of at least ``least``, the one with the shortest labels: -3, -2 rather than -3, -2.6."""
    steps = [k for k in STEPS if least <= k <= max(2.5 * least, 1)] or [math.ceil(least)]
    return min(steps, key=lambda k: sum(map(len, labels[::k])) / len(labels[::k]))
