"""Experiment configs: one YAML per table or figure, strictly validated.

A config says what it reproduces, which numbers the paper reports and what it claims, how the outcome is rendered,
and holds the settings of three scales. Settings shared by the scales stand under ``common``; an experiment that reuses
the runs of another names it as ``base`` and overrides what differs; ``systems`` and ``render`` are the base's where it
has none. Every mistake is reported as one line that names
the file, the key, and what is allowed there.
"""

from __future__ import annotations

import io
import re
import typing
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from tasks.claim import Claim
from tasks.errors import ConfigError
from tasks.schema import Misfit, Settings, convert, from_plain, is_finite

REPOSITORY = Path(__file__).resolve().parent.parent
CONFIGS = REPOSITORY / "configs"
SCALES = ("smoke", "lab", "paper")
PAPERS = ("AdaSplash", "AdaSplash-2")
FAMILIES = ("kernel_bench", "language_modeling", "text_classification", "retrieval", "ruler", "helmet")
FIGURE_KINDS = ("lines", "heatmap", "bars")


@dataclass(frozen=True)
class Reported:
    """Numbers printed in a paper, in long format: one row a cell, ``columns`` naming its fields."""

    source: str
    columns: tuple[str, ...]
    rows: tuple[tuple[Any, ...], ...]

    def cells(self) -> Iterator[dict[str, Any]]:
        """Yield ``{system, metric, params, value, status}``; an out-of-memory cell has ``value=None``."""
        for row in self.rows:
            cell = dict(zip(self.columns, row, strict=True))
            system, metric, value = cell.pop("system"), cell.pop("metric"), cell.pop("value")
            ran_out = value == "oom"
            yield {
                "system": system,
                "metric": metric,
                "params": cell,
                "value": None if ran_out else float(value),
                "status": "oom" if ran_out else "ok",
            }


@dataclass(frozen=True)
class TableSpec:
    """How records become a table: fields (``system``, ``metric`` or a parameter) along each side."""

    rows: tuple[str, ...]
    columns: tuple[str, ...]
    metrics: tuple[str, ...]


@dataclass(frozen=True)
class FigureSpec:
    """How records become a figure: ``lines`` and ``bars`` plot y against x, a ``heatmap`` colours ``metric``."""

    kind: str
    x: str
    y: str
    series: str = "system"
    metric: str = ""
    panel: str = ""
    xlabel: str = ""
    ylabel: str = ""
    xscale: str = "linear"
    yscale: str = "linear"


@dataclass(frozen=True)
class Render:
    """What to draw for an experiment; either part may be absent, not both."""

    table: TableSpec | None
    figure: FigureSpec | None

    @property
    def metrics(self) -> set[str]:
        """The metrics that are named; empty when a table shows all there are."""
        if self.table and not self.table.metrics:
            return set()
        drawn = {self.figure.metric if self.figure.kind == "heatmap" else self.figure.y} if self.figure else set()
        return drawn.union(self.table.metrics if self.table else ())

    @property
    def params(self) -> tuple[str, ...]:
        """The parameters that tell one cell of the table or point of the figure from another, in their order."""
        names = [*self.table.rows, *self.table.columns] if self.table else []
        if self.figure:
            heat = self.figure.kind == "heatmap"
            names += [self.figure.x, self.figure.y if heat else self.figure.series, self.figure.panel]
        return tuple(n for n in dict.fromkeys(names) if n not in ("", "system", "metric"))


@dataclass(frozen=True)
class _Layer:
    """Settings as one place of a file gives them: ``common`` or ``scales.<scale>``."""

    file: str
    place: str
    values: dict[str, Any]


@dataclass(frozen=True)
class Experiment:
    """One table or figure of a paper, as its YAML describes it."""

    path: Path
    id: str
    paper: str
    item: str
    title: str
    family: str
    program: str
    notes: tuple[str, ...]
    systems: dict[str, str]
    reported: Reported | None
    render: Render
    base: str | None = None
    claims: tuple[Claim, ...] = ()
    _layers: dict[str, tuple[_Layer, ...]] = field(default_factory=dict, repr=False)  # each over those before it

    @property
    def file(self) -> str:
        """The config's path as messages show it: relative to the repository where possible."""
        try:
            return str(self.path.relative_to(REPOSITORY))
        except ValueError:
            return str(self.path)

    def settings(self, scale: str) -> dict[str, Any]:
        """Return the plain settings of one scale: ``common`` overlaid by ``scales.<scale>``.

        Those of a ``base`` come first, so that whatever this config says goes over them.
        """
        if scale not in SCALES:
            raise ConfigError(f"scale: got {scale!r}, allowed are {', '.join(SCALES)}")
        merged = OmegaConf.create({})
        for layer in self._layers[scale]:
            try:
                merged = typing.cast(DictConfig, OmegaConf.merge(merged, layer.values))
            except TypeError as error:  # OmegaConf does not say where
                key = _clash(OmegaConf.to_container(merged), layer.values)
                raise ConfigError(f"{layer.file}: {layer.place}{key}: a list and a mapping cannot be merged") from error
        try:
            return typing.cast(dict[str, Any], OmegaConf.to_container(merged, resolve=True, throw_on_missing=True))
        except OmegaConfBaseException as error:
            raise ConfigError(f"{self._locate(scale, error.full_key or '')}: {_first_line(error)}") from error

    def typed_settings(self, scale: str, schema: type[Settings]) -> Settings:
        """Return the settings of one scale as an instance of the dataclass ``schema``."""
        try:
            return typing.cast(Settings, convert(schema, self.settings(scale)))
        except Misfit as error:
            raise ConfigError(f"{self._locate(scale, error.key)}: {error.reason}") from error

    def _locate(self, scale: str, key: str) -> str:
        """Name the file and place that a setting comes from, or where it is to be given if it is nowhere."""
        nowhere = _Layer(self.file, f"scales.{scale}", {})
        layer = next((la for la in reversed(self._layers[scale]) if _holds(la.values, key)), nowhere)
        return f"{layer.file}: {layer.place}{'.' if key else ''}{key}"


def _holds(values: Any, key: str) -> bool:
    """Tell whether nested mappings hold a dotted key. A name may have a dot of its own, as entmax_1.5 does."""
    if not isinstance(values, Mapping):
        return True
    return any(key == str(name) or key.startswith((f"{name}.", f"{name}[")) and _holds(value, key[len(str(name)) + 1:])
               for name, value in values.items())


def _clash(below: Any, above: Any) -> str:
    """Return the dotted key at which one value is a list and the other a mapping, with a leading dot."""
    for name in above.keys() & below.keys():
        low, high = below[name], above[name]
        if {type(low), type(high)} == {list, dict}:
            return f".{name}"
        if isinstance(low, dict) and isinstance(high, dict) and (found := _clash(low, high)):
            return f".{name}{found}"
    return ""


def _first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__


@dataclass(frozen=True)
class _ReportedFile:
    source: str
    columns: tuple[str, ...]
    rows: tuple[tuple[Any, ...], ...]

    def __post_init__(self) -> None:
        missing = {"system", "metric", "value"} - set(self.columns)
        if missing:
            raise ValueError(f"columns: must hold system, metric and value; lacks {', '.join(sorted(missing))}")
        if len(set(self.columns)) != len(self.columns):
            raise ValueError(f"columns: got {', '.join(self.columns)}, allowed are distinct names")
        for i, row in enumerate(self.rows):
            if len(row) != len(self.columns):
                raise ValueError(f"rows[{i}]: has {len(row)} fields, columns names {len(self.columns)}")
            cell = dict(zip(self.columns, row, strict=True))
            for name in ("system", "metric"):
                if not isinstance(cell[name], str):
                    raise ValueError(f"rows[{i}]: {name} is {cell[name]!r}, allowed is a string")
            if cell["value"] != "oom" and not is_finite(cell["value"]):
                raise ValueError(f"rows[{i}]: value is {cell['value']!r}, allowed is a number or oom")


@dataclass(frozen=True)
class _RenderFile:
    table: TableSpec | None = None
    figure: FigureSpec | None = None

    def __post_init__(self) -> None:
        if self.table is None and self.figure is None:
            raise ValueError("table: missing, and figure too; at least one of them is needed")
        if self.figure is not None and self.figure.kind not in FIGURE_KINDS:
            raise ValueError(f"figure.kind: got {self.figure.kind!r}, allowed are {', '.join(FIGURE_KINDS)}")


@dataclass(frozen=True)
class _ExperimentFile:
    experiment: str
    paper: str
    item: str
    title: str
    family: str
    program: str
    notes: tuple[str, ...]
    reported: _ReportedFile | None
    systems: dict[str, str] | None = None  # these two are the base's where they are not given
    render: _RenderFile | None = None
    common: dict[str, Any] = field(default_factory=dict)
    scales: dict[str, dict[str, Any] | None] = field(default_factory=dict)
    base: str | None = None
    claims: tuple[Claim, ...] = ()

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[\w-]+/[\w-]+", self.experiment, re.ASCII):  # it becomes a path below results/
            raise ValueError(f"experiment: got {self.experiment!r}, allowed is folder/name in letters, digits, _ and -")
        for key, value, allowed in (("paper", self.paper, PAPERS), ("family", self.family, FAMILIES)):
            if value not in allowed:
                raise ValueError(f"{key}: got {value!r}, allowed are {', '.join(allowed)}")
        if set(self.scales) - set(SCALES):
            unknown = sorted(set(self.scales) - set(SCALES))[0]
            raise ValueError(f"scales.{unknown}: unknown key, allowed are {', '.join(SCALES)}")
        if not self.base and set(self.scales) != set(SCALES):
            missing = [s for s in SCALES if s not in self.scales][0]
            raise ValueError(f"scales.{missing}: missing, expected a mapping (it may be empty)")
        for key, value in (("systems", self.systems), ("render", self.render)):
            if value is None and not self.base:
                raise ValueError(f"{key}: missing, expected a mapping")

    def check_names(self, systems: dict[str, str], render: Render) -> None:
        """Compare what is reported and claimed with what is measured and shown.

        Raises:
            ValueError: a name is not there; the message begins with its key.
        """
        for i, row in enumerate(self.reported.rows if self.reported else ()):
            system = row[self.reported.columns.index("system")]
            if system not in systems:
                raise ValueError(f"reported.rows[{i}]: system {system!r} is not among systems: {', '.join(systems)}")
        for i, claim in enumerate(self.claims):
            try:
                claim.check(systems, render.metrics, render.params)
            except ValueError as error:
                raise ValueError(f"claims[{i}].{error}") from error


def load_experiment(path: Path, root: Path = CONFIGS) -> Experiment:
    """Read and validate one config.

    Raises:
        ConfigError: the file is missing, is not YAML, or breaks the schema; the message names file and key.
    """
    path = Path(path)
    shown = _shown(path)
    parsed = from_plain(_ExperimentFile, _read_yaml(path), shown)
    try:
        expected = path.resolve().relative_to(root.resolve()).with_suffix("").as_posix()
    except ValueError:
        expected = parsed.experiment  # a config outside the tree may carry any id
    if parsed.experiment != expected:
        raise ConfigError(f"{shown}: experiment: got {parsed.experiment!r}, its place in the tree says {expected!r}")
    base = _load_base(parsed, root, shown) if parsed.base else None
    systems = parsed.systems or (base.systems if base else {})
    render = base.render if base else Render(None, None)
    if parsed.render:
        render = Render(parsed.render.table, parsed.render.figure)
    try:
        parsed.check_names(systems, render)
    except ValueError as error:
        raise ConfigError(f"{shown}: {error}") from error
    below = base._layers if base else {}
    layers = {s: (*below.get(s, ()), _Layer(shown, "common", parsed.common),
                  _Layer(shown, f"scales.{s}", parsed.scales.get(s) or {})) for s in SCALES}
    reported = parsed.reported and Reported(parsed.reported.source, parsed.reported.columns, parsed.reported.rows)
    return Experiment(
        path=path.resolve(), id=parsed.experiment, paper=parsed.paper, item=parsed.item, title=parsed.title,
        family=parsed.family, program=parsed.program, notes=parsed.notes, systems=systems, reported=reported,
        render=render, base=parsed.base, claims=parsed.claims, _layers=layers,
    )


def _load_base(parsed: _ExperimentFile, root: Path, shown: str) -> Experiment:
    if parsed.base == parsed.experiment:
        raise ConfigError(f"{shown}: base: an experiment cannot be its own base")
    base_path = root / f"{parsed.base}.yaml"
    if not base_path.is_file():
        raise ConfigError(f"{shown}: base: no experiment {parsed.base!r} among the configs (python -m tasks list)")
    base = load_experiment(base_path, root)
    if base.base:
        raise ConfigError(f"{shown}: base: {parsed.base!r} has a base itself; name that one: {base.base!r}")
    return base


def _shown(path: Path) -> str:
    try:
        return str(path.resolve().relative_to(REPOSITORY))
    except ValueError:
        return str(path)


def _read_yaml(path: Path) -> Any:
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError(f"config: no such file: {path}") from None
    except IsADirectoryError:
        raise ConfigError(f"config: {path} is a folder, a YAML file is needed") from None
    except OSError as error:
        raise ConfigError(f"config: {path} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{_shown(path)}: not a YAML mapping: not UTF-8 text") from error
    try:
        return OmegaConf.to_container(OmegaConf.load(io.StringIO(text)), resolve=False)
    except (yaml.YAMLError, OmegaConfBaseException, ValueError, OSError) as error:  # OSError: text, not a mapping
        mark = getattr(error, "problem_mark", None)
        line = f" (line {mark.line + 1})" if mark else ""
        raise ConfigError(f"{_shown(path)}: not a YAML mapping{line}: "
                          f"{getattr(error, 'problem', None) or _first_line(error)}") from error


def find_experiments(root: Path = CONFIGS) -> list[Experiment]:
    """Load every config below ``root``, in the order of the papers and then of their names."""
    paths = sorted(root.glob("*/*.yaml"))
    if not paths:
        raise ConfigError(f"config: no experiment configs below {root}")
    return [load_experiment(path, root) for path in paths]
