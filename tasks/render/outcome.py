"""How an experiment's numbers compare with the paper's, in a sentence or two computed from the records."""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence

from tasks.config import Experiment
from tasks.records import Record
from tasks.render.cells import Cell, collect, setting
from tasks.render.claims import TELLING_SCALES
from tasks.render.metrics import Metric, metric_of

DIFFERENCES = {"%": "points", "ratio": "", "nats/token": "nats/token"}  # units whose values are subtracted, not divided
TIMES = ("ms", "s")
SPEEDUP = "speedup"
LENGTH = "n"
FEWEST_LENGTHS = 3  # whose times show a power of the length: the longest, at least half of all


def outcome(experiment: Experiment, records: Mapping[str, Sequence[Record]], metrics: Mapping[str, Metric]) -> str:
    """Compare the numbers of the most trustworthy scale, paper before lab, with the paper's; empty without any.

    Said are, for every metric that the paper reports, measured over reported (or, for shares and losses, measured less
    reported) where both have a number, how the systems' speeds compare with that of one of them, and how their times
    grow with the length.
    """
    for scale in TELLING_SCALES:
        wanted = {*experiment.render.metrics, SPEEDUP} if experiment.render.metrics else ()
        cells = collect(experiment, records.get(scale, ()), experiment.render.params, tuple(wanted))
        shown = {c.metric: metric_of(c.metric, metrics, records.get(scale, ())) for c in cells}
        said = [*_agreement(cells, shown), *_speeds(experiment, cells, shown), *_growth(experiment, cells, shown)]
        if said:
            text = " ".join(said)
            return f"At {scale} scale{' (reduced settings)' * (scale == 'lab')}, {text[0].lower()}{text[1:]}"
    return ""


def _agreement(cells: Sequence[Cell], metrics: Mapping[str, Metric]) -> Iterator[str]:
    parts: dict[str, list[str]] = {"over": [], "less": []}
    for name in dict.fromkeys(c.metric for c in cells if c.paper):
        reported = [c for c in cells if c.metric == name and c.paper and c.paper["value"] is not None]
        both = [(c.measured.mean, c.paper["value"]) for c in reported
                if c.measured and c.measured.status == "ok" and c.paper]
        metric, subtract = metrics[name], metrics[name].unit in DIFFERENCES
        values = [m - p if subtract else m / p for m, p in both if subtract or p]
        if values:
            write = _signed if subtract else _number
            unit = DIFFERENCES[metric.unit or ""] if subtract else ""
            middle = f"{write(statistics.median(values))} {unit}".rstrip()
            spread = f"median; {write(min(values))} to {write(max(values))}; " if len(values) > 1 else ""
            parts["less" if subtract else "over"].append(
                f"{metric.label} {middle} ({spread}{len(values)} of {len(reported)} reported cells)")
    for word, found in parts.items():
        if found:
            yield f"Measured {word} reported: {', '.join(found)}."


def _speeds(experiment: Experiment, cells: Sequence[Cell], metrics: Mapping[str, Metric]) -> Iterator[str]:
    """Compare systems by the first time that the paper reports, else by that of the figure, else by the speedup
    measured here."""
    speedups = [c for c in cells if c.metric == SPEEDUP and c.measured and c.measured.status == "ok"]
    base = next((c.measured.records[-1].params.get("relative_to") for c in speedups if c.measured), None)
    timed = [c for c in cells if c.paper and c.paper["value"] and metrics[c.metric].unit in TIMES]
    if timed:
        first = [c for c in timed if c.metric == timed[0].metric]
        base = base or _most_reported(experiment, first)
        beside = _beside_the_paper(experiment, first, base)
        if beside:
            label = metrics[first[0].metric].label
            yield f"{label}, times as fast as {experiment.systems[base]} – {'; '.join(beside)}."
            return
    if base in experiment.systems:
        drawn = _figure_time(experiment, metrics)
        values = _relative({(c.system, setting(c)): c.measured.mean for c in cells if c.metric == drawn and c.measured
                            and c.measured.status == "ok" and c.measured.mean > 0}, base)  # fmt: skip
        label = f"{metrics[drawn].label}, times" if drawn and values else "Times"
        if not values:
            values = {s: [c.measured.mean for c in speedups if c.system == s and c.measured]
                      for s in {c.system for c in speedups} - {base}}
        alone = [f"{experiment.systems[s]}: {_range(values[s])}" for s in experiment.systems if s in values]
        if alone:
            yield (f"{label} as fast as {experiment.systems[base]}, of which the paper gives no numbers – "
                   f"{'; '.join(alone)}.")


def _figure_time(experiment: Experiment, metrics: Mapping[str, Metric]) -> str | None:
    """Return the time that the figure is of, if it is of one and the records have it."""
    figure = experiment.render.figure
    drawn = figure.y if figure and figure.kind != "heatmap" else ""
    return drawn if drawn in metrics and metrics[drawn].unit in TIMES else None


def _relative(times: Mapping[tuple, float], base: str) -> dict[str, list[float]]:
    """Return how fast each system is relative to ``base``, from times by system and setting, wherever both have one."""
    values = defaultdict(list)
    for (system, place), time in times.items():
        if system != base and (base, place) in times:
            values[system].append(times[base, place] / time)
    return values


def _beside_the_paper(experiment: Experiment, cells: Sequence[Cell], base: str) -> list[str]:
    """Say of each system how fast it is relative to ``base``, here and in the paper, over the same settings."""
    found = {(c.system, setting(c)): (c.measured.mean, c.paper["value"]) for c in cells
             if c.paper and c.measured and c.measured.status == "ok" and c.measured.mean > 0}
    here, there = (_relative({key: both[side] for key, both in found.items()}, base) for side in (0, 1))
    return [f"{experiment.systems[s]}: {_range(here[s])} (paper {_range(there[s])})"
            for s in experiment.systems if s in here]  # fmt: skip


def _growth(experiment: Experiment, cells: Sequence[Cell], metrics: Mapping[str, Metric]) -> Iterator[str]:
    """Say to which power of the length each system's time grows, a fit over the longest lengths.

    It is the time that the figure is of, else the first kind that there is.
    """
    timed = [c for c in cells if metrics[c.metric].unit in TIMES and c.measured and c.measured.status == "ok"
             and c.measured.mean > 0 and c.params.get(LENGTH)]
    drawn = _figure_time(experiment, metrics)
    timed = [c for c in timed if c.metric == drawn] or timed
    curves: dict[tuple, list[tuple[float, float]]] = defaultdict(list)
    for cell in timed:
        if cell.metric == timed[0].metric:
            others = tuple(pair for pair in setting(cell) if pair[0] != LENGTH)
            curves[cell.system, others].append((cell.params[LENGTH], cell.measured.mean))
    powers: dict[str, list[float]] = defaultdict(list)
    fitted = set()
    for (system, _), points in curves.items():
        longest = sorted(points)[-max(FEWEST_LENGTHS, math.ceil(len(points) / 2)):]
        if len(longest) >= FEWEST_LENGTHS:
            logs = [[math.log(value) for value in column] for column in zip(*longest, strict=True)]
            powers[system].append(statistics.linear_regression(*logs).slope)
            fitted |= {n for n, _ in longest}
    if powers:
        each = "; ".join(f"{experiment.systems[s]}: {_powers(powers[s])}" for s in experiment.systems if s in powers)
        label = metrics[timed[0].metric].label
        yield f"{label} grows with this power of the length (fitted from {min(fitted)} to {max(fitted)}) – {each}."


def _most_reported(experiment: Experiment, cells: Sequence[Cell]) -> str:
    """Return the system with the most numbers of the paper, the first of several."""
    return max(experiment.systems, key=lambda system: sum(c.system == system for c in cells))


def _range(values: Sequence[float]) -> str:
    low, high = _number(min(values)), _number(max(values))
    return low if low == high else f"{low} to {high}"


def _powers(values: Sequence[float]) -> str:
    low, high = f"{min(values):.2f}", f"{max(values):.2f}"
    return low if low == high else f"{low} to {high}"


def _number(value: float) -> str:
    return f"{value:.2g}" if abs(value) < 10 else f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"


def _signed(value: float) -> str:
    return _number(value) if value <= 0 else f"+{_number(value)}"
