"""Checks of what callers pass in. Each failure names the argument, what was given and what is allowed."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from .masks import AttentionMask

MAX_HEAD_DIM = 256
KERNEL_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_INTEGERS = (torch.int32, torch.int64)
_MAX_WINDOW = 2**30  # a position plus a window must fit int32


def check_alpha(alpha: float | Tensor, heads: int | None = None) -> float | Tensor:
    """Return alpha as a float or a floating-point tensor; with ``heads``, a tensor must be scalar or (heads,)."""
    if isinstance(alpha, Tensor):
        if not alpha.is_floating_point():
            raise ValueError(f"alpha: got a tensor of {alpha.dtype}, allowed is a floating-point tensor")
        if heads is not None and tuple(alpha.shape) not in ((), (1,), (heads,)):
            raise ValueError(f"alpha: got shape {tuple(alpha.shape)}, allowed is a scalar or ({heads},), one per head")
        return alpha
    if isinstance(alpha, bool) or not isinstance(alpha, int | float):
        raise ValueError(f"alpha: got {type(alpha).__name__}, allowed is a number in [1, 2] or a tensor")
    if not 1 <= alpha <= 2:
        raise ValueError(f"alpha: got {alpha}, allowed is 1 (softmax) to 2 (sparsemax)")
    return float(alpha)


def check_qkv(q: Tensor, k: Tensor, v: Tensor) -> None:
    """Check shapes, dtypes and devices of (B, H, N, D) queries and (B, H_kv, N_k, D) keys and values."""
    for name, x in (("q", q), ("k", k), ("v", v)):
        if not isinstance(x, Tensor):
            raise ValueError(f"{name}: got {type(x).__name__}, allowed is a tensor")
        if x.ndim != 4:
            raise ValueError(f"{name}: got shape {tuple(x.shape)}, allowed is (batch, heads, length, head dim)")
        if x.dtype not in (*KERNEL_DTYPES, torch.float64):
            raise ValueError(f"{name}: got {x.dtype}, allowed are float16, bfloat16, float32 and float64")
        if x.dtype != q.dtype:
            raise ValueError(f"{name}: got {x.dtype}, allowed is q's dtype {q.dtype}")
        if x.device != q.device:
            raise ValueError(f"{name}: on {x.device}, allowed is q's device {q.device}")
    if v.shape != k.shape:
        raise ValueError(f"v: got shape {tuple(v.shape)}, allowed is k's shape {tuple(k.shape)}")
    if k.shape[0] != q.shape[0]:
        raise ValueError(f"k: got batch size {k.shape[0]}, allowed is q's {q.shape[0]}")
    if k.shape[3] != q.shape[3]:
        raise ValueError(f"k: got head dim {k.shape[3]}, allowed is q's {q.shape[3]}")
    if not 1 <= q.shape[3] <= MAX_HEAD_DIM:
        raise ValueError(f"q: got head dim {q.shape[3]}, allowed is 1 to {MAX_HEAD_DIM}")
    if k.shape[1] == 0 or q.shape[1] % k.shape[1]:
        raise ValueError(f"k: got {k.shape[1]} heads, allowed is a divisor of q's {q.shape[1]} heads")
    if k.shape[2] == 0:
        raise ValueError("k: got length 0, allowed is 1 or more")


def check_per_sequence(name: str, x: Tensor | None, q: Tensor) -> None:
    """Check a (B,) integer tensor such as ``key_lengths``."""
    if x is None:
        return
    _check_integers(name, x, q)
    if tuple(x.shape) != (q.shape[0],):
        raise ValueError(f"{name}: got shape {tuple(x.shape)}, allowed is ({q.shape[0]},), one per sequence")


def _check_integers(name: str, x: Tensor, q: Tensor) -> None:
    if not isinstance(x, Tensor) or x.dtype not in _INTEGERS:
        given = x.dtype if isinstance(x, Tensor) else type(x).__name__
        raise ValueError(f"{name}: got {given}, allowed is a tensor of int32 or int64")
    if x.device != q.device:
        raise ValueError(f"{name}: on {x.device}, allowed is q's device {q.device}")


def check_window(window: int | None) -> None:
    """Check the width of a sliding window; None is no window."""
    if window is None:
        return
    if isinstance(window, bool) or not isinstance(window, int):
        raise ValueError(f"window: got {type(window).__name__}, allowed is a positive integer or None")
    if not 1 <= window <= _MAX_WINDOW:
        raise ValueError(f"window: got {window}, allowed is 1 to {_MAX_WINDOW}, or None for no window")


def check_alibi_slopes(slopes: Tensor | None, q: Tensor) -> None:
    """Check (H,) or (B, H) float32 slopes for (B, H, N_q, D) queries.

    Raises:
        ValueError: wrong type, shape, dtype or device.
        NotImplementedError: the slopes ask for a gradient, which no method computes.
    """
    if slopes is None:
        return
    if not isinstance(slopes, Tensor) or slopes.dtype != torch.float32:
        given = slopes.dtype if isinstance(slopes, Tensor) else type(slopes).__name__
        raise ValueError(f"alibi_slopes: got {given}, allowed is a tensor of float32")
    batch, heads = q.shape[:2]
    if tuple(slopes.shape) not in ((heads,), (batch, heads)):
        raise ValueError(
            f"alibi_slopes: got shape {tuple(slopes.shape)}, allowed is ({heads},), one per head, or ({batch}, {heads})"
        )
    if slopes.device != q.device:
        raise ValueError(f"alibi_slopes: on {slopes.device}, allowed is q's device {q.device}")
    if slopes.requires_grad and torch.is_grad_enabled():
        raise NotImplementedError("alibi_slopes: its gradient is not implemented by any method; pass it detached")


def check_packing(
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    q: Tensor,
    k: Tensor,
    key_starts: Tensor | None,
    key_lengths: Tensor | None,
) -> tuple[Tensor | None, Tensor | None]:
    """Return the (S + 1,) cumulative lengths of packed queries and keys, the keys' default filled in.

    Values are not inspected: that would wait for the GPU.
    """
    if cu_seqlens_q is None:
        if cu_seqlens_k is not None:
            raise ValueError("cu_seqlens_k: got it without cu_seqlens_q, allowed is only together with it")
        return None, None
    _check_integers("cu_seqlens_q", cu_seqlens_q, q)
    if cu_seqlens_q.ndim != 1 or cu_seqlens_q.shape[0] < 2:
        raise ValueError(
            f"cu_seqlens_q: got shape {tuple(cu_seqlens_q.shape)}, allowed is (S + 1,) for S sequences, S at least 1"
        )
    if q.shape[0] != 1:
        raise ValueError(f"cu_seqlens_q: got it with q of batch size {q.shape[0]}, allowed is batch size 1")
    for name, value in (("key_starts", key_starts), ("key_lengths", key_lengths)):
        if value is not None:
            raise ValueError(f"{name}: got it together with cu_seqlens_q, allowed is one of the two")
    if cu_seqlens_k is None:
        if q.shape[2] != k.shape[2]:
            raise ValueError(
                f"cu_seqlens_k: got None with {q.shape[2]} queries and {k.shape[2]} keys, allowed is None only where "
                "these are equal"
            )
        return cu_seqlens_q, cu_seqlens_q
    _check_integers("cu_seqlens_k", cu_seqlens_k, q)
    if cu_seqlens_k.shape != cu_seqlens_q.shape:
        given, allowed = tuple(cu_seqlens_k.shape), tuple(cu_seqlens_q.shape)
        raise ValueError(f"cu_seqlens_k: got shape {given}, allowed is cu_seqlens_q's {allowed}")
    return cu_seqlens_q, cu_seqlens_k


def check_mask(q: Tensor, k: Tensor, **fields: Any) -> AttentionMask:
    """Check the fields of an ``AttentionMask`` against checked queries and keys, and return the mask."""
    mask = AttentionMask(**fields)
    check_window(mask.window)
    check_alibi_slopes(mask.alibi_slopes, q)
    check_per_sequence("key_starts", mask.key_starts, q)
    check_per_sequence("key_lengths", mask.key_lengths, q)
    queries, keys = check_packing(mask.cu_seqlens_q, mask.cu_seqlens_k, q, k, mask.key_starts, mask.key_lengths)
    if keys is mask.cu_seqlens_k:
        return mask
    return dataclasses.replace(mask, cu_seqlens_q=queries, cu_seqlens_k=keys)


def check_scale(scale: float | None, head_dim: int) -> float:
    """Return the factor on q.k, ``1/sqrt(head_dim)`` by default."""
    if scale is None:
        return head_dim**-0.5
    if isinstance(scale, bool) or not isinstance(scale, int | float):
        raise ValueError(f"scale: got {type(scale).__name__}, allowed is a number or None")
    if not scale > 0 or scale == float("inf"):
        raise ValueError(f"scale: got {scale}, allowed is a positive finite number or None")
    return float(scale)
