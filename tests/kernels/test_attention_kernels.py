"""The Triton kernels against the float64 oracle: interpreted on a CPU, compiled on a GPU; same tests."""

from __future__ import annotations

import functools

import pytest
import torch
from oracle import check_against_oracle

from adasplash_kernels import entmax_attention
from adasplash_kernels.attention import METHODS

KERNELS = [m for m in METHODS if m not in ("auto", "eager")]
eager = functools.partial(entmax_attention, method="eager")
pytestmark = pytest.mark.parametrize("method", KERNELS)


def qkv(device, n_q, n_k, d, *, heads=2, kv_heads=2, batch=1, dtype=torch.float32, spread=1.0, seed=0):
    generator = torch.Generator(device="cpu").manual_seed(seed)
    q = spread * torch.randn(batch, heads, n_q, d, generator=generator)
    k, v = (torch.randn(batch, kv_heads, n_k, d, generator=generator) for _ in range(2))
    return tuple(x.to(device, dtype) for x in (q, k, v))


@pytest.mark.parametrize("alpha", [1.0, 1.25, 1.5, 1.75, 2.0])
@pytest.mark.parametrize("causal", [False, True])
def test_alphas(device, method, alpha, causal):
    check_against_oracle(functools.partial(entmax_attention, method=method), eager, *qkv(device, 33, 33, 16),
                         alpha=alpha, causal=causal)  # fmt: skip


@pytest.mark.parametrize(("n_q", "n_k"), [(1, 1), (1, 17), (17, 1), (16, 16), (5, 40), (40, 5), (63, 63), (113, 113)])
@pytest.mark.parametrize("causal", [False, True])
def test_lengths(device, method, n_q, n_k, causal):
    check_against_oracle(functools.partial(entmax_attention, method=method), eager, *qkv(device, n_q, n_k, 16, heads=1,
                         kv_heads=1), causal=causal)  # fmt: skip


@pytest.mark.parametrize("d", [1, 16, 40, 64, 80, 96, 128, 256])
def test_head_dims(device, method, d):
    check_against_oracle(functools.partial(entmax_attention, method=method), eager,
                         *qkv(device, 19, 19, d, heads=1, kv_heads=1), causal=True)  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("alpha", [1.5, 1.3, 2.0])
def test_half_precision(device, method, dtype, alpha):
    check_against_oracle(functools.partial(entmax_attention, method=method), eager,
                         *qkv(device, 35, 35, 32, dtype=dtype), alpha=alpha, causal=True)  # fmt: skip


@pytest.mark.parametrize("kv_heads", [1, 2])
def test_grouped_queries(device, method, kv_heads):
    check_against_oracle(functools.partial(entmax_attention, method=method), eager,
                         *qkv(device, 20, 20, 16, heads=4, kv_heads=kv_heads, batch=2), causal=True)  # fmt: skip


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("integer", [torch.int32, torch.int64])
def test_padding(device, method, causal, integer):
    starts = torch.tensor([0, 3, 9, 0], dtype=integer, device=device)
    lengths = torch.tensor([37, 37, 20, 0], dtype=integer, device=device)  # the last sequence is all padding
    check_against_oracle(functools.partial(entmax_attention, method=method), eager, *qkv(device, 37, 37, 16, batch=4),
                         causal=causal, key_starts=starts, key_lengths=lengths)  # fmt: skip


def test_alpha_per_head(device, method):
    alpha = torch.tensor([1.0, 1.2, 1.5, 2.0], device=device)
    check_against_oracle(functools.partial(entmax_attention, method=method), eager,
                         *qkv(device, 21, 21, 16, heads=4), alpha=alpha)  # fmt: skip


@pytest.mark.parametrize("spread", [0.01, 30.0, 1000.0])
@pytest.mark.parametrize("alpha", [1.0, 1.4, 1.5, 2.0])
def test_score_scales(device, method, spread, alpha):
    check_against_oracle(functools.partial(entmax_attention, method=method), eager,
                         *qkv(device, 33, 33, 32, spread=spread), alpha=alpha)  # fmt: skip


def test_strided_inputs(device, method):
    packed = torch.randn(2, 19, 3, 2, 24, generator=torch.Generator().manual_seed(1)).to(device)
    q, k, v = (packed[:, :, i].transpose(1, 2) for i in range(3))  # (B, H, N, D) views of one projection
    dense = entmax_attention(*(x.contiguous() for x in (q, k, v)), causal=True, method=method)
    torch.testing.assert_close(entmax_attention(q, k, v, causal=True, method=method), dense, rtol=0, atol=0)
    transposed = q.transpose(-1, -2).contiguous().transpose(-1, -2)  # head dim not the fastest
    torch.testing.assert_close(entmax_attention(transposed, k, v, causal=True, method=method), dense, rtol=0, atol=0)


def test_expanded_gradient(device, method):
    """``out.sum()`` sends back a gradient without memory of its own."""
    q, k, v = qkv(device, 18, 18, 16)
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    entmax_attention(*leaves, method=method).sum().backward()
    expected = [x.clone().requires_grad_() for x in (q, k, v)]
    eager(*expected).sum().backward()
    for a, b in zip(leaves, expected, strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=2e-5, atol=2e-6)


def test_ties_share_equally(device, method):
    q = torch.zeros(1, 1, 17, 16, device=device)
    k = torch.randn(1, 1, 40, 16, device=device)
    v = torch.randn(1, 1, 40, 16, device=device)
    for alpha in (1.0, 1.5, 1.8, 2.0):
        out = entmax_attention(q, k, v, alpha=alpha, method=method)
        torch.testing.assert_close(out, v.mean(2, keepdim=True).expand_as(out), rtol=1e-5, atol=1e-6)


def test_nan_reaches_the_output_and_ends(device, method):
    q, k, v = qkv(device, 20, 20, 16, heads=1, kv_heads=1)
    q[0, 0, 3, 0] = float("nan")
    out = entmax_attention(q, k, v, method=method)
    assert out[0, 0, 3].isnan().all() and out[0, 0, :3].isfinite().all() and out[0, 0, 4:].isfinite().all()


def test_no_queries(device, method):
    q, k, v = qkv(device, 4, 4, 16)
    assert entmax_attention(q[:, :, :0], k, v, method=method).shape == (1, 2, 0, 16)


def test_gradients_repeat_bit_for_bit(device, method):
    q, k, v = qkv(device, 50, 50, 16, heads=4, kv_heads=2)

    def run():
        leaves = [x.clone().requires_grad_() for x in (q, k, v)]
        out = entmax_attention(*leaves, causal=True, method=method, deterministic=True)
        return [out, *torch.autograd.grad(out.square().sum(), leaves)]

    for a, b in zip(run(), run(), strict=True):
        assert torch.equal(a, b)


def test_second_derivative_is_refused(device, method):
    q, k, v = (x.requires_grad_() for x in qkv(device, 8, 8, 16))
    out = entmax_attention(q, k, v, method=method)
    (gradient,) = torch.autograd.grad(out.sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiated twice"):
        (gradient.square().sum() + out.sum()).backward()  # must not drop the first term silently


def test_alpha_gradient_is_refused_not_dropped(device, method):
    q, k, v = qkv(device, 8, 8, 16)
    with pytest.raises(NotImplementedError, match="alpha"):
        entmax_attention(q, k, v, alpha=torch.tensor(1.5, device=device, requires_grad=True), method=method)


def test_custom_ops_are_well_formed(device, method):
    from adasplash_kernels.ops import backward_op, forward_op

    q, k, v = qkv(device, 9, 12, 16)
    alpha = torch.full((1,), 1.5, device=device)
    arguments = (q, k, v, alpha, None, None, "1.5", 0.25, False, method, True)
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(forward_op, arguments, test_utils=checks)
    out, out2, theta = forward_op(*arguments)
    torch.library.opcheck(backward_op, (q, k, v, alpha, None, None, theta, out2, out, "1.5", 0.25, False),
                          test_utils=checks)  # fmt: skip


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.gpu)])
def test_compiles_whole_with_dynamic_lengths(device, method, backend):
    def step(q, k, v):
        return entmax_attention(q, k, v, causal=True, method=method).square().mean()

    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend=backend)
    for n in (19, 23):
        plain = [x.requires_grad_() for x in qkv(device, n, n, 16, seed=n)]
        traced = [x.detach().clone().requires_grad_() for x in plain]
        expected = torch.autograd.grad(step(*plain), plain)
        for a, b in zip(torch.autograd.grad(compiled(*traced), traced), expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)
