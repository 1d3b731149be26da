"""Rows of scores that are hard to find thresholds for, the thresholds in float64, and the problems kernels solve."""

from __future__ import annotations

import math

import torch
from oracle import LOWEST_ALPHA
from torch import Tensor

from adasplash_kernels.problem import Problem
from adasplash_kernels.reference import entmax_reference
from adasplash_kernels.thresholds import THRESHOLDS
from adasplash_kernels.tile_sizes import Tiles

FLOAT32 = 2**-23
GENERAL = "any"  # the kind of closed form that reads alpha
ALPHAS = [
    (1.0, "1"), (1.0, GENERAL), (1.001, GENERAL), (1.1, GENERAL), (1.25, GENERAL), (1.5, "1.5"), (1.5, GENERAL),
    (1.75, GENERAL), (2.0, "2"), (2.0, GENERAL),
]  # fmt: skip
FEW_ALPHAS = [(1.0, "1"), (1.25, GENERAL), (1.5, "1.5"), (1.75, GENERAL), (2.0, "2")]


def hard_rows(n: int, alpha: float) -> dict[str, Tensor]:
    """Return (rows, n) float32 scores by what is hard about them."""
    generator = torch.Generator().manual_seed(n)
    normal = torch.randn(2, n, generator=generator)
    place = torch.arange(n)
    reach = 1 / max(alpha - 1, 0.05)  # how far below the largest score a weight may lie
    rows = {f"normal x {spread:g}": spread * normal for spread in (0.01, 0.1, 1, 10, 100, 1000)}
    rows |= {
        "far from zero": normal + torch.tensor([[1000.0], [-3000.0]]),
        "ties": torch.randint(0, 4, (2, n), generator=generator) * torch.tensor([[0.25], [1.0]]),
        "all equal": torch.tensor([[0.0], [3.7]]).expand(2, n),
        "two levels": torch.where(place % 2 == 0, 0.0, -torch.tensor([[0.1], [0.5 * reach]])),
        "one ahead": torch.where(place == n // 2, torch.tensor([[4.0], [50.0]]), normal),
        "geometric": -0.01 * torch.tensor([[1.1], [1.5]]) ** place.clamp_max(60),
        "even steps": -place * torch.tensor([[reach / n], [3 * reach / n]]),
        # all but one lie about where the support ends: a little above, a little below, or on either side
        "edge": torch.where(place == 0, 0.0, -reach * torch.tensor([[0.999], [1.001]])),
        "across the edge": torch.where(place == 0, 0.0, -reach * (1 + 1e-4 * normal)),
        "half hidden": torch.where(torch.rand(2, n, generator=generator) < 0.5, -math.inf, normal),
        "one seen": torch.where(place == n - 1, 5.0, -math.inf).expand(1, n),
        "none seen": torch.full((1, n), -math.inf),
    }
    return {name: x.float() for name, x in rows.items()}


def stacked(rows: dict[str, Tensor], device: str) -> tuple[Tensor, list[str]]:
    """Return all rows as one matrix, and their names."""
    return torch.cat([*rows.values()]).to(device), [name for name, x in rows.items() for _ in x]


def both_alphas(alpha: float, kind: str, device: str) -> tuple[float, Tensor]:
    """Return the alpha that counts, in float64, and the float32 tensor that kernels read."""
    tensor = torch.full((1,), alpha, dtype=torch.float32)
    exact = float(tensor.double())
    return max(exact, LOWEST_ALPHA) if kind == GENERAL else exact, tensor.to(device)


def exact_theta(scores: Tensor, alpha: float) -> Tensor:
    """Return theta (..., n) -> (...) in float64: the largest weight says where it is; ``+inf`` for rows of ``-inf``."""
    top, best = scores.double().amax(-1), entmax_reference(scores, alpha).amax(-1)
    log_best, a = torch.where(best > 0, best, 1.0).log(), alpha - 1
    return torch.where(best > 0, top - (torch.expm1(a * log_best) / a if a else log_best), math.inf)


def resolution(scores: Tensor) -> Tensor:
    """Return (..., n) -> (...) how well float32 tells a threshold: by the roundings of scores, and of their sums."""
    largest = scores.double().abs().masked_fill(scores.isinf(), 0).amax(-1)
    return 4 * FLOAT32 * largest + 2e-6


def stored(scores: Tensor, alpha: Tensor, kind: str, tiles: Tiles) -> Problem:
    """Return the problem of (rows, n) stored scores."""
    rows, n = scores.shape
    nothing = scores.new_empty(1)
    q, k = nothing.expand(1, 1, rows, 1), nothing.expand(1, 1, n, 1)
    return Problem(q, k, k, alpha, kind, 1.0, scores=scores.contiguous(), tiles=tiles)


def computed(scores: Tensor, alpha: Tensor, kind: str) -> Problem:
    """Return the problem of (heads, 16, n) finite scores, whose queries and keys multiply to them without rounding."""
    heads, rows, _ = scores.shape
    q = torch.eye(rows, device=scores.device).expand(1, heads, rows, rows).contiguous()
    k = (2 * scores.mT)[None].contiguous()
    return Problem(q, k, k, alpha, kind, 0.5)


def solve(method: str, problem: Problem, **options: int) -> tuple[Tensor, Tensor | None]:
    """Return theta (B, H, N_q) and the marks, if the method leaves any."""
    found = THRESHOLDS[method].solve(problem, **options)
    return found if THRESHOLDS[method].lists else (found, None)


def check_theta(found: Tensor, scores: Tensor, alpha: float, names: list[str]) -> None:
    """Assert that theta (rows,) is the root for (rows, n) scores, as well as float32 can tell."""
    exact = exact_theta(scores, alpha)
    empty = exact.isinf()
    assert torch.equal(found == math.inf, empty)
    excess = torch.where(empty, 0.0, (found.double() - exact).abs() / resolution(scores)).nan_to_num(math.inf)
    worst = int(excess.argmax())
    assert excess[worst] <= 1, f"{names[worst]}: {float(excess[worst]):.3g} times the allowed error"
