"""What a metric is called, its unit, and how many digits of it mean something: ``metrics.yaml``."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import yaml

from tasks.config import from_plain
from tasks.errors import ConfigError, UserError
from tasks.records import Record

METRICS_FILE = Path(__file__).with_name("metrics.yaml")
ARROWS = {"lower": "↓", "higher": "↑", None: ""}
DIGITS_WHEN_UNKNOWN = 4  # significant ones, for a metric the file does not list


@dataclass(frozen=True)
class Metric:
    """How a metric is shown: ``digits`` counts decimals, ``better`` is lower, higher or absent."""

    label: str
    unit: str | None = None
    digits: int | None = None
    better: str | None = None

    def __post_init__(self) -> None:
        if self.better not in ARROWS:
            raise ValueError(f"better: got {self.better!r}, allowed are lower, higher or null")
        if self.digits is not None and not 0 <= self.digits <= 12:
            raise ValueError(f"digits: got {self.digits}, allowed is 0 to 12")

    @property
    def title(self) -> str:
        """Label with unit, as an axis or a header shows it."""
        return f"{self.label} ({self.unit})" if self.unit else self.label

    @property
    def heading(self) -> str:
        """Label, unit and an arrow towards better values."""
        return f"{self.title} {ARROWS[self.better]}".rstrip()

    def text(self, value: float) -> str:
        """Format a value; one too small for the decimals is shown in scientific notation, not as zero."""
        if self.digits is None:
            return f"{value:.{DIGITS_WHEN_UNKNOWN}g}"
        fixed = f"{value:.{self.digits}f}"
        return f"{value:.1e}" if value != 0 and math.isfinite(value) and float(fixed) == 0 else fixed

    def short(self, value: float) -> str:
        """Format a value for a narrow place: one too small for the decimals becomes ``<0.01``."""
        if self.digits is None or value == 0 or float(f"{value:.{self.digits}f}") != 0:
            return self.text(value)
        return f"{'<' if value > 0 else '>-'}{10.0**-self.digits:.{self.digits}f}"

    def spread(self, value: float) -> str:
        """Format a standard deviation, to the decimals of the value it stands beside."""
        return self.text(value) if self.digits is None else f"{value:.{self.digits}f}"


@lru_cache
def load_metrics(path: Path = METRICS_FILE) -> Mapping[str, Metric]:
    """Read the table of metrics.

    Raises:
        ConfigError: the file is missing, is not YAML or holds an unknown key; the message names file and key.
    """
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        reason = (isinstance(error, OSError) and error.strerror) or " ".join(str(error).split())
        raise ConfigError(f"{path.name}: cannot be read: {reason}") from error
    return from_plain(dict[str, Metric], values, path.name)  # type: ignore[arg-type]


def metric_of(name: str, metrics: Mapping[str, Metric], records: Iterable[Record] = ()) -> Metric:
    """Return the metric called ``name``; one that is not listed goes by its name, in its records' unit.

    Raises:
        UserError: records give it in another unit than the list, and so than the paper's numbers, or than
            each other.
    """
    known = metrics.get(name)
    units = {r.unit for r in records if r.metric == name and r.unit and r.status == "ok"}
    expected = known.unit if known else min(units, default=None)
    for unit in sorted(units - {expected}):
        raise UserError(f"metric {name}: a record's unit is {unit!r}, expected is {expected or 'no unit'!r}")
    return known or Metric(label=name, unit=expected)
