"""The support map against the oracle's weights."""

from __future__ import annotations

import pytest
import torch

from adasplash_kernels import support_map
from adasplash_kernels.masks import allowed_keys
from adasplash_kernels.reference import entmax_reference


@pytest.mark.parametrize("alpha", [1.3, 1.5, 2.0])
@pytest.mark.parametrize("rows_at_once", [8, 1024])
def test_counts_tiles_and_tau(alpha, rows_at_once, monkeypatch):
    monkeypatch.setattr("adasplash_kernels.support._ROWS_AT_ONCE", rows_at_once)
    q, k = 3 * torch.randn(2, 4, 21, 8, dtype=torch.float64), torch.randn(2, 2, 30, 8, dtype=torch.float64)
    lengths = torch.tensor([30, 17])
    found = support_map(q, k, alpha=alpha, causal=True, key_lengths=lengths, tile=(4, 7))
    mask = allowed_keys(21, 30, causal=True, key_lengths=lengths)
    scores = (q @ k.repeat_interleave(2, 1).mT * 8**-0.5).masked_fill(~mask, -torch.inf)
    p = entmax_reference(scores, alpha)
    assert torch.equal(found.counts, (p > 0).sum(-1))
    assert torch.equal(found.allowed, mask.sum(-1).expand(2, 4, -1))
    for i in range(6):
        for j in range(5):
            tile = (p[:, :, 4 * i : 4 * i + 4, 7 * j : 7 * j + 7] > 0).flatten(2).any(-1)
            assert torch.equal(found.occupancy[:, :, i, j], tile)
    again = ((alpha - 1) * scores - found.tau[..., None].double()).clamp_min(0) ** (1 / (alpha - 1))
    torch.testing.assert_close(again, p, rtol=1e-5, atol=1e-6)
    assert (found.nonzero_ratio > 0).all() and (found.nonzero_ratio < 1).all()


def test_softmax_looks_at_everything():
    q = torch.randn(1, 1, 5, 4)
    assert support_map(q, q, alpha=1.0, causal=True).nonzero_ratio.item() == 1.0


def test_rows_without_keys():
    q = torch.randn(1, 1, 3, 4)
    found = support_map(q, q, key_lengths=torch.tensor([0]))
    assert found.counts.eq(0).all() and found.tau.isnan().all() and found.nonzero_ratio.eq(0).all()
