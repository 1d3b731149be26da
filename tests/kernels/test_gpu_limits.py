"""Sizes that only a GPU can hold: memory grows with the length alone, offsets pass 2^31, long sequences stay exact."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch
from calls import KERNELS, bind, plain, positions, random_qkv
from oracle import check_against_oracle
from torch import Tensor

pytestmark = [pytest.mark.gpu, pytest.mark.parametrize("method", KERNELS)]
GIBIBYTE = 2**30


def train(method: str, inputs: list[Tensor], upstream: Tensor, **options: Any) -> list[Tensor]:
    leaves = [x.detach().requires_grad_() for x in inputs]
    out = bind(method)(*leaves, **options)
    return [out.detach(), *torch.autograd.grad(out, leaves, upstream)]


def additional_memory(method: str, n: int, case: str) -> int:
    """Return the bytes that forward and backward need at their peak beside the inputs and the upstream gradient.

    Autograd's thread may drop what a call saved a moment after its gradients are there. A call that starts in that
    moment seems to need less, so it is the largest of three.
    """
    options = {
        "causal": {"causal": True},
        "packed": {"cu_seqlens_q": positions("cuda", 0, n // 3, n // 2, n), "causal": True},
        "window": {"window": 1024, "alibi_slopes": torch.tensor([0.5, 0.25, 0.1, 0.0], device="cuda")},
    }[case]
    inputs = [torch.randn(1, 4, n, 64, device="cuda", dtype=torch.bfloat16) for _ in range(3)]
    upstream = torch.randn_like(inputs[0])
    train(method, inputs, upstream, **options)  # workspaces that stay allocated once made
    needed = []
    for _ in range(3):
        gc.collect()  # reference cycles of earlier tests would otherwise be freed while this one is measured
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        train(method, inputs, upstream, **options)
        torch.cuda.synchronize()
        needed.append(torch.cuda.max_memory_allocated() - before)
    return max(needed)


@pytest.mark.parametrize("case", ["causal", "packed", "window"])
def test_memory_grows_with_the_length_alone(method, case):
    n = 16384
    short, long = additional_memory(method, n, case), additional_memory(method, 2 * n, case)
    assert long <= 2.1 * short
    assert short < n * n  # not even a byte for each pair of one head


@pytest.mark.parametrize("apart", ["rows", "packed rows", "batches"])
def test_offsets_past_two_to_the_31(method, apart):
    """q, k, v and the upstream gradient are narrow views of one buffer of more than 2^31 elements."""
    n, head_dim = 2100, 64
    if apart == "batches":
        buffer = torch.empty(3, 2**30 + 2**20, dtype=torch.bfloat16, device="cuda")
        size = n * head_dim
        views = [buffer[:, i * size : (i + 1) * size].view(3, 1, n, head_dim) for i in range(4)]
    else:
        buffer = torch.empty(n, 2**20, dtype=torch.bfloat16, device="cuda")
        views = [buffer[:, i * head_dim : (i + 1) * head_dim].view(1, 1, n, head_dim) for i in range(4)]
    last = max(sum((s - 1) * step for s, step in zip(x.shape, x.stride(), strict=True)) for x in views)
    assert last > 2**31
    for i, x in enumerate(views):
        x.copy_(torch.randn(x.shape, generator=torch.Generator("cuda").manual_seed(i), device="cuda"))
    options = {"cu_seqlens_q": positions("cuda", 0, 1000, 1001, n)} if apart == "packed rows" else {}
    found = train(method, views[:3], views[3], causal=True, **options)
    dense = [x.contiguous() for x in views]
    for a, b in zip(found, train(method, dense[:3], dense[3], causal=True, **options), strict=True):
        assert torch.equal(a, b)


def test_results_past_two_to_the_31_elements(method):
    if torch.cuda.mem_get_info()[0] < 48 * GIBIBYTE:
        pytest.skip("needs 48 GiB of free GPU memory")
    shape = (2, 2**14, 1025, 64)
    *inputs, upstream = (
        torch.randn(shape, generator=torch.Generator("cuda").manual_seed(i), device="cuda", dtype=torch.bfloat16)
        for i in range(4)
    )
    assert inputs[0].numel() > 2**31
    found = train(method, inputs, upstream, causal=True)
    one = [x[-1:, -1:].contiguous() for x in (*inputs, upstream)]
    for a, b in zip(found, train(method, one[:3], one[3], causal=True), strict=True):
        assert torch.equal(a[-1:, -1:], b)


@pytest.mark.parametrize("alpha", [1.0, 1.25, 1.5, 2.0])
@pytest.mark.parametrize("n", [1000, 1025, 4096])
def test_long_sequences_stay_exact(method, n, alpha):
    qkv = random_qkv("cuda", n, head_dim=64, heads=2, kv_heads=1, dtype=torch.bfloat16, seed=n)
    check_against_oracle(bind(method), plain(method), *qkv, alpha=alpha, causal=True)


@pytest.mark.parametrize("case", ["window", "packed", "padded", "two lengths"])
def test_long_masked_sequences_stay_exact(method, case):
    n = 3001
    options = {
        "window": {"window": 700, "causal": True},
        "packed": {"cu_seqlens_q": positions("cuda", 0, 1500, 1501, 2900), "causal": True},
        "padded": {"key_starts": positions("cuda", 333), "key_lengths": positions("cuda", 2222)},
        "two lengths": {"causal": True},
    }[case]
    n_q = 1777 if case == "two lengths" else n
    qkv = random_qkv("cuda", n_q, n, head_dim=80, heads=2, dtype=torch.float16, spread=2.0, seed=1)
    check_against_oracle(bind(method), plain(method), *qkv, alpha=1.4, **options)
