"""Mappings from scores to probabilities as surfaces over two of the scores (AdaSplash-2, mappings figure).

Scores are (z1, z2, *further_scores); z1 and z2 run over a grid. Everything is float64 on the CPU.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from adasplash_kernels.reference import entmax_reference
from tasks.programs import Context, Job
from tasks.records import Measurement

OF = ("z1", "z2")
_DECIMALS = 9  # of a grid's coordinates: 0.3, not 0.30000000000000004


@dataclass(frozen=True)
class Mapping:
    """entmax of ``alpha`` (1 is softmax, 2 sparsemax), over the ``k`` largest scores only if k is given."""

    alpha: float
    k: int | None = None

    def __post_init__(self) -> None:
        if not 1 <= self.alpha <= 2:
            raise ValueError(f"alpha: got {self.alpha}, allowed is 1 (softmax) to 2 (sparsemax)")
        if self.k is not None and self.k < 1:
            raise ValueError(f"k: got {self.k}, allowed is 1 or more")


@dataclass(frozen=True)
class Grid:
    """``points`` values of z1 and as many of z2, evenly from ``low`` to ``high``, and whose probability is taken."""

    low: float
    high: float
    points: int
    further_scores: tuple[float, ...]
    probability_of: str

    def __post_init__(self) -> None:
        if not self.low < self.high:
            raise ValueError(f"low: got {self.low}, allowed is a number below high ({self.high})")
        if self.points < 2:
            raise ValueError(f"points: got {self.points}, allowed is 2 or more")
        if self.probability_of not in OF:
            raise ValueError(f"probability_of: got {self.probability_of!r}, allowed are {', '.join(OF)}")

    @property
    def axis(self) -> list[float]:
        """The values of z1, and of z2."""
        step = (self.high - self.low) / (self.points - 1)
        return [round(self.low + i * step, _DECIMALS) for i in range(self.points)]

    @property
    def scores(self) -> Tensor:
        """(points of z1, points of z2, scores)."""
        axis = torch.tensor(self.axis, dtype=torch.float64)
        own = torch.stack(torch.meshgrid(axis, axis, indexing="ij"), -1)
        further = torch.tensor(self.further_scores, dtype=torch.float64)
        return torch.cat([own, further.expand(*own.shape[:2], -1)], -1)


@dataclass(frozen=True)
class SurfaceSettings:
    """What ``program: mapping_surfaces`` takes: a mapping for each system, and the grid they share."""

    mappings: dict[str, Mapping]
    grid: Grid

    def __post_init__(self) -> None:
        if not self.mappings:
            raise ValueError("mappings: got none, allowed is one or more")
        scores = 2 + len(self.grid.further_scores)
        for name, mapping in self.mappings.items():
            if mapping.k is not None and mapping.k > scores:
                raise ValueError(f"mappings.{name}.k: got {mapping.k}, allowed is 1 to {scores}, the number of scores")


def probabilities(mapping: Mapping, scores: Tensor) -> Tensor:
    """Map scores (..., n) to probabilities (..., n), float64; of equal scores the first are among the k largest."""
    if mapping.k is not None:
        order = scores.argsort(dim=-1, descending=True, stable=True)
        scores = scores.scatter(-1, order[..., mapping.k :], float("-inf"))
    return entmax_reference(scores, mapping.alpha)


def jobs(settings: SurfaceSettings) -> list[Job]:
    """Return a job for each mapping."""
    return [Job(name) for name in settings.mappings]


def mapping_surfaces(job: Job, settings: SurfaceSettings, context: Context) -> list[Measurement]:
    """Return the probability at every point of the grid under one mapping."""
    grid, mapping = settings.grid, settings.mappings[job.system]
    surface = probabilities(mapping, grid.scores)[..., OF.index(grid.probability_of)]
    shared = {"alpha": mapping.alpha, "k": mapping.k, "further_scores": list(grid.further_scores),
              "probability_of": grid.probability_of}  # fmt: skip
    return [
        Measurement("probability", value, "", shared | {"z1": z1, "z2": z2})
        for z1, row in zip(grid.axis, surface.tolist(), strict=True)
        for z2, value in zip(grid.axis, row, strict=True)
    ]
