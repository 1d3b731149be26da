"""What Hopper's kernel for gradients of short sequences computes, run without a GPU: see gluon_eager.py."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from calls import random_qkv
from gluon_eager import pointer, program
from torch import Tensor

import adasplash_kernels
from adasplash_kernels.eager import attention_eager, masked_scores, solve_theta
from adasplash_kernels.inputs import UNLIMITED
from adasplash_kernels.masks import AttentionMask
from adasplash_kernels.short import _rounds_are_full

FOLDER = Path(adasplash_kernels.__file__).parent
MODULES = [FOLDER / "rows_gluon.py", FOLDER / "gradients_hopper.py"]


def run(
    q: Tensor, k: Tensor, v: Tensor, theta: Tensor, out2: Tensor, d_out: Tensor, *, scale: float,
    left: int = UNLIMITED, right: int = UNLIMITED, key_starts: Tensor | None = None, key_lengths: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Return dQ, dK and dV of the kernel, all programs one after the other."""
    batch, heads, n_q, head_dim = q.shape
    n_k = k.shape[2]
    numbers = {"heads": heads, "groups": 1, "n_q": n_q, "n_k": n_k, "left": left, "right": right, "scale": scale}
    for name, x in (("q", q), ("k", k), ("v", v)):
        numbers |= dict(zip((f"{name}_batch", f"{name}_head", f"{name}_row"), x.stride(), strict=False))
    x = SimpleNamespace(
        q=pointer(q), k=pointer(k), v=pointer(v), starts=pointer(key_starts), lengths=pointer(key_lengths), d=head_dim,
        BLOCK_M=64, BLOCK_N=128, BLOCK_D=max(16, 1 << (head_dim - 1).bit_length()),
    )  # fmt: skip
    pitches = dict(zip(("d_out_batch", "d_out_head", "d_out_row"), d_out.stride(), strict=False))
    up = SimpleNamespace(theta=pointer(theta), d_out=pointer(d_out), ALIGNED=True, **pitches)
    results = [torch.full(t.shape, 7.0, dtype=t.dtype) for t in (q, k, v)]
    for number in range(batch * heads):
        kernel = program(MODULES, number, 8)["gradients_hopper_kernel"]
        size = SimpleNamespace(**numbers)
        kernel(x, size, up, pointer(out2), *map(pointer, results), max(128, math.ceil(n_q / 128) * 128))
    return tuple(results)


def check(
    n_q: int, n_k: int, head_dim: int, *, dtype: torch.dtype = torch.bfloat16, heads: int = 1, batch: int = 1,
    causal: bool = False, window: int | None = None, spread: float = 1.0, scale: float = 0.3, **padding: Tensor,
) -> None:  # fmt: skip
    """Compare with the eager path in float64."""
    q, k, v = random_qkv("cpu", n_q, n_k, head_dim, heads=heads, batch=batch, spread=spread, dtype=dtype)
    d_out = torch.randn(q.shape).to(dtype)
    mask = AttentionMask(causal=causal, window=window, **padding)
    exact = [t.double().requires_grad_() for t in (q, k, v)]
    out = attention_eager(*exact, alpha=1.5, scale=scale, mask=mask)
    want = torch.autograd.grad(out, exact, d_out.double())

    scores = masked_scores(exact[0], exact[1], scale=scale, mask=mask).detach()
    empty = scores.isinf().all(-1)
    theta = solve_theta(scores.masked_fill(empty[..., None], 0.0), 1.5).squeeze(-1).masked_fill(empty, math.inf)
    u = (1 + 0.5 * (scores - theta[..., None])).clamp_min(0)
    out2 = u @ v.double() / u.sum(-1, keepdim=True).clamp_min(1e-30)
    width = UNLIMITED if window is None else window - 1
    found = run(
        q, k, v, theta.float(), out2.to(dtype), d_out,
        scale=scale, left=width, right=0 if causal else width, **padding,
    )  # fmt: skip
    for got, expected in zip(found, want, strict=True):
        assert (got.double() - expected).norm() <= 2**-7 * (expected.norm() + 1e-3)
    sees = ~scores.isinf().all(-2)  # keys that no query sees
    assert (found[1][~sees] == 0).all() and (found[2][~sees] == 0).all()
    assert (found[0][empty] == 0).all()


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("n", [1, 64, 65, 127, 128, 129, 200, 385, 512])
def test_lengths(n, causal):
    check(n, n, 16, causal=causal)


@pytest.mark.in_turn(2)
@pytest.mark.parametrize(
    "options", [{}, {"causal": True}, {"window": 5}, {"causal": True, "window": 70}, {"scale": 2.5}], ids=str
)
@pytest.mark.parametrize(("n_q", "n_k"), [(264, 256), (136, 520), (511, 170), (30, 300), (300, 30)])
def test_masks(n_q, n_k, options):
    """Some queries see no key where there are more queries than keys, and some keys are seen by none."""
    check(n_q, n_k, 32, heads=2, dtype=torch.float16, **options)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("n", [100, 300])
def test_padding(n, causal):
    starts, lengths = torch.tensor([0, 3, 9, 0, 50]), torch.tensor([n, n - 3, 17, 0, 50])
    check(n, n, 16, batch=5, causal=causal, key_starts=starts, key_lengths=lengths)


@pytest.mark.parametrize("head_dim", [16, 32, 48, 64])
@pytest.mark.parametrize("spread", [0.0, 0.3, 4.0])
def test_head_dims(head_dim, spread):
    check(150, 150, head_dim, spread=spread)


def test_rows_and_heads_that_are_not_next_to_each_other():
    q, k, v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in random_qkv("cpu", 200, heads=3, head_dim=16))
    theta, out2, d_out = torch.randn(1, 3, 200), torch.randn(q.shape).bfloat16(), torch.randn(q.shape).bfloat16()
    q, k, v = (x.bfloat16() for x in (q, k, v))
    same = run(*(x.contiguous() for x in (q, k, v)), theta, out2, d_out, scale=0.2)
    turned = d_out.transpose(1, 2).contiguous().transpose(1, 2)
    assert all(map(torch.equal, run(q, k, v, theta, out2, turned, scale=0.2), same))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_reaches_dq_of_its_row_alone(value):
    q, k, v = random_qkv("cpu", 200, heads=1, head_dim=16, dtype=torch.bfloat16)
    theta, out2, d_out = torch.zeros(1, 1, 200), torch.randn(q.shape).bfloat16(), torch.randn(q.shape).bfloat16()
    d_out[0, 0, 7, 0] = value
    dq, _, _ = run(q, k, v, theta, out2, d_out, scale=0.2)
    bad = ~dq.isfinite().all(-1)
    assert bad[0, 0, 7] and bad.sum() == 1


@pytest.mark.parametrize(
    ("heads", "full"), [(1, False), (79, False), (80, True), (132, True), (133, False), (160, True)]
)
def test_heads_that_leave_few_places_empty(heads, full):
    """With a program a head, 132 at a time: 80 of 132 are enough, 133 of 264 are not."""
    assert _rounds_are_full(heads, 132) == full
