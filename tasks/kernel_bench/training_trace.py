"""Scores of a model along its training, from files that ``tasks.kernel_bench.score_capture`` writes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tasks.checks import at_least
from tasks.errors import ConfigError
from tasks.kernel_bench.captured import sha256


@dataclass(frozen=True)
class TrainingTrace:
    """Which run is traced, and where its captures lie.

    Attributes:
        run: the experiment whose training it is, as folder/name.
        system: the run's system.
        steps: of the whole training; looked at is every multiple of ``every_steps`` up to it.
        sequences: of each capture, the first so many are used.
        captures: folder that holds ``step-<N>.safetensors``, below the data root or, if it has no such folder, where
            Python runs.
    """

    run: str
    system: str
    steps: int
    every_steps: int
    sequences: int
    captures: str

    def __post_init__(self) -> None:
        at_least(1, steps=self.steps, every_steps=self.every_steps, sequences=self.sequences)
        if self.every_steps > self.steps:
            raise ValueError(f"every_steps: got {self.every_steps}, allowed is 1 to steps ({self.steps})")
        if not self.captures:
            raise ValueError("captures: got '', allowed is a folder")

    @property
    def points(self) -> Sequence[int]:
        """The optimizer steps looked at."""
        return range(self.every_steps, self.steps + 1, self.every_steps)

    def file(self, data_root: Path | None, step: int) -> Path:
        """Return where the capture of a step lies."""
        root = data_root if data_root and (data_root / self.captures).is_dir() else Path()
        return root / self.captures / f"step-{step}.safetensors"

    def present(self, data_root: Path | None) -> dict[str, str]:
        """Return the hash of every capture that is there, by its step."""
        files = {str(step): self.file(data_root, step) for step in self.points}
        return {step: sha256(path) for step, path in files.items() if path.is_file()}

    def missing(self, step: int) -> str:
        """Say what to do about a capture that is not there."""
        return (f"no {self.captures}/step-{step}.safetensors: first train {self.system} of {self.run} at this scale, "
                "which writes it")  # fmt: skip


def load_scores(path: Path, sequences: int, rows: int, seed: int) -> Tensor:
    """Return causal scores of ``rows`` queries (rows, n) float32, ``-inf`` at keys that a query does not see.

    The queries are drawn, by ``seed``, from all layers, heads and positions of the first sequences (all of them, if
    there are fewer).

    Args:
        path: a safetensors file with q.<layer> (B, H, N, D) and k.<layer> (B, H_kv, N, D) for every layer.

    Raises:
        ConfigError: it is no such file, or holds fewer sequences; the message names ``training_trace``.
    """
    opened, layers = _open(path)
    b, h, n, d = opened.get_slice(f"q.{layers[0]}").get_shape()
    if b < sequences:
        raise ConfigError(f"training_trace.sequences: got {sequences}, allowed with {path} is 1 to {b}")
    total = len(layers) * sequences * h * n
    chosen = torch.randperm(total, generator=torch.Generator().manual_seed(seed))[:rows].sort().values
    out = torch.full((len(chosen), n), -torch.inf)
    for number, layer in enumerate(layers):
        q, k = (opened.get_slice(f"{name}.{layer}")[:sequences].float() for name in "qk")
        if q.shape != (sequences, h, n, d) or k.shape[0::2] != (sequences, n) or h % k.shape[1] or k.shape[3] != d:
            raise ConfigError(
                f"training_trace.captures: {path}: layer {layer} has q {tuple(q.shape)} and k "
                f"{tuple(k.shape)}, which do not fit each other or the other layers"
            )
        at = (chosen >= number * sequences * h * n) & (chosen < (number + 1) * sequences * h * n)
        within = chosen[at] - number * sequences * h * n
        sequence, head, position = within // (h * n), within // n % h, within % n
        keys = k[sequence, head // (h // k.shape[1])]  # (rows here, n, d)
        scores = torch.einsum("rd,rnd->rn", q[sequence, head, position], keys) * d**-0.5
        out[at] = scores.masked_fill(torch.arange(n) > position[:, None], -torch.inf)
    return out


def _open(path: Path) -> tuple[Any, list[int]]:
    """Return the opened file and its layers."""
    try:
        from safetensors import SafetensorError, safe_open
    except ImportError as error:
        raise ConfigError("training_trace: captures need the package safetensors, which is not installed") from error
    try:
        opened = safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise ConfigError(f"training_trace.captures: {path} is not a safetensors file: {error}") from error
    names = set(opened.keys())
    layers = sorted(int(name[2:]) for name in names if name.startswith("q.") and name[2:].isdigit())
    if not layers or names != {f"{x}.{layer}" for layer in layers for x in "qk"}:
        raise ConfigError(
            f"training_trace.captures: {path} holds {', '.join(sorted(names)) or 'nothing'}, allowed are "
            "q.<layer> and k.<layer>"
        )
    return opened, layers
