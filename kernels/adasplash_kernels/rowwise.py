"""alpha-entmax of a tensor along one dimension, without attention around it."""

from __future__ import annotations

import torch
from torch import Tensor

from .arguments import check_alpha
from .dispatch import choose_method, kernel_alpha
from .eager import DenseEntmax


def entmax(x: Tensor, alpha: float | Tensor = 1.5, dim: int = -1, *, method: str = "auto") -> Tensor:
    """Map scores to a sparse distribution along ``dim`` (Peters et al. 2019; AdaSplash, eq. 2).

    Args:
        x: floating-point scores of any shape; ``-inf`` excludes an entry. float16 and bfloat16 are computed in
            float32 and returned in their own dtype.
        alpha: 1 is softmax, 2 is sparsemax; a number in [1, 2], or a tensor that broadcasts against ``x`` with
            ``dim`` moved last and size 1 there (a 0-dimensional tensor always does). A tensor may require grad.
            Its values are not inspected, since that would wait for the GPU: below 1 they count as 1.
        dim: the dimension that sums to one.
        method: as in ``entmax_attention``: ``"eager"`` is dense PyTorch, the others solve for the threshold in Triton,
            which stores nothing but the weights and one number a row; ``"auto"`` is eager on CPU and for float64.

    Returns:
        Weights of the shape and dtype of ``x``. A row of ``-inf`` alone gives zeros; NaN propagates.

    Raises:
        ValueError: ``x`` is not floating point, ``alpha`` is outside [1, 2] or does not broadcast, ``dim`` is out
            of range or has size 0.
        RuntimeError: differentiated twice.
    """
    if not isinstance(x, Tensor) or not x.is_floating_point():
        given = x.dtype if isinstance(x, Tensor) else type(x).__name__
        raise ValueError(f"x: got {given}, allowed is a floating-point tensor")
    if not -x.ndim <= dim < x.ndim:
        raise ValueError(f"dim: got {dim}, allowed is {-x.ndim}..{x.ndim - 1} for x of {x.ndim} dimensions")
    if x.shape[dim] == 0:
        raise ValueError(f"x: dimension {dim} has size 0, allowed is 1 or more")
    alpha = check_alpha(alpha)
    scores = x.movedim(dim, -1)
    if isinstance(alpha, Tensor):
        try:
            fits = torch.broadcast_shapes(alpha.shape, (*scores.shape[:-1], 1)) == (*scores.shape[:-1], 1)
        except RuntimeError:
            fits = False
        if not fits:
            raise ValueError(
                f"alpha: got shape {tuple(alpha.shape)}, allowed is one that broadcasts to {(*scores.shape[:-1], 1)}"
            )
    chosen = choose_method(method, x, "x")
    if chosen != "eager":
        return _run_kernels(scores, alpha, chosen).movedim(-1, dim)
    compute = torch.float64 if x.dtype == torch.float64 else torch.float32
    return DenseEntmax.apply(scores.to(compute), alpha).to(x.dtype).movedim(-1, dim)


def _run_kernels(scores: Tensor, alpha: float | Tensor, method: str) -> Tensor:
    from .rowwise_ops import entmax_op  # imported late: the eager path works without Triton

    if scores.numel() == 0:
        return scores * 1.0
    if isinstance(alpha, Tensor) and alpha.numel() > 1:
        alpha = alpha.expand(*scores.shape[:-1], 1)
    by_kernel, kind = kernel_alpha(alpha, scores.device)
    rows = scores.reshape(-1, scores.shape[-1]).contiguous()
    return entmax_op(rows, by_kernel, kind, method)[0].reshape(scores.shape)
