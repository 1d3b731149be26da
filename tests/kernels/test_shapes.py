"""Lengths, head dims and half precision in combinations that the support matrix has one example of."""

from __future__ import annotations

import pytest
import torch
from calls import METHODS, bind, plain, random_qkv
from oracle import check_against_oracle

pytestmark = pytest.mark.parametrize("method", METHODS)


@pytest.mark.in_turn(3)
@pytest.mark.parametrize(("n_q", "n_k"), [(1, 1), (1, 17), (17, 1), (16, 16), (5, 40), (40, 5), (63, 63), (113, 113)])
@pytest.mark.parametrize("causal", [False, True])
def test_lengths(device, method, n_q, n_k, causal):
    check_against_oracle(bind(method), plain(method), *random_qkv(device, n_q, n_k), causal=causal)


@pytest.mark.in_turn(2)
@pytest.mark.parametrize("head_dim", [1, 16, 40, 64, 80, 96, 128, 256])
def test_head_dims(device, method, head_dim):
    check_against_oracle(bind(method), plain(method), *random_qkv(device, 19, head_dim=head_dim), causal=True)


@pytest.mark.in_turn(2)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("alpha", [1.3, 1.5, 2.0])
def test_half_precision(device, method, dtype, alpha):
    qkv = random_qkv(device, 35, head_dim=32, dtype=dtype)
    check_against_oracle(bind(method), plain(method), *qkv, alpha=alpha, causal=True)


@pytest.mark.parametrize(
    ("causal", "integer"),
    [
        (False, torch.int32),
        (True, torch.int64),
        pytest.param(False, torch.int64, marks=pytest.mark.gpu),
        pytest.param(True, torch.int32, marks=pytest.mark.gpu),
    ],
)
def test_padding(device, method, causal, integer):
    starts = torch.tensor([0, 3, 9, 0], dtype=integer, device=device)
    lengths = torch.tensor([37, 37, 20, 0], dtype=integer, device=device)  # the last sequence is all padding
    check_against_oracle(bind(method), plain(method), *random_qkv(device, 37, batch=4),
                         causal=causal, key_starts=starts, key_lengths=lengths)  # fmt: skip
