"""q, k and v of a trained model, from the file that ``tasks.kernel_bench.capture`` writes."""

from __future__ import annotations

import hashlib
from pathlib import Path

from torch import Tensor

from tasks.errors import ConfigError

NAMES = ("q", "k", "v")


def locate(name: str, data_root: Path | None) -> Path:
    """Return the file: as named, or below the data root or the working directory if the name is relative.

    Raises:
        ConfigError: there is no such file.
    """
    path = Path(name) if Path(name).is_absolute() or data_root is None else data_root / name
    if not path.is_file():
        raise ConfigError(f"inputs.data: no such file: {path} (python -m tasks.kernel_bench.capture makes one; a "
                          "relative path is below the data root, or without one the working directory)")
    return path


def sha256(path: Path) -> str:
    """Return the hash of a file."""
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def check(path: Path, shape: tuple[int, int, int, int]) -> None:
    """Check names and shapes without reading the tensors.

    Args:
        path: a safetensors file with q (1, h, N, d), k and v (1, h_kv, N, d).
        shape: (h, h_kv, n, d) asked for; N may be more than n.

    Raises:
        ConfigError: it is no such file, or does not fit; the message names ``inputs.data``.
    """
    h, h_kv, n, d = shape
    opened = _open(path)
    found = {name: tuple(opened.get_slice(name).get_shape()) for name in opened.keys()}  # noqa: SIM118 - no mapping
    for name, heads in zip(NAMES, (h, h_kv, h_kv), strict=True):
        if name not in found:
            raise ConfigError(f"inputs.data: {path} holds {', '.join(sorted(found)) or 'nothing'}, it lacks {name}")
        got = found[name]
        if len(got) != 4 or (got[0], got[1], got[3]) != (1, heads, d) or got[2] < n:
            raise ConfigError(f"inputs.data: {path}: {name} has shape {got}, allowed is (1, {heads}, {n} or more, {d})")


def load(path: Path, shape: tuple[int, int, int, int], n: int) -> list[Tensor]:
    """Return the first n positions of q, k and v in float32; arguments and errors as :func:`check`."""
    check(path, shape)
    opened = _open(path)
    return [opened.get_slice(name)[:, :, :n].float() for name in NAMES]


def _open(path: Path):  # noqa: ANN202 - safetensors is imported late
    try:
        from safetensors import SafetensorError, safe_open
    except ImportError as error:
        raise ConfigError("inputs.data: captured data needs the package safetensors, which is not installed") from error
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise ConfigError(f"inputs.data: {path} is not a safetensors file: {error}") from error
