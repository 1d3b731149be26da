"""The exact output and gradients, band by band, against autograd through the dense oracle; and the gate."""

from __future__ import annotations

import math

import pytest
import torch

from adasplash_kernels.reference import attention_reference
from tasks.kernel_bench import exact as module
from tasks.kernel_bench.correctness import fault, relative_error, worst
from tasks.kernel_bench.exact import Exact, Extent
from tasks.kernel_bench.inputs import Tensors
from tasks.kernel_bench.trial import judged


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("alpha", [1.0, 1.5, 1.75, 2.0])
def test_parts(alpha, causal, problem, monkeypatch):
    monkeypatch.setattr(module, "_BAND", 5)
    monkeypatch.setattr(module, "_ROWS", 4)
    wanted = problem(b=3, h=6, h_kv=3, n=13, d=4, causal=causal)
    torch.manual_seed(0)
    q, k, v, do = (torch.randn(3, h, 13, 4) for h in (6, 3, 3, 6))
    tensors = Tensors(*(x.requires_grad_() for x in (q, k, v)), do)
    extent = Extent.of(wanted, seed=0)
    assert extent.rows[-4:].tolist() == [9, 10, 11, 12]
    assert len(set(extent.rows.tolist())) == 8 and extent.sequences == (0, 2)
    checked = Exact(wanted, tensors, extent)
    out = attention_reference(q, k, v, alpha=alpha, causal=causal)
    expected = checked.pick(out, torch.autograd.grad(out, (q, k, v), do.double()))
    found = checked.parts(alpha)
    assert {name: tuple(x.shape) for name, x in found.items()} == {
        "out": (2, 6, 8, 4), "dq": (4, 13, 4), "dk": (2, 13, 4), "dv": (2, 13, 4)}  # fmt: skip
    for name, part in found.items():
        torch.testing.assert_close(part, expected[name].double(), atol=1e-6, rtol=1e-5)  # gradients come as float32
    assert checked.parts(alpha) is found


def test_extent_by_length(problem):
    short, long, longer = (Extent.of(problem(h=16, h_kv=8, n=n), seed=1) for n in (300, 8192, 8193))
    assert short.params == {"checked_rows": 300, "checked_sequences": 1, "checked_gradient_heads": 2}
    assert long.params == {"checked_rows": 512, "checked_sequences": 1, "checked_gradient_heads": 2}
    assert longer.params == {"checked_rows": 512, "checked_sequences": 1, "checked_gradient_heads": 0}
    assert torch.equal(long.rows, Extent.of(problem(h=16, n=8192), seed=1).rows)
    assert not torch.equal(long.rows, Extent.of(problem(h=16, n=8192), seed=2).rows)
    assert (long.rows.diff() > 0).all() and long.rows[-1] == 8191


def test_relative_error():
    exact = torch.tensor([3.0, 4.0], dtype=torch.float64)
    assert relative_error(torch.tensor([3.0, 4.5]), exact) == pytest.approx(0.1)
    assert relative_error(torch.tensor([0.5]), torch.zeros(1, dtype=torch.float64)) == 0.5


@pytest.mark.parametrize(
    ("errors", "finite", "message"),
    [
        ({"out": 1e-3, "dq": 1e-2}, True, None),
        ({"out": 1e-3, "dq": 3e-2}, True, "wrong result: dq is off by 0.03 (relative; allowed is 0.02)"),
        ({"out": math.nan, "dq": math.inf}, False,
         "wrong result: out is off by nan (relative; allowed is 0.02), dq is off by inf (relative; allowed is 0.02)"),
        ({"out": 1e-3}, False, "wrong result: output or gradients are not finite"),
    ],
)
def test_fault(errors, finite, message):
    found = fault(errors, finite, torch.bfloat16)
    assert found == message if message is None else found.startswith(message)


def test_less_error_is_allowed_in_float32():
    assert fault({"out": 1e-2}, True, torch.bfloat16) is None
    assert fault({"out": 1e-2}, True, torch.float32) is not None


@pytest.mark.parametrize(
    ("rounding", "allowed"), [(0.0, 2e-2), (4e-3, 2e-2), (1e-2, 5e-2), (1.0, 0.25), (math.nan, 2e-2)]
)
def test_more_error_is_allowed_where_rounding_alone_makes_it(rounding, allowed):
    for error, fits in ((0.99 * allowed, True), (1.01 * allowed, False), (math.nan, False)):
        found = fault({"out": 0.0, "dq": error}, True, torch.bfloat16, {"out": 0.0, "dq": rounding})
        assert (found is None) == fits
    assert fault({"out": 3e-2, "dq": 0.0}, True, torch.bfloat16, {"dq": rounding})  # a part of its own


def _common_keys(problem, dtype, common):
    """Two heads of causal attention whose keys are ``common`` and standard normal numbers on top."""
    wanted = problem(b=1, h=2, h_kv=2, n=96, d=16, causal=True, dtype=dtype)
    torch.manual_seed(0)
    q, k, v, do = torch.randn(4, 1, 2, 96, 16)
    tensors = Tensors(*(x.to(dtype).requires_grad_() for x in (q, k + common, v)), do.to(dtype))
    return wanted, tensors, Exact(wanted, tensors, Extent.of(wanted, seed=0))


@pytest.mark.parametrize("alpha", [1.0, 1.5, 2.0])
def test_rounding(alpha, problem):
    """Some 2^-9 where nothing cancels; more, in the gradient to the queries alone, where keys have much in common."""
    plain, cancelling, exactly = (_common_keys(problem, dtype, common)[2].rounding(alpha) for dtype, common in
                                  ((torch.bfloat16, 0.0), (torch.bfloat16, 30.0), (torch.float32, 0.0)))  # fmt: skip
    assert set(plain) == {"out", "dq", "dk", "dv"}
    assert all(2**-10 < error < 2**-7 for error in plain.values())
    assert cancelling["dq"] > 5 * plain["dq"]
    assert all(cancelling[name] < 2**-7 for name in ("out", "dk", "dv"))
    assert all(error < 1e-6 for error in exactly.values())


def test_a_correct_system_passes_where_parts_cancel(problem):
    """PyTorch's attention in bfloat16, whose error of dq is above what is allowed elsewhere; a wrong scale is not."""
    wanted, tensors, exact = _common_keys(problem, torch.bfloat16, 30.0)
    q, k, v = tensors.leaves
    out = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
    gradients = torch.autograd.grad(out, tensors.leaves, tensors.do)
    errors, reason = judged(exact, 1.0, out.detach(), gradients)
    assert errors["dq"] > 2e-2 and reason is None
    assert fault(errors, True, torch.bfloat16) is not None
    dq, dk, dv = gradients
    assert "dq is off by" in judged(exact, 1.0, out.detach(), (dq * 1.3, dk, dv))[1]
    assert "dk is off by" in judged(exact, 1.0, out.detach(), (dq, dk * 1.03, dv))[1]


def test_worst():
    assert worst({"a": 1.0, "b": 2.0}) == 2.0
    assert math.isnan(worst({"a": math.nan, "b": 2.0}))
