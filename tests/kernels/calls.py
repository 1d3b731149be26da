"""What the kernel tests call, and with which tensors."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from adasplash_kernels import entmax_attention
from adasplash_kernels.dispatch import METHODS as PUBLIC_METHODS
from adasplash_kernels.dispatch import kernel_alpha
from adasplash_kernels.inputs import UNLIMITED
from adasplash_kernels.reference import attention_reference

METHODS = tuple(m for m in PUBLIC_METHODS if m != "auto")
KERNELS = tuple(m for m in METHODS if m != "eager")
USUAL = 2 / 3  # for limits.DENSEST: with a GPU's own, inputs as small as those of tests have hardly any lists

Device = str | torch.device


def stretch(device: Device, factor: int = 9) -> int:
    """What lengths are multiplied by, so that they cross the tiles of a GPU too, which are 2 to 4 times larger."""
    return factor if torch.device(device).type == "cuda" else 1  # odd, so that odd lengths stay odd


def tile_size(head_dim: int, dtype: torch.dtype) -> tuple[int, int]:
    """Return the queries and keys of one tile of the kernels."""
    from adasplash_kernels.tile_sizes import choose_tiles

    tiles = choose_tiles(head_dim, torch.float32 if dtype == torch.float64 else dtype)
    return tiles.block_m, tiles.block_n


def tile_mask(words: Tensor, columns: int) -> Tensor:
    """Return the bits of (B * H, query blocks, words) int32, lowest first, as (B * H, blocks, columns) bool."""
    bits = words[..., None] >> torch.arange(32, device=words.device) & 1
    return bits.flatten(-2)[..., :columns].bool()


def bind(method: str) -> Callable[..., Tensor]:
    """Return ``entmax_attention`` with its method chosen."""
    return functools.partial(entmax_attention, method=method)


def plain(method: str) -> Callable[..., Tensor]:
    """Return the yardstick of a method's error: the same computation in plain PyTorch at the inputs' precision.

    That is the eager method; for the eager method itself, the float64 oracle rounded to the inputs' precision.
    """
    return _rounded_reference if method == "eager" else bind("eager")


def _rounded_reference(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
    return attention_reference(q, k, v, **options).to(q.dtype)


def random_qkv(
    device: Device, n_q: int, n_k: int | None = None, head_dim: int = 16, *, heads: int = 1,
    kv_heads: int | None = None, batch: int = 1, spread: float = 1.0, dtype: torch.dtype = torch.float32, seed: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Return normal q (B, H, N_q, D), ``spread`` times as large, and k, v (B, H_kv, N_k, D), the same on any device."""
    generator = torch.Generator().manual_seed(seed)
    n_k, kv_heads = n_q if n_k is None else n_k, heads if kv_heads is None else kv_heads
    q = spread * torch.randn(batch, heads, n_q, head_dim, generator=generator)
    k, v = (torch.randn(batch, kv_heads, n_k, head_dim, generator=generator) for _ in range(2))
    return q.to(device, dtype), k.to(device, dtype), v.to(device, dtype)


def positions(device: Device, *values: int, dtype: torch.dtype = torch.int32) -> Tensor:
    """Return lengths, starts or cumulative lengths as a tensor."""
    return torch.tensor(values, dtype=dtype, device=device)


def in_turn(cases: Sequence[str]) -> list[tuple[str, str]]:
    """Return pairs of a kernel method and a case: all on a GPU; elsewhere one method a case, in turn, to save time."""
    if torch.cuda.is_available():
        return list(itertools.product(KERNELS, cases))
    return [(KERNELS[i % len(KERNELS)], case) for i, case in enumerate(cases)]


def op_arguments(
    q: Tensor, k: Tensor, v: Tensor, method: str, *, alpha: float | Tensor = 1.5, left: int = UNLIMITED,
    right: int = UNLIMITED, need_backward: bool = True, **masks: Tensor,
) -> tuple[Any, ...]:  # fmt: skip
    """Return what ``torch.ops.adasplash_kernels.forward`` takes, for tests that look behind the public function."""
    numbers, kind = kernel_alpha(alpha, q.device)
    names = ("alibi_slopes", "key_starts", "key_lengths", "cu_seqlens_q", "cu_seqlens_k")
    tensors = (numbers, *(masks.get(n) for n in names))
    return q, k, v, *tensors, kind, q.shape[-1] ** -0.5, left, right, method, need_backward
