"""The public attention function: checks, choice of method, dispatch."""

from __future__ import annotations

import torch
from torch import Tensor

from .arguments import check_alpha, check_mask, check_qkv, check_scale
from .dispatch import choose_method, fastest_kernel, kernel_alpha
from .eager import attention_eager
from .masks import AttentionMask


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
            inspected (that would wait for the GPU): outside [1, 2] they count as the nearer end. A tensor may require
            grad.
        causal: query ``i`` stands at key ``i + N_k - N_q`` (the last query at the last key) and sees none after it.
        scale: factor on q.k, ``1/sqrt(D)`` by default.
        window: at least 1; a query sees only keys less than ``window`` away from where it stands.
        alibi_slopes: (H,) or (B, H) float32; slope times distance is taken off the scores (ALiBi, Press et al. 2022).
            No gradient flows to it.
        key_lengths: (B,) int32 or int64; keys at or past it are padding.
        key_starts: (B,) int32 or int64; keys before it are padding (left-padded batches).
        cu_seqlens_q, cu_seqlens_k: (S + 1,) int32 or int64, cumulative lengths, from 0, of S sequences packed one after
            the other along N, for a batch of 1. A query sees keys of its own sequence alone, and stands in it as above,
            by the sequence's own lengths. Without ``cu_seqlens_k`` the keys are packed like the queries. Values are
            not inspected; tokens past the last length see and are seen by nothing.
        method: ``"eager"`` is dense PyTorch; the others are Triton (CUDA, or CPU under ``TRITON_INTERPRET=1``):
            ``"adasplash"`` solves for the threshold by Halley-bisection and skips tiles without weights through a bit
            mask, ``"adasplash_nomask"`` skips none, ``"adasplash2"`` starts from a histogram of the scores and skips
            tiles, ``"columns"`` lists the single keys that a block of queries can use, from a bound by the maxima of
            groups of scores, and ``"columns_nolist"`` starts from that bound but visits all keys. ``"auto"`` is eager
            on CPU and for float64; on CUDA ``"columns"`` for long sequences and ``"columns_nolist"`` for short ones
            (see ``dispatch.fastest_kernel``).
        deterministic: every method adds in a fixed order, so True, False and None give the same bits.

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
    mask = check_mask(
        q, k, causal=causal, window=window, alibi_slopes=alibi_slopes, key_starts=key_starts, key_lengths=key_lengths,
        cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k,
    )  # fmt: skip
    if isinstance(alpha, Tensor) and alpha.device != q.device and alpha.ndim:
        raise ValueError(f"alpha: on {alpha.device}, allowed is q's device {q.device}")
    sequences = 1 if mask.cu_seqlens_k is None else mask.cu_seqlens_k.shape[0] - 1  # equally long, for all shapes tell
    visible = min(k.shape[2] // max(sequences, 1), 2 * (mask.window or k.shape[2]))
    chosen = choose_method(method, q, "q", fastest_kernel(q.shape[0] * q.shape[1], q.shape[2], visible, q.shape[3]))
    if chosen == "eager":
        with torch.autocast(q.device.type, enabled=False):
            return attention_eager(q, k, v, alpha=alpha, scale=scale, mask=mask)
    return _run_kernels(q, k, v, alpha, scale, mask, chosen)


def _as_autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Cast to autocast's dtype where it is on, as for PyTorch's own attention; rotary embeddings, for one, leave
    queries and keys in float32 beside values in bfloat16."""
    first = tensors[0]
    if not isinstance(first, Tensor) or not torch.is_autocast_enabled(first.device.type):
        return tensors
    low = torch.get_autocast_dtype(first.device.type)
    return tuple(x.to(low) if isinstance(x, Tensor) and x.is_floating_point() else x for x in tensors)


def _run_kernels(
    q: Tensor, k: Tensor, v: Tensor, alpha: float | Tensor, scale: float, mask: AttentionMask, method: str
) -> Tensor:
    from .inputs import UNLIMITED  # imported late: the eager path works without Triton
    from .ops import forward_op

    alpha, kind = kernel_alpha(alpha, q.device)
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    if q.numel() == 0:
        return q * 1.0
    reach = UNLIMITED if mask.window is None else mask.window - 1
    need_backward = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (q, k, v, alpha))
    return forward_op(
        q, k, v, alpha, mask.alibi_slopes, mask.key_starts, mask.key_lengths, mask.cu_seqlens_q, mask.cu_seqlens_k,
        kind, scale, reach, 0 if mask.causal else reach, method, need_backward,
    )[0]  # fmt: skip
