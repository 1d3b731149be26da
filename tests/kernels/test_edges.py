"""The edges of the surface: rows without keys, single keys, ties, huge scores, NaN and infinities, no queries."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import pytest
import torch
from calls import METHODS, bind, plain, positions, random_qkv, stretch
from maximum import maximum_drops_nan  # noqa: F401
from oracle import check_against_oracle
from torch import Tensor

from adasplash_kernels.reference import attention_reference

# Without its mask AdaSplash is the same code with less to do: in the interpreter it is left out.
pytestmark = pytest.mark.parametrize(
    "method", [pytest.param(m, marks=pytest.mark.gpu) if m == "adasplash_nomask" else m for m in METHODS]
)


class Way(NamedTuple):
    """A way for queries to see no key, and keys no query. Lengths are ``stretch`` times longer on a GPU."""

    n_q: int
    n_k: int
    batch: int
    options: dict[str, Any]  # tuples are positions
    empty: list[tuple[int, int, int]]  # sequence, first query, end
    unseen: list[tuple[int, int, int]]  # sequence, first key, end


WAYS = {
    "length 0": Way(9, 18, 2, {"key_lengths": (0, 18)}, [(0, 0, 9)], [(0, 0, 18)]),
    "start past the length": Way(9, 18, 2, {"key_starts": (12, 0), "key_lengths": (5, 17)},
                                 [(0, 0, 9)], [(0, 0, 18), (1, 17, 18)]),
    "start past the end": Way(9, 18, 2, {"key_starts": (18, 3)}, [(0, 0, 9)], [(0, 0, 18), (1, 0, 3)]),
    "left padding, causal": Way(18, 18, 1, {"key_starts": (7,), "causal": True}, [(0, 0, 7)], [(0, 0, 7)]),
    "more queries than keys, causal": Way(34, 17, 1, {"causal": True}, [(0, 0, 17)], []),
    "window past the padding": Way(34, 34, 1, {"window": 1, "key_lengths": (10,)}, [(0, 10, 34)], [(0, 10, 34)]),
    "packed, no keys": Way(34, 20, 1, {"cu_seqlens_q": (0, 10, 25, 34), "cu_seqlens_k": (0, 9, 9, 20)},
                           [(0, 10, 25)], []),
    "packed, no queries": Way(18, 34, 1, {"cu_seqlens_q": (0, 8, 8, 18), "cu_seqlens_k": (0, 7, 25, 34)},
                              [], [(0, 7, 25)]),
    "packed, more queries than keys, causal": Way(
        34, 20, 1, {"cu_seqlens_q": (0, 20, 34), "cu_seqlens_k": (0, 5, 20), "causal": True}, [(0, 0, 15)], [],
    ),
    "packed, past the end": Way(34, 34, 1, {"cu_seqlens_q": (0, 5, 21)}, [(0, 21, 34)], [(0, 21, 34)]),
    "packed, nothing": Way(18, 20, 1, {"cu_seqlens_q": (0, 0), "cu_seqlens_k": (0, 0)}, [(0, 0, 18)], [(0, 0, 20)]),
}  # fmt: skip


def places(device, where: list[tuple[int, int, int]], batch: int, n: int, factor: int) -> Tensor:
    """Return (batch, 1, n) bool, true at the listed places."""
    found = torch.zeros(batch, 1, n, dtype=torch.bool, device=device)
    for sequence, first, end in where:
        found[sequence, :, factor * first : factor * end] = True
    return found


@pytest.mark.in_turn(3)
@pytest.mark.parametrize("learned", [False, True], ids=["fixed alpha", "learned alpha"])
@pytest.mark.parametrize("way", WAYS)
def test_without_keys_all_is_zero(device, method, way, learned):
    n_q, n_k, batch, options, empty, unseen = WAYS[way]
    factor = stretch(device)
    options = {name: positions(device, *(factor * x for x in option)) if isinstance(option, tuple) else option
               for name, option in options.items()}  # fmt: skip
    empty = places(device, empty, batch, factor * n_q, factor)
    unseen = places(device, unseen, batch, factor * n_k, factor)
    inputs = [x.requires_grad_() for x in random_qkv(device, factor * n_q, factor * n_k, batch=batch)]
    alpha = torch.tensor(1.3, device=device, requires_grad=True) if learned else 1.5
    out = bind(method)(*inputs, alpha=alpha, **options)
    upstream = torch.randn(out.shape, device=device)
    dq, dk, dv, *to_alpha = torch.autograd.grad(out, [*inputs, alpha] if learned else inputs, upstream)
    assert torch.equal((out == 0).all(-1), empty)
    assert (dq[empty] == 0).all() and (dk[unseen] == 0).all() and (dv[unseen] == 0).all()
    assert all(x.isfinite().all() for x in (out, dq, dk, dv, *to_alpha))
    if learned and empty.all():
        assert to_alpha[0] == 0


ONE_KEY = {
    "one key": (lambda n: (n, 1, {}, [0] * n)),
    "length 1": (lambda n: (n, n, {"key_lengths": (1,)}, [0] * n)),
    "window of one": (lambda n: (n, n + 5, {"window": 1}, range(5, n + 5))),
    "packed, one token each": (lambda n: (n, n, {"cu_seqlens_q": range(n + 1)}, range(n))),
}


@pytest.mark.in_turn(3)
@pytest.mark.parametrize("alpha", [1.0, 1.3, 1.5, 2.0])
@pytest.mark.parametrize("way", ONE_KEY)
def test_one_key_is_copied(device, method, way, alpha):
    n_q, n_k, options, seen = ONE_KEY[way](18 * stretch(device))
    options = {name: x if isinstance(x, int) else positions(device, *x) for name, x in options.items()}
    q, k, v = random_qkv(device, n_q, n_k, spread=3.0)
    check_against_value(method, q, k, v, v[:, :, list(seen)], alpha=alpha, **options)


def check_against_value(method: str, q: Tensor, k: Tensor, v: Tensor, expected: Tensor, **options: Any) -> None:
    """Assert that the oracle gives what is known to be right, and that the method is within the oracle's budget."""
    reference = attention_reference(q, k, v, **options)
    torch.testing.assert_close(reference, expected.double().expand_as(reference))
    check_against_oracle(bind(method), plain(method), q, k, v, **options)


@pytest.mark.in_turn(2)
@pytest.mark.parametrize("alpha", [1.0, 1.5, 1.8, 2.0])
def test_ties_share_equally(device, method, alpha):
    q, k, v = random_qkv(device, 9, 40 * stretch(device))
    check_against_value(method, torch.zeros_like(q), k, v, v.double().mean(2, keepdim=True), alpha=alpha)


@pytest.mark.in_turn(2)
@pytest.mark.parametrize("alpha", [1.0, 1.5, 1.8, 2.0])
def test_tied_winners_share_equally(device, method, alpha):
    """Three equal keys in different tiles, ahead of all others by more than any support reaches."""
    n = 40 * stretch(device)
    q, k, v = random_qkv(device, 18, n)
    winners = [2, n // 2, n - 1]
    q, k = 10 + 0.1 * q, 0.1 * k
    k[:, :, winners] = 1.0
    check_against_value(method, q, k, v, v[:, :, winners].double().mean(2, keepdim=True), alpha=alpha)


@pytest.mark.in_turn(2)
@pytest.mark.parametrize("spread", [0.01, 30.0, 1000.0])
@pytest.mark.parametrize("alpha", [1.0, 1.4, 1.5, 2.0])
def test_score_scales(device, method, spread, alpha):
    qkv = random_qkv(device, 18 * stretch(device), 33 * stretch(device), 32, spread=spread)
    check_against_oracle(bind(method), plain(method), *qkv, alpha=alpha)


@pytest.mark.in_turn(2)
@pytest.mark.parametrize("shift", [-100.0, 100.0])
@pytest.mark.parametrize("alpha", [1.0, 1.3, 1.5, 2.0])
def test_shifting_all_scores_changes_nothing(device, method, shift, alpha):
    q, k, v = random_qkv(device, 18 * stretch(device), spread=3.0)
    q[..., -1] = 0
    expected = attention_reference(q, k, v, alpha=alpha)
    q[..., -1], k[..., -1] = 1, shift * 16**0.5
    check_against_value(method, q, k, v, expected, alpha=alpha)


BAD = [float("nan"), float("inf"), float("-inf")]
as_on_a_gpu = pytest.mark.usefixtures("maximum_drops_nan")


def infected(x: Tensor, row: int, value: float) -> tuple[Tensor, Tensor]:
    """Return x with one bad number in a row of the last head, and with a large finite one of the same sign instead."""
    bad, large = x.clone(), x.clone()
    bad[0, -1, row, 3] = value
    large[0, -1, row, 3] = bad[0, -1, row, 3].nan_to_num(0.0, 1e4, -1e4)
    return bad, large


@pytest.mark.in_turn(3)
@as_on_a_gpu
@pytest.mark.parametrize("alpha", [1.0, 1.3, 1.5, 2.0])
@pytest.mark.parametrize("value", BAD)
@pytest.mark.parametrize("where", ["q", "k"])
def test_bad_scores_reach_their_rows_and_end(device, method, where, value, alpha):
    """A NaN or +inf among the scores a row may see makes its output NaN; -inf hides the key; nothing else changes."""
    n = 20 * stretch(device)
    q, k, v = random_qkv(device, n)
    bad, large = infected(q if where == "q" else k, n // 3, value)
    call = functools.partial(bind(method), alpha=alpha, causal=True)
    found = call(bad, k, v) if where == "q" else call(q, bad, v)
    expected = call(large, k, v) if where == "q" else call(q, large, v)
    scores = bad.double() @ k.double().mT if where == "q" else q.double() @ bad.double().mT
    scores = scores.masked_fill(~torch.ones(n, n, dtype=torch.bool, device=device).tril(), -torch.inf)
    reached = (scores.isnan() | (scores == torch.inf)).any(-1)
    assert 0 < reached.sum() < n
    assert found[reached].isnan().all()
    torch.testing.assert_close(found[~reached], expected[~reached])


@pytest.mark.in_turn(3)
@as_on_a_gpu
@pytest.mark.parametrize("value", BAD)
@pytest.mark.parametrize("where", ["q", "k", "v"])
def test_bad_numbers_stay_in_their_head(device, method, where, value):
    n = 20 * stretch(device)
    inputs = dict(zip("qkv", random_qkv(device, n, heads=2), strict=True))
    upstream = torch.randn(1, 2, n, 16, device=device)

    def run(**changes: Tensor) -> list[Tensor]:
        leaves = [x.clone().requires_grad_() for x in (inputs | changes).values()]
        out = bind(method)(*leaves, causal=True)
        return [out, *torch.autograd.grad(out, leaves, upstream)]  # must end

    clean = run()
    found = run(**{where: infected(inputs[where], n // 3, value)[0]})
    assert not all(x.isfinite().all() for x in found)
    for a, b in zip(found, clean, strict=True):
        torch.testing.assert_close(a[:, 0], b[:, 0])
    if where == "q":  # the other queries' gradients have no part in the bad row
        others = torch.arange(n, device=device) != n // 3
        torch.testing.assert_close(found[1][:, :, others], clean[1][:, :, others])


@as_on_a_gpu
@pytest.mark.parametrize("value", BAD)
def test_bad_values_reach_the_rows_that_use_them(device, method, value):
    n = 20 * stretch(device)
    q, k, v = random_qkv(device, n, heads=2)
    bad, _ = infected(v, n // 3, value)
    unit = torch.zeros_like(v)
    unit[0, 1, n // 3] = 1
    used = attention_reference(q, k, unit)[0, 1, :, 3] > 1e-6
    assert 0 < used.sum() < n
    found, clean = bind(method)(q, k, bad), bind(method)(q, k, v)
    assert not found[0, 1, used, 3].isfinite().any()
    columns = torch.arange(16, device=device) != 3
    torch.testing.assert_close(found[..., columns], clean[..., columns])


@pytest.mark.parametrize("sizes", [(1, 0), (0, 4)], ids=["no queries", "no sequences"])
def test_nothing_to_do(device, method, sizes):
    batch, n_q = sizes
    q = torch.randn(batch, 2, n_q, 16, device=device, requires_grad=True)
    k, v = (torch.randn(batch, 2, 5, 16, device=device, requires_grad=True) for _ in range(2))
    out = bind(method)(q, k, v)
    assert out.shape == q.shape and out.dtype == q.dtype and out is not q
    for x, gradient in zip((q, k, v), torch.autograd.grad(out.sum(), (q, k, v), materialize_grads=True), strict=True):
        assert gradient.shape == x.shape and (gradient == 0).all()
