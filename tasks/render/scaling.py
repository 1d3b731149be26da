"""How well training is spread over devices: tokens a second over those of as many single devices.

Derived from the records, as a run on several devices and one on a single device are different runs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from tasks.records import Record
from tasks.render.cells import is_number, written

METRIC, UNIT = "scaling_efficiency", "%"
SPEED = "tokens_per_s"


def with_scaling(records: Sequence[Record]) -> list[Record]:
    """Return the records and, for every speed on several devices, its share of what so many single ones would reach.

    The single device is that of the newest run of the same system, seed, code, model of GPU and settings.
    """
    speeds = [r for r in sorted(records, key=written)
              if r.metric == SPEED and is_number(r.params.get("devices")) and is_number(r.value)]  # fmt: skip
    single = {_run(r): r for r in speeds if r.params["devices"] == 1}
    alone = [replace(r, metric=METRIC, unit=UNIT, stats=None, value=None, status="not_applicable")
             for r in speeds if r.params["devices"] == 1]  # fmt: skip
    shares = [replace(r, metric=METRIC, unit=UNIT, stats=None,
                      value=100 * r.value / (r.params["devices"] * single[_run(r)].value))
              for r in speeds if r.params["devices"] > 1 and _run(r) in single]  # fmt: skip
    return [*records, *alone, *shares]


def _run(record: Record) -> tuple:
    shared = sorted((k, str(v)) for k, v in record.params.items() if k not in ("devices", "nodes", "strategy"))
    return record.system, record.seed, record.source_sha256, record.env.get("gpu"), *shared
