"""Few queries against many keys without gradients, which take a path of their own; interpreted or compiled."""

from __future__ import annotations

import functools
import math
from typing import Any

import pytest
import torch
from calls import KERNELS, bind, op_arguments, plain, positions, random_qkv
from maximum import maximum_drops_nan  # noqa: F401
from oracle import check_against_oracle
from torch import Tensor

from adasplash_kernels import decode, entmax_attention
from adasplash_kernels.ops import forward_op
from adasplash_kernels.problem import Problem

METHOD = "adasplash"  # where it makes no difference
by_method = pytest.mark.parametrize("method", KERNELS)
TILE, FEWEST = decode._KEYS, decode._MIN_KEYS
KEYS = 2 * FEWEST + 3


@pytest.fixture
def taken(monkeypatch) -> list[str]:
    """Note the method of each call that takes the path."""
    calls: list[str] = []
    original = decode.decode
    monkeypatch.setattr(decode, "decode", lambda problem, method: calls.append(method) or original(problem, method))
    return calls


def check(taken: list[str], q: Tensor, k: Tensor, v: Tensor, method: str = METHOD, **options: Any) -> None:
    """Compare with the oracle what this path, and no other, computes."""
    check_against_oracle(bind(method), plain(method), q, k, v, forward_only=True, **options)
    assert taken == [method]


@pytest.mark.parametrize(("n_q", "batch", "heads", "kv_heads", "causal"), [
    (1, 3, 2, 2, False), (1, 2, 6, 2, True), (3, 2, 2, 1, False), (3, 1, 4, 2, True), (8, 1, 2, 2, False),
    (8, 1, 2, 1, True), (16, 1, 1, 1, False), (16, 1, 4, 1, True),
])  # fmt: skip
def test_queries_and_heads(device, taken, n_q, batch, heads, kv_heads, causal):
    check(taken, *random_qkv(device, n_q, KEYS, heads=heads, kv_heads=kv_heads, batch=batch), causal=causal)


MASKS: dict[str, dict[str, Any]] = {
    "causal window": {"causal": True, "window": KEYS // 3},
    "window on both sides": {"window": 5},
    "window of one": {"window": 1, "causal": True},
    "ALiBi per head": {"alibi_slopes": [0.25, -0.01]},
    "ALiBi per batch and head, causal": {"alibi_slopes": [[0.5, 0.1], [-0.02, 0.3]], "causal": True},
    "lengths": {"key_lengths": (KEYS - 9, 0)},
    "lengths of one, and past the end": {"key_lengths": (1, KEYS + 5)},
    "starts": {"key_starts": (0, TILE + 1)},
    "starts at and past the end": {"key_starts": (KEYS - 1, KEYS)},
    "starts past lengths, causal": {"key_starts": (5, 20), "key_lengths": (KEYS - 4, 7), "causal": True},
    "all": {"key_starts": (TILE - 2, 1), "key_lengths": (KEYS, 3 * TILE // 2), "causal": True, "window": TILE + 4,
            "alibi_slopes": [0.25, -0.01]},
}  # fmt: skip


def on_device(options: dict[str, Any], device: str) -> dict[str, Any]:
    """Return options with their tuples as positions and their lists as float32."""
    made = {tuple: lambda x: positions(device, *x), list: lambda x: torch.tensor(x, device=device)}
    return {name: made.get(type(x), lambda x: x)(x) for name, x in options.items()}


@pytest.mark.parametrize("mask", MASKS)
def test_masks(device, taken, mask):
    qkv = random_qkv(device, 3, KEYS, heads=2, kv_heads=1, batch=2)
    check(taken, *qkv, **on_device(MASKS[mask], device))


@pytest.mark.in_turn(2)
@by_method
@pytest.mark.parametrize("alpha", [1.0, 1.1, 1.5, 1.75, 2.0, "scalar", "one element", "per head"])
def test_alphas(device, taken, method, alpha):
    tensors = {"scalar": torch.tensor(1.3), "one element": torch.tensor([1.8]),
               "per head": torch.tensor([1.0, 1.2, 1.5, 2.0])}  # fmt: skip
    alpha = tensors[alpha].to(device) if alpha in tensors else alpha
    check(taken, *random_qkv(device, 1, KEYS, heads=4, kv_heads=2), method, alpha=alpha)


@by_method
@pytest.mark.parametrize("spread", [0.01, 30.0, 1000.0])
def test_score_scales(device, taken, method, spread):
    check(taken, *random_qkv(device, 3, KEYS, spread=spread), method, alpha=1.5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("alpha", [1.0, 1.3, 1.5, 2.0])
def test_half_precision(device, taken, dtype, alpha):
    check(taken, *random_qkv(device, 2, KEYS, 32, heads=2, kv_heads=1, dtype=dtype), alpha=alpha, causal=True)


@pytest.mark.parametrize("head_dim", [1, 24, 40, 80, 256])
def test_head_dims(device, taken, head_dim):
    check(taken, *random_qkv(device, 2, FEWEST + 1, head_dim, heads=2, kv_heads=1), causal=True, scale=0.3)


@pytest.mark.parametrize("n_k", [FEWEST, FEWEST + 1, 3 * TILE - 1, 3 * TILE, 3 * TILE + 1,
                                 pytest.param(4097, marks=pytest.mark.gpu)])  # fmt: skip
@pytest.mark.parametrize("pieces", [1, 3, decode._PIECES])
def test_tile_and_piece_borders(device, taken, monkeypatch, n_k, pieces):
    """A piece of all keys, pieces of several tiles, of which the last is not full, and a piece a tile."""
    monkeypatch.setattr(decode, "_PIECES", pieces)
    check(taken, *random_qkv(device, 1, max(n_k, FEWEST), heads=2), causal=True)


def test_strides(device, taken):
    """Caches that are views: of (B, N, H, D), of a longer cache, and with the head dim not the fastest."""
    q, k, v = random_qkv(device, 2, KEYS, heads=4, kv_heads=2, batch=2)
    longer = torch.full((2, 2, KEYS + 40, 16), math.nan, device=device)
    by_token = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v)]
    expected = entmax_attention(q, k, v, method=METHOD)
    for cache in (longer, longer.mT.contiguous().mT):
        views = [cache.clone(memory_format=torch.preserve_format)[:, :, 7 : 7 + KEYS] for _ in range(2)]
        for view, x in zip(views, (k, v), strict=True):
            view.copy_(x)
        assert torch.equal(entmax_attention(q.mT.contiguous().mT, *views, method=METHOD), expected)
    assert torch.equal(entmax_attention(*by_token, method=METHOD), expected)
    assert torch.equal(entmax_attention(q, k[:, :1].expand(2, 2, -1, -1), v, method=METHOD),
                       entmax_attention(q, k[:, :1].repeat(1, 2, 1, 1), v, method=METHOD))  # fmt: skip
    assert taken == [METHOD] * 6


@pytest.mark.in_turn(2)
@by_method
@pytest.mark.parametrize("alpha", [1.0, 1.3, 1.5, 2.0])
def test_as_accurate_as_the_ordinary_path(device, taken, monkeypatch, method, alpha):
    q, k, v = random_qkv(device, 3, KEYS, heads=2, kv_heads=1, spread=2.0)

    def ordinary(*tensors: Tensor, **options: Any) -> Tensor:
        with monkeypatch.context() as patch:
            patch.setattr(decode, "suits", lambda problem: False)
            return entmax_attention(*tensors, method=method, **options)

    check_against_oracle(bind(method), ordinary, q, k, v, forward_only=True, alpha=alpha, causal=True)
    assert taken == [method]


@by_method
def test_thresholds_are_those_of_the_ordinary_path(device, taken, monkeypatch, method):
    q, k, v = random_qkv(device, 3, KEYS, heads=2, kv_heads=1, batch=2)
    arguments = op_arguments(q, k, v, method, need_backward=False, key_lengths=positions(device, 20, 0))
    theta = forward_op(*arguments)[2]
    monkeypatch.setattr(decode, "suits", lambda problem: False)
    ordinary = forward_op(*arguments)[2]
    assert taken == [method] and theta.shape == (2, 2, 3)
    assert (theta[1] == math.inf).all() and (ordinary[1] == math.inf).all()
    assert ((theta - ordinary)[0].abs() <= 2e-6 + 2**-21 * ordinary[0].abs()).all()


def ask(taken: list[str], *qkv: Tensor, **options: Any) -> bool:
    """Call, and return whether the path was taken."""
    taken.clear()
    entmax_attention(*qkv, method=METHOD, **options)
    return taken == [METHOD]


def test_when_it_is_taken(device, taken):
    """With few queries, enough keys, and no gradient to come."""
    assert ask(taken, *random_qkv(device, 2, FEWEST))
    assert not ask(taken, *random_qkv(device, 2, FEWEST - 1))
    assert not ask(taken, *random_qkv(device, decode.MAX_QUERIES + 1, FEWEST))


def suits(n_q: int, n_k: int, heads: int = 1, kv_heads: int = 1) -> bool:
    qkv = random_qkv("cpu", n_q, n_k, heads=heads, kv_heads=kv_heads)
    return decode.suits(Problem(*qkv, torch.ones(1), "1.5", 1.0))


def test_whom_it_suits():
    """At most 16 queries, and 64 of those that share keys, which are one tile."""
    assert suits(1, FEWEST) and suits(16, FEWEST) and not suits(17, FEWEST) and not suits(1, FEWEST - 1)
    assert suits(1, FEWEST, 64) and not suits(1, FEWEST, 65) and suits(1, FEWEST, 128, 2)
    assert suits(16, FEWEST, 4) and not suits(16, FEWEST, 5) and not suits(13, FEWEST, 5) and suits(12, FEWEST, 5)


def test_not_for_packed_sequences(device, taken):
    q, k, v = random_qkv(device, 4, KEYS)
    packed = {"cu_seqlens_q": positions(device, 0, 1, 4), "cu_seqlens_k": positions(device, 0, 9, KEYS)}
    assert not ask(taken, q, k, v, **packed)


@pytest.mark.parametrize("needed", ["q", "k", "v", "alpha"])
def test_not_where_gradients_are_needed(device, taken, needed):
    tensors = dict(zip("qkv", random_qkv(device, 2, KEYS), strict=True), alpha=torch.tensor(1.4, device=device))
    tensors[needed].requires_grad_()
    alpha = tensors.pop("alpha")
    assert not ask(taken, *tensors.values(), alpha=alpha)
    with torch.no_grad():
        assert ask(taken, *tensors.values(), alpha=alpha)
    with torch.inference_mode():
        assert ask(taken, *tensors.values(), alpha=alpha)


@pytest.mark.parametrize("alpha", [1.3, 1.5])
def test_values_of_tiles_without_weights_are_not_read(device, taken, alpha):
    """Guaranteed by tiles of ``decode._KEYS`` keys: a value is read if any key of its tile has a weight for any of the
    queries and heads that share it, and not otherwise; so caches may hold anything past their lengths' last tile."""
    q, k, v = random_qkv(device, 1, max(2 * TILE, FEWEST) + 5, heads=2, kv_heads=1, batch=2)
    q[..., 0], k[..., 0] = 4, -100
    k[0, :, TILE : 2 * TILE, 0] = k[1, :, :3, 0] = 0
    used = torch.zeros_like(v[..., :1], dtype=torch.bool)
    used[0, :, TILE : 2 * TILE] = used[1, :, :TILE] = True
    unreadable = torch.where(used, v, math.nan)
    call = functools.partial(entmax_attention, q, k, alpha=alpha, method=METHOD)
    assert torch.equal(call(unreadable), call(v))
    beside = unreadable.clone()
    beside[1, 0, 3] = math.nan  # no weight, but in a tile that has some
    assert torch.equal(call(beside).isnan().all(-1), torch.tensor([[[False]] * 2, [[True]] * 2], device=device))
    lengths = positions(device, 2 * TILE, TILE)
    past_the_end = torch.where(torch.arange(v.shape[2], device=device)[:, None] < 2 * TILE, v, math.nan)
    assert torch.equal(call(past_the_end, key_lengths=lengths), call(v, key_lengths=lengths))
    assert len(taken) == 5


@pytest.mark.usefixtures("maximum_drops_nan")
@pytest.mark.parametrize(("method", "alpha"), [*((m, 1.5) for m in KERNELS), ("adasplash2", 1.0), ("adasplash2", 1.3)])
def test_nan_reaches_the_output(device, taken, method, alpha):
    """A query's own row, all rows that see a key, and all that use a value; no others."""
    q, k, v = random_qkv(device, 2, KEYS, heads=2)
    call = functools.partial(entmax_attention, alpha=alpha, causal=True, method=method)
    clean = call(q, k, v)
    bad_q, bad_k, bad_v = q.clone(), k.clone(), v.clone()
    bad_q[0, 1, 0, 3] = bad_k[0, 1, KEYS - 1, 3] = math.nan
    bad_v[0, 0, :, 3] = math.nan
    reached = torch.zeros(3, *q.shape, dtype=torch.bool, device=device)
    reached[0, 0, 1, 0] = reached[1, 0, 1, 1] = True  # the last query alone sees the last key
    reached[2, 0, 0, :, 3] = True
    for found, nan in zip((call(bad_q, k, v), call(q, bad_k, v), call(q, k, bad_v)), reached, strict=True):
        assert torch.equal(found.isnan(), nan)
        torch.testing.assert_close(found[~nan], clean[~nan])
    assert len(taken) == 4


@pytest.mark.usefixtures("maximum_drops_nan")
@by_method
def test_nan_alone_among_hidden_keys_reaches_the_output(device, taken, method):
    q, k, v = random_qkv(device, 2, KEYS)
    k[0, 0, 9, 0] = math.nan
    seen = {"key_starts": positions(device, 9), "key_lengths": positions(device, 10)}
    assert entmax_attention(q, k, v, method=method, **seen).isnan().all()
    assert taken == [method]


def test_the_same_call_gives_the_same_bits(device):
    q, k, v = random_qkv(device, 2, KEYS, heads=2, kv_heads=1, dtype=torch.bfloat16)
    first = entmax_attention(q, k, v, method=METHOD)
    assert all(torch.equal(entmax_attention(q, k, v, method=METHOD), first) for _ in range(3))


def test_custom_op_is_well_formed(device, taken):
    q, k, v = random_qkv(device, 2, FEWEST, heads=2, kv_heads=1)
    torch.library.opcheck(forward_op, op_arguments(q, k, v, METHOD, need_backward=False))
    assert taken


def test_compiles_whole_while_the_cache_grows(device, taken):
    torch.compiler.reset()
    step = functools.partial(entmax_attention, causal=True, method=METHOD)
    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend="aot_eager")
    with torch.no_grad():
        for n_k in (FEWEST - 1, FEWEST, KEYS):  # the first takes the ordinary path, by the same graph
            qkv = random_qkv(device, 2, n_k, seed=n_k)
            torch.testing.assert_close(compiled(*qkv), step(*qkv), rtol=0, atol=0)
    assert len(taken) == 4
