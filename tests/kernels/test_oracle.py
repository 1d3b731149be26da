"""The error budget: what it measures, what it forgives, and that it forgives nothing else."""

from __future__ import annotations

import json
import math

import oracle
import pytest
import torch
from calls import bind, random_qkv
from oracle import check_against_oracle, error_ratios, gradients
from rounding import ClosedForm, rounding_costs

from adasplash_kernels.reference import attention_reference

eager = bind("eager")


@pytest.fixture(autouse=True)
def nothing_reported(monkeypatch):
    """These tests hand the oracle what is wrong on purpose: that is not the kernels' largest error."""
    monkeypatch.setattr(oracle, "WORST", {})
    monkeypatch.delenv(oracle.REPORT_TO, raising=False)


def learned(*values: float, device: str = "cpu") -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float32, device=device).requires_grad_()


def with_gradient(index: int, factor: float):
    """Return eager attention whose gradient to one of q, k, v is wrong by a factor."""

    def function(*qkv, **options):
        inputs = list(qkv)
        inputs[index] = factor * qkv[index] + ((1 - factor) * qkv[index]).detach()
        return eager(*inputs, **options)

    return function


@pytest.mark.parametrize("alpha", [1.0, 1.5, 2.0, learned(1.0, 1.3, 1.9, 2.0)], ids=str)
def test_closed_form_equals_the_oracles_autograd(alpha):
    """Gradients by the paper's formulas, and by differentiating the oracle, which knows none of them."""
    q, k, v = (x.double() for x in random_qkv("cpu", 9, 13, 8, heads=4, kv_heads=2, batch=2))
    upstream = torch.randn(q.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    options = {"causal": True, "alibi_slopes": torch.tensor([0.5, 0.1, 0.0, -0.1])}
    alpha = oracle._as_documented(alpha)
    inputs = (q, k, v, *([alpha] if isinstance(alpha, torch.Tensor) else []))

    def reference(q, k, v, own=alpha):
        return attention_reference(q, k, v, alpha=own, **options)

    exact, solved = oracle._solve(lambda: gradients(reference, inputs, upstream))
    p, a = solved.weights, (solved.alpha - 1).clamp_min(1e-9)
    u = torch.where(p > 0, p ** (1 - a), 0.0)
    k, v = (x.repeat_interleave(2, dim=1) for x in (k, v))
    found = ClosedForm(p, u, a, q, k, v, upstream, 8**-0.5, kv_heads=2).results()
    found["dalpha"] = found["dalpha"].sum((0, 2, 3))
    for x, e in zip(found.values(), exact, strict=False):
        torch.testing.assert_close(x, e, rtol=1e-8, atol=1e-8)


def test_a_right_result_is_far_inside_the_budget():
    q, k, v = random_qkv("cpu", 17, heads=2)
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        ratios = error_ratios(eager, eager, *(x.to(dtype) for x in (q, k, v)), alpha=learned(1.2, 1.7))
        assert list(ratios) == ["output", "dq", "dk", "dv", "dalpha"]
        assert all(0 < r < 0.5 for r in ratios.values())


def test_twice_the_error_of_plain_pytorch_is_allowed():
    def off(factor):
        return lambda *x, **options: factor * eager(*x, **options)

    ratios = error_ratios(off(1.5), off(1.25), *random_qkv("cpu", 17))
    assert all(r == pytest.approx(1, abs=1e-3) for r in ratios.values())


@pytest.mark.parametrize(("dtype", "factor"), [(torch.float32, 1.0001), (torch.float16, 1.01), (torch.bfloat16, 1.1)])
def test_a_result_that_is_wrong_is_told_apart(dtype, factor):
    q, k, v = (x.to(dtype) for x in random_qkv("cpu", 17, heads=2))
    options = {"alpha": learned(1.2, 1.7), "causal": True}

    def wrong(function):
        return [name for name, ratio in error_ratios(function, eager, q, k, v, **options).items() if ratio > 1]

    assert wrong(eager) == []
    assert "output" in wrong(lambda *x, **o: factor * eager(*x, **o))
    assert wrong(with_gradient(0, factor)) == ["dq"]
    assert wrong(with_gradient(1, factor)) == ["dk"]
    assert wrong(with_gradient(2, factor)) == ["dv"]

    def alpha_off(*x, alpha, **o):
        return eager(*x, alpha=factor * alpha + ((1 - factor) * alpha).detach(), **o)

    assert wrong(alpha_off) == ["dalpha"]


def test_a_weight_at_the_edge_of_the_support_may_fall_to_either_side():
    """With alpha = 2 and scores 1 and 0 the second key's weight is zero by a hair, and its gradient is not."""
    q, v = torch.tensor([1.0, 0.0]).reshape(1, 1, 1, 2), torch.tensor([[1.0, 2.0], [3.0, 5.0]])[None, None]
    k = torch.tensor([[1.0, 0.0], [0.0, 0.0]])[None, None]

    def nudged(by):
        return lambda q, k, v, **o: eager(q, k + by * torch.tensor([[0.0], [1.0]]), v, **o)

    options = {"alpha": 2.0, "scale": 1.0}
    check_against_oracle(nudged(2**-24), eager, q, k, v, **options)
    with pytest.raises(AssertionError, match="output: .* times the allowed error"):
        check_against_oracle(nudged(1e-4), eager, q, k, v, **options)


def test_larger_scores_are_forgiven_more():
    """Whether it is ``scale`` or ALiBi that makes them large."""

    def cost(**options):
        q, k, v = (x.double() for x in random_qkv("cpu", 9))
        _, solved = oracle._solve(lambda: (attention_reference(q, k, v, **options),))
        return rounding_costs(solved, q, k, v, None, options.get("scale"), torch.float32)["output"]

    assert cost(scale=10.0) > 3 * cost()
    assert cost(alibi_slopes=torch.tensor([-1000.0])) > 30 * cost()


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_not_finite_fails(value):
    q, k, v = random_qkv("cpu", 9)

    def broken(*x, **options):
        out = eager(*x, **options)
        out.data[0, 0, 4, 2] = value
        return out

    assert error_ratios(broken, eager, q, k, v)["output"] == math.inf
    with pytest.raises(AssertionError, match="output is not finite"):
        check_against_oracle(broken, eager, q, k, v)


def test_plain_pytorch_excuses_nothing_where_it_overflows():
    q, k, v = random_qkv("cpu", 9)
    assert (
        error_ratios(lambda *x, **o: 1.01 * eager(*x, **o), lambda *x, **o: math.nan * eager(*x, **o), q, k, v)["dq"]
        > 1
    )


def test_gradients_that_float16_cannot_hold_are_scaled_into_it():
    q, k, v = random_qkv("cpu", 64, spread=5e3, dtype=torch.float16)
    k, upstream = 1e-3 * k, 100 * torch.ones_like(q)
    assert not gradients(eager, (q, k, v), upstream)[2].isfinite().all()
    check_against_oracle(eager, eager, q, k, v, upstream=upstream)


def test_forward_only_asks_for_no_gradient():
    q, k, v = random_qkv("cpu", 9)

    def function(*x, **options):
        assert not torch.is_grad_enabled() and not any(t.requires_grad for t in x)
        return eager(*x, **options)

    assert list(error_ratios(function, eager, q, k, v, forward_only=True, alpha=learned(1.3))) == ["output"]


def test_dtype_and_shape_are_compared():
    q, k, v = random_qkv("cpu", 9, dtype=torch.float16)
    for wrong in (lambda *x, **o: eager(*x, **o).float(), lambda *x, **o: eager(*x, **o)[:, :, :, :1]):
        with pytest.raises((AssertionError, RuntimeError), match="output: got|shape"):
            error_ratios(wrong, eager, q, k, v, forward_only=True)


def test_largest_ratios_are_kept_with_the_test_that_gave_them(tmp_path, monkeypatch):
    monkeypatch.setattr(oracle, "WORST", {})
    monkeypatch.setenv(oracle.REPORT_TO, str(tmp_path))
    q, k, v = random_qkv("cpu", 9)
    check_against_oracle(eager, eager, q, k, v)
    ratio, where = oracle.WORST["dq"]
    assert 0 < ratio < 0.5 and where.endswith("::test_largest_ratios_are_kept_with_the_test_that_gave_them")
    oracle.report({"dq": 0.7, "dk": 0.0, "output": math.inf}, "elsewhere")
    assert oracle.WORST["dq"] == (0.7, "elsewhere") and oracle.WORST["dk"][1] == oracle.WORST["output"][1] == where
    (path,) = tmp_path.iterdir()
    assert path.suffix == ".json" and json.loads(path.read_text()) == {n: list(x) for n, x in oracle.WORST.items()}
