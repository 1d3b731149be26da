"""Settings of the kernel benchmarks, as their configs spell them, and the cases they ask for."""

from __future__ import annotations

import itertools
import zlib
from dataclasses import dataclass, field
from typing import Any

import torch

from tasks.checks import above_zero, at_least, distinct
from tasks.kernel_bench.systems import SYSTEMS

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
STATISTICS = ("median", "mean")
WHOLE_SQUARE, CAUSAL_HALF = "whole_square", "causal_half"
GAUSSIAN, CAPTURE = "gaussian", "capture:"
EXTRA_TILES = (16, 64, 128)  # metrics.yaml has a block sparsity for each


@dataclass(frozen=True)
class Inputs:
    """Shape and content of q (b, h, n, d) and of k and v (b, h_kv, n, d).

    ``data`` is ``gaussian``, independent normal numbers of the three variances, or ``capture:PATH``, a safetensors
    file with q, k and v of a trained model, of which the first n positions are taken; a relative PATH lies below the
    data root, or, without one, below the working directory. Queries are multiplied by each ``query_scale``.
    """

    b: int
    h: int
    h_kv: int
    n: tuple[int, ...]
    d: int
    dtype: str
    causal: bool
    alpha: float
    data: str
    query_variance: float = 1.0
    key_variance: float = 1.0
    value_variance: float = 1.0
    query_scale: tuple[float, ...] = (1.0,)
    seed: int = 0

    def __post_init__(self) -> None:
        at_least(1, b=self.b, h=self.h, h_kv=self.h_kv)
        if self.h % self.h_kv:
            raise ValueError(f"h: got {self.h}, allowed is a multiple of h_kv ({self.h_kv})")
        distinct("n", self.n)
        for i, n in enumerate(self.n):
            at_least(1, **{f"n[{i}]": n})
        if not 1 <= self.d <= 256:
            raise ValueError(f"d: got {self.d}, allowed is 1 to 256")
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype: got {self.dtype!r}, allowed are {', '.join(DTYPES)}")
        if not 1 < self.alpha <= 2:
            raise ValueError(f"alpha: got {self.alpha}, allowed is above 1 to 2 (sparsemax)")
        if self.data != GAUSSIAN and not (self.data.startswith(CAPTURE) and self.data != CAPTURE):
            raise ValueError(f"data: got {self.data!r}, allowed are {GAUSSIAN} and {CAPTURE}PATH")
        if self.data != GAUSSIAN and self.b != 1:
            raise ValueError(f"b: got {self.b}, allowed with captured data is 1")
        above_zero(query_variance=self.query_variance, key_variance=self.key_variance,
                    value_variance=self.value_variance)  # fmt: skip
        distinct("query_scale", self.query_scale)
        for i, scale in enumerate(self.query_scale):
            above_zero(**{f"query_scale[{i}]": scale})
        at_least(0, seed=self.seed)


@dataclass(frozen=True)
class OneLength:
    """Shape of q (b, h, n, d) and of k and v (b, h_kv, n, d), and what is computed, where there is one length only."""

    b: int
    h: int
    h_kv: int
    n: int
    d: int
    dtype: str
    causal: bool
    alpha: float
    data: str

    def gaussian(self, **more: Any) -> Inputs:
        """Return the settings of Gaussian inputs of this shape; ``more`` are fields of theirs.

        Raises:
            ValueError: a value is out of range.
        """
        at_least(1, n=self.n)
        return Inputs(self.b, self.h, self.h_kv, (self.n,), self.d, self.dtype, self.causal, self.alpha, GAUSSIAN,
                      **more)  # fmt: skip


@dataclass(frozen=True)
class Timing:
    """How often a case is timed: ``repeats`` rounds after ``warmup`` rounds, all systems once in each.

    A case stops early once it has spent ``max_seconds``, but not before three timed rounds (or ``repeats``, if that
    is fewer); warm-up may take a quarter of the time.
    """

    warmup: int
    repeats: int
    statistic: str
    max_seconds: float = 60.0

    def __post_init__(self) -> None:
        at_least(0, warmup=self.warmup)
        at_least(1, repeats=self.repeats)
        if self.statistic not in STATISTICS:
            raise ValueError(f"statistic: got {self.statistic!r}, allowed are {', '.join(STATISTICS)}")
        above_zero(max_seconds=self.max_seconds)


@dataclass(frozen=True)
class BlockSparsity:
    """Whose share is counted: tiles of ``tile`` queries by keys, and square ones of the sizes in ``also``."""

    tile: tuple[int, ...]
    over: str
    also: tuple[int, ...] = EXTRA_TILES

    def __post_init__(self) -> None:
        if len(self.tile) != 2 or min(self.tile) < 1:
            raise ValueError(f"tile: got {list(self.tile)}, allowed are two integers of 1 or more: queries and keys")
        if self.over not in (WHOLE_SQUARE, CAUSAL_HALF):
            raise ValueError(f"over: got {self.over!r}, allowed are {WHOLE_SQUARE}, {CAUSAL_HALF}")
        if len(set(self.also)) != len(self.also) or set(self.also) - set(EXTRA_TILES):
            raise ValueError(f"also: got {list(self.also)}, allowed are {', '.join(map(str, EXTRA_TILES))}, each once")


@dataclass(frozen=True)
class Solver:
    """How many iterations a system's search for the threshold gets, instead of its own choice."""

    iterations: int

    def __post_init__(self) -> None:
        at_least(1, iterations=self.iterations)


@dataclass(frozen=True)
class Determinism:
    """How many runs are held against one before them, bit for bit, of sequences up to ``longest``."""

    runs: int
    longest: int

    def __post_init__(self) -> None:
        at_least(1, runs=self.runs, longest=self.longest)


@dataclass(frozen=True)
class Graphs:
    """Calls of sequences up to ``longest`` are also timed as replays of a CUDA graph."""

    longest: int

    def __post_init__(self) -> None:
        at_least(1, longest=self.longest)


@dataclass(frozen=True)
class SpeedSettings:
    """What ``program: attention_speed`` takes."""

    measure: tuple[str, ...]
    inputs: Inputs
    timing: Timing
    relative_to: str | None = None
    block_sparsity: BlockSparsity | None = None
    determinism: Determinism | None = None
    graphs: Graphs | None = None
    solver: dict[str, Solver] = field(default_factory=dict)

    def __post_init__(self) -> None:
        distinct("measure", self.measure)
        for i, name in enumerate(self.measure):
            if name not in SYSTEMS:
                raise ValueError(f"measure[{i}]: got {name!r}, allowed are {', '.join(SYSTEMS)}")
        if self.relative_to is not None and self.relative_to not in self.measure:
            raise ValueError(f"relative_to: got {self.relative_to!r}, allowed are those in measure: "
                             f"{', '.join(self.measure)}")  # fmt: skip
        iterating = [name for name, system in SYSTEMS.items() if system.takes_iterations]
        for name in self.solver:
            if name not in iterating:
                raise ValueError(f"solver.{name}: unknown, allowed are {', '.join(iterating)}")
        if self.block_sparsity and self.block_sparsity.over == CAUSAL_HALF and not self.inputs.causal:
            raise ValueError(f"block_sparsity.over: got {CAUSAL_HALF}, which goes with inputs.causal true")


@dataclass(frozen=True)
class Case:
    """One point of a benchmark: all systems are measured on the same inputs of length n.

    ``seed`` depends on ``inputs.seed``, n and the scale alone, so that the inputs of a length are the same whatever
    other lengths a config lists.
    """

    n: int
    query_scale: float
    seed: int

    def __str__(self) -> str:
        return f"n = {self.n}" + (f", queries x {self.query_scale:g}" if self.query_scale != 1 else "")


def cases(inputs: Inputs) -> list[Case]:
    """Return every case, short ones first."""
    return [
        Case(n, scale, zlib.crc32(f"{inputs.seed} {n} {scale:g}".encode()))
        for n, scale in itertools.product(sorted(inputs.n), inputs.query_scale)
    ]
