"""What the kinds of figures share: canvas, title, small print, colours, markers, saving to fixed bytes."""

from __future__ import annotations

import io
import math
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib
from matplotlib import rcParams
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from matplotlib.textpath import TextPath
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter, NullLocator

from tasks.config import Experiment, FigureSpec
from tasks.render.cells import Cell, in_order, is_number, show
from tasks.render.metrics import Metric

# Okabe and Ito, "Color Universal Design", 2008. Their yellow is too pale for a line on white and is left out; wine and
# indigo (Tol, SRON/EPS/TN/09-002) and khaki (Petroff, arXiv 2107.02270) follow. To colour-blind eyes, as Machado et al.
# (2009) simulate them, these three are no closer to any colour than two of the first seven are to each other.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#882255", "#332288", "#B9AC70")
MARKERS = "osD^vP*<>p"  # crosses are for runs without a result
LINES = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)))
HATCHES = ("", "//", "..", "\\\\", "xx", "--")
FAINT = 0.45
TITLE_PT, SMALL_PT, TEXT_PT = 10.5, 7.5, 8.5
MARGIN_IN = 0.12
STYLE = {
    "font.family": "DejaVu Sans",  # comes with matplotlib, so the same everywhere
    "font.size": TEXT_PT, "axes.titlesize": TEXT_PT + 0.5, "axes.labelsize": TEXT_PT,
    "legend.fontsize": TEXT_PT - 0.5, "xtick.labelsize": TEXT_PT - 0.5, "ytick.labelsize": TEXT_PT - 0.5,
    "axes.spines.top": False, "axes.spines.right": False, "axes.axisbelow": True,
    "grid.color": "#dddddd", "grid.linewidth": 0.6, "hatch.linewidth": 0.5,
    "axes.formatter.use_mathtext": True, "svg.fonttype": "none", "svg.hashsalt": "adasplash",
}


@dataclass(frozen=True)
class Look:
    """How one series is drawn: it differs from the others in more than colour."""

    colour: str
    marker: str
    line: Any
    hatch: str


def look(index: int) -> Look:
    """Return the look of the ``index``-th series."""
    return Look(COLOURS[index % len(COLOURS)], MARKERS[index % len(MARKERS)], LINES[index % len(LINES)],
                HATCHES[index % len(HATCHES)])


@dataclass(frozen=True)
class Picture:
    """Everything a kind of figure needs to draw itself."""

    experiment: Experiment
    spec: FigureSpec
    cells: list[Cell]
    metric: Metric
    title: str
    small_print: str
    measured: bool  # False: the paper's numbers alone, drawn in full strength

    def values(self, name: str) -> list[Any]:
        """Return the values of a field in their order; one None when the spec names no such field."""
        return in_order(self.experiment, name, [c.get(name) for c in self.cells]) if name else [None]

    def panels(self) -> list[tuple[Any, list[Cell]]]:
        """Split the cells by the panel field."""
        name = self.spec.panel
        return [(v, [c for c in self.cells if not name or c.get(name) == v]) for v in self.values(name)]

    def looks(self) -> dict[Any, Look]:
        """Return a look for every series; a system looks the same at every scale."""
        present = self.values(self.spec.series)
        listed = list(self.experiment.systems) if self.spec.series == "system" else []
        return {v: look(i) for i, v in enumerate(dict.fromkeys([*listed, *present])) if v in present}

    def label(self, name: str, value: Any) -> str:
        """Name a value of a field for a legend or a panel's title; a number carries its parameter's name."""
        if name == "system":
            return self.experiment.systems.get(value, str(value))
        return (value if isinstance(value, str) else f"{name} = {show(value)}").replace("_", " ")

    @property
    def xlabel(self) -> str:
        """Label of the x axis."""
        return self.spec.xlabel or self.spec.x

    @property
    def value_label(self) -> str:
        """Label of the values, with the metric's unit unless the config's label ends with one in brackets."""
        given = "" if self.spec.kind == "heatmap" else self.spec.ylabel
        if not given:
            return self.metric.title
        return given if given.endswith(")") or not self.metric.unit else f"{given} ({self.metric.unit})"


def canvas(picture: Picture, width: float, height: float, rows: int = 1, columns: int = 1,
           **options: Any) -> tuple[Figure, list[Axes]]:
    """Return a figure whose plots cover ``width`` x ``height`` inches below the header, and its axes.

    The header gets its own strip: a layout engine does not know of text placed beside the axes.
    """
    bold, plain = FontProperties(size=TITLE_PT, weight="bold"), FontProperties(size=SMALL_PT)
    title = wrap(picture.title, width - 2 * MARGIN_IN, bold)
    small = wrap(picture.small_print, width - 2 * MARGIN_IN, plain)
    line, small_line = TITLE_PT * 1.3 / 72, SMALL_PT * 1.35 / 72
    header = MARGIN_IN + len(title) * line + len(small) * small_line + MARGIN_IN / 2
    total = height + header
    figure = Figure(figsize=(width, total), layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    figure.get_layout_engine().set(rect=(0, 0, 1, height / total), w_pad=0.06, h_pad=0.06)  # type: ignore[union-attr]
    top = total - MARGIN_IN
    for texts, font, step, colour in ((title, bold, line, "black"), (small, plain, small_line, "#555555")):
        for text in texts:
            figure.text(MARGIN_IN / width, top / total, text, fontproperties=font, va="top", color=colour,
                        parse_math=False)
            top -= step
    axes = figure.subplots(rows, columns, squeeze=False, **options)
    return figure, list(axes.flat)


def wrap(text: str, inches: float, font: FontProperties | None = None) -> list[str]:
    """Break a text into lines that fit; a single word may stick out. The font is that of labels if not given."""
    font = font or FontProperties(size=TEXT_PT)
    lines: list[str] = []
    room = 0.93 * inches * 72  # drawn on a coarse grid of pixels, glyphs come out up to a few per cent wider
    for word in text.split():
        longer = f"{lines[-1]} {word}" if lines else word
        if lines and TextPath((0, 0), longer.replace("$", "S"), prop=font).get_extents().width <= room:
            lines[-1] = longer
        else:
            lines.append(word)
    return lines


def legend(axes: Axes, entries: Sequence[tuple[Any, str]]) -> None:
    """Put a legend right of ``axes``, where it can hide nothing."""
    labels = ["\n".join(textwrap.wrap(label, 30)) for _, label in entries]
    axes.legend([handle for handle, _ in entries], labels, loc="upper left", bbox_to_anchor=(1.01, 1.0),
                borderaxespad=0.0, frameon=False, handlelength=2.6)


def legend_width(labels: Sequence[str]) -> float:
    """Estimate in inches how wide a legend gets, so that the plot beside it keeps its size."""
    longest = max((len(part) for label in labels for part in textwrap.wrap(label, 30)), default=0)
    return 0.6 + longest * (TEXT_PT - 0.5) * 0.58 / 72


def layout(panels: int) -> tuple[int, int]:
    """Return rows and columns for a number of panels: at most three abreast, four as a square."""
    columns = 2 if panels == 4 else min(panels, 3)
    return -(-panels // columns), columns


def fit_labels(axes: Axes, labels: Sequence[str], width: float) -> None:
    """Slant the labels of the x axis when they are too long to stand side by side in ``width`` inches."""
    room = 0.85 * width * 72 / max(len(labels), 1)
    if max((len(label) for label in labels), default=0) * (TEXT_PT - 0.5) * 0.62 > room:
        for label in axes.get_xticklabels():
            label.set(rotation=30, ha="right", rotation_mode="anchor")


def plain_log_ticks(axis: Axis) -> None:
    """Label a logarithmic axis, whose limits are final, with plain numbers where those are short.

    An axis of less than two decades gets labels between the powers of ten too.
    """
    low, high = sorted(axis.get_view_interval())
    decades = math.log10(high / low)
    plain = low >= 0.005 and high <= 200000
    if decades < 0.4:  # hardly any round number of the kind 2, 3, 5 falls in here
        axis.set_major_locator(MaxNLocator(5))
        axis.set_major_formatter(FuncFormatter(lambda at, _: f"{at:.6g}"))
        axis.set_minor_locator(NullLocator())
        return
    if plain:
        axis.set_major_formatter(FuncFormatter(lambda at, _: f"{at:.6g}"))
    between = (2, 5) if decades > 1.5 else (2, 3, 5) if decades > 0.8 else (2, 3, 4, 5, 6, 7, 8)
    if decades < 2 and plain:
        axis.set_minor_locator(LogLocator(subs=between))
        axis.set_minor_formatter(FuncFormatter(lambda at, _: f"{at:.6g}"))
        pad = rcParams[f"{axis.axis_name}tick.major.pad"] + 1.5  # their ticks are shorter
        axis.set_tick_params(which="minor", pad=pad)
    else:
        axis.set_minor_formatter(NullFormatter())


def compact(value: Any) -> str:
    """Write a tick: powers of two from 1024 on as 1k, 2k."""
    if is_number(value) and value >= 1024 and value % 1024 == 0:
        return f"{int(value) // 1024}k"
    return show(value)


def to_png(figure: Figure) -> bytes:
    """Return the figure as PNG, the same bytes for the same figure."""
    return _save(figure, format="png", dpi=150, metadata={"Software": None})


def to_svg(figure: Figure) -> bytes:
    """Return the figure as SVG with text as text, the same bytes for the same figure."""
    return _save(figure, format="svg", metadata={"Date": None, "Creator": None})


def _save(figure: Figure, **options: Any) -> bytes:
    out = io.BytesIO()
    with matplotlib.rc_context(STYLE):
        figure.savefig(out, **options)
    return out.getvalue()
