"""The block sparsity from which a system is as fast as another: read off the recorded speedups, not measured itself.

It needs every level of a sweep, while a level is a job that is recorded and resumed by itself. Derived from the
records it always belongs to the curve that the figure shows, also after a run that was resumed.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace

from tasks.records import Record
from tasks.render.cells import is_number, written

METRIC, UNIT = "parity_block_sparsity", "%"
_LEVEL = {"block_sparsity", "block_sparsity_asked", "reason"}  # parameters in which the points of a curve differ
Point = tuple[float, float]


def crossing(points: Sequence[Point]) -> float | None:
    """Return where a curve reaches 1 for good; None if it does not.

    Args:
        points: (block sparsity, speedup), one or more, in order of the first.

    Returns:
        The place of 1 on the line between the last point below 1 and the next; the first point's place if none is
        below 1; None if the last one is.
    """
    below = [i for i, (_, speedup) in enumerate(points) if speedup < 1]
    if not below:
        return points[0][0]
    last = below[-1]
    if last == len(points) - 1:
        return None
    (x0, y0), (x1, y1) = points[last], points[last + 1]
    return x0 + (1 - y0) / (y1 - y0) * (x1 - x0)


def with_parity(records: Sequence[Record]) -> list[Record]:
    """Return the records and, for every system with a speedup at levels of block sparsity, one of its parity.

    Speedups of different settings or GPUs make different curves. One of ``reached`` and ``reason`` among the
    parameters says how the value came about or why there is none; a curve that is at 1 or above throughout has its
    lowest level as its value.
    """
    curves: dict[tuple, dict[float, Record]] = defaultdict(dict)
    for record in sorted(records, key=written):
        if record.metric == "speedup" and is_number(asked := record.params.get("block_sparsity_asked")):
            curves[record.system, record.config_sha256, record.env.get("gpu")][asked] = record
    return [*records, *(_parity(list(curve.values())) for curve in curves.values())]


def _parity(curve: Sequence[Record]) -> Record:
    last = max(curve, key=written)
    shared = {k: v for k, v in last.params.items() if k not in _LEVEL}

    def answer(value: float | None, status: str = "ok", **how: str) -> Record:
        return replace(last, metric=METRIC, value=value, unit=UNIT, params=shared | how, seed=None, status=status,
                       stats=None)

    if last.system == shared.get("relative_to"):
        return answer(None, "not_applicable", reason="it is what the others are compared with")
    if shared.get("alpha") == 1:
        return answer(None, "not_applicable", reason="softmax has no block sparsity")
    points = sorted((r.params["block_sparsity"], r.value) for r in curve
                    if r.value is not None and is_number(r.params.get("block_sparsity")))
    if not points:
        found = {r.status for r in curve}
        status = next((s for s in ("failed", "oom") if s in found), "not_applicable")
        return answer(None, status, reason=last.params.get("reason", "block sparsity was not measured"))
    value = crossing(points)
    if value is None:
        reason = f"slower than {shared.get('relative_to')} at {points[-1][0]:g} %, the highest level measured"
        return answer(None, "not_applicable", reason=reason)
    if all(speedup >= 1 for _, speedup in points):
        return answer(value, reached="at the lowest level measured: it is as fast everywhere")
    low = max(level for level, speedup in points if speedup < 1)
    high = min(level for level, _ in points if level > low)
    return answer(value, reached=f"between {low:g} and {high:g} %")
