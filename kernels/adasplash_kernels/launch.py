"""Launching the kernels: tile sizes, pitches and grids. Nothing here knows about autograd."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property

import torch
import triton
import triton.language as tl
from torch import Tensor

from .backward import Upstream, grad_key_value_kernel, grad_query_kernel
from .forward import output_kernel
from .inputs import UNLIMITED, Inputs, Sizes, sealed
from .spans import packed_spans
from .thresholds import THRESHOLDS, register
from .thresholds.halley import halley_kernel
from .thresholds.histogram import histogram_kernel
from .thresholds.refine import MAX_ITERATIONS
from .worklists.tiles import transpose, words

INTERPRETED = not isinstance(output_kernel, triton.JITFunction)


@dataclass(frozen=True)
class Tiles:
    """Queries and keys a program works on at once, and the warps that do it."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int = 2


def choose_tiles(head_dim: int, dtype: torch.dtype) -> Tiles:
    """Pick tiles by head dim and dtype alone: a new length never compiles or tunes anything."""
    if INTERPRETED:  # small tiles make short test sequences cross tile borders
        return Tiles(16, 16, 1)
    if dtype == torch.float32:  # exact float32 products run on the plain cores; more of them a thread would spill
        return Tiles(32, 32, 8, 1)
    if head_dim <= 64:
        return Tiles(64, 64, 4, 3)
    if head_dim <= 128:
        return Tiles(64, 64, 4)
    return Tiles(64, 32, 8, 1)


def choose_row_tiles(n: int, alpha_by_row: bool = True) -> Tiles:
    """Pick tiles for thresholds of rows of ``n`` stored scores: wide, with several rows only if alpha is theirs all."""
    if INTERPRETED:
        return Tiles(1 if alpha_by_row else 4, 32, 1)
    # 15 counts times 4096 lanes is the most that the histogram's 16-bit sums hold
    width = min(4096, max(32, triton.next_power_of_2(n)))
    rows = 1 if alpha_by_row else max(1, min(32, 2048 // width))
    return Tiles(rows, width, max(1, min(8, rows * width // 512)))


@dataclass(frozen=True)
class Problem:
    """Everything about a call that is not a tensor of results.

    Attributes:
        q, k, v: (B, H, N_q, D), (B, H_kv, N_k, D) twice, the last dimension contiguous.
        alpha: (1,) or (H,) float32; ``alpha_kind`` is "1", "1.5", "2", or "any" to read it.
        scale: factor on q.k.
        left, right: keys a query sees before and after its own position, ``UNLIMITED`` or more for all.
        alibi_slopes: (H,) or (B, H) float32.
        key_starts, key_lengths: (B,) integers.
        cu_seqlens_q, cu_seqlens_k: (S + 1,) integers.
        scores: (B, H, N_q, N_k) masked scores before ``scale``, where they are already there.
        tiles: sizes to use instead of the usual ones.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    alpha: Tensor
    alpha_kind: str
    scale: float
    left: int = UNLIMITED
    right: int = UNLIMITED
    alibi_slopes: Tensor | None = None
    key_starts: Tensor | None = None
    key_lengths: Tensor | None = None
    cu_seqlens_q: Tensor | None = None
    cu_seqlens_k: Tensor | None = None
    scores: Tensor | None = None
    tiles: Tiles = field(default=None)  # type: ignore[assignment]

    def __post_init__(self) -> None:
        if self.tiles is None:
            object.__setattr__(self, "tiles", choose_tiles(self.q.shape[3], self.q.dtype))

    @cached_property
    def _inputs(self) -> Inputs:
        q, k, v, tiles, slopes = self.q, self.k, self.v, self.tiles, self.alibi_slopes
        spans = (None, None)
        if self.cu_seqlens_q is not None:
            spans = packed_spans(self.cu_seqlens_q, self.cu_seqlens_k, q.shape[2], k.shape[2], self.left, self.right)
        block_d = max(16, triton.next_power_of_2(q.shape[3]))
        return Inputs(
            q, k, v, self.scores, self.alpha, slopes, self.key_starts, self.key_lengths, *spans, None, None, q.shape[3],
            tl.constexpr(self.alpha_kind), tl.constexpr(q.shape[3] == block_d), _aligned(q, k, v),
            tl.constexpr(block_d), tl.constexpr(tiles.block_m), tl.constexpr(tiles.block_n),
        )  # fmt: skip

    def inputs(self, query_tiles: Tensor | None = None, key_tiles: Tensor | None = None) -> Inputs:
        """Return what kernels are given, with the work lists to use."""
        return self._inputs._replace(query_tiles=query_tiles, key_tiles=key_tiles)

    @cached_property
    def sizes(self) -> Sizes:
        """Return the run-time numbers."""
        q, k, v, slopes = self.q, self.k, self.v, self.alibi_slopes
        numbers = (
            q.shape[1], q.shape[1] // k.shape[1], q.shape[2], k.shape[2], min(self.left, UNLIMITED),
            min(self.right, UNLIMITED), slopes.stride(0) if slopes is not None and slopes.ndim == 2 else 0,
            1 if self.alpha.numel() > 1 else 0, *_pitches(q), *_pitches(k), *_pitches(v),
        )  # fmt: skip
        return Sizes(*(sealed(n) for n in numbers), self.scale)

    @property
    def query_blocks(self) -> int:
        return triton.cdiv(self.q.shape[2], self.tiles.block_m)

    @property
    def key_blocks(self) -> int:
        return triton.cdiv(self.k.shape[2], self.tiles.block_n)

    @property
    def query_grid(self) -> tuple[int]:
        """One program for each block of queries of each head."""
        return (self.query_blocks * self.q.shape[0] * self.q.shape[1],)

    @property
    def key_grid(self) -> tuple[int]:
        """One program for each block of keys of each key-value head."""
        return (self.key_blocks * self.k.shape[0] * self.k.shape[1],)

    @property
    def options(self) -> dict[str, int]:
        """Launch options."""
        return {"num_warps": self.tiles.num_warps, "num_stages": self.tiles.num_stages}


def _pitches(x: Tensor) -> tuple[int, ...]:
    """Return the strides of batch, head and row; 0 where there is one only and its stride may be anything."""
    return tuple(stride if size > 1 else 0 for size, stride in zip(x.shape[:3], x.stride()[:3], strict=True))


def _aligned(*tensors: Tensor) -> tl.constexpr:
    return tl.constexpr(all(pitch % 8 == 0 for x in tensors for pitch in _pitches(x)))


def _threshold(
    kernel: triton.JITFunction, problem: Problem, mark: bool, max_iterations: int
) -> tuple[Tensor, Tensor | None]:
    batch, heads, n_q, _ = problem.q.shape
    theta = torch.empty(batch, heads, n_q, dtype=torch.float32, device=problem.q.device)
    tiles = None
    # Softmax has no zeros, and where scores are stored no tile is visited again.
    if mark and problem.alpha_kind != "1" and problem.scores is None:
        # zeros: a block writes only the words of tiles that the mask of attention leaves it
        shape = (batch * heads, problem.query_blocks, words(problem.key_blocks))
        tiles = torch.zeros(shape, dtype=torch.int32, device=problem.q.device)
    kernel[problem.query_grid](problem.inputs(), problem.sizes, theta, tiles, max_iterations, **problem.options)
    return theta, tiles


@register("adasplash", marks_tiles=True)
def halley(problem: Problem, max_iterations: int = MAX_ITERATIONS) -> tuple[Tensor, Tensor | None]:
    """Halley-bisection, with a bit mask of tiles (AdaSplash)."""
    return _threshold(halley_kernel, problem, True, max_iterations)


@register("adasplash_nomask")
def halley_without_mask(problem: Problem, max_iterations: int = MAX_ITERATIONS) -> Tensor:
    """Halley-bisection that leaves every tile to be visited (AdaSplash without block masks)."""
    return _threshold(halley_kernel, problem, False, max_iterations)[0]


@register("adasplash2", marks_tiles=True)
def histogram(problem: Problem, max_iterations: int = MAX_ITERATIONS) -> tuple[Tensor, Tensor | None]:
    """Histogram start and safeguarded updates, with a bit mask of tiles (AdaSplash-2)."""
    return _threshold(histogram_kernel, problem, True, max_iterations)


def threshold(method: str, problem: Problem) -> tuple[Tensor, Tensor | None]:
    """Return theta (B, H, N_q) float32 and the bit mask of tiles, if the method leaves one."""
    entry = THRESHOLDS[method]
    found = entry.solve(problem)
    return found if entry.marks_tiles else (found, None)


def forward_output(
    problem: Problem, theta: Tensor, tiles: Tensor | None, need_out2: bool
) -> tuple[Tensor, Tensor | None]:
    """Return O and, if asked for, O2, (B, H, N_q, D) in q's dtype."""
    q = problem.q
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    out2 = torch.empty(q.shape, dtype=q.dtype, device=q.device) if need_out2 else None
    output_kernel[problem.query_grid](problem.inputs(tiles), problem.sizes, theta, out, out2, **problem.options)
    return out, out2


def backward_gradients(
    problem: Problem, theta: Tensor, out2: Tensor, tiles: Tensor | None, d_out: Tensor, need_alpha: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Return dQ (B, H, N_q, D), dK and dV (B, H_kv, N_k, D) in the inputs' dtype; d_alpha (B, H, N_q) if asked for."""
    delta = torch.empty_like(theta)
    dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (problem.q, problem.k, problem.v))
    d_alpha = torch.empty_like(theta) if need_alpha else None
    up = Upstream(theta, delta, d_out, *(sealed(n) for n in _pitches(d_out)), _aligned(d_out))
    inputs = problem.inputs(tiles, None if tiles is None else transpose(tiles, problem.key_blocks))
    grad_query_kernel[problem.query_grid](inputs, problem.sizes, up, out2, dq, d_alpha, **problem.options)
    grad_key_value_kernel[problem.key_grid](inputs, problem.sizes, up, dk, dv, **problem.options)
    return dq, dk, dv, d_alpha
