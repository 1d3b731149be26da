"""What the command line shows: the list of experiments and the summary of a run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

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
    measured = [s for s in SCALES if read_records(records_path(RESULTS, experiment.id, s))]
    return "measured: " + ", ".join(measured) if measured else "ready"


def print_outcome(outcome: Outcome) -> None:
    """Print how a single experiment ended, where that needs saying."""
    if outcome.state == FAILED:
        print(f"  {outcome.experiment.id} failed: {outcome.detail}", flush=True)


def print_summary(
    outcomes: Sequence[Outcome], waiting: Sequence[Experiment], files: Sequence[Path], results: Path
) -> None:
    """Print what was done, skipped or failed, what has no code yet, and where the results are."""
    out = console()
    if outcomes:
        table = Table(box=None, pad_edge=False, header_style="bold")
        for heading in ("experiment", "outcome", "seconds", "detail"):
            table.add_column(heading, overflow="fold", justify="right" if heading == "seconds" else "left")
        for o in outcomes:
            colour = _COLOURS.get(o.state, "yellow")
            table.add_row(o.experiment.id, f"[{colour}]{o.state}[/{colour}]", f"{o.seconds:.0f}", o.detail)
        print()
        out.print(table)
    counts = {state: sum(o.state == state for o in outcomes) for state in (DONE, SKIPPED, FAILED)}
    print(f"\n{counts[DONE]} done, {counts[SKIPPED]} up to date, {counts[FAILED]} failed, "
          f"{len(waiting)} not implemented yet")
    if waiting:
        print("not implemented yet: " + ", ".join(e.id for e in waiting))
    ran = {o.experiment.id for o in outcomes}
    made = [f for f in files if any(f.is_relative_to(results / kind / Path(i).parent) and
                                    f.name.split(".")[0] == Path(i).name
                                    for kind in ("tables", "figures") for i in ran)]  # fmt: skip
    for path in made:
        if path.suffix in (".md", ".png"):
            print(f"{'table ' if path.suffix == '.md' else 'figure'}: {shown(path.resolve())}")
    if files:
        print(f"index : {shown(Path(results).resolve() / 'README.md')}")
