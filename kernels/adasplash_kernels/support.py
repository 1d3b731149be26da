"""What attention looked at: which weights are not zero, counted by row and by tile."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from .arguments import check_alpha, check_mask, check_qkv, check_scale
from .eager import exponent, masked_scores, solve_theta, weights

_ROWS_AT_ONCE = 1024


@dataclass(frozen=True)
class SupportMap:
    """The support of alpha-entmax attention.

    Attributes:
        counts: (B, H, N_q) int64, keys with a weight above zero.
        allowed: (B, H, N_q) int64, keys the mask lets the query see.
        occupancy: (B, H, ceil(N_q / tile_q), ceil(N_k / tile_k)) bool, tiles that hold a weight above zero.
        tau: (B, H, N_q) float32, the paper's threshold on ``(alpha - 1)`` times the scores; NaN for rows
            without keys.
    """

    counts: Tensor
    allowed: Tensor
    occupancy: Tensor
    tau: Tensor

    @property
    def nonzero_ratio(self) -> Tensor:
        """(B, H) share of the allowed weights that are not zero (AdaSplash, figures 4 and 5)."""
        return self.counts.sum(-1) / self.allowed.sum(-1).clamp_min(1)


@torch.no_grad()
def support_map(
    q: Tensor, k: Tensor, *, alpha: float | Tensor = 1.5, causal: bool = False, scale: float | None = None,
    window: int | None = None, alibi_slopes: Tensor | None = None, key_lengths: Tensor | None = None,
    key_starts: Tensor | None = None, cu_seqlens_q: Tensor | None = None, cu_seqlens_k: Tensor | None = None,
    tile: tuple[int, int] = (64, 64),
) -> SupportMap:  # fmt: skip
    """Compute which weights of ``entmax_attention(q, k, ...)`` are not zero, exactly, a band of queries at a time.

    Args:
        q, k, alpha, causal, scale, window, alibi_slopes, key_lengths, key_starts, cu_seqlens_q, cu_seqlens_k: as in
            ``entmax_attention``.
        tile: queries and keys per tile of ``occupancy``; tiles count from the first token, packed sequences or not.

    Raises:
        ValueError: an argument has the wrong type, shape, dtype, device or range; the message names it.
    """
    check_qkv(q, k, k)
    alpha = check_alpha(alpha, heads=q.shape[1])
    scale = check_scale(scale, q.shape[3])
    mask = check_mask(q, k, causal=causal, window=window, alibi_slopes=alibi_slopes, key_starts=key_starts,
                      key_lengths=key_lengths, cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k)  # fmt: skip
    if len(tile) != 2 or not all(isinstance(t, int) and t >= 1 for t in tile):
        raise ValueError(f"tile: got {tile!r}, allowed are two positive integers")
    (batch, heads, n_q, _), n_k = q.shape, k.shape[2]
    tile_q, tile_k = tile
    per_head = alpha.reshape(-1, 1, 1) if isinstance(alpha, Tensor) else alpha
    counts, allowed, thetas, occupied = [], [], [], []
    band = tile_q * max(1, _ROWS_AT_ONCE // tile_q)  # whole tiles, so that no tile is split between bands
    for start in range(0, max(n_q, 1), band):  # one empty band where there are no queries
        rows = slice(start, min(start + band, n_q))
        scores = masked_scores(q, k, scale=scale, mask=mask, rows=rows)
        theta = solve_theta(scores, per_head)
        nonzero = weights(scores, theta, per_head) > 0
        counts.append(nonzero.sum(-1))
        allowed.append(mask.allowed(n_q, n_k, rows=rows, device=q.device).sum(-1).expand(batch, heads, -1))
        thetas.append(theta.squeeze(-1))
        occupied.append(_tiles_any(nonzero, tile_q, tile_k))
    theta = torch.cat(thetas, -1)
    a = exponent(per_head, theta.dtype).squeeze(-1) if isinstance(per_head, Tensor) else per_head - 1
    tau = torch.where(theta.isinf(), math.nan, a * theta - 1).float()
    return SupportMap(torch.cat(counts, -1), torch.cat(allowed, -1), torch.cat(occupied, -2), tau)


def _tiles_any(nonzero: Tensor, tile_q: int, tile_k: int) -> Tensor:
    rows, keys = nonzero.shape[-2:]
    padded = torch.nn.functional.pad(nonzero, (0, -keys % tile_k, 0, -rows % tile_q))
    return padded.unflatten(-1, (-1, tile_k)).unflatten(-3, (-1, tile_q)).any(-1).any(-2)
