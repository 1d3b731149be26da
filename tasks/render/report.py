"""The index of all results: ``results/README.md``."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tasks.claim import Claim
from tasks.config import PAPERS, REPOSITORY, SCALES, Experiment
from tasks.errors import UserError
from tasks.records import Record
from tasks.render.cells import written
from tasks.render.claims import Verdict
from tasks.render.figures import REPORTED
from tasks.render.files import write_if_changed
from tasks.render.grid import Grid
from tasks.render.markdown import GENERATED, bullets, escape, section

MARKS = ("<!-- reproduced: begin -->", "<!-- reproduced: end -->")  # of the overview in the repository's README
FOLD_FROM = 25  # a table with more rows is folded away in the index
ABOUT = (
    "Every number below was measured by the code of this repository or is quoted from the paper named beside "
    "it. `smoke` proves that the programs run end to end, `lab` is a reduced run on one GPU, `paper` has the "
    "settings of the paper. – means that the paper does not report the number."
)
CLAIMS = (
    "Each verdict is computed from the records of paper scale or, without a value there, of lab scale. A ratio is "
    "reproduced when it is at least 85 % of the paper's, different when it is less than that but above 1. A crossing, "
    "the value from which on a ratio is at least 1, is reproduced when it lies at most 5 points above the paper's and "
    "different when it lies higher. Anything else is not reproduced; what was not measured where the claim speaks is "
    "not run."
)
TARGETS = (
    "What this project set itself beyond the papers, held against the same records; ratios are of one run. A ratio is "
    "to be at least the target, anything else at most."
)


@dataclass
class Rendered:
    """What was rendered of one experiment."""

    experiment: Experiment
    records: Mapping[str, Sequence[Record]] = field(default_factory=dict)
    tables: list[Path] = field(default_factory=list)
    grids: list[Grid] = field(default_factory=list)
    figures: dict[str, list[Path]] = field(default_factory=dict)  # scale -> PNG and SVG
    error: str | None = None
    outcome: str = ""  # how the numbers compare with the paper's
    verdicts: Sequence[Verdict] = ()

    @property
    def files(self) -> list[Path]:
        """All files of the experiment."""
        return self.tables + [path for pair in self.figures.values() for path in pair]


def write_report(rendered: Sequence[Rendered], results_root: Path,
                 implemented: Callable[[Experiment], bool]) -> Path:
    """Write the index of ``rendered`` and return its path; links are relative to it."""
    parts = [f"_{GENERATED}_", "# Results", ABOUT, _overview(rendered, implemented)]
    parts += _verdicts(rendered, "Claims", "Claim", CLAIMS, lambda claim: claim.target is None)
    parts += _verdicts(rendered, "Targets", "Target", TARGETS, lambda claim: claim.target is not None)
    for paper in PAPERS:
        of_paper = [r for r in rendered if r.experiment.paper == paper]
        if of_paper:
            parts.append(f"## {escape(paper)}")
        for one in of_paper:
            parts += _chapter(one, results_root, implemented)
    return write_if_changed(results_root / "README.md", "\n\n".join(parts) + "\n")


def state(one: Rendered, scale: str, implemented: Callable[[Experiment], bool]) -> str:
    """Say whether a scale was measured, and when."""
    if one.error:
        return "not rendered"
    records = one.records.get(scale, ())
    if not records:
        return "not run" if implemented(one.experiment) else "not implemented"
    text = f"measured {max(written(r) for r in records).date().isoformat()}"
    failed = sum(r.status == "failed" for r in records)
    return text + (f", {failed} of {len(records)} failed" if failed else "")


def write_overview(readme: Path, rendered: Sequence[Rendered], results_root: Path,
                   implemented: Callable[[Experiment], bool]) -> Path:
    """Put the overview, linked to the index, between the two marks of a README and return its path.

    Raises:
        UserError: the file is missing or lacks the marks.
    """
    try:
        before, rest = readme.read_text(encoding="utf-8").split(MARKS[0])
        after = rest.split(MARKS[1])[1]
    except FileNotFoundError:
        raise UserError(f"{readme}: no such file") from None
    except (ValueError, IndexError):
        raise UserError(f"{readme}: needs the marks {MARKS[0]} and {MARKS[1]}, once each") from None
    index = os.path.relpath(results_root.resolve() / "README.md", readme.resolve().parent)
    table = _overview(rendered, implemented, index)
    return write_if_changed(readme, f"{before}{MARKS[0]}\n{table}\n{MARKS[1]}{after}")


def _overview(rendered: Sequence[Rendered], implemented: Callable[[Experiment], bool], index: str = "") -> str:
    lines = ["| Paper | Item | What | " + " | ".join(SCALES) + " |", "| --- " * (3 + len(SCALES)) + "|"]
    for one in rendered:
        e = one.experiment
        cells = [escape(e.paper), f"[{escape(e.item)}]({index}#{_anchor(e)})", escape(e.title)]
        lines.append("| " + " | ".join(cells + [state(one, scale, implemented) for scale in SCALES]) + " |")
    return "\n".join(lines)


def _verdicts(rendered: Sequence[Rendered], title: str, column: str, about: str,
              belongs: Callable[[Claim], bool]) -> list[str]:  # fmt: skip
    """Collect the verdicts of all experiments in one table."""
    lines = [f"| Paper | Item | {column} | What the records say |", "| --- " * 4 + "|"]
    for one in rendered:
        e = one.experiment
        for verdict in (v for v in one.verdicts if belongs(v.claim)):
            cells = [escape(e.paper), f"[{escape(e.item)}](#{_anchor(e)})", escape(verdict.claim.text),
                     _verdict(verdict)]
            lines.append("| " + " | ".join(cells) + " |")
    return [f"## {title}", about, "\n".join(lines)] if len(lines) > 2 else []


def _verdict(verdict: Verdict) -> str:
    return f"**{verdict.outcome}**: {escape(verdict.detail)}"


def _chapter(one: Rendered, root: Path, implemented: Callable[[Experiment], bool]) -> list[str]:
    e = one.experiment
    states = "; ".join(f"{scale}: {state(one, scale, implemented)}" for scale in SCALES)
    parts = [f'<a id="{_anchor(e)}"></a>', f"### {escape(e.item)}: {escape(e.title)}",
             f"{_config(e, root)}. {states}."]
    if one.error:
        return [*parts, f"**Not rendered:** {escape(one.error)}"]
    if one.outcome:
        parts.append(escape(one.outcome))
    lines = [f"- {escape(v.claim.text)} {_verdict(v)}." for v in one.verdicts if v.claim.target is None]
    if lines:
        parts.append("Claims:\n\n" + "\n".join(lines))
    if any(v.claim.target is not None for v in one.verdicts):
        parts.append("What this project set itself here stands under [Targets](#targets).")
    links = [_link(path.suffix[1:], path, root) for path in one.tables]
    if links:
        parts.append("Table: " + ", ".join(links))
    if one.figures:
        parts.append("Figure: " + "; ".join(
            f"{scale} " + ", ".join(_link(path.suffix[1:], path, root) for path in pair)
            for scale, pair in one.figures.items()))
    best = _best(one.figures)
    if best:
        alt = f"{escape(e.paper)}, {escape(e.item)}, {'the paper’s numbers' if best == REPORTED else best}"
        parts.append(f"![{alt}]({_relative(one.figures[best][0], root)})")
    if one.grids:
        parts.append(_inline(one.grids[-1]))  # grids follow the scales, the most telling one comes last
    if not one.figures and not one.grids:
        parts.append("Nothing to draw yet: no records here, and no public numbers of the paper.")
    if e.notes:
        parts.append("Notes:\n\n" + bullets(e.notes))
    return parts


def _inline(grid: Grid) -> str:
    if len(grid.rows) <= FOLD_FROM:
        return section(grid)
    return f"<details><summary>Table, {len(grid.rows)} rows</summary>\n\n{section(grid)}\n\n</details>"


def _best(figures: Mapping[str, Sequence[Path]]) -> str | None:
    return next((scale for scale in (*reversed(SCALES), REPORTED) if scale in figures), None)


def _anchor(experiment: Experiment) -> str:
    return experiment.id.replace("/", "-")


def _config(experiment: Experiment, root: Path) -> str:
    """Name the config, with a link where config and results lie in one repository."""
    inside = experiment.path.is_relative_to(REPOSITORY) and root.resolve().is_relative_to(REPOSITORY)
    name = f"`{experiment.id}`"
    return f"[{name}]({os.path.relpath(experiment.path, root.resolve())})" if inside else name


def _link(text: str, path: Path, root: Path) -> str:
    return f"[{text}]({_relative(path, root)})"


def _relative(path: Path, root: Path) -> str:
    return path.relative_to(root).as_posix()
