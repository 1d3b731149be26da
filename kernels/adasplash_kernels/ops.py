"""The kernels as ``torch.library`` ops, so that ``torch.compile`` and fake tensors see through them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import launch
from .eager import TWICE

_NAMESPACE = "adasplash_kernels"


@torch.library.custom_op(f"{_NAMESPACE}::forward", mutates_args=())
def forward_op(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    alpha: Tensor,
    key_starts: Tensor | None,
    key_lengths: Tensor | None,
    alpha_kind: str,
    scale: float,
    causal: bool,
    method: str,
    need_backward: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return O, O2 (empty unless a backward pass will follow) and theta (B, H, N_q) float32."""
    problem = launch.Problem(q, k, v, alpha, alpha_kind, scale, causal, key_starts, key_lengths)
    theta = launch.threshold(method, problem)
    out, out2 = launch.forward_output(problem, theta, need_backward)
    return out, out2, theta


@forward_op.register_fake
def _(q, k, v, alpha, key_starts, key_lengths, alpha_kind, scale, causal, method, need_backward):
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    out2 = torch.empty(q.shape if need_backward else (0,), dtype=q.dtype, device=q.device)
    return out, out2, torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)


@torch.library.custom_op(f"{_NAMESPACE}::backward", mutates_args=())
def backward_op(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    alpha: Tensor,
    key_starts: Tensor | None,
    key_lengths: Tensor | None,
    theta: Tensor,
    out2: Tensor,
    d_out: Tensor,
    alpha_kind: str,
    scale: float,
    causal: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return dQ, dK and dV, contiguous, in the inputs' dtypes."""
    problem = launch.Problem(q, k, v, alpha, alpha_kind, scale, causal, key_starts, key_lengths)
    d_out = d_out if d_out.stride(-1) == 1 else d_out.contiguous()
    return launch.backward_gradients(problem, theta, out2, d_out)


@backward_op.register_fake
def _(q, k, v, alpha, key_starts, key_lengths, theta, out2, d_out, alpha_kind, scale, causal):
    return tuple(torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))


class KernelAttention(torch.autograd.Function):
    """Autograd around the two ops. Differentiating twice raises."""

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        alpha: Tensor,
        key_starts: Tensor | None,
        key_lengths: Tensor | None,
        alpha_kind: str,
        scale: float,
        causal: bool,
        method: str,
        need_backward: bool,
    ) -> Tensor:
        out, out2, theta = forward_op(
            q, k, v, alpha, key_starts, key_lengths, alpha_kind, scale, causal, method, need_backward
        )
        ctx.save_for_backward(q, k, v, alpha, key_starts, key_lengths, theta, out2)
        ctx.alpha_kind, ctx.scale, ctx.causal = alpha_kind, scale, causal
        return out

    @staticmethod
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, alpha, key_starts, key_lengths, theta, out2 = ctx.saved_tensors
        gradients = _KernelGradients.apply(
            q, k, v, d_out, alpha, key_starts, key_lengths, theta, out2, ctx.alpha_kind, ctx.scale, ctx.causal
        )
        return *gradients, *(None,) * 8


class _KernelGradients(torch.autograd.Function):
    """The backward op as a node of its own, so that a second derivative raises instead of being left out.

    PyTorch's ``once_differentiable`` only notices upstream gradients that require grad; a gradient penalty's do not.
    """

    @staticmethod
    def forward(ctx: Any, q, k, v, d_out, alpha, key_starts, key_lengths, theta, out2, alpha_kind, scale, causal):
        return backward_op(q, k, v, alpha, key_starts, key_lengths, theta, out2, d_out, alpha_kind, scale, causal)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        raise RuntimeError(TWICE)
