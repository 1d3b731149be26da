"""The support map against the oracle's weights."""

from __future__ import annotations

import pytest
import torch

from adasplash_kernels import support_map
from adasplash_kernels.masks import AttentionMask
from adasplash_kernels.reference import entmax_reference

RULES = {
    "causal, padding": dict(causal=True, key_lengths=torch.tensor([30, 17])),
    "window": dict(window=5, key_starts=torch.tensor([0, 11])),
    "alibi": dict(causal=True, window=13, alibi_slopes=torch.tensor([[0.5, 0.2, 0.0, -0.1], [0.1, 0.1, 0.4, 2.0]])),
    "packed": dict(cu_seqlens_q=torch.tensor([0, 4, 4, 9, 11, 20]), cu_seqlens_k=torch.tensor([0, 9, 14, 14, 22, 29])),
    "packed, all": dict(
        causal=True,
        window=6,
        alibi_slopes=torch.tensor([0.5, 0.2, 0.0, -0.1]),
        cu_seqlens_q=torch.tensor([0, 10, 13, 21]),
        cu_seqlens_k=torch.tensor([0, 12, 20, 27]),
    ),
}


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES.keys())
@pytest.mark.parametrize("alpha", [1.3, 1.5, 2.0, torch.tensor([1.25, 1.5, 1.9, 3.0])], ids=str)
@pytest.mark.parametrize("rows_at_once", [8, 1024])
def test_counts_tiles_and_tau(rule, alpha, rows_at_once, monkeypatch):
    monkeypatch.setattr("adasplash_kernels.support._ROWS_AT_ONCE", rows_at_once)
    generator = torch.Generator().manual_seed(0)
    batch = 1 if "cu_seqlens_q" in rule else 2
    q = 3 * torch.randn(batch, 4, 21, 8, dtype=torch.float64, generator=generator)
    k = torch.randn(batch, 2, 30, 8, dtype=torch.float64, generator=generator)
    found = support_map(q, k, alpha=alpha, tile=(4, 7), **rule)
    mask = AttentionMask(**rule)
    scores = q @ k.repeat_interleave(2, 1).mT * 8**-0.5
    if mask.alibi_slopes is not None:
        scores += mask.bias(21, 30, dtype=torch.float64)
    scores = scores.masked_fill(~mask.allowed(21, 30), -torch.inf)
    alpha = alpha.double().clamp(1, 2).reshape(4, 1, 1) if torch.is_tensor(alpha) else alpha
    p = entmax_reference(scores, alpha)
    assert torch.equal(found.counts, (p > 0).sum(-1))
    assert torch.equal(found.allowed, mask.allowed(21, 30).sum(-1).expand(batch, 4, -1))
    for i in range(6):
        for j in range(5):
            tile = (p[:, :, 4 * i : 4 * i + 4, 7 * j : 7 * j + 7] > 0).flatten(2).any(-1)
            assert torch.equal(found.occupancy[:, :, i, j], tile)
    seen = found.allowed > 0
    assert torch.equal(found.tau.isnan(), ~seen)
    again = ((alpha - 1) * scores - found.tau[..., None].double()).clamp_min(0) ** (1 / (alpha - 1))
    torch.testing.assert_close(again[seen], p[seen], rtol=1e-5, atol=1e-6)
    assert (found.nonzero_ratio > 0).all() and (found.nonzero_ratio < 1).all()


def test_softmax_looks_at_everything():
    q = torch.randn(1, 1, 5, 4)
    assert support_map(q, q, alpha=1.0, causal=True).nonzero_ratio.item() == 1.0


def test_rows_without_keys():
    q = torch.randn(1, 1, 3, 4)
    found = support_map(q, q, key_lengths=torch.tensor([0]))
    assert found.counts.eq(0).all() and found.tau.isnan().all() and found.nonzero_ratio.eq(0).all()


def test_no_queries():
    found = support_map(torch.zeros(2, 3, 0, 4), torch.zeros(2, 3, 70, 4), window=2)
    assert found.counts.shape == found.allowed.shape == found.tau.shape == (2, 3, 0)
    assert found.occupancy.shape == (2, 3, 0, 2)
