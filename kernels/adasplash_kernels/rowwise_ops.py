"""Row-wise entmax in Triton: thresholds by attention's own solvers on stored scores, then weights and gradients."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .custom_ops import define, differentiate, no_gradient
from .inputs import open_sizes
from .launch import threshold
from .launching import launched_by_key
from .mapping import alpha_slope, load_exponent, weights
from .problem import Problem
from .scores import load_theta, query_block, threshold_scores
from .tile_sizes import choose_row_tiles
from .worklists.walk import MIXED, all_tiles


@triton.jit
def _places(x, size, at, tile):
    """Return where a tile of rows lies in a contiguous matrix, and which of it exists."""
    cols = tile * x.BLOCK_N + tl.arange(0, x.BLOCK_N)
    rows = at.head_index * size.n_q + at.rows
    return rows[:, None] * size.n_k + cols[None, :], (at.rows < size.n_q)[:, None] & (cols < size.n_k)[None, :]


@launched_by_key
@triton.jit
def _weights_kernel(x, size, theta_in, out):
    """Write the weights of a block of rows."""
    size = open_sizes(x, size)
    at = query_block(x, size)
    a = load_exponent(x, size, at.head)
    theta = load_theta(theta_in, size, at)[:, None]
    for tile in range(at.first, at.last):
        p, _u = weights(threshold_scores(x, size, at, 0.0, all_tiles(at), tile, MIXED), size.scale, theta, a, x.ALPHA)
        offsets, keep = _places(x, size, at, tile)
        tl.store(out + offsets, p.to(out.dtype.element_ty), mask=keep)


@launched_by_key
@triton.jit
def _gradient_kernel(x, size, theta_in, d_out, d_scores, d_alpha):
    """Write dS = U (dP - delta) of a block of rows, delta = sum(U dP) / sum(U); and d_alpha by row unless None."""
    size = open_sizes(x, size)
    at = query_block(x, size)
    a = load_exponent(x, size, at.head)
    theta = load_theta(theta_in, size, at)[:, None]
    total = tl.zeros((x.BLOCK_M,), tl.float32)
    product = tl.zeros((x.BLOCK_M,), tl.float32)
    for tile in range(at.first, at.last):
        _p, u = weights(threshold_scores(x, size, at, 0.0, all_tiles(at), tile, MIXED), size.scale, theta, a, x.ALPHA)
        offsets, keep = _places(x, size, at, tile)
        total += tl.sum(u, 1)
        product += tl.sum(u * tl.load(d_out + offsets, mask=keep, other=0.0).to(tl.float32), 1)
    delta = product / tl.where(total == 0.0, 1.0, total)
    to_alpha = tl.zeros((x.BLOCK_M,), tl.float32)
    for tile in range(at.first, at.last):
        p, u = weights(threshold_scores(x, size, at, 0.0, all_tiles(at), tile, MIXED), size.scale, theta, a, x.ALPHA)
        offsets, keep = _places(x, size, at, tile)
        centred = tl.load(d_out + offsets, mask=keep, other=0.0).to(tl.float32) - delta[:, None]
        tl.store(d_scores + offsets, (u * centred).to(d_scores.dtype.element_ty), mask=keep)
        if d_alpha is not None:
            to_alpha += tl.sum(centred * alpha_slope(p, u, a), 1)
    if d_alpha is not None:
        tl.store(d_alpha + at.head_index * size.n_q + at.rows, to_alpha, mask=at.rows < size.n_q)


def _problem(scores: Tensor, alpha: Tensor | None, alpha_kind: str) -> Problem:
    """Rows as queries of one head; with an alpha each, as heads of one query."""
    rows, n = scores.shape
    by_row = alpha is not None and alpha.numel() > 1
    nothing = scores.new_empty(1)
    q = nothing.expand(1, rows, 1, 1) if by_row else nothing.expand(1, 1, rows, 1)
    k = nothing.expand(1, 1, n, 1)
    tiles = choose_row_tiles(n, by_row)
    return Problem(q, k, k, alpha, alpha_kind, 1.0, scores=scores, tiles=tiles)


def entmax(scores: Tensor, alpha: Tensor | None, alpha_kind: str, method: str) -> tuple[Tensor, Tensor]:
    """Return the weights (rows, n) in the scores' dtype and theta (rows,) float32.

    Args:
        scores: (rows, n) contiguous.
        alpha: (1,) or (rows,) float32, which is read where ``alpha_kind`` is "any"; else that is "1", "1.5" or "2", and
            alpha may be None.
        method: name of a threshold method that can read stored scores.
    """
    problem = _problem(scores, alpha, alpha_kind)
    theta, _ = threshold(method, problem)
    out = torch.empty_like(scores)
    _weights_kernel[problem.query_grid()](problem.inputs(), problem.sizes(), theta, out, **problem.options)
    return out, theta.reshape(-1)


def _fake_entmax(scores, alpha, alpha_kind, method):
    return torch.empty_like(scores), torch.empty(scores.shape[:1], dtype=torch.float32, device=scores.device)


def entmax_backward(
    scores: Tensor, alpha: Tensor | None, theta: Tensor, d_out: Tensor, alpha_kind: str, need_alpha: bool
) -> tuple[Tensor, Tensor]:
    """Return the gradients to the scores and to alpha (empty if not asked for)."""
    problem = _problem(scores, alpha, alpha_kind)
    d_scores = torch.empty_like(scores)
    rows = torch.empty_like(theta) if need_alpha else None
    _gradient_kernel[problem.query_grid()](
        problem.inputs(), problem.sizes(), theta, d_out.contiguous(), d_scores, rows, **problem.options
    )
    if rows is None:
        return d_scores, no_gradient(scores)
    return d_scores, rows if alpha.numel() > 1 else rows.sum().reshape(1)


def _fake_entmax_backward(scores, alpha, theta, d_out, alpha_kind, need_alpha):
    return torch.empty_like(scores), alpha.new_empty(alpha.shape) if need_alpha else no_gradient(scores)


entmax_op = define(entmax, _fake_entmax)
entmax_backward_op = define(entmax_backward, _fake_entmax_backward)


def _save(ctx: Any, inputs: tuple, output: tuple) -> None:
    scores, alpha, ctx.alpha_kind, _ = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(scores, alpha, output[1])


def _differentiate(ctx: Any, d_out: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
    need_alpha = ctx.needs_input_grad[1]
    d_scores, d_alpha = entmax_backward_op(*ctx.saved_tensors, d_out, ctx.alpha_kind, need_alpha)
    return d_scores, d_alpha if need_alpha else None, None, None


differentiate(entmax_op, entmax_backward_op, _differentiate, _save)
