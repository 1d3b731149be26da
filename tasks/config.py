"""Experiment configs: one YAML per table or figure, strictly validated.

A config says what it reproduces, which numbers the paper reports, how the outcome is rendered, and holds the
settings of three scales. Settings shared by the scales stand under ``common``; an experiment that reuses the runs
of another names it as ``base`` and overrides what differs. Every mistake is reported as one line that names the
file, the key, and what is allowed there.
"""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from tasks.errors import ConfigError

REPOSITORY = Path(__file__).resolve().parent.parent
CONFIGS = REPOSITORY / "configs"
SCALES = ("smoke", "lab", "paper")
PAPERS = ("AdaSplash", "AdaSplash-2")
FAMILIES = ("kernel_bench", "language_modeling", "text_classification", "retrieval", "ruler", "helmet")
FIGURE_KINDS = ("lines", "heatmap", "bars")

Settings = TypeVar("Settings")


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
    _common: dict[str, Any] = field(default_factory=dict, repr=False)
    _scales: dict[str, dict[str, Any]] = field(default_factory=dict, repr=False)

    @property
    def file(self) -> str:
        """The config's path as messages show it: relative to the repository where possible."""
        try:
            return str(self.path.relative_to(REPOSITORY))
        except ValueError:
            return str(self.path)

    def settings(self, scale: str) -> dict[str, Any]:
        """Return the plain settings of one scale: ``common`` overlaid by ``scales.<scale>``."""
        if scale not in SCALES:
            raise ConfigError(f"scale: got {scale!r}, allowed are {', '.join(SCALES)}")
        try:
            merged = OmegaConf.merge(OmegaConf.create(self._common), OmegaConf.create(self._scales[scale]))
            return typing.cast(dict[str, Any], OmegaConf.to_container(merged, resolve=True, throw_on_missing=True))
        except OmegaConfBaseException as error:
            raise ConfigError(f"{self.file}: scales.{scale}: {_first_line(error)}") from error

    def typed_settings(self, scale: str, schema: type[Settings]) -> Settings:
        """Return the settings of one scale as an instance of the dataclass ``schema``."""
        return from_plain(schema, self.settings(scale), f"{self.file}: scales.{scale}")


def _first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__


def from_plain(schema: type[Settings], values: Any, where: str) -> Settings:
    """Build the dataclass ``schema`` from parsed YAML, refusing unknown and missing keys and wrong types.

    Args:
        schema: a dataclass; nested dataclasses, ``X | None``, ``tuple[X, ...]``, ``dict[str, X]`` and scalars
            are understood. ``float`` accepts whole numbers; nothing else is converted.
        values: the parsed YAML.
        where: file and key that messages begin with.

    Raises:
        ConfigError: naming the file, the key, what was given and what is allowed.
    """
    return _convert(schema, values, where)


def _convert(kind: Any, value: Any, where: str) -> Any:
    origin = typing.get_origin(kind)
    if kind is Any:
        return value
    if origin in (typing.Union, types.UnionType):
        options = typing.get_args(kind)
        if value is None:
            if type(None) in options:
                return None
        else:
            return _convert(next(o for o in options if o is not type(None)), value, where)
    elif origin is tuple:
        if isinstance(value, list | tuple):
            return tuple(_convert(typing.get_args(kind)[0], v, f"{where}[{i}]") for i, v in enumerate(value))
    elif origin is dict:
        if isinstance(value, Mapping):
            return {_convert(str, k, where): _convert(typing.get_args(kind)[1], v, f"{where}.{k}")
                    for k, v in value.items()}
    elif dataclasses.is_dataclass(kind):
        if isinstance(value, Mapping):
            return _convert_dataclass(kind, value, where)
    elif kind is float:
        if isinstance(value, int | float) and not isinstance(value, bool):
            return float(value)
    elif isinstance(value, kind) and not (kind is int and isinstance(value, bool)):
        return value
    given = "nothing" if value is None else f"{value!r} ({type(value).__name__})"
    raise ConfigError(f"{where}: got {given}, allowed is {_describe(kind)}")


def _convert_dataclass(schema: Any, values: Mapping[str, Any], where: str) -> Any:
    hints = typing.get_type_hints(schema)
    fields = {f.name: f for f in dataclasses.fields(schema) if f.init}
    for key in values:
        if key not in fields:
            raise ConfigError(f"{where}.{key}: unknown key, allowed are {', '.join(fields)}")
    converted = {}
    for name, spec in fields.items():
        if name in values:
            converted[name] = _convert(hints[name], values[name], f"{where}.{name}")
        elif spec.default is dataclasses.MISSING and spec.default_factory is dataclasses.MISSING:
            raise ConfigError(f"{where}.{name}: missing, expected {_describe(hints[name])}")
    try:
        return schema(**converted)
    except ValueError as error:  # a schema's own checks begin with the key they speak of
        raise ConfigError(f"{where}.{error}") from error


def _describe(kind: Any) -> str:
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(_describe(a) for a in arguments)
    if origin is tuple:
        return f"a list of {_describe(arguments[0])}"
    if origin is dict:
        return f"a mapping to {_describe(arguments[1])}"
    if dataclasses.is_dataclass(kind):
        return "a mapping with the keys " + ", ".join(f.name for f in dataclasses.fields(kind))
    names = {type(None): "null", str: "a string", int: "an integer", float: "a number", bool: "true or false"}
    return names.get(kind, getattr(kind, "__name__", str(kind)))


@dataclass(frozen=True)
class _ReportedFile:
    source: str
    columns: tuple[str, ...]
    rows: tuple[tuple[Any, ...], ...]

    def __post_init__(self) -> None:
        missing = {"system", "metric", "value"} - set(self.columns)
        if missing:
            raise ValueError(f"columns: must hold system, metric and value; lacks {', '.join(sorted(missing))}")
        for i, row in enumerate(self.rows):
            if len(row) != len(self.columns):
                raise ValueError(f"rows[{i}]: has {len(row)} fields, columns names {len(self.columns)}")
            value = row[self.columns.index("value")]
            if value != "oom" and (isinstance(value, bool) or not isinstance(value, int | float)):
                raise ValueError(f"rows[{i}]: value is {value!r}, allowed is a number or oom")


@dataclass(frozen=True)
class _RenderFile:
    table: TableSpec | None = None
    figure: FigureSpec | None = None

    def __post_init__(self) -> None:
        if self.table is None and self.figure is None:
            raise ValueError("table: neither table nor figure is given, at least one is needed")
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
    systems: dict[str, str]
    reported: _ReportedFile | None
    render: _RenderFile
    common: dict[str, Any] = field(default_factory=dict)
    scales: dict[str, dict[str, Any] | None] = field(default_factory=dict)
    base: str | None = None

    def __post_init__(self) -> None:
        for key, value, allowed in (("paper", self.paper, PAPERS), ("family", self.family, FAMILIES)):
            if value not in allowed:
                raise ValueError(f"{key}: got {value!r}, allowed are {', '.join(allowed)}")
        if set(self.scales) - set(SCALES):
            unknown = sorted(set(self.scales) - set(SCALES))[0]
            raise ValueError(f"scales.{unknown}: unknown key, allowed are {', '.join(SCALES)}")
        if not self.base and set(self.scales) != set(SCALES):
            missing = [s for s in SCALES if s not in self.scales][0]
            raise ValueError(f"scales.{missing}: missing, expected a mapping (it may be empty)")
        for cell_system in {row[self.reported.columns.index("system")] for row in self.reported.rows} \
                if self.reported else ():
            if cell_system not in self.systems:
                raise ValueError(f"reported.rows: system {cell_system!r} is not among systems: "
                                 f"{', '.join(self.systems)}")


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
        raise ConfigError(f"{shown}.experiment: got {parsed.experiment!r}, its place in the tree says {expected!r}")
    common, scales = dict(parsed.common), {s: dict(parsed.scales.get(s) or {}) for s in SCALES}
    if parsed.base:
        common, scales = _inherit(parsed, common, scales, root, shown)
    reported = parsed.reported and Reported(parsed.reported.source, parsed.reported.columns, parsed.reported.rows)
    return Experiment(
        path=path.resolve(), id=parsed.experiment, paper=parsed.paper, item=parsed.item, title=parsed.title,
        family=parsed.family, program=parsed.program, notes=parsed.notes, systems=parsed.systems,
        reported=reported, render=Render(parsed.render.table, parsed.render.figure), base=parsed.base,
        _common=common, _scales=scales,
    )


def _inherit(parsed: _ExperimentFile, common: dict, scales: dict, root: Path, shown: str) -> tuple[dict, dict]:
    base_path = root / f"{parsed.base}.yaml"
    if not base_path.is_file():
        raise ConfigError(f"{shown}.base: no experiment {parsed.base!r} among the configs")
    if parsed.base == parsed.experiment:
        raise ConfigError(f"{shown}.base: an experiment cannot be its own base")
    base = load_experiment(base_path, root)
    if base.base:
        raise ConfigError(f"{shown}.base: {parsed.base!r} has a base itself; name that one: {base.base!r}")

    def overlay(below: dict, above: dict) -> dict:
        return typing.cast(dict, OmegaConf.to_container(OmegaConf.merge(below, above)))

    return overlay(base._common, common), {s: overlay(base._scales[s], scales[s]) for s in SCALES}


def _shown(path: Path) -> str:
    try:
        return str(path.resolve().relative_to(REPOSITORY))
    except ValueError:
        return str(path)


def _read_yaml(path: Path) -> Any:
    try:
        return OmegaConf.to_container(OmegaConf.load(path), resolve=False)
    except FileNotFoundError:
        raise ConfigError(f"config: no such file: {path}") from None
    except IsADirectoryError:
        raise ConfigError(f"config: {path} is a folder, a YAML file is needed") from None
    except (yaml.YAMLError, OmegaConfBaseException, UnicodeDecodeError, OSError) as error:
        mark = getattr(error, "problem_mark", None)
        line = f" (line {mark.line + 1})" if mark else ""
        raise ConfigError(f"{_shown(path)}: not a readable YAML mapping{line}: "
                          f"{getattr(error, 'problem', None) or _first_line(error)}") from error


def find_experiments(root: Path = CONFIGS) -> list[Experiment]:
    """Load every config below ``root``, in the order of the papers and then of their names."""
    paths = sorted(root.glob("*/*.yaml"))
    if not paths:
        raise ConfigError(f"config: no experiment configs below {root}")
    return [load_experiment(path, root) for path in paths]
