"""Verdicts: what the records say to the claims of a config (tasks/claim.py), each in one line.

Numbers are means over seeds at the most trustworthy scale that has them, paper before lab. A smoke run proves nothing.

A ratio is reproduced when it is at least 85 % of the paper's; different when it is less than that but above 1; else not
reproduced. A crossing is reproduced when it lies at most 5 points above the paper's, different when it lies higher, and
not reproduced when the last point is below 1. What was not measured where the claim speaks is not run.

A target of this project is met, or not, as it says.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from tasks.claim import Claim
from tasks.config import Experiment
from tasks.records import Record
from tasks.render.cells import Cell, collect, setting, show
from tasks.render.metrics import Metric

REPRODUCED, DIFFERENT, NOT_REPRODUCED, NOT_RUN = "reproduced", "different", "not reproduced", "not run"
MET, NOT_MET = "met", "not met"
TELLING_SCALES = ("paper", "lab")
ENOUGH = 0.85  # of the paper's ratio
POINTS = 5.0  # beyond the paper's crossing, in units of what it lies along
MANY = 4  # settings up to this number are named one by one


@dataclass(frozen=True)
class Verdict:
    """What came out of a claim, and the numbers behind it."""

    claim: Claim
    outcome: str
    detail: str

    @property
    def text(self) -> str:
        """The line that goes under the claim."""
        return f"{self.outcome}: {self.detail}"


@dataclass(frozen=True)
class _Point:
    """A measured ratio (None: one side has no value), and where it lies along the claim's axis."""

    params: dict[str, Any]
    ratio: float | None
    along: float | None


def verdicts(experiment: Experiment, records: Mapping[str, Sequence[Record]],
             metrics: Mapping[str, Metric]) -> list[Verdict]:
    """Judge every claim of an experiment by its records, given by scale."""
    return [_judge(experiment, claim, records, metrics) for claim in experiment.claims]


def _judge(experiment: Experiment, claim: Claim, records: Mapping[str, Sequence[Record]],
           metrics: Mapping[str, Metric]) -> Verdict:
    along = claim.metric if claim.kind == "most" else claim.along  # what the claim's number is of
    unit = metrics[along].unit if along in metrics and claim.kind != "exponent" else None
    goal = claim.paper if claim.target is None else claim.target
    assert goal is not None
    number = f"{goal:g} times" if claim.kind == "ratio" else _with_unit(goal, unit)
    paper = f"the {'paper' if claim.target is None else 'target'}: {number}"
    name = metrics[claim.along].label.lower() if claim.along in metrics else claim.along.replace("_", " ")
    without = None
    for scale in TELLING_SCALES:
        points = _points(experiment, claim, records.get(scale, ()))
        if not points:
            continue
        if claim.kind == "ratio":
            outcome, said = _ratio(claim, points)
        elif claim.kind == "crossing":
            outcome, said = _crossing(claim, points, name, unit)
        else:
            outcome, said = _exponent(claim, points, name) if claim.kind == "exponent" else _most(claim, points, unit)
        found = Verdict(claim, outcome, f"{said} ({scale} scale; {paper})")
        if outcome != NOT_RUN:
            return found
        without = without or found
    return without or Verdict(claim, NOT_RUN, f"no records of lab or paper scale ({paper})")


def _points(experiment: Experiment, claim: Claim, records: Sequence[Record]) -> list[_Point]:
    """Pair both systems wherever their parameters agree."""
    wanted = [claim.metric, claim.along] if claim.along else [claim.metric]
    cells = {(c.system, c.metric, setting(c)): c for c in collect(experiment, records, experiment.render.params, wanted)
             if c.measured}
    points = []
    for (system, metric, place), cell in cells.items():
        if (system, metric) != (claim.of, claim.metric):
            continue
        if any(cell.params.get(name) != value for name, value in claim.where.items()):
            continue
        top, bottom = _mean(cell), _mean(cells.get((claim.over, metric, place))) if claim.over else 1.0
        along = None
        if claim.along:
            along = cell.params.get(claim.along)
            along = _mean(cells.get((system, claim.along, place))) if along is None else float(along)
        points.append(_Point(cell.params, top / bottom if top is not None and bottom else None, along))
    return points


def _mean(cell: Cell | None) -> float | None:
    return cell.measured.mean if cell and cell.measured and cell.measured.status == "ok" else None


def _ratio(claim: Claim, points: Sequence[_Point]) -> tuple[str, str]:
    """Judge by the least ratio, so that a claim holds in every setting it speaks of."""
    done = [(p, p.ratio) for p in points if p.ratio is not None]
    if not done:
        return NOT_RUN, "one of the two systems has no value"
    ratios = [ratio for _, ratio in done]
    least = min(ratios)
    if claim.target is not None:
        outcome = MET if least >= claim.target else NOT_MET
    else:
        assert claim.paper is not None
        above = REPRODUCED if least >= ENOUGH * claim.paper else DIFFERENT
        outcome = above if least > 1 else NOT_REPRODUCED
    if len(done) == 1:
        said = _times(least)
    elif len(done) <= MANY:
        said = ", ".join(_times(ratio) + _where(p, claim) for p, ratio in done)
    else:
        said = f"{_number(least)} to {_times(max(ratios))} over {len(done)} settings"
    return outcome, said + _lost(len(points) - len(done))


def _exponent(claim: Claim, points: Sequence[_Point], name: str) -> tuple[str, str]:
    """Fit a power by least squares of logarithms; its exponent is to be at most the target."""
    done = [(math.log(p.along), math.log(p.ratio)) for p in points if p.along and p.ratio]
    if len({x for x, _ in done}) < 2:
        return NOT_RUN, "fewer than two points have a value"
    slope = statistics.linear_regression(*zip(*done, strict=True)).slope
    assert claim.target is not None
    low, high = (math.exp(pick(x for x, _ in done)) for pick in (min, max))
    said = f"grows as {name} to the power of {slope:.2f}, from {low:.0f} to {high:.0f}"
    return MET if slope <= claim.target else NOT_MET, said + _lost(len(points) - len(done))


def _most(claim: Claim, points: Sequence[_Point], unit: str | None) -> tuple[str, str]:
    """Find the largest value, which is to be at most the target."""
    done = [(p.ratio, p) for p in points if p.ratio is not None]
    if not done:
        return NOT_RUN, "no setting has a value"
    value, at = max(done, key=lambda pair: pair[0])
    assert claim.target is not None
    said = f"at most {_with_unit(value, unit)}{_where(at, claim) if value else ' anywhere'}"
    return MET if value <= claim.target else NOT_MET, said + _lost(len(points) - len(done))


def _crossing(claim: Claim, points: Sequence[_Point], name: str, unit: str | None) -> tuple[str, str]:
    """Find the least value from which on no measured ratio is below 1."""
    assert claim.paper is not None
    done = sorted((p.along, p.ratio) for p in points if p.along is not None and p.ratio is not None)
    lost = _lost(len(points) - len(done))
    if not done:
        return NOT_RUN, "no point has a value" + lost
    levels = [(at, min(ratio for _, ratio in group)) for at, group in groupby(done, key=lambda pair: pair[0])]
    (first, _), (last, at_last) = levels[0], levels[-1]
    if at_last < 1:
        said = f"{_times(at_last)} at {_with_unit(last, unit)} {name}, the highest measured{lost}"
        spoken_of = float(_number(last)) >= claim.paper  # by the digits that are shown
        return (NOT_REPRODUCED if spoken_of else NOT_RUN), said
    below = [at for at, ratio in levels if ratio < 1]
    start = min(at for at, _ in levels if not below or at > below[-1])
    if not below:
        said = f"at least 1 at every measured {name}, from {_with_unit(first, unit)} on{lost}"
        return (REPRODUCED if first <= claim.paper + POINTS else NOT_RUN), said
    said = f"at least 1 from {_with_unit(start, unit)} {name} on, less at {_with_unit(below[-1], unit)}{lost}"
    return (REPRODUCED if start <= claim.paper + POINTS else DIFFERENT), said


def _where(point: _Point, claim: Claim) -> str:
    """Name what tells a setting from the others of the claim; one may be of all of them together."""
    names = ", ".join(f"{name} {show(value)}" for name, value in point.params.items() if name not in claim.where)
    return f" at {names}" if names else " in all"


def _lost(count: int) -> str:
    return f"; {count} point{'s' * (count != 1)} without a value" if count else ""


def _number(value: float) -> str:
    return f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"


def _times(value: float) -> str:
    return f"{_number(value)} times"


def _with_unit(value: float, unit: str | None) -> str:
    return f"{_number(value)} {unit}" if unit else _number(value)
