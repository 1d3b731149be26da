"""Launching the kernels: tile sizes, strides and grids. Nothing here knows about autograd."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from .backward import grad_key_value_kernel, grad_query_kernel
from .forward import output_kernel
from .thresholds.halley import halley_kernel

INTERPRETED = not isinstance(halley_kernel, triton.JITFunction)
_MAX_ITERATIONS = 40  # bisection alone would need about 30; Halley's steps need 3 to 6


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
    if dtype == torch.float32:  # exact float32 products run on the plain cores and take more registers
        return Tiles(64, 32, 4, 1) if head_dim <= 64 else Tiles(32, 32, 4, 1)
    if head_dim <= 64:
        return Tiles(128, 64, 8)
    if head_dim <= 128:
        return Tiles(64, 64, 4)
    return Tiles(64, 32, 8, 1)


@dataclass(frozen=True)
class Problem:
    """Everything about a call that is not a tensor of results."""

    q: Tensor
    k: Tensor
    v: Tensor
    alpha: Tensor
    alpha_kind: str
    scale: float
    causal: bool
    key_starts: Tensor | None
    key_lengths: Tensor | None

    @property
    def padded(self) -> bool:
        return self.key_starts is not None or self.key_lengths is not None

    @property
    def groups(self) -> int:
        return self.q.shape[1] // self.k.shape[1]

    @property
    def bounds(self) -> tuple[Tensor, Tensor]:
        """Starts and lengths of the keys; placeholders where there is no padding."""
        batch, n_k = self.q.shape[0], self.k.shape[2]
        if not self.padded:
            return self.q, self.q
        starts, lengths = self.key_starts, self.key_lengths
        if starts is None:
            starts = torch.zeros(batch, dtype=torch.int32, device=self.q.device)
        if lengths is None:
            lengths = torch.full((batch,), n_k, dtype=torch.int32, device=self.q.device)
        return starts.contiguous(), lengths.contiguous()

    def tail(self, tiles: Tiles) -> dict:
        """The constants that close every kernel's signature, by name."""
        head_dim = self.q.shape[3]
        return dict(
            CAUSAL=self.causal,
            PADDED=self.padded,
            ALPHA=self.alpha_kind,
            D=head_dim,
            BLOCK_D=max(16, triton.next_power_of_2(head_dim)),
            BLOCK_M=tiles.block_m,
            BLOCK_N=tiles.block_n,
            num_warps=tiles.num_warps,
            num_stages=tiles.num_stages,
        )

    def shape(self, heads: int) -> tuple:
        """The run-time numbers every kernel takes after its strides."""
        alpha_stride = 1 if self.alpha.numel() > 1 else 0
        return heads, self.groups, self.q.shape[2], self.k.shape[2], self.scale, alpha_stride


def halley_threshold(problem: Problem, max_iterations: int = _MAX_ITERATIONS) -> Tensor:
    """Return theta (B, H, N_q) float32 by Halley-bisection without a block mask."""
    q, k = problem.q, problem.k
    batch, heads, n_q, head_dim = q.shape
    tiles = choose_tiles(head_dim, q.dtype)
    theta = torch.empty(batch, heads, n_q, dtype=torch.float32, device=q.device)
    grid = (triton.cdiv(n_q, tiles.block_m) * batch * heads,)
    halley_kernel[grid](
        q, k, theta, problem.alpha, *problem.bounds, *q.stride()[:3], *k.stride()[:3],
        *problem.shape(heads), max_iterations, **problem.tail(tiles),
    )  # fmt: skip
    return theta


def forward_output(problem: Problem, theta: Tensor, need_out2: bool) -> tuple[Tensor, Tensor]:
    """Return O and O2 (B, H, N_q, D) in q's dtype; O2 is empty unless ``need_out2``."""
    q, k, v = problem.q, problem.k, problem.v
    batch, heads, n_q, head_dim = q.shape
    tiles = choose_tiles(head_dim, q.dtype)
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    out2 = torch.empty(q.shape if need_out2 else (0,), dtype=q.dtype, device=q.device)
    grid = (triton.cdiv(n_q, tiles.block_m) * batch * heads,)
    output_kernel[grid](
        q, k, v, theta, out, out2, problem.alpha, *problem.bounds,
        *q.stride()[:3], *k.stride()[:3], *v.stride()[:3],
        *problem.shape(heads), NEED_OUT2=need_out2, **problem.tail(tiles),
    )  # fmt: skip
    return out, out2


def backward_gradients(
    problem: Problem, theta: Tensor, out2: Tensor, d_out: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return dQ (B, H, N_q, D), dK and dV (B, H_kv, N_k, D) in the inputs' dtype."""
    q, k, v = problem.q, problem.k, problem.v
    batch, heads, n_q, head_dim = q.shape
    kv_heads, n_k = k.shape[1], k.shape[2]
    tiles = choose_tiles(head_dim, q.dtype)
    delta = torch.empty_like(theta)
    dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    strides = (*q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *d_out.stride()[:3])
    inputs = (problem.alpha, *problem.bounds)
    grad_query_kernel[(triton.cdiv(n_q, tiles.block_m) * batch * heads,)](
        q, k, v, theta, out2, d_out, delta, dq, *inputs, *strides, *problem.shape(heads), **problem.tail(tiles)
    )
    grad_key_value_kernel[(triton.cdiv(n_k, tiles.block_n) * batch * kv_heads,)](
        q, k, v, theta, delta, d_out, dk, dv, *inputs, *strides, *problem.shape(kv_heads), **problem.tail(tiles)
    )
    return dq, dk, dv


def threshold(method: str, problem: Problem) -> Tensor:
    """Return theta by the named method. A new method is a new row of ``THRESHOLDS``."""
    return THRESHOLDS[method](problem)


THRESHOLDS = {"adasplash": halley_threshold}
