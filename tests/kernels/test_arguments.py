"""Bad input is refused with the argument's name, what was given and what is allowed."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from adasplash_kernels import attention, entmax, entmax_attention, support_map
from adasplash_kernels.arguments import check_mask
from adasplash_kernels.dispatch import fastest_kernel

X = torch.randn(2, 4, 6, 8)
ONE = {n: X[:1] for n in "qkv"}
CU = torch.tensor([0, 2, 6])


def call(**changes):
    arguments = {"q": X, "k": X, "v": X, **changes}
    q, k, v = (arguments.pop(n) for n in "qkv")
    return entmax_attention(q, k, v, **arguments)


def call_support_map(**changes):
    return support_map(**{"q": X, "k": X, **{n: x for n, x in changes.items() if n != "v"}})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"alpha": 0.5}, r"alpha: got 0.5, allowed is 1 .* to 2"),
        ({"alpha": 2.5}, "alpha: got 2.5"),
        ({"alpha": float("nan")}, "alpha: got nan"),
        ({"alpha": "1.5"}, "alpha: got str"),
        ({"alpha": True}, "alpha: got bool"),
        ({"alpha": torch.tensor([1, 2])}, "alpha: got a tensor of torch.int64"),
        ({"alpha": torch.ones(3)}, r"alpha: got shape \(3,\), allowed is a scalar or \(4,\)"),
        ({"q": X[0]}, r"q: got shape \(4, 6, 8\)"),
        ({"q": X.tolist()}, "q: got list"),
        ({"q": X.int()}, "q: got torch.int32"),
        ({"k": X.half()}, "k: got torch.float16, allowed is q's dtype"),
        ({"k": X[:, :3], "v": X[:, :3]}, "k: got 3 heads, allowed is a divisor of q's 4 heads"),
        ({"k": X[:1], "v": X[:1]}, "k: got batch size 1"),
        ({"k": X[..., :4], "v": X[..., :4]}, "k: got head dim 4"),
        ({"v": X[:, :, :3]}, "v: got shape"),
        ({"k": X[:, :, :0], "v": X[:, :, :0]}, "k: got length 0"),
        ({n: torch.zeros(1, 1, 2, 257) for n in "qkv"}, "q: got head dim 257"),
        ({"scale": 0.0}, "scale: got 0.0"),
        ({"scale": "1"}, "scale: got str"),
        ({"method": "flash"}, "method: got 'flash', allowed are auto, eager, .*, adasplash2, columns, columns_nolist$"),
        ({"method": "adasplash", **{n: X.double() for n in "qkv"}}, "q: got torch.float64"),
    ],
)
def test_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        call(**changes)


def test_what_is_not_implemented_says_so():
    with pytest.raises(NotImplementedError, match="alibi_slopes: its gradient is not implemented"):
        call(alibi_slopes=torch.ones(4, requires_grad=True))


def test_slopes_that_require_grad_are_taken_where_no_gradient_is_recorded():
    slopes = torch.full((4,), 0.3, requires_grad=True)
    with torch.no_grad():
        assert torch.equal(call(alibi_slopes=slopes), call(alibi_slopes=slopes.detach()))


MASKS = [
    ({"key_lengths": torch.ones(2)}, "key_lengths: got torch.float32, allowed is a tensor of int32 or int64"),
    ({"key_lengths": [1, 2]}, "key_lengths: got list"),
    ({"key_starts": torch.zeros(3, dtype=torch.int32)}, r"key_starts: got shape \(3,\), allowed is \(2,\)"),
    (
        {"key_starts": torch.zeros(2, dtype=torch.int32, device="meta")},
        "key_starts: on meta, allowed is q's device cpu",
    ),
    ({"window": 0}, r"window: got 0, allowed is 1 to 1073741824, or None"),
    ({"window": -3}, "window: got -3, allowed is 1"),
    ({"window": 2**30 + 1}, "window: got 1073741825, allowed is 1"),
    ({"window": True}, "window: got bool, allowed is a positive integer or None"),
    ({"window": 4.0}, "window: got float"),
    ({"window": (4, 0)}, "window: got tuple"),
    ({"alibi_slopes": [0.5] * 4}, "alibi_slopes: got list, allowed is a tensor of float32"),
    ({"alibi_slopes": torch.ones(4).double()}, "alibi_slopes: got torch.float64, allowed is a tensor of float32"),
    ({"alibi_slopes": torch.ones(2)}, r"alibi_slopes: got shape \(2,\), allowed is \(4,\), one per head, or \(2, 4\)"),
    ({"alibi_slopes": torch.ones(1, 4)}, r"alibi_slopes: got shape \(1, 4\)"),
    ({"alibi_slopes": torch.ones(())}, r"alibi_slopes: got shape \(\)"),
    ({"alibi_slopes": torch.ones(4, device="meta")}, "alibi_slopes: on meta, allowed is q's device cpu"),
    ({**ONE, "cu_seqlens_k": CU}, "cu_seqlens_k: got it without cu_seqlens_q"),
    ({"cu_seqlens_q": CU}, "cu_seqlens_q: got it with q of batch size 2, allowed is batch size 1"),
    ({**ONE, "cu_seqlens_q": [0, 2, 6]}, "cu_seqlens_q: got list, allowed is a tensor of int32 or int64"),
    ({**ONE, "cu_seqlens_q": CU.float()}, "cu_seqlens_q: got torch.float32"),
    ({**ONE, "cu_seqlens_q": CU.expand(2, 3)}, r"cu_seqlens_q: got shape \(2, 3\), allowed is \(S \+ 1,\)"),
    ({**ONE, "cu_seqlens_q": CU[:1]}, r"cu_seqlens_q: got shape \(1,\), allowed is \(S \+ 1,\)"),
    ({**ONE, "cu_seqlens_q": CU.to("meta")}, "cu_seqlens_q: on meta, allowed is q's device cpu"),
    ({**ONE, "cu_seqlens_q": CU, "cu_seqlens_k": CU.tolist()}, "cu_seqlens_k: got list"),
    ({**ONE, "cu_seqlens_q": CU, "cu_seqlens_k": CU.short()}, "cu_seqlens_k: got torch.int16"),
    ({**ONE, "cu_seqlens_q": CU, "cu_seqlens_k": CU[:2]}, r"cu_seqlens_k: got shape \(2,\), allowed is .* \(3,\)"),
    ({**ONE, "cu_seqlens_q": CU, "cu_seqlens_k": CU.to("meta")}, "cu_seqlens_k: on meta, allowed is q's device cpu"),
    (
        {**ONE, "q": X[:1, :, :5], "cu_seqlens_q": CU},
        "cu_seqlens_k: got None with 5 queries and 6 keys, allowed is None only where these are equal",
    ),
    ({**ONE, "cu_seqlens_q": CU, "key_starts": CU[:1]}, "key_starts: got it together with cu_seqlens_q"),
    ({**ONE, "cu_seqlens_q": CU, "key_lengths": CU[:1]}, "key_lengths: got it together with cu_seqlens_q"),
]


@pytest.mark.parametrize("function", [call, call_support_map])
@pytest.mark.parametrize(("changes", "message"), MASKS)
def test_mask_refused(function, changes, message):
    with pytest.raises(ValueError, match=message):
        function(**changes)


def test_largest_window_is_no_window():
    assert torch.equal(call(window=2**30), call())


def test_packed_keys_are_the_packed_queries_by_default():
    assert check_mask(X[:1], X[:1], cu_seqlens_q=CU).cu_seqlens_k is CU
    assert torch.equal(call(**ONE, cu_seqlens_q=CU), call(**ONE, cu_seqlens_q=CU, cu_seqlens_k=CU))
    assert not torch.equal(call(**ONE, cu_seqlens_q=CU), call(**ONE))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.zeros(3, dtype=torch.int64),), "x: got torch.int64"),
        ((torch.zeros(3), 0.5), "alpha: got 0.5"),
        ((torch.zeros(3), 1.5, 1), "dim: got 1"),
        ((torch.zeros(3, 0),), "x: dimension -1 has size 0"),
        ((torch.zeros(2, 3), torch.ones(5)), r"alpha: got shape \(5,\)"),
    ],
)
def test_entmax_refuses(arguments, message):
    with pytest.raises(ValueError, match=message):
        entmax(*arguments)


def test_support_map_refuses():
    with pytest.raises(ValueError, match="tile: got"):
        support_map(X, X, tile=(0, 4))


def test_kernels_on_cpu_tensors_need_the_interpreter():
    """Without a GPU and without TRITON_INTERPRET the kernels cannot run: the message says what to do."""
    program = (
        "import torch; from adasplash_kernels import entmax_attention as f; x = torch.randn(1, 1, 4, 4)\n"
        "try: f(x, x, x, method='adasplash')\n"
        "except ValueError as e: print(e)"
    )
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(sys.path)
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert "needs CUDA tensors" in done.stdout, done.stderr


def test_autocast_casts_before_it_checks():
    q, k, v = X, X, X.bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        assert entmax_attention(q, k, v).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("heads", "queries", "visible", "head_dim", "chosen"),
    [
        (16, 4096, 4096, 64, "columns"),
        (15, 4096, 4096, 64, "columns_nolist"),
        (32, 64, 131072, 128, "columns"),
        (31, 64, 131072, 128, "columns_nolist"),
        (64, 4096, 4095, 64, "columns_nolist"),
        (64, 63, 131072, 64, "adasplash_nomask"),
        (64, 8192, 8191, 129, "columns_nolist"),
        (4, 8192, 8192, 256, "columns"),
    ],
)
def test_what_auto_takes_on_a_gpu(heads, queries, visible, head_dim, chosen):
    """Long sequences pay for lists of columns; short ones, few heads or queries and narrow windows do not."""
    assert fastest_kernel(heads, queries, visible, head_dim) == chosen


@pytest.mark.parametrize(
    ("options", "visible"),
    [
        ({}, 5000),
        ({"window": 100, "causal": True}, 200),
        ({"window": 4000}, 5000),
        ({"cu_seqlens_q": torch.tensor([0, 10, 4990, 5000])}, 1666),
    ],
)
def test_auto_looks_at_the_keys_that_a_query_may_see(monkeypatch, options, visible):
    seen = []
    monkeypatch.setattr(attention, "fastest_kernel", lambda *numbers: seen.append(numbers) or "adasplash")
    x = torch.zeros(1, 2, 5000, 8)
    with torch.no_grad():
        monkeypatch.setattr(attention, "attention_eager", lambda q, k, v, **o: q)
        entmax_attention(x, x, x, **options)
    assert seen == [(2, 5000, visible, 8)]
