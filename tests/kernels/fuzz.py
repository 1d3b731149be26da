"""Random calls of the kernels against the float64 oracle: ``python tests/kernels/fuzz.py --cases 2000``.

A case fails if it raises, gives a result that is not finite, or errs more than the budget of ``oracle.py`` allows. A
seed alone brings a case back: ``python tests/kernels/fuzz.py --seed 1234`` prints it and runs it again. With a GPU the
kernels are compiled and cases are larger; without one Triton's interpreter runs small ones, so a seed means another
case there unless ``--limits`` says otherwise.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import math
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from unittest import mock

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when triton is first imported

from calls import USUAL, bind
from fuzz_cases import COMPILED, INTERPRETED, Case, Limits
from fuzz_workers import Outcome, Report, run_cases
from oracle import error_ratios
from poison import poisoned
from torch import Tensor

import adasplash_kernels.limits
from adasplash_kernels.ahead import nothing_ahead

# what lets inputs as small and heads as few as these have lists, and one kernel for all gradients
SMALL = {"DENSEST": USUAL, "FILLED": 0.0}
LIMITS = {"compiled": COMPILED, "interpreted": INTERPRETED}


def run(case: Case, device: torch.device | str, function: Callable[..., Tensor] | None = None) -> Outcome:
    """Run a case and compare it with the oracle.

    Args:
        function: what to test instead of ``entmax_attention`` with the case's method.
    """
    try:
        q, k, v, upstream, options = case.tensors(device)
        with poisoned():
            ratios = error_ratios(function or bind(case.method), bind("eager"), q, k, v, upstream=upstream,
                                  forward_only=not case.backward, **options)  # fmt: skip
    except Exception as error:  # whatever it is, it is the case's outcome
        lines = str(error).strip().splitlines() or [""]
        return Outcome(None, f"{type(error).__name__}: {lines[0][:300]}")
    infinite = [name for name, ratio in ratios.items() if not math.isfinite(ratio)]
    if infinite:
        return Outcome(None, f"{', '.join(infinite)} not finite")
    over = [f"{name} {ratio:.3g}" for name, ratio in ratios.items() if ratio > 1]
    return Outcome(max(ratios.values()), f"times the allowed error: {', '.join(over)}" if over else None)


def run_seed(seed: int, limits: Limits, device: str) -> Outcome:
    """Run the case of a seed, on one thread: there are other workers."""
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", category=RuntimeWarning)  # the interpreter's NumPy subtracts infinities
    # Compiling side by side is worth its threads where cores are free, which they are not beside other workers.
    ahead = nothing_ahead() if seed // 2 % 4 else contextlib.nullcontext()
    with mock.patch.dict(vars(adasplash_kernels.limits), SMALL if seed % 2 else {}), ahead:
        return run(Case.draw(seed, limits), device)


def summary(report: Report, limits: Limits) -> str:
    """Return the failures, a case each, and the totals."""
    lines = []
    for seed, outcome in sorted(report.failures.items()):
        ratio = "-" if outcome.ratio is None else f"{outcome.ratio:.3g}"
        lines += [f"seed {seed:<8} ratio {ratio:<9} {Case.draw(seed, limits)}", f"    {outcome.failure}"]
    worst = "none" if report.worst is None else f"{report.worst[0]:.3f} (seed {report.worst[1]})"
    lines.append(f"{report.ran} cases, {len(report.failures)} failures, largest ratio {worst}")
    if report.ran < report.asked:
        lines.append(f"{report.asked - report.ran} of {report.asked} cases were not run: the time was up")
    return "\n".join(lines)


def as_json(report: Report) -> str:
    """Return what a program that started this one wants to know."""
    worst, seed = report.worst or (None, None)
    return json.dumps({"asked": report.asked, "ran": report.ran, "failed": sorted(report.failures), "worst": worst,
                       "worst_seed": seed})  # fmt: skip


@contextlib.contextmanager
def progress(total: int) -> Iterator[Callable[[Report], None]]:
    """Show a bar if someone is watching."""
    if not sys.stdout.isatty():
        yield lambda report: None
        return
    from rich.progress import Progress

    with Progress() as bars:
        task = bars.add_task("fuzz", total=total)
        yield lambda r: bars.update(task, completed=r.ran, description=f"fuzz, {len(r.failures)} failed")


def _positive(text: str) -> int:
    if (number := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"got {text}, allowed is 1 or more")
    return number


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one case, or many; return 0 if all ran and none failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0, help="the case to run, or the first of them; default 0")
    parser.add_argument("--cases", type=_positive, help="how many; without it one, in this process")
    parser.add_argument("--workers", type=_positive, default=min(14, os.cpu_count() or 1), help="default %(default)s")
    parser.add_argument("--seconds", type=float, default=math.inf, help="start no case after these")
    parser.add_argument("--case-seconds", type=float, default=180, help="time for one case; default %(default)s")
    parser.add_argument("--limits", choices=LIMITS, help="how large cases are; default: by the device")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the totals to a file too")
    options = parser.parse_args(arguments)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    limits = LIMITS[options.limits or ("compiled" if device == "cuda" else "interpreted")]
    if options.cases is None:
        print(Case.draw(options.seed, limits))
        outcome = run_seed(options.seed, limits, device)
        print(f"largest ratio {outcome.ratio}: {outcome.failure or 'passed'}")
        return int(outcome.failure is not None)
    seeds = range(options.seed, options.seed + options.cases)
    with progress(options.cases) as tell:
        report = run_cases(functools.partial(run_seed, limits=limits, device=device), seeds, workers=options.workers,
                           seconds=options.seconds, case_seconds=options.case_seconds, tell=tell)  # fmt: skip
    print(summary(report, limits))
    if options.json:
        options.json.write_text(as_json(report), encoding="utf-8")
    return 0 if report.passed else 1


if __name__ == "__main__":
    sys.exit(main())
