"""Block sparsity against the size of the tiles: how many hold no weight above zero (AdaSplash, reply to reviewers)."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch

from tasks.checks import at_least, distinct
from tasks.kernel_bench.inputs import make_problem, make_tensors
from tasks.kernel_bench.settings import GAUSSIAN, WHOLE_SQUARE, Case, Inputs, OneLength, cases
from tasks.kernel_bench.sparsity import measure_sparsity
from tasks.kernel_bench.systems import ENTMAX, SYSTEMS
from tasks.kernel_bench.trial import failed_trial, free_memory
from tasks.programs import Context, Job
from tasks.records import Measurement


@dataclass(frozen=True)
class GaussianInputs(OneLength):
    """q, k and v, normal numbers of the three variances.

    Tiles are counted in the first sequence, as sparsity.py does. v has no part in it; its variance is there so that
    the inputs are those of ``attention_speed``.
    """

    query_variance: float = 1.0
    key_variance: float = 1.0
    value_variance: float = 1.0

    def __post_init__(self) -> None:
        if self.data != GAUSSIAN:
            raise ValueError(f"data: got {self.data!r}, allowed is {GAUSSIAN}")
        self.drawn_with(0)

    def drawn_with(self, seed: int) -> Inputs:
        """Return the settings that the inputs of a seed are drawn with."""
        return self.gaussian(query_variance=self.query_variance, key_variance=self.key_variance,
                             value_variance=self.value_variance, seed=seed)  # fmt: skip


@dataclass(frozen=True)
class TileSizes:
    """Queries (``b_r``) and keys (``b_c``) of a tile; every pair of them is counted."""

    b_r: tuple[int, ...]
    b_c: tuple[int, ...]

    def __post_init__(self) -> None:
        for name, sizes in (("b_r", self.b_r), ("b_c", self.b_c)):
            distinct(name, sizes)
            at_least(1, **{f"{name}[{i}]": size for i, size in enumerate(sizes)})


@dataclass(frozen=True)
class TileSettings:
    """What ``program: block_sparsity_by_tile`` takes. The count is that of the inputs, whatever ``measure`` names."""

    measure: tuple[str, ...]
    inputs: GaussianInputs
    sweep: TileSizes
    seeds: tuple[int, ...]

    def __post_init__(self) -> None:
        distinct("measure", self.measure)
        able = [name for name, system in SYSTEMS.items() if system.computes == ENTMAX]
        for i, name in enumerate(self.measure):
            if name not in able:
                raise ValueError(f"measure[{i}]: got {name!r}, allowed are {', '.join(able)}")
        distinct("seeds", self.seeds)
        at_least(0, **{f"seeds[{i}]": seed for i, seed in enumerate(self.seeds)})


def tile_jobs(settings: TileSettings) -> list[Job]:
    """Return a job for each system and seed."""
    return [Job(name, seed) for seed in settings.seeds for name in settings.measure]


def block_sparsity_by_tile(job: Job, settings: TileSettings, context: Context) -> list[Measurement]:
    """Count the tiles without a weight above zero, of every size, on the inputs of one seed."""
    assert job.seed is not None
    x = settings.inputs
    inputs = x.drawn_with(job.seed)
    (case,) = cases(inputs)
    tiles = list(itertools.product(settings.sweep.b_r, settings.sweep.b_c))
    shared = {"b": x.b, "h": x.h, "h_kv": x.h_kv, "n": x.n, "d": x.d, "dtype": x.dtype, "causal": x.causal,
              "alpha": x.alpha, "data": x.data, "query_variance": x.query_variance, "key_variance": x.key_variance,
              "value_variance": x.value_variance, "over": WHOLE_SQUARE}  # fmt: skip
    params = {tile: shared | {"b_r": tile[0], "b_c": tile[1]} for tile in tiles}
    try:
        percent, heads = _count(inputs, case, set(tiles))
    except torch.OutOfMemoryError as error:
        lost = failed_trial(error)
        context.say(f"{job}: not measured: {lost.reason}")
        return [Measurement("block_sparsity", None, "%", params[t] | {"reason": lost.reason}, status=lost.status)
                for t in tiles]  # fmt: skip
    for b_r in settings.sweep.b_r:
        line = ", ".join(f"{b_r}x{b_c}: {percent[b_r, b_c]:.1f} %" for b_c in settings.sweep.b_c)
        context.say(f"{job}: empty tiles of n = {x.n}, {line}")
    return [Measurement("block_sparsity", percent[t], "%", params[t] | {"heads": heads}) for t in tiles]


def _count(inputs: Inputs, case: Case, tiles: set[tuple[int, int]]) -> tuple[dict[tuple[int, int], float], int]:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    free_memory(device)
    tensors = make_tensors(inputs, case, device, None)
    found = measure_sparsity(make_problem(inputs, case, device), tensors, tiles, WHOLE_SQUARE)
    return found.percent, found.heads
