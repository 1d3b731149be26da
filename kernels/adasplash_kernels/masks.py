"""Which keys a query may see, as a dense boolean mask. The kernels compute the same rule tile by tile."""

from __future__ import annotations

import torch
from torch import Tensor


def allowed_keys(
    n_q: int,
    n_k: int,
    *,
    causal: bool = False,
    key_starts: Tensor | None = None,
    key_lengths: Tensor | None = None,
    rows: slice | None = None,
    device: torch.device | str | None = None,
) -> Tensor:
    """Return the boolean mask of allowed (query, key) pairs.

    Args:
        n_q, n_k: numbers of queries and keys.
        causal: query ``i`` sees key ``j`` only if ``j <= i + n_k - n_q`` (the last query sees every key).
        key_starts: (B,) integers; keys before the start are padding.
        key_lengths: (B,) integers; keys at or past the length are padding.
        rows: the queries wanted, all by default.

    Returns:
        (B or 1, 1, rows, n_k) bool, broadcastable over heads.
    """
    query = torch.arange(n_q, device=device)[rows if rows is not None else slice(None)][:, None]
    key = torch.arange(n_k, device=device)
    mask = torch.ones(1, 1, query.shape[0], n_k, dtype=torch.bool, device=device)
    if causal:
        mask = mask & (key <= query + (n_k - n_q))
    if key_starts is not None:
        mask = mask & (key >= key_starts[:, None, None, None])
    if key_lengths is not None:
        mask = mask & (key < key_lengths[:, None, None, None])
    return mask
