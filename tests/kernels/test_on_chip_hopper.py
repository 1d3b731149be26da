"""What Hopper's kernel for short sequences computes, run without a GPU: see gluon_eager.py."""

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
from adasplash_kernels.inputs import UNLIMITED
from adasplash_kernels.reference import attention_reference, entmax_reference

FOLDER = Path(adasplash_kernels.__file__).parent
MODULES = [FOLDER / "rows_gluon.py", FOLDER / "warpgroups.py", FOLDER / "on_chip_hopper.py"]


def run(
    q: Tensor, k: Tensor, v: Tensor, *, causal: bool = False, window: int | None = None, scale: float | None = None,
    key_starts: Tensor | None = None, key_lengths: Tensor | None = None, each: int = 2, need_out2: bool = True,
) -> tuple[Tensor, Tensor | None, Tensor]:  # fmt: skip
    """Return O, O2 and theta of the kernel, all programs one after the other."""
    batch, heads, n_q, head_dim = q.shape
    n_k = k.shape[2]
    tile = max(128, 1 << (n_k - 1).bit_length())
    warps = 8 if tile > 256 else 4
    width = UNLIMITED if window is None else window - 1
    blocks = math.ceil(n_q / 64)
    numbers = {"heads": heads, "groups": heads // k.shape[1], "n_q": n_q, "n_k": n_k}
    for name, x in (("q", q), ("k", k), ("v", v)):
        numbers |= dict(zip((f"{name}_batch", f"{name}_head", f"{name}_row"), x.stride(), strict=False))
    size = SimpleNamespace(
        **numbers, left=width, right=0 if causal else width, scale=head_dim**-0.5 if scale is None else scale
    )
    x = SimpleNamespace(
        q=pointer(q), k=pointer(k), v=pointer(v), starts=pointer(key_starts), lengths=pointer(key_lengths), d=head_dim,
        BLOCK_M=64, BLOCK_N=tile, BLOCK_D=max(16, 1 << (head_dim - 1).bit_length()),
    )  # fmt: skip
    theta = torch.full((batch, heads, n_q), 7.0)
    out = torch.full((batch, heads, n_q, head_dim), 7.0, dtype=q.dtype)
    out2 = torch.full_like(out, 7.0) if need_out2 else None
    for number in range(batch * heads * math.ceil(blocks / each)):
        kernel = program(MODULES, number, warps)["on_chip_hopper_kernel"]
        kernel(x, size, pointer(theta), pointer(out), pointer(out2), 40, each, causal, head_dim % 16 == 0)
    return out, out2, theta


def check(q: Tensor, k: Tensor, v: Tensor, **options) -> None:
    """Compare O with the oracle, and theta and O2 with what they are of its weights."""
    out, out2, theta = run(q, k, v, **options)
    options.pop("each", None)
    want = attention_reference(q, k, v, alpha=1.5, **options)
    assert (out.double() - want).norm() <= 2**-8 * (1 + want.norm())
    assert out.isfinite().all() and out2.isfinite().all()
    nothing = torch.ones_like(v)
    seen = attention_reference(q, k, nothing, alpha=1.5, **options)[..., 0] > 0.5
    assert torch.equal(theta.isinf(), ~seen)
    assert (out[~seen] == 0).all() and (out2[~seen] == 0).all()


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("n", [1, 63, 65, 128, 129, 256, 257, 511, 512])
def test_lengths(n, causal):
    """All widths of tiles, with one group of warps and with two; causal ones have blocks that see half of a tile."""
    check(*random_qkv("cpu", n, heads=1, head_dim=16, spread=2.0, dtype=torch.bfloat16), causal=causal)


@pytest.mark.in_turn(2)
@pytest.mark.parametrize(
    "options",
    [{}, {"causal": True}, {"window": 5}, {"causal": True, "window": 7}, {"scale": 0.01}, {"scale": 2.5}],
    ids=str,
)
@pytest.mark.parametrize(("n_q", "n_k"), [(264, 256), (136, 128), (170, 511), (520, 512), (30, 300), (300, 30)])
def test_masks(n_q, n_k, options):
    """Some queries see no key where there are more queries than keys."""
    q, k, v = random_qkv("cpu", n_q, n_k, 24, heads=2, kv_heads=1, dtype=torch.float16)
    check(q, k, v, **options, each=3)


@pytest.mark.parametrize("n", [100, 256, 500])
def test_padding(n):
    q, k, v = random_qkv("cpu", n, heads=1, batch=5, head_dim=16, dtype=torch.bfloat16)
    starts, lengths = torch.tensor([0, 3, 9, 0, 50]), torch.tensor([n, n - 3, 17, 0, 50])
    check(q, k, v, key_starts=starts, key_lengths=lengths)


@pytest.mark.parametrize("n", [120, 400])
@pytest.mark.parametrize("spread", [0.0, 1e-3, 30.0, 1e4])
def test_hard_rows(n, spread):
    """Ties of all keys, and one key that outdoes all others."""
    q, k, v = random_qkv("cpu", n, heads=1, spread=spread, head_dim=16, dtype=torch.bfloat16)
    check(q, k, v)


def check_theta(q: Tensor, k: Tensor, v: Tensor) -> None:
    """Compare theta and O2 with float64; of the sum of weights an error of theta costs sum u times as much."""
    _out, out2, theta = run(q, k, v)
    scores = q.double() @ k.double().mT * q.shape[-1] ** -0.5
    u = entmax_reference(scores, 1.5).sqrt()
    exact = (scores - 2 * (u - 1)).where(u > 1e-4, math.nan).nanmean(-1)
    assert ((theta - exact).abs() * u.sum(-1)).max() < 1e-5
    want = u @ v.double() / u.sum(-1, keepdim=True)
    assert (out2.double() - want).norm() < 2**-8 * want.norm()


@pytest.mark.parametrize("n", [128, 256, 512])
@pytest.mark.parametrize("spread", [0.3, 1.0, 4.0])
def test_theta_and_the_mean_of_values(n, spread):
    check_theta(*random_qkv("cpu", n, heads=1, head_dim=64, spread=spread, dtype=torch.bfloat16))


@pytest.mark.parametrize(("n", "groups"), [(256, 1), (512, 2)])
@pytest.mark.parametrize("ahead", [1.0, 4.0])
def test_a_bound_that_misses_most_of_the_support(n, groups, ahead):
    """All keys of note share one maximum."""
    q, k, v = random_qkv("cpu", n, heads=1, head_dim=64, dtype=torch.bfloat16)
    q[..., 0] = ahead * 8
    k *= 0.1
    k[..., 0] = 0
    k[..., groups * torch.arange(0, 64, 8), 0] = 1
    check_theta(q, k, v)


def test_no_second_output_where_none_is_asked_for():
    q, k, v = random_qkv("cpu", 200, heads=1, head_dim=16, dtype=torch.bfloat16)
    out, out2, theta = run(q, k, v, need_out2=False)
    same, _, same_theta = run(q, k, v)
    assert out2 is None and torch.equal(out, same) and torch.equal(theta, same_theta)


@pytest.mark.parametrize("n", [200, 400])
def test_blocks_that_a_program_takes_change_nothing(n):
    q, k, v = random_qkv("cpu", n, heads=2, head_dim=16, dtype=torch.bfloat16)
    first = run(q, k, v, causal=True, each=1)
    for each in (2, 7):
        assert all(map(torch.equal, first, run(q, k, v, causal=True, each=each)))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_reaches_its_rows_alone(value):
    q, k, v = random_qkv("cpu", 300, heads=1, head_dim=16, dtype=torch.bfloat16)
    q[0, 0, 5, 0] = value
    bad = ~run(q, k, v)[0].isfinite().all(-1)
    assert bad[0, 0, 5] and bad.sum() == 1
