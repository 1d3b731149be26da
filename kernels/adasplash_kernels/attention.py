"""The public attention function: checks, choice of method, dispatch."""

from __future__ import annotations

import torch
from torch import Tensor

from .arguments import KERNEL_DTYPES, check_alpha, check_per_sequence, check_qkv, check_scale
from .eager import attention_eager

METHODS = ("auto", "eager", "adasplash")
_PLANNED = ("adasplash2", "columns")


def entmax_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    alpha: float | Tensor = 1.5,
    causal: bool = False,
    scale: float | None = None,
    window: int | None = None,
    alibi_slopes: Tensor | None = None,
    key_lengths: Tensor | None = None,
    key_starts: Tensor | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    method: str = "auto",
    deterministic: bool | None = None,
) -> Tensor:
    """Attention whose weights are alpha-entmax of the scores: exact, and zero for most keys (AdaSplash, sec. 3).

    Args:
        q: (B, H, N_q, D) queries; float16, bfloat16 or float32, and float64 for ``method="eager"``. Any strides.
        k, v: (B, H_kv, N_k, D) keys and values of q's dtype; H must be a multiple of H_kv (grouped queries).
            D is 1 to 256, N_k at least 1, N_q may differ from N_k.
        alpha: 1 is softmax, 2 is sparsemax; a number in [1, 2] or a tensor, scalar or (H,), whose values are not
            inspected (that would wait for the GPU): outside [1, 2] they count as the nearer end. A tensor that
            requires grad needs ``method="eager"`` for now.
        causal: query ``i`` sees key ``j`` only if ``j <= i + N_k - N_q``: the last query sees the last key.
        scale: factor on q.k, ``1/sqrt(D)`` by default.
        key_lengths: (B,) int32 or int64; keys at or past it are padding.
        key_starts: (B,) int32 or int64; keys before it are padding (left-padded batches).
        method: ``"eager"`` is dense PyTorch; ``"adasplash"`` is Halley-bisection in Triton (CUDA, or CPU under
            ``TRITON_INTERPRET=1``); ``"auto"`` is eager on CPU and for float64, a Triton kernel on CUDA.
        deterministic: every method so far adds in a fixed order, so True, False and None give the same bits.
        window, alibi_slopes, cu_seqlens_q, cu_seqlens_k: reserved, not implemented yet.

    Under autocast q, k and v are cast to its dtype.

    Returns:
        (B, H, N_q, D) in q's dtype. A query that may see no key gets zeros, and its gradients are zero; a query
        with one key copies its value; tied scores share equally; NaN in a row's scores makes its output NaN.

    Raises:
        ValueError: an argument has the wrong type, shape, dtype, device or range; the message names it.
        NotImplementedError: an argument is valid but its implementation is still missing.
        RuntimeError: differentiated twice.
    """
    q, k, v = _as_autocast(q, k, v)
    check_qkv(q, k, v)
    alpha = check_alpha(alpha, heads=q.shape[1])
    scale = check_scale(scale, q.shape[3])
    check_per_sequence("key_lengths", key_lengths, q)
    check_per_sequence("key_starts", key_starts, q)
    for name, value in (("window", window), ("alibi_slopes", alibi_slopes), ("cu_seqlens_q", cu_seqlens_q),
                        ("cu_seqlens_k", cu_seqlens_k)):  # fmt: skip
        if value is not None:
            raise NotImplementedError(f"{name}: not implemented yet by any method")
    if isinstance(alpha, Tensor) and alpha.device != q.device and alpha.ndim:
        raise ValueError(f"alpha: on {alpha.device}, allowed is q's device {q.device}")
    chosen = _choose_method(method, q, alpha)
    if chosen == "eager":
        with torch.autocast(q.device.type, enabled=False):
            return attention_eager(
                q, k, v, alpha=alpha, causal=causal, scale=scale, key_starts=key_starts, key_lengths=key_lengths
            )
    return _run_kernels(q, k, v, alpha, causal, scale, key_starts, key_lengths, chosen)


def _as_autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Cast to autocast's dtype where it is on, as for PyTorch's own attention; rotary embeddings, for one, leave
    queries and keys in float32 beside values in bfloat16."""
    first = tensors[0]
    if not isinstance(first, Tensor) or not torch.is_autocast_enabled(first.device.type):
        return tensors
    low = torch.get_autocast_dtype(first.device.type)
    return tuple(x.to(low) if isinstance(x, Tensor) and x.is_floating_point() else x for x in tensors)


def _choose_method(method: str, q: Tensor, alpha: float | Tensor) -> str:
    if method in _PLANNED:
        raise NotImplementedError(f"method: {method!r} is not implemented yet; available are {', '.join(METHODS)}")
    if method not in METHODS:
        raise ValueError(f"method: got {method!r}, allowed are {', '.join(METHODS)}")
    if method == "auto":
        method = "eager" if q.device.type == "cpu" or q.dtype == torch.float64 else "adasplash"
    if method == "eager":
        return method
    if q.dtype not in KERNEL_DTYPES:
        raise ValueError(f"q: got {q.dtype}, allowed with method {method!r} are float16, bfloat16 and float32")
    if q.device.type == "cpu" and not kernels_interpreted():
        raise ValueError(
            f"method: {method!r} needs CUDA tensors, q is on the CPU; use 'auto' or 'eager', or set "
            "TRITON_INTERPRET=1 before importing triton to run the kernels in its interpreter"
        )
    if isinstance(alpha, Tensor) and alpha.requires_grad and torch.is_grad_enabled():
        raise NotImplementedError(
            f"alpha: its gradient is not implemented yet by method {method!r}; use method='eager'"
        )
    return method


def kernels_interpreted() -> bool:
    """Tell whether Triton runs kernels on the CPU; False where Triton is not installed."""
    try:
        from .launch import INTERPRETED
    except ModuleNotFoundError:
        return False
    return INTERPRETED


def _run_kernels(q, k, v, alpha, causal, scale, key_starts, key_lengths, method) -> Tensor:
    from .ops import KernelAttention  # imported late: the eager path works without Triton

    kinds = {1.0: "1", 1.5: "1.5", 2.0: "2"}
    kind = "any" if isinstance(alpha, Tensor) else kinds.get(alpha, "any")
    if isinstance(alpha, Tensor):
        alpha = alpha.detach().to(device=q.device, dtype=torch.float32).reshape(-1).contiguous()
    else:
        alpha = torch.full((1,), alpha, dtype=torch.float32, device=q.device)
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    need_backward = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v))
    if q.numel() == 0:
        return q * 1.0
    return KernelAttention.apply(
        q, k, v, alpha, key_starts, key_lengths, kind, scale, causal, method, need_backward
    )
