"""What the command line shows: the list of experiments and the summary of a run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from tasks.config import SCALES, Experiment
from tasks.programs import is_implemented
from tasks.records import RESULTS, read_records, records_path
from tasks.runner import DONE, FAILED, SKIPPED, Outcome, shown

_COLOURS = {DONE: "green", SKIPPED: "cyan", FAILED: "red"}


def console() -> Console:
    """Return a console that keeps tables readable where the terminal's width is unknown."""
    found = Console(highlight=False)
    return found if found.is_terminal else Console(highlight=False, width=120)


def print_list(experiments: Sequence[Experiment]) -> None:
    """Print every experiment with its paper, family, scales and state, one whole line each."""
    rows = [("experiment", "paper", "family", "scales", "state", "what it reproduces")]
    rows += [(e.id, e.paper, e.family, " ".join(SCALES), _state(e), f"{e.item}: {e.title}") for e in experiments]
    widths = [max(len(row[i]) for row in rows) for i in range(5)]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=False)), row[5], sep="  ")
    ready = sum(is_implemented(e) for e in experiments)
    print(f"{len(experiments)} experiments, {ready} of them implemented")


def _state(experiment: Experiment) -> str:
    if not is_implemented(experiment):
        return "not implemented"
    measured = [s for s in SCALES
                if any(r.status != "failed" for r in read_records(records_path(RESULTS, experiment.id, s)))]
    return "measured: " + ", ".join(measured) if measured else "ready"


def print_summary(outcomes: Sequence[Outcome], waiting: Sequence[Experiment]) -> None:
    """Print what was done, skipped or failed, and what has no code yet."""
    if outcomes:
        table = Table(box=None, pad_edge=False, header_style="bold")
        for heading in ("experiment", "outcome", "seconds", "detail"):
            table.add_column(heading, overflow="fold", justify="right" if heading == "seconds" else "left")
        for o in outcomes:  # Text: a message may hold brackets, which rich would read as markup
            state = Text(o.state, style=_COLOURS.get(o.state, "yellow"))
            table.add_row(o.experiment.id, state, f"{o.seconds:.0f}", Text(o.detail))
        print(flush=True)
        console().print(table)
    counts = [f"{sum(o.state == state for o in outcomes)} {state}" for state in (DONE, SKIPPED, FAILED)]
    print("\n" + ", ".join(counts) + (f", {len(waiting)} not implemented yet" if waiting else ""))
    if waiting:
        print("not implemented yet: " + ", ".join(e.id for e in waiting))


def print_files(outcomes: Sequence[Outcome], files: Sequence[Path], results: Path) -> None:
    """Print where the tables and figures of the experiments that ran are, and the index of all."""
    for outcome in outcomes:
        name = Path(outcome.experiment.id)
        for kind, suffix in (("table", ".md"), ("figure", ".png")):
            folder = results / f"{kind}s" / name.parent
            for path in files:
                if path.parent == folder and path.suffix == suffix and path.name.split(".")[0] == name.name:
                    print(f"{kind + ':':7} {shown(path.resolve())}")
    print(f"index:  {shown((results / 'README.md').resolve())}")
