"""Short sequences whose scores stay on chip: which calls take that kernel, and that it is exact."""

from __future__ import annotations

import math

import pytest
import torch
from calls import bind, plain, positions, random_qkv
from oracle import check_against_oracle

from adasplash_kernels import entmax_attention, limits, short

ON_GPU = torch.cuda.is_available()
METHOD = "columns_nolist"
# the interpreter's tile holds 32 keys, those of a GPU 128 to 512
LENGTHS = [1, 63, 64, 65, 127, 128, 129, 255, 256, 257, 384, 511, 512] if ON_GPU else [1, 15, 16, 17, 31, 32]
MOST = LENGTHS[-1]


def most(device: str) -> int:
    """Return how many keys one kernel takes."""
    hopper = ON_GPU and short._has_hopper_kernel(torch.device(device, 0))
    return limits.ON_CHIP_HOPPER if hopper else limits.ON_CHIP


def names_of(device, names_launched, n_k, **options) -> list[str]:
    names_launched.clear()
    kept = {name: options.pop(name) for name in ("head_dim", "dtype") if name in options}
    q, k, v = random_qkv(device, 20, n_k, **{"dtype": torch.bfloat16, **kept})
    entmax_attention(q, k, v, method=METHOD, **options)
    return list(names_launched)


def test_short_sequences_take_one_kernel(device, names_launched):
    longest = most(device)
    for n_k in (1, longest - 1, longest):
        [name] = names_of(device, names_launched, n_k)
        assert name.startswith("on_chip")
    assert names_of(device, names_launched, longest + 1)[0] == "bound_kernel"


@pytest.mark.parametrize("options", [{"alpha": 1.3}, {"alpha": 2.0}, {"dtype": torch.float32}, {"head_dim": 65}])
def test_what_does_not_fit_takes_the_passes(device, names_launched, options):
    assert names_of(device, names_launched, 16, **options)[0] == "bound_kernel"


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("n", LENGTHS)
def test_lengths(device, n, causal):
    q, k, v = random_qkv(device, n, heads=2, head_dim=64 if ON_GPU else 16, spread=2.0, dtype=torch.bfloat16)
    check_against_oracle(bind(METHOD), plain(METHOD), q, k, v, causal=causal)


@pytest.mark.parametrize(
    "options",
    [{}, {"causal": True}, {"window": 5}, {"causal": True, "window": 7}, {"scale": 0.01}, {"scale": 2.5}],
    ids=str,
)
@pytest.mark.parametrize(("n_q", "n_k"), [(MOST + 8, MOST), (MOST // 3, MOST - 1)])
def test_masks(device, n_q, n_k, options):
    q, k, v = random_qkv(device, n_q, n_k, 24, heads=4, kv_heads=2, batch=2, dtype=torch.float16)
    check_against_oracle(bind(METHOD), plain(METHOD), q, k, v, **options)


def test_padding(device):
    q, k, v = random_qkv(device, MOST, heads=2, batch=4, head_dim=40, dtype=torch.bfloat16)
    starts, lengths = positions(device, 0, 3, 9, 0), positions(device, MOST, MOST - 3, 17, 0)
    check_against_oracle(bind(METHOD), plain(METHOD), q, k, v, key_starts=starts, key_lengths=lengths)
    out = entmax_attention(q, k, v, method=METHOD, key_lengths=lengths)
    assert (out[3] == 0).all()


@pytest.mark.parametrize("spread", [0.0, 1e-3, 30.0, 1e4])
def test_hard_rows(device, spread):
    """Ties of all keys, and one key that outdoes all others."""
    q, k, v = random_qkv(device, MOST, heads=2, spread=spread, head_dim=32, dtype=torch.bfloat16)
    check_against_oracle(bind(METHOD), plain(METHOD), q, k, v, causal=True)


def test_weights_sum_to_one(device):
    q, k, v = random_qkv(device, MOST, heads=2, spread=3.0, head_dim=32, dtype=torch.bfloat16)
    out = entmax_attention(q, k, torch.ones_like(v), method=METHOD, causal=True)
    assert (out.float() - 1).abs().max() < 2**-7


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_not_finite_reaches_its_rows_alone(device, value):
    q, k, v = random_qkv(device, MOST, heads=2, head_dim=16, dtype=torch.bfloat16)
    q[0, 1, 5, 0] = value
    out = entmax_attention(q, k, v, method=METHOD)
    bad = ~out.isfinite().all(-1)
    assert bad[0, 1, 5] and bad.sum() == 1


def test_runs_are_equal_bit_for_bit(device):
    qkv = random_qkv(device, MOST, heads=4, head_dim=32, dtype=torch.bfloat16)
    first = entmax_attention(*qkv, method=METHOD)
    assert all(torch.equal(first, entmax_attention(*qkv, method=METHOD)) for _ in range(5))
