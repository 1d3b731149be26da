"""Results: one JSON object a line, appended by the program that measured it. The only module that writes them.

A batch of lines is written with a single ``write`` on a locked file opened for appending, and taken back whole if
the disk fills, so a reader never sees half of a job. A line torn by a power cut is cut off at the next append.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import math
import os
import platform
import subprocess
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from functools import lru_cache
from importlib import metadata
from pathlib import Path
from typing import Any

from tasks.config import REPOSITORY, SCALES
from tasks.errors import UserError

RESULTS = REPOSITORY / "results"
STATUSES = ("ok", "oom", "failed", "not_applicable")


@dataclass(frozen=True)
class Record:
    """One measured number with everything needed to trace it."""

    experiment: str
    scale: str
    system: str
    metric: str
    value: float | None
    unit: str
    params: dict[str, Any]
    seed: int | None
    config_sha256: str
    source_sha256: str
    env: dict[str, str | None]
    created: str
    status: str = "ok"
    stats: dict[str, float] | None = None
    git_commit: str | None = None


@dataclass(frozen=True)
class Measurement:
    """What a program hands back: a value (``None`` unless ``status`` is ok), its unit and its parameters."""

    metric: str
    value: float | None
    unit: str
    params: dict[str, Any] = field(default_factory=dict)
    stats: dict[str, float] | None = None
    status: str = "ok"

    def __post_init__(self) -> None:
        if self.status not in STATUSES:
            raise ValueError(f"status: got {self.status!r}, allowed are {', '.join(STATUSES)}")
        if (self.value is None) == (self.status == "ok"):
            raise ValueError(f"value: {self.metric} has value {self.value!r} with status {self.status!r}")
        if self.value is not None and not math.isfinite(self.value):
            raise ValueError(f"value: {self.metric} is {self.value}, allowed is a finite number")


def records_path(root: Path, experiment_id: str, scale: str) -> Path:
    """Return where the records of an experiment at a scale live below the results folder ``root``."""
    if scale not in SCALES:
        raise UserError(f"scale: got {scale!r}, allowed are {', '.join(SCALES)}")
    return root / "records" / f"{experiment_id}" / f"{scale}.jsonl"


def read_records(path: Path) -> list[Record]:
    """Read a record file; a missing file is no records.

    Raises:
        UserError: a complete line is not a record. A torn last line (no newline) is left out: it was never
            acknowledged.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return []
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read: {error}") from error
    records = []
    for number, line in enumerate(text.split("\n")[:-1], 1):
        try:
            records.append(Record(**json.loads(line, parse_constant=_refuse_constant)))
        except (ValueError, TypeError) as error:
            raise UserError(f"{path}:{number}: not a record: {error}") from error
    return records


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def append_records(path: Path, records: Iterable[Record]) -> None:
    """Append records as one batch: either all lines are in the file afterwards, or none.

    Raises:
        UserError: the disk is full or the folder cannot be written; the file is as it was before.
        ValueError, TypeError: a value is NaN or infinite, or none that JSON has; nothing is written.
    """
    lines = "".join(json.dumps(asdict(r), sort_keys=True, allow_nan=False) + "\n" for r in records)
    if not lines:
        return
    data = lines.encode()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
    except OSError as error:
        raise UserError(f"{path}: cannot be written: {error.strerror}") from error
    size = None
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        size = _cut_torn_line(handle)
        if os.write(handle, data) != len(data):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        os.fsync(handle)
    except OSError as error:
        if size is not None:
            os.ftruncate(handle, size)
        raise UserError(f"{path}: records not written, file left as it was: {error.strerror}") from error
    finally:
        os.close(handle)


def _cut_torn_line(handle: int) -> int:
    """Truncate a last line that lacks its newline; return the file's size."""
    size = os.fstat(handle).st_size
    if size and os.pread(handle, 1, size - 1) != b"\n":
        content = os.pread(handle, size, 0)
        size = content.rfind(b"\n") + 1
        os.ftruncate(handle, size)
    return size


def sha256_of(value: Any) -> str:
    """Return the SHA-256 of a JSON-able value in canonical form."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()


@lru_cache
def git_commit(root: Path = REPOSITORY) -> str | None:
    """Return the checked-out commit, with ``-dirty`` when files differ from it, or None outside git."""
    def git(*arguments: str) -> str:
        # Without its lock on the index, which a run that is killed would leave behind and all later commits stop at.
        command = ["git", "--no-optional-locks", "-C", str(root), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout

    try:
        changed = git("status", "--porcelain", "--", "kernels", "tasks", "configs").strip()
        return git("rev-parse", "HEAD").strip() + ("-dirty" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return None


@lru_cache
def environment() -> dict[str, str | None]:
    """Return what a record says of the machine: GPU name, driver, and the versions that decide speed."""
    import torch

    gpu = driver = None
    if torch.cuda.is_available():
        gpu = torch.cuda.get_device_name()
        driver = _nvidia_driver()
    return {"gpu": gpu, "driver": driver, "torch": torch.__version__, "triton": _version("triton"),
            "python": platform.python_version()}


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def _nvidia_driver() -> str | None:
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        lines = subprocess.run(query, capture_output=True, text=True, check=True, timeout=20).stdout.splitlines()
    except (OSError, subprocess.SubprocessError):
        return None
    return lines[0].strip() if lines else None


@dataclass(frozen=True)
class Provenance:
    """What every record of one job shares; equal provenance means the job need not run again."""

    experiment: str
    scale: str
    system: str
    seed: int | None
    config_sha256: str
    source_sha256: str

    def matches(self, record: Record) -> bool:
        """Tell whether a record came from this very job: same hashes, and the same kind of device."""
        return (
            (record.experiment, record.scale, record.system, record.seed)
            == (self.experiment, self.scale, self.system, self.seed)
            and (record.config_sha256, record.source_sha256) == (self.config_sha256, self.source_sha256)
            and record.env.get("gpu") == environment()["gpu"]
        )

    def records(self, measurements: Iterable[Measurement]) -> list[Record]:
        """Stamp measurements with this provenance, the environment and the time."""
        created = datetime.now(UTC).isoformat(timespec="milliseconds")  # tells one batch from the next
        shared = {**asdict(self), "env": environment(), "created": created, "git_commit": git_commit()}
        return [Record(**asdict(m), **shared) for m in measurements]
