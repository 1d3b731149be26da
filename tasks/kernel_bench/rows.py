"""Rows of scores for the solvers of the threshold, and the exact solution of each."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from adasplash_kernels.eager import solve_theta
from tasks.checks import above_zero, at_least
from tasks.kernel_bench.settings import DTYPES, GAUSSIAN

BATCH = 2**25  # scores looked at at once: 256 MiB in float64, several times that while they are sorted


def check_rows(rows: int, n: int, dtype: str, alpha: float, data: str, dtypes: Iterable[str] = DTYPES) -> None:
    """Check what all settings of rows of scores share; raises ValueError that names the key."""
    at_least(1, rows=rows, n=n)
    if dtype not in dtypes:
        raise ValueError(f"dtype: got {dtype!r}, allowed are {', '.join(dtypes)}")
    if not 1 < alpha <= 2:
        raise ValueError(f"alpha: got {alpha}, allowed is above 1 to 2 (sparsemax)")
    if data != GAUSSIAN:
        raise ValueError(f"data: got {data!r}, allowed is {GAUSSIAN}")


@dataclass(frozen=True)
class Rows:
    """Shape and content of rows of scores (rows, n): independent normal numbers of one variance."""

    rows: int
    n: int
    dtype: str
    alpha: float
    data: str
    variance: float = 1.0

    def __post_init__(self) -> None:
        check_rows(self.rows, self.n, self.dtype, self.alpha, self.data)
        above_zero(variance=self.variance)

    @property
    def params(self) -> dict[str, object]:
        """As records say it."""
        return {"rows": self.rows, "n": self.n, "dtype": self.dtype, "alpha": self.alpha, "data": self.data,
                "variance": self.variance}  # fmt: skip


@dataclass(frozen=True)
class SeededRows(Rows):
    """Rows of one draw."""

    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(0, seed=self.seed)


def device_here() -> torch.device:
    """Return where measurements run."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def draw(rows: Rows, generator: torch.Generator) -> Tensor:
    """Return the rows, drawn on the CPU so that they are the same on every machine."""
    x = torch.randn(rows.rows, rows.n, generator=generator).mul_(rows.variance**0.5)
    return x.to(DTYPES[rows.dtype])


def exact_theta(scores: Tensor, alpha: float) -> Tensor:
    """Return theta (R,) float64 of rows of scores: by sorting for alpha 1.5 and 2, by Newton's steps for others."""
    return torch.cat([solve_theta(scores[at].double(), alpha)[:, 0] for at in bands(scores)])


def bands(scores: Tensor) -> Iterator[slice]:
    """Cut rows (R, n) into bands of at most :data:`BATCH` scores, or of one row."""
    count = max(1, BATCH // scores.shape[1])
    for start in range(0, len(scores), count):
        yield slice(start, min(start + count, len(scores)))
