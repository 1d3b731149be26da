"""Speed against block sparsity: the systems of ``attention_speed``, side by side, on inputs with chosen empty tiles."""

from __future__ import annotations

import zlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from tasks.checks import distinct
from tasks.kernel_bench.inputs import Tensors
from tasks.kernel_bench.placed_tiles import draw_queries_and_keys
from tasks.kernel_bench.settings import (
    DTYPES,
    WHOLE_SQUARE,
    BlockSparsity,
    OneLength,
    Solver,
    SpeedSettings,
    Timing,
)
from tasks.kernel_bench.side_by_side import SideBySide
from tasks.kernel_bench.sparsity import Sparsity

PLACED = "placed_tiles"
_FEWEST_DIMENSIONS = 4  # two for codes, two for noise


@dataclass(frozen=True)
class PlacedInputs(OneLength):
    """q, k and v, whose content ``placed_tiles.py`` describes.

    ``tile`` is the size, queries by keys, of the tiles that are placed and counted.
    """

    tile: tuple[int, ...]
    seed: int = 0

    def __post_init__(self) -> None:
        self.gaussian(seed=self.seed)
        if self.data != PLACED:
            raise ValueError(f"data: got {self.data!r}, allowed is {PLACED}")
        if self.causal:
            raise ValueError(f"causal: got true, allowed with {PLACED} is false")
        if self.d < _FEWEST_DIMENSIONS:
            raise ValueError(f"d: got {self.d}, allowed with {PLACED} is {_FEWEST_DIMENSIONS} to 256")
        BlockSparsity(self.tile, WHOLE_SQUARE)
        if any(self.n % side for side in self.tile):
            raise ValueError(f"n: got {self.n}, allowed are multiples of both sides of tile ({list(self.tile)})")


@dataclass(frozen=True)
class Levels:
    """Percentages of empty tiles to ask for."""

    block_sparsity: tuple[float, ...]

    def __post_init__(self) -> None:
        distinct("block_sparsity", self.block_sparsity)
        for i, level in enumerate(self.block_sparsity):
            if not 0 <= level <= 100:
                raise ValueError(f"block_sparsity[{i}]: got {level:g}, allowed is 0 to 100 (%)")


@dataclass(frozen=True)
class SweepSettings:
    """What ``program: block_sparsity_sweep`` takes."""

    measure: tuple[str, ...]
    inputs: PlacedInputs
    sweep: Levels
    timing: Timing
    relative_to: str
    solver: dict[str, Solver] = field(default_factory=dict)

    def __post_init__(self) -> None:
        SpeedSettings(self.measure, self.inputs.gaussian(), self.timing, self.relative_to, self.block_sparsity,
                      solver=self.solver)  # fmt: skip

    @property
    def determinism(self) -> None:
        """Not asked for: the levels are of one length, and kernels do not differ between them."""
        return None

    @property
    def graphs(self) -> None:
        """Not asked for either: that length is one at which the host keeps up."""
        return None

    @property
    def block_sparsity(self) -> BlockSparsity:
        """Which tiles are counted: those placed, and the larger ones that records have a metric for."""
        return BlockSparsity(self.inputs.tile, WHOLE_SQUARE)


@dataclass(frozen=True)
class LevelCase:
    """One point of the sweep: all systems are measured on inputs drawn for the level. Others do not change it."""

    n: int
    level: float
    seed: int

    def __str__(self) -> str:
        return f"n = {self.n}, block sparsity {self.level:g} % asked for"


def level_cases(settings: SweepSettings) -> list[LevelCase]:
    """Return every point, in the order of the config."""
    x = settings.inputs
    return [LevelCase(x.n, level, zlib.crc32(f"{x.seed} {x.n} {level:g} {PLACED}".encode()))
            for level in settings.sweep.block_sparsity]  # fmt: skip


def make_placed_tensors(inputs: PlacedInputs, case: LevelCase, device: torch.device) -> Tensors:
    """Draw q and k with the placed tiles, and standard normal v and gradient to the output, on the CPU.

    Raises:
        ValueError: d is too small for the level.
    """
    shape = (inputs.b, inputs.h, inputs.h_kv, inputs.n, inputs.d)
    q, k, _ = draw_queries_and_keys(case.level, shape, (inputs.tile[0], inputs.tile[1]), inputs.alpha, case.seed)
    generator = torch.Generator().manual_seed(case.seed + 1)
    v, do = (torch.randn(x.shape, generator=generator) for x in (k, q))
    q, k, v, do = (x.to(device, DTYPES[inputs.dtype]) for x in (q, k, v, do))
    return Tensors(*(x.requires_grad_() for x in (q, k, v)), do)


class SideBySideAtLevel(SideBySide):
    """The systems of one level. Records carry the level asked for and the share of empty tiles that was measured."""

    def _make_tensors(self, data_root: Path | None) -> Tensors:
        return make_placed_tensors(self.settings.inputs, self.case, self.device)

    def _params(self, name: str) -> dict[str, Any]:
        params = self._problem_params(name)
        params |= {"tile": list(self.settings.inputs.tile), "block_sparsity_asked": self.case.level}
        found = self._sparsity
        if isinstance(found, Sparsity):  # where a figure puts the point
            params["block_sparsity"] = round(found.percent[self._tiles["block_sparsity"]], 3)
        return params
