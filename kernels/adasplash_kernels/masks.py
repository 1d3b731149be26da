"""Which keys a query may see, and how distance lowers their scores, in dense form: the rule that the oracle and the
eager path apply as it stands here, and that the kernels compute tile by tile."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class AttentionMask:
    """The rule of one attention call: seven fields, all off by default.

    Query ``i`` stands at position ``P_i = i + N_k - N_q`` among the keys: the last query at the last key.

    Attributes:
        causal: query ``i`` sees key ``j`` only if ``j <= P_i``.
        window: at least 1; query ``i`` sees key ``j`` only if ``|P_i - j| < window``.
        alibi_slopes: (H,) or (B, H) float; ``slope * |P_i - j|`` is taken off scores (ALiBi, Press et al. 2022).
        key_starts: (B,) integers; keys before the start are padding. ``P_i`` does not depend on it.
        key_lengths: (B,) integers; keys at or past the length are padding. ``P_i`` does not depend on it.
        cu_seqlens_q: (S + 1,) integers rising from 0, for a batch of one. Sequence ``s`` holds the queries
            ``cu_seqlens_q[s]`` up to ``cu_seqlens_q[s + 1]``. A query sees keys of its own sequence only, and
            positions count within the sequence, by its own lengths. Tokens past the last entry belong to no
            sequence: they see nothing and nothing sees them.
        cu_seqlens_k: (S + 1,) the same for the keys; ``cu_seqlens_q`` by default.
    """

    causal: bool = False
    window: int | None = None
    alibi_slopes: Tensor | None = None
    key_starts: Tensor | None = None
    key_lengths: Tensor | None = None
    cu_seqlens_q: Tensor | None = None
    cu_seqlens_k: Tensor | None = None

    @property
    def hides_keys(self) -> bool:
        """Whether any query may be kept from any key; False spares the caller a mask of ones."""
        return self.causal or any(
            x is not None for x in (self.window, self.key_starts, self.key_lengths, self.cu_seqlens_q)
        )

    def allowed(
        self, n_q: int, n_k: int, *, rows: slice | None = None, device: torch.device | str | None = None
    ) -> Tensor:
        """Return which (query, key) pairs are allowed.

        Args:
            n_q, n_k: numbers of queries and keys.
            rows: the queries wanted, all by default.
            device: where the tensors of the mask are; needed if they are not on the default device.

        Returns:
            (B or 1, 1, rows, n_k) bool, broadcastable over heads.
        """
        position, first, end = self._places(n_q, n_k, rows, device)
        key = torch.arange(n_k, device=device)
        seen = torch.ones(1, 1, position.shape[0], n_k, dtype=torch.bool, device=device)
        seen = seen & (key >= first) & (key < end)
        if self.causal:
            seen = seen & (key <= position)
        if self.window is not None:
            seen = seen & ((position - key).abs() < self.window)
        return seen

    def bias(
        self,
        n_q: int,
        n_k: int,
        *,
        rows: slice | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype,
    ) -> Tensor | None:
        """Return what ALiBi adds to the scores, ``-slope * |P_i - j|``, or None without slopes.

        Args:
            n_q, n_k, rows, device: as for ``allowed``.
            dtype: of the result and of its computation.

        Returns:
            (B or 1, H, rows, n_k); where the pair is not allowed the value is finite but means nothing.
        """
        if self.alibi_slopes is None:
            return None
        position, _, _ = self._places(n_q, n_k, rows, device)
        distance = (position - torch.arange(n_k, device=device)).abs()
        slopes = self.alibi_slopes if self.alibi_slopes.ndim == 2 else self.alibi_slopes[None]
        return -slopes.to(dtype)[:, :, None, None] * distance.to(dtype)

    def _places(
        self, n_q: int, n_k: int, rows: slice | None, device: torch.device | str | None
    ) -> tuple[Tensor, Tensor | int, Tensor | int]:
        """Return each query's position among all keys, (rows, 1), its first key and the one past its last key."""
        query = torch.arange(n_q, device=device)[slice(None) if rows is None else rows][:, None]
        if self.cu_seqlens_q is None:
            first = 0 if self.key_starts is None else self.key_starts[:, None, None, None]
            end = n_k if self.key_lengths is None else self.key_lengths[:, None, None, None]
            return query + (n_k - n_q), first, end
        queries = self.cu_seqlens_q.long().contiguous()
        keys = queries if self.cu_seqlens_k is None else self.cu_seqlens_k.long()
        # Counting the entries at or below the query passes over sequences without queries. Queries past the end get
        # some sequence, to index with, but no key of it.
        sequence = (torch.searchsorted(queries, query, right=True) - 1).clamp(0, queries.shape[0] - 2)
        first, end = keys[sequence], keys[sequence + 1]
        # i_local + len_k - len_q, counted from the first key of all: the starts of the sequence cancel.
        position = query + end - queries[sequence + 1]
        return position, first, torch.where(query < queries[-1], end, first)


def allowed_keys(
    n_q: int, n_k: int, *, rows: slice | None = None, device: torch.device | str | None = None, **fields: Any
) -> Tensor:
    """Return ``AttentionMask(**fields).allowed(...)``: (B or 1, 1, rows, n_k) bool."""
    return AttentionMask(**fields).allowed(n_q, n_k, rows=rows, device=device)
