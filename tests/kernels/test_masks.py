"""The dense mask and ALiBi term against loops over single pairs, written from the definitions, and cases by hand."""

from __future__ import annotations

import itertools

import pytest
import torch

from adasplash_kernels.arguments import check_mask
from adasplash_kernels.masks import AttentionMask, allowed_keys

WINDOWS = [None, 1, 2, 4, 2**30]
LENGTHS = [(1, 1), (6, 6), (3, 7), (7, 3), (1, 6), (6, 1)]
PADDING = [
    {},
    {"key_starts": [0, 2, 9]},
    {"key_lengths": [6, 0, 3]},
    {"key_starts": [1, 0, 2], "key_lengths": [4, 9, 1]},
]
PACKED = [  # cumulative lengths of queries, of keys; numbers of queries and of keys
    ([0, 6], [0, 6], 6, 6),
    ([0, 2, 7], None, 7, 7),
    ([0, 2, 7], None, 9, 9),  # two tokens past the end
    ([0, 0, 3, 3, 3, 5, 5], None, 5, 5),  # sequences of no tokens at all
    ([0, 3, 4, 8], [0, 1, 5, 9], 8, 9),  # fewer keys than queries, more, and as many
    ([0, 0, 3, 5, 6], [0, 2, 2, 3, 7], 8, 10),  # no queries, no keys, and tokens past the end
    ([0, 0, 0], [0, 0, 4], 3, 4),  # nothing to ask
]


def place(token: int, cu: list[int]) -> tuple[int, int, int] | None:
    """Return the sequence of a token, its index there and the sequence's length; None past the end."""
    for s in range(len(cu) - 1):
        if token in range(cu[s], cu[s + 1]):
            return s, token - cu[s], cu[s + 1] - cu[s]
    return None


def distance(b, i, j, n_q, n_k, *, causal=False, window=None, key_starts=None, key_lengths=None, cu_seqlens_q=None,
             cu_seqlens_k=None):  # fmt: skip
    """Return |P_i - j| if query i of batch entry b sees key j, else None: one pair at a time."""
    if key_starts is not None and j < key_starts[b]:
        return None
    if key_lengths is not None and j >= key_lengths[b]:
        return None
    if cu_seqlens_q is not None:
        query, key = place(i, cu_seqlens_q), place(j, cu_seqlens_k or cu_seqlens_q)
        if query is None or key is None or query[0] != key[0]:
            return None
        (_, i, n_q), (_, j, n_k) = query, key
    position = i + n_k - n_q
    if causal and j > position:
        return None
    if window is not None and not abs(position - j) < window:
        return None
    return abs(position - j)


def check(n_q: int, n_k: int, batch: int = 1, integer: torch.dtype = torch.int64, **rule) -> None:
    """Compare ``allowed``, and ``bias`` for slopes of both shapes, with the loops."""
    tensors = {n: torch.tensor(x, dtype=integer) if isinstance(x, list) else x for n, x in rule.items()}
    pairs = list(itertools.product(range(batch), range(n_q), range(n_k)))
    expected = torch.zeros(batch, 1, n_q, n_k, dtype=torch.bool)
    for b, i, j in pairs:
        expected[b, 0, i, j] = distance(b, i, j, n_q, n_k, **rule) is not None
    found = AttentionMask(**tensors).allowed(n_q, n_k)
    assert found.dtype == torch.bool and found.shape == expected.shape
    assert torch.equal(found, expected)
    for slopes in (torch.tensor([0.5, -0.25]), torch.tensor([[0.5, 2.0]] * batch) - torch.arange(batch)[:, None]):
        for dtype in (torch.float32, torch.float64):
            bias = AttentionMask(alibi_slopes=slopes, **tensors).bias(n_q, n_k, dtype=dtype)
            assert bias.dtype == dtype and bias.shape == (slopes.shape[0] if slopes.ndim == 2 else 1, 2, n_q, n_k)
            bias, slope = bias.expand(batch, -1, -1, -1), slopes.expand(batch, 2)
            assert bias.isfinite().all()
            for b, i, j in pairs:
                if (d := distance(b, i, j, n_q, n_k, **rule)) is not None:
                    assert bias[b, :, i, j].tolist() == [-float(s) * d for s in slope[b]]


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("lengths", LENGTHS)
def test_equals_the_loops(causal, window, lengths):
    for padding in PADDING:
        for integer in (torch.int32, torch.int64):
            check(*lengths, batch=3 if padding else 1, integer=integer, causal=causal, window=window, **padding)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize(("cu_q", "cu_k", "n_q", "n_k"), PACKED)
def test_packed_equals_the_loops(causal, window, cu_q, cu_k, n_q, n_k):
    for integer in (torch.int32, torch.int64):
        check(n_q, n_k, integer=integer, causal=causal, window=window, cu_seqlens_q=cu_q, cu_seqlens_k=cu_k)


@pytest.mark.parametrize(
    ("n_q", "n_k", "rule", "expected"),
    [
        (3, 3, dict(causal=True), "100 110 111"),
        (2, 4, dict(causal=True), "1110 1111"),
        (4, 2, dict(causal=True), "00 00 10 11"),
        (4, 4, dict(window=2), "1100 1110 0111 0011"),
        (4, 4, dict(window=2, causal=True), "1000 1100 0110 0011"),
        (2, 5, dict(window=2), "00111 00011"),
        (4, 2, dict(window=2), "00 10 11 11"),
        (3, 3, dict(window=1), "100 010 001"),
        (3, 3, dict(causal=True, key_starts=[1], key_lengths=[2]), "000 010 010"),
        (4, 4, dict(cu_seqlens_q=[0, 1, 3]), "1000 0110 0110 0000"),
        (4, 4, dict(cu_seqlens_q=[0, 1, 4], causal=True, window=2), "1000 0100 0110 0011"),
        # queries 0 / none / 1, 2 / 3 past the end; keys 0, 1 / 2 / 3 / 4 past the end
        (4, 5, dict(cu_seqlens_q=[0, 1, 1, 3], cu_seqlens_k=[0, 2, 3, 4], causal=True), "11000 00000 00010 00000"),
    ],
)
def test_by_hand(n_q, n_k, rule, expected):
    tensors = {n: torch.tensor(x) if isinstance(x, list) else x for n, x in rule.items()}
    seen = AttentionMask(**tensors).allowed(n_q, n_k)[0, 0]
    assert " ".join("".join(str(int(x)) for x in row) for row in seen) == expected
    assert torch.equal(allowed_keys(n_q, n_k, **tensors)[0, 0], seen)


def test_bias_by_hand():
    slopes = torch.tensor([1.0, 0.5])
    bias = AttentionMask(alibi_slopes=slopes).bias(2, 3, dtype=torch.float32)
    assert bias.tolist() == [[[[-1, 0, -1], [-2, -1, 0]], [[-0.5, 0, -0.5], [-1, -0.5, 0]]]]
    cu = torch.tensor([0, 2, 3])
    packed = AttentionMask(alibi_slopes=slopes[:1], cu_seqlens_q=cu, cu_seqlens_k=cu + torch.tensor([0, 1, 1]))
    bias = packed.bias(3, 4, dtype=torch.float32)[0, 0]  # two queries of three keys, then one of one
    assert [bias[0, :3].tolist(), bias[1, :3].tolist(), bias[2, 3].item()] == [[-1, 0, -1], [-2, -1, 0], 0]
    assert AttentionMask(causal=True).bias(2, 3, dtype=torch.float32) is None


RULES = [
    dict(causal=True, window=3),
    dict(key_starts=torch.tensor([1, 0]), key_lengths=torch.tensor([9, 4])),
    dict(cu_seqlens_q=torch.tensor([0, 3, 3, 7]), cu_seqlens_k=torch.tensor([0, 2, 4, 9]), window=2),
]


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("rows", [slice(0, 3), slice(2, 7), slice(5, 20), slice(4, 4), None])
def test_rows_are_a_slice_of_all(rule, rows):
    mask = AttentionMask(alibi_slopes=torch.tensor([0.3]), **rule)
    wanted = slice(None) if rows is None else rows
    assert torch.equal(mask.allowed(8, 10, rows=rows), mask.allowed(8, 10)[:, :, wanted])
    bias = mask.bias(8, 10, dtype=torch.float64)
    assert torch.equal(mask.bias(8, 10, rows=rows, dtype=torch.float64), bias[:, :, wanted])


def test_hides_keys():
    assert not AttentionMask().hides_keys
    assert not AttentionMask(alibi_slopes=torch.ones(1)).hides_keys
    for name, value in dict(causal=True, window=1).items():
        assert AttentionMask(**{name: value}).hides_keys
    for name in ("key_starts", "key_lengths", "cu_seqlens_q"):
        assert AttentionMask(**{name: torch.tensor([0])}).hides_keys


@pytest.mark.parametrize("rule", RULES)
def test_stays_on_the_device_and_does_not_wait_for_it(rule):
    """Tensors on "meta" have no values to wait for, and refuse to meet those of another device."""
    tensors = {n: x.to("meta") if torch.is_tensor(x) else x for n, x in rule.items()}
    q, k = (torch.zeros(2 if "key_starts" in rule else 1, 2, n, 4, device="meta") for n in (8, 10))
    mask = check_mask(q, k, alibi_slopes=torch.zeros(2, device="meta"), **tensors)
    assert mask.allowed(8, 10, device=q.device).is_meta
    assert mask.bias(8, 10, device=q.device, dtype=q.dtype).is_meta
