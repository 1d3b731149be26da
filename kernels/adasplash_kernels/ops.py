"""The kernels as ``torch.library`` ops, so that ``torch.compile`` and fake tensors see through them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import decode, launch, limits
from .custom_ops import define, differentiate, no_gradient
from .problem import Problem, list_numbers
from .replays import replayed
from .thresholds import THRESHOLDS
from .tile_sizes import choose_column_tiles, choose_tiles
from .worklists.tiles import words


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    alpha: Tensor | None,
    alibi_slopes: Tensor | None,
    key_starts: Tensor | None,
    key_lengths: Tensor | None,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    alpha_kind: str,
    scale: float,
    left: int,
    right: int,
    method: str,
    need_backward: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Compute attention; arguments as in ``Problem``, and the name of a threshold method.

    Returns:
        O; O2, empty unless a backward pass will follow; theta (B, H, N_q) float32; the work lists
        (B * H, ...) int32, empty without any or without a backward pass.
    """
    attend = _attend if THRESHOLDS[method].replayed else _attend.__wrapped__
    out, out2, theta, lists = attend(
        q, k, v, alpha, alibi_slopes, key_starts, key_lengths, cu_seqlens_q, cu_seqlens_k, alpha_kind, scale, left,
        right, method, need_backward,
    )  # fmt: skip
    return out.sum(0).to(q.dtype) if out.ndim > q.ndim else out, out2, theta, lists


def _both_ways(
    q, k, v, alpha, alibi_slopes, key_starts, key_lengths, cu_seqlens_q, cu_seqlens_k, alpha_kind, scale, left, right,
    method, need_backward,
):  # fmt: skip
    """Compute attention and gradients, so that the kernels of both are compiled together."""
    problem = (q, k, v, alpha, alibi_slopes, key_starts, key_lengths, cu_seqlens_q, cu_seqlens_k)
    out, out2, theta, lists = _attend.__wrapped__(*problem, alpha_kind, scale, left, right, method, need_backward)
    if need_backward:
        need_alpha = alpha is not None and alpha.requires_grad
        _gradients.__wrapped__(
            *problem, theta, out2, lists, out, alpha_kind, scale, left, right, method, need_alpha
        )  # fmt: skip


@replayed(limits.settings, ahead=_both_ways)
def _attend(
    q, k, v, alpha, alibi_slopes, key_starts, key_lengths, cu_seqlens_q, cu_seqlens_k, alpha_kind, scale, left, right,
    method, need_backward,
):  # fmt: skip
    problem = Problem(q, k, v, alpha, alpha_kind, scale, left, right, alibi_slopes, key_starts, key_lengths,
                             cu_seqlens_q, cu_seqlens_k)  # fmt: skip
    if not need_backward:
        if decode.suits(problem):
            out, theta = decode.decode(problem, method)  # in parts
        else:
            out, _, theta, _ = launch.forward(method, problem, need_out2=False)
        return out, q.new_empty(0), theta, _no_lists(q)
    out, out2, theta, lists = launch.forward(method, problem, need_out2=True)
    return out, out2, theta, _no_lists(q) if lists is None else lists


def _no_lists(q: Tensor) -> Tensor:
    return torch.empty(0, 0, 0, dtype=torch.int32, device=q.device)


def _fake_forward(
    q, k, v, alpha, alibi_slopes, key_starts, key_lengths, cu_seqlens_q, cu_seqlens_k, alpha_kind, scale, left, right,
    method, need_backward,
):  # fmt: skip
    (batch, heads, n_q, _), n_k = q.shape, k.shape[2]
    lists = _no_lists(q)
    if need_backward and THRESHOLDS[method].lists and alpha_kind != "1":
        tiles = choose_tiles(q.shape[3], q.dtype)
        shape = (batch * heads, -(-n_q // tiles.block_m), words(-(-n_k // tiles.block_n)))
        if THRESHOLDS[method].lists == "columns":
            columns = choose_column_tiles(q.shape[3], q.dtype)
            blocks = -(-n_q // columns.walk.block_m)
            shape = (batch * heads, list_numbers(columns, blocks, n_k))
        lists = torch.empty(shape, dtype=torch.int32, device=q.device)
    out2 = torch.empty(q.shape if need_backward else (0,), dtype=q.dtype, device=q.device)
    theta = torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)
    return torch.empty(q.shape, dtype=q.dtype, device=q.device), out2, theta, lists


def backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    alpha: Tensor | None,
    alibi_slopes: Tensor | None,
    key_starts: Tensor | None,
    key_lengths: Tensor | None,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    theta: Tensor,
    out2: Tensor,
    lists: Tensor,
    d_out: Tensor,
    alpha_kind: str,
    scale: float,
    left: int,
    right: int,
    method: str,
    need_alpha: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return dQ, dK, dV, contiguous, in the inputs' dtypes, and d_alpha of alpha's shape (empty if not asked for)."""
    d_out = d_out if d_out.stride(-1) == 1 else d_out.contiguous()
    gradients = _gradients if THRESHOLDS[method].replayed else _gradients.__wrapped__
    dq, dk, dv, rows = gradients(
        q, k, v, alpha, alibi_slopes, key_starts, key_lengths, cu_seqlens_q, cu_seqlens_k, theta, out2, lists, d_out,
        alpha_kind, scale, left, right, method, need_alpha,
    )  # fmt: skip
    if rows is None:
        return dq, dk, dv, no_gradient(q)
    return dq, dk, dv, rows.sum((0, 2)) if alpha.numel() == q.shape[1] else rows.sum().reshape(1)


@replayed(limits.settings)
def _gradients(
    q, k, v, alpha, alibi_slopes, key_starts, key_lengths, cu_seqlens_q, cu_seqlens_k, theta, out2, lists, d_out,
    alpha_kind, scale, left, right, method, need_alpha,
):  # fmt: skip
    problem = Problem(q, k, v, alpha, alpha_kind, scale, left, right, alibi_slopes, key_starts, key_lengths,
                             cu_seqlens_q, cu_seqlens_k)  # fmt: skip
    found = lists if lists.numel() else None
    return launch.backward_gradients(problem, theta, out2, method, found, d_out, need_alpha)


def _fake_backward(
    q, k, v, alpha, alibi_slopes, key_starts, key_lengths, cu_seqlens_q, cu_seqlens_k, theta, out2, lists, d_out,
    alpha_kind, scale, left, right, method, need_alpha,
):  # fmt: skip
    gradients = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    return *gradients, alpha.new_empty(alpha.shape) if need_alpha else no_gradient(q)


forward_op = define(forward, _fake_forward)
backward_op = define(backward, _fake_backward)

_SAVED = 9  # tensors that come first in both ops' arguments


def _save(ctx: Any, inputs: tuple, output: tuple) -> None:
    _, out2, theta, lists = output
    ctx.mark_non_differentiable(out2, theta, lists)
    ctx.save_for_backward(*inputs[:_SAVED], theta, out2, lists)
    ctx.options = inputs[_SAVED : _SAVED + 5]  # alpha_kind, scale, left, right, method


def _differentiate(ctx: Any, d_out: Tensor, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    need_alpha = ctx.needs_input_grad[3]
    *gradients, d_alpha = backward_op(*ctx.saved_tensors, d_out, *ctx.options, need_alpha)
    return *gradients, d_alpha if need_alpha else None, *(None,) * 11


differentiate(forward_op, backward_op, _differentiate, _save)
