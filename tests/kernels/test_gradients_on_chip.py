"""Gradients of short sequences in one kernel: which calls take it, and that they are exact. It needs a Hopper GPU; what
it computes is also tested without one (test_gradients_hopper.py)."""

from __future__ import annotations

import pytest
import torch
from calls import bind, plain, positions, random_qkv
from oracle import check_against_oracle

from adasplash_kernels import entmax_attention, limits, short

METHOD = "columns_nolist"
HOPPER = torch.cuda.is_available() and short._has_hopper_kernel(torch.device("cuda", 0))
pytestmark = pytest.mark.skipif(not HOPPER, reason="the kernel is for Hopper's GPUs")


@pytest.fixture(autouse=True)
def few_heads_too(monkeypatch):
    monkeypatch.setattr(limits, "FILLED", 0.0)


def of_backward(names_launched: list[str], q, k, v, d_out=None, **options) -> list[str]:
    leaves = [x.requires_grad_() for x in (q, k, v)]
    out = entmax_attention(*leaves, method=METHOD, **options)
    d_out = torch.randn_like(out) if d_out is None else d_out
    names_launched.clear()
    with torch.autograd.set_multithreading_enabled(False):  # in this thread, which is the one that listens
        torch.autograd.grad(out, leaves, d_out)
    return list(names_launched)


@pytest.mark.parametrize("queries", [1, 300, 512])
@pytest.mark.parametrize("options", [{}, {"causal": True}, {"window": 9}])
def test_one_kernel(device, names_launched, queries, options):
    q, k, v = random_qkv(device, queries, 512, 64, heads=2, dtype=torch.float16)
    assert of_backward(names_launched, q, k, v, **options) == ["gradients_hopper_kernel"]


@pytest.mark.parametrize(
    "case", ["alpha", "queries", "head dim", "columns", "groups", "slopes", "odd pitch", "float32"]
)
def test_what_does_not_fit_takes_two_kernels(device, names_launched, case):
    head_dim = {"head dim": 80, "columns": 40}.get(case, 64)
    q, k, v = random_qkv(
        device, 513 if case == "queries" else 100, 100, head_dim, heads=4, kv_heads=2 if case == "groups" else 4,
        dtype=torch.float32 if case == "float32" else torch.bfloat16,
    )  # fmt: skip
    options = {"alpha": 1.7} if case == "alpha" else {}
    if case == "slopes":
        options["alibi_slopes"] = torch.ones(4, device=device)
    d_out = torch.randn(*q.shape[:3], 65, device=device, dtype=q.dtype)[..., :64] if case == "odd pitch" else None
    names = of_backward(names_launched, q, k, v, d_out, **options)
    assert names == ["grad_query_kernel", "grad_key_value_kernel"]


def test_few_heads_take_two_kernels(device, names_launched, monkeypatch):
    monkeypatch.setattr(limits, "FILLED", 0.6)
    qkv = random_qkv(device, 100, head_dim=64, heads=2, dtype=torch.bfloat16)
    assert len(of_backward(names_launched, *qkv)) == 2


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("n", [1, 63, 64, 65, 127, 128, 129, 255, 256, 257, 384, 385, 511, 512])
def test_lengths(device, n, causal):
    q, k, v = random_qkv(device, n, heads=3, head_dim=64, spread=2.0, dtype=torch.bfloat16)
    check_against_oracle(bind(METHOD), plain(METHOD), q, k, v, causal=causal)


@pytest.mark.parametrize(
    "options", [{}, {"causal": True}, {"window": 5}, {"causal": True, "window": 70}, {"scale": 2.5}], ids=str
)
@pytest.mark.parametrize(("n_q", "n_k"), [(520 - 8, 500), (170, 511), (30, 300), (300, 30), (100, 512)])
def test_masks(device, n_q, n_k, options):
    q, k, v = random_qkv(device, n_q, n_k, 32, heads=4, batch=2, dtype=torch.float16)
    check_against_oracle(bind(METHOD), plain(METHOD), q, k, v, **options)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("n", [100, 500])
def test_padding(device, n, causal):
    q, k, v = random_qkv(device, n, heads=2, batch=4, head_dim=48, dtype=torch.bfloat16)
    starts, lengths = positions(device, 0, 3, 9, 0), positions(device, n, n - 3, 17, 0)
    check_against_oracle(bind(METHOD), plain(METHOD), q, k, v, key_starts=starts, key_lengths=lengths, causal=causal)


@pytest.mark.parametrize("head_dim", [16, 32, 48, 64])
@pytest.mark.parametrize("spread", [0.0, 1e-3, 8.0])
def test_head_dims(device, head_dim, spread):
    q, k, v = random_qkv(device, 300, heads=2, head_dim=head_dim, spread=spread, dtype=torch.bfloat16)
    check_against_oracle(bind(METHOD), plain(METHOD), q, k, v, causal=True)


@pytest.mark.parametrize("n", [128, 512])
def test_many_heads_repeat_bit_for_bit(device, n):
    """More heads than programs run at a time, over and over."""
    q, k, v = (x.requires_grad_() for x in random_qkv(device, n, heads=16, batch=20, head_dim=64, dtype=torch.bfloat16))
    d_out = torch.randn_like(q)

    def gradients():
        return torch.autograd.grad(entmax_attention(q, k, v, method=METHOD), (q, k, v), d_out)

    first = gradients()
    for _ in range(10):
        assert all(map(torch.equal, first, gradients()))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(limits, "GRADIENTS_HOPPER", 0)
        for one, two in zip(first, gradients(), strict=True):
            assert (one.float() - two.float()).norm() < 1e-3 * two.float().norm()


def test_rows_that_are_not_next_to_each_other(device):
    q, k, v = (
        x.transpose(1, 2).contiguous().transpose(1, 2)
        for x in random_qkv(device, 200, heads=3, head_dim=64, dtype=torch.bfloat16)
    )
    check_against_oracle(bind(METHOD), plain(METHOD), q, k, v)
