"""What this machine has, and what each scale can run on it."""

from __future__ import annotations

import platform
import shutil
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path

import torch
from rich.table import Table

from tasks.config import SCALES, Experiment
from tasks.data.sources import DATA_ROOT_VARIABLE, find_data_root
from tasks.errors import UserError
from tasks.programs import find_program, is_implemented
from tasks.records import RESULTS, environment
from tasks.runner import one_line
from tasks.status import console

_PACKAGES = ("torch", "triton", "pytorch-lightning", "transformers", "datasets", "sentence-transformers", "mteb",
             "omegaconf", "adasplash")  # fmt: skip


def report(experiments: Sequence[Experiment], data_root: str | None = None) -> None:
    """Print devices, versions, data, free disk, and per experiment and scale whether it can run and why not.

    Raises:
        DataError: the data root given is no folder.
    """
    root = find_data_root(data_root)
    found = environment()
    if found["gpu"]:
        memory = torch.cuda.get_device_properties(0).total_memory / 2**30
        print(f"GPU     {torch.cuda.device_count()} x {found['gpu']}, {memory:.0f} GiB, driver {found['driver']}")
    else:
        print("GPU     none: kernels run on the CPU only in Triton's interpreter, models use the exact eager path")
    print(f"Python  {platform.python_version()}, {torch.get_num_threads()} threads")
    print("packages")
    for name in _PACKAGES:
        print(f"  {name:22} {_version(name)}")
    if root is None:
        print(f"data    no local folder (--data-root or {DATA_ROOT_VARIABLE} names one); else the hub or embedded data")
    else:
        folders = sorted(p.relative_to(root).as_posix() for p in root.glob("*/*") if p.is_dir())
        print(f"data    {root}: {', '.join(folders) if folders else 'empty'}")
    print(f"disk    {shutil.disk_usage(_existing(RESULTS)).free / 2**30:.0f} GiB free for results/\n")
    table = Table("experiment", *SCALES, box=None, pad_edge=False, header_style="bold")
    reasons: dict[str, int] = {}  # told once each, below the table
    ready = [e for e in experiments if is_implemented(e)]
    for e in ready:
        found_reasons = [_why_not(e, scale, root) for scale in SCALES]
        table.add_row(e.id, *(f"no ({reasons.setdefault(r, len(reasons) + 1)})" if r else "can run"
                              for r in found_reasons))  # fmt: skip
    console().print(table)
    for reason, number in reasons.items():
        print(f"({number}) {reason}")
    print(f"not implemented yet: {len(experiments) - len(ready)} of {len(experiments)} experiments "
          "(python -m tasks list)")


def _why_not(experiment: Experiment, scale: str, root: Path | None) -> str | None:
    try:
        program = find_program(experiment)
        settings = experiment.typed_settings(scale, program.settings)
        if obstacle := program.obstacle(settings, root):
            return obstacle
        program.identity(settings, root)  # raises where no source of its data can serve
        return None
    except UserError as error:
        return one_line(error)


def _version(distribution: str) -> str:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return "not installed"


def _existing(path: Path) -> Path:
    while not path.exists():
        path = path.parent
    return path
