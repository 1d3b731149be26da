"""``python -m tasks list | run | render | doctor``: the command line of the experiments."""

from __future__ import annotations

import argparse
import contextlib
import fnmatch
import os
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from tasks.config import CONFIGS, REPOSITORY, SCALES, Experiment, find_experiments, load_experiment
from tasks.errors import ConfigError, NotImplementedYet, UserError
from tasks.records import RESULTS

if TYPE_CHECKING:
    from tasks.runner import Options


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command and return its exit status: 0 good, 1 something failed, 2 the user can mend it."""
    options = _parser().parse_args(arguments)
    try:
        return options.command(options)
    except UserError as error:
        print("error: " + " ".join(str(error).split("\n")), file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\ninterrupted; finished jobs are recorded, run the same command again to resume", file=sys.stderr)
        return 130  # 128 + SIGINT, as shells have it


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m tasks", description="Tables and figures of both papers.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    listing = commands.add_parser("list", help="every table and figure: paper, family, scales, state")
    listing.add_argument("--only", metavar="PATTERN", help="part of an id or family, or a shell pattern")
    listing.set_defaults(command=_list)

    run = commands.add_parser("run", help="run experiments, then render the results")
    run.add_argument("configs", nargs="*", type=Path, metavar="CONFIG", help="config files; or --all")
    run.add_argument("--all", action="store_true", help="every config that has code")
    run.add_argument("--only", metavar="PATTERN", help="with --all: part of an id or family, or a shell pattern")
    run.add_argument("--scale", choices=SCALES, default="smoke", help="default: smoke")
    run.add_argument("--data-root", metavar="DIR", help="folder with local data; default: ADASPLASH_DATA")
    run.add_argument("--force", action="store_true", help="run again what has up-to-date records")
    run.add_argument("--seeds", type=_seeds, metavar="N,N", help="with config files: these seeds alone, so that "
                     "several GPUs can share an experiment")
    run.add_argument("--results", type=Path, default=RESULTS, metavar="DIR", help="default: results/")
    run.add_argument("--gpus", type=int, default=1, metavar="N", help="run experiments side by side, one a GPU; "
                     "default: 1")
    run.add_argument("--devices", type=int, default=1, metavar="N", help="GPUs of each node; default: 1")
    run.add_argument("--num-nodes", type=int, default=1, metavar="N", help="default: 1")
    run.add_argument("--strategy", default="auto", metavar="NAME", help="auto, ddp or fsdp; default: auto")
    run.add_argument("--no-render", action="store_true", help="leave tables and figures as they are")
    run.add_argument("--outcome", type=Path, help=argparse.SUPPRESS)  # how run_many's children answer
    run.set_defaults(command=_run)

    render = commands.add_parser("render", help="draw tables, figures and results/README.md from the records")
    render.add_argument("--results", type=Path, default=RESULTS, metavar="DIR", help="default: results/")
    render.add_argument("--readme", action="store_true", help="also the overview in the repository's README.md")
    render.set_defaults(command=_render)

    doctor = commands.add_parser("doctor", help="what this machine has, and what each scale can run here")
    doctor.add_argument("--data-root", metavar="DIR", help="folder with local data; default: ADASPLASH_DATA")
    doctor.set_defaults(command=_doctor)
    return parser


def _seeds(text: str) -> frozenset[int]:
    try:
        return frozenset(int(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"got {text!r}, allowed are numbers with commas between") from None


def select(experiments: Sequence[Experiment], pattern: str | None) -> list[Experiment]:
    """Return the experiments whose id or family contains ``pattern`` or matches it as a shell pattern.

    Raises:
        ConfigError: none does.
    """
    if not pattern:
        return list(experiments)
    chosen = [e for e in experiments
              if pattern in e.id or pattern in e.family or fnmatch.fnmatch(e.id, pattern)]  # fmt: skip
    if not chosen:
        raise ConfigError(f"--only: nothing matches {pattern!r}; python -m tasks list shows what there is")
    return chosen


def _list(options: argparse.Namespace) -> int:
    from tasks.status import print_list

    print_list(select(find_experiments(), options.only))
    return 0


def _run(options: argparse.Namespace) -> int:
    if options.only and not options.all:
        raise ConfigError("--only: goes with --all")
    if options.seeds is not None and options.all:
        raise ConfigError("--seeds: goes with config files, not with --all")
    if bool(options.configs) == options.all:
        given = "both" if options.all else "neither"
        raise ConfigError(f"run: got {given}, allowed are either config files or --all (python -m tasks list)")
    from tasks.data.sources import find_data_root
    from tasks.distributed import Devices, rank
    from tasks.kernel_bench import compile_cache
    from tasks.programs import find_program, is_implemented
    from tasks.runner import FAILED, Options, run_experiment, run_many
    from tasks.side_by_side import run_side_by_side
    from tasks.status import print_files, print_summary

    # What tunes itself (the published kernels, FlashAttention-2 in Triton) does so once, not anew in every experiment.
    # Said where: torch.compile would move Triton's cache when it first compiles, and with it what had been found.
    os.environ.setdefault("TRITON_CACHE_AUTOTUNING", "1")
    with contextlib.suppress(RuntimeError):  # who runs this has no home, and may need no cache
        os.environ.setdefault("TRITON_CACHE_DIR", str(compile_cache.folders()[0]))
    data_root = find_data_root(options.data_root)
    devices = Devices(options.devices, options.num_nodes, options.strategy)
    devices.check_launch()
    if options.gpus < 1:
        raise ConfigError(f"--gpus: got {options.gpus}, allowed is 1 or more")
    if options.gpus > 1 and devices.world > 1:
        raise ConfigError(f"--gpus: got {options.gpus}, allowed with --devices is 1")
    if devices.world > 1 and len(options.configs) != 1:
        raise ConfigError(f"--devices: got {devices.world} in all, allowed is 1 unless one config file is given")
    run_several = run_many if options.gpus == 1 else partial(run_side_by_side, gpus=options.gpus)
    run_options = Options(options.scale, data_root, options.force, options.results.resolve(), devices,
                          options.seeds)
    if options.all:
        experiments = select(find_experiments(), options.only)
        # An experiment comes after its base, whose runs it shares.
        runnable = sorted((e for e in experiments if is_implemented(e)), key=lambda e: e.base is not None)
        if not runnable:
            raise NotImplementedYet(f"--only: not implemented yet: {', '.join(e.id for e in experiments)}")
        outcomes = run_several(runnable, run_options)
        waiting = [e for e in experiments if e not in runnable]
    else:
        experiments = [load_experiment(path) for path in options.configs]
        for experiment in experiments:
            find_program(experiment)  # before anything runs: every one must have code
        waiting = []
        if options.outcome:
            return _run_for_parent(experiments[0], run_options, options.outcome)
        if len(experiments) == 1 and options.gpus == 1:
            outcomes = [run_experiment(experiments[0], run_options)]
        else:
            outcomes = run_several(experiments, run_options)
    if rank():
        return 1 if any(o.state == FAILED for o in outcomes) else 0
    print_summary(outcomes, waiting)  # before rendering, which may find fault with a record or config
    if not options.no_render:
        print_files(outcomes, _render_into(options.results), options.results)
    return 1 if any(o.state == FAILED for o in outcomes) else 0


def _run_for_parent(experiment: Experiment, run_options: Options, note: Path) -> int:
    """Run one experiment as the child of ``run --all``, which prints the outcome."""
    from tasks.runner import FAILED, run_experiment, write_outcome

    try:
        outcome = run_experiment(experiment, run_options)
    except UserError as error:
        write_outcome(note, FAILED, str(error))
        return 2
    write_outcome(note, outcome.state, outcome.detail)
    return 1 if outcome.state == FAILED else 0


def _render(options: argparse.Namespace) -> int:
    from tasks.runner import shown

    files = _render_into(options.results, REPOSITORY / "README.md" if options.readme else None)
    print(f"{len(files)} files rendered; the index is {shown(Path(options.results).resolve() / 'README.md')}")
    return 0


def _render_into(results: Path, readme: Path | None = None) -> list[Path]:
    from tasks.programs import is_implemented
    from tasks.render import render_all

    return render_all(find_experiments(CONFIGS), results, is_implemented, readme)


def _doctor(options: argparse.Namespace) -> int:
    from tasks.doctor import report

    report(find_experiments(), options.data_root)
    return 0


if __name__ == "__main__":
    # The kernels of this checkout, whose hash the records carry, also where none or others are installed.
    sys.path.insert(0, str(REPOSITORY / "kernels"))
    sys.exit(main())
