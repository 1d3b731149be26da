"""What attention looked at: which weights are not zero, counted by row and by tile."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from .arguments import check_alpha, check_per_sequence, check_qkv, check_scale
from .eager import solve_theta, weights
from .masks import allowed_keys

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
    q: Tensor,
    k: Tensor,
    *,
    alpha: float | Tensor = 1.5,
    causal: bool = False,
    scale: float | None = None,
    key_lengths: Tensor | None = None,
    key_starts: Tensor | None = None,
    tile: tuple[int, int] = (64, 64),
) -> SupportMap:
    """Compute which weights of ``entmax_attention(q, k, ...)`` are not zero, exactly, a band of queries at a time.

    Args:
        q, k, alpha, causal, scale, key_lengths, key_starts: as in ``entmax_attention``.
        tile: queries and keys per tile of ``occupancy``.

    Raises:
        ValueError: an argument has the wrong type, shape, dtype, device or range; the message names it.
    """
    check_qkv(q, k, k)
    alpha = check_alpha(alpha, heads=q.shape[1])
    scale = check_scale(scale, q.shape[3])
    check_per_sequence("key_lengths", key_lengths, q)
    check_per_sequence("key_starts", key_starts, q)
    if len(tile) != 2 or not all(isinstance(t, int) and t >= 1 for t in tile):
        raise ValueError(f"tile: got {tile!r}, allowed are two positive integers")
    (batch, heads, n_q, _), n_k = q.shape, k.shape[2]
    tile_q, tile_k = tile
    per_head = alpha.reshape(-1, 1, 1) if isinstance(alpha, Tensor) else alpha
    compute = torch.float64 if q.dtype == torch.float64 else torch.float32
    keys = k.to(compute).repeat_interleave(heads // k.shape[1], dim=1).transpose(-1, -2)
    counts, allowed, thetas, occupied = [], [], [], []
    band = tile_q * max(1, _ROWS_AT_ONCE // tile_q)  # whole tiles, so that no tile is split between bands
    for start in range(0, n_q, band):
        rows = slice(start, min(start + band, n_q))
        mask = allowed_keys(n_q, n_k, causal=causal, key_starts=key_starts, key_lengths=key_lengths, rows=rows,
                            device=q.device)  # fmt: skip
        scores = (scale * (q[:, :, rows].to(compute) @ keys)).masked_fill(~mask, -math.inf)
        theta = solve_theta(scores, per_head)
        nonzero = weights(scores, theta, per_head) > 0
        counts.append(nonzero.sum(-1))
        allowed.append(mask.sum(-1).expand(batch, heads, -1))
        thetas.append(theta.squeeze(-1))
        occupied.append(_tiles_any(nonzero, tile_q, tile_k))
    theta = torch.cat(thetas, -1)
    a = (per_head - 1).squeeze(-1) if isinstance(per_head, Tensor) else per_head - 1
    tau = torch.where(theta.isinf(), math.nan, a * theta - 1).float()
    return SupportMap(torch.cat(counts, -1), torch.cat(allowed, -1), torch.cat(occupied, -2), tau)


def _tiles_any(nonzero: Tensor, tile_q: int, tile_k: int) -> Tensor:
    rows, keys = nonzero.shape[-2:]
    padded = torch.nn.functional.pad(nonzero, (0, -keys % tile_k, 0, -rows % tile_q))
    return padded.unflatten(-1, (-1, tile_k)).unflatten(-3, (-1, tile_q)).any(-1).any(-2)
