"""Checks of what callers pass in. Each failure names the argument, what was given and what is allowed."""

from __future__ import annotations

import torch
from torch import Tensor

MAX_HEAD_DIM = 256
KERNEL_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_INTEGERS = (torch.int32, torch.int64)


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
    if not isinstance(x, Tensor) or x.dtype not in _INTEGERS:
        given = x.dtype if isinstance(x, Tensor) else type(x).__name__
        raise ValueError(f"{name}: got {given}, allowed is a tensor of int32 or int64")
    if tuple(x.shape) != (q.shape[0],):
        raise ValueError(f"{name}: got shape {tuple(x.shape)}, allowed is ({q.shape[0]},), one per sequence")
    if x.device != q.device:
        raise ValueError(f"{name}: on {x.device}, allowed is q's device {q.device}")


def check_scale(scale: float | None, head_dim: int) -> float:
    """Return the factor on q.k, ``1/sqrt(head_dim)`` by default."""
    if scale is None:
        return head_dim**-0.5
    if isinstance(scale, bool) or not isinstance(scale, int | float):
        raise ValueError(f"scale: got {type(scale).__name__}, allowed is a number or None")
    if not scale > 0 or scale == float("inf"):
        raise ValueError(f"scale: got {scale}, allowed is a positive finite number or None")
    return float(scale)
