"""Comparing with the float64 oracle, and how much error low precision is allowed: the error budget.

    error <= 2 x the error of the same computation in plain PyTorch at the inputs' precision
             + a few roundings of the result
             + what it costs to round what every implementation must round on the way (see ``rounding.py``)

All are Frobenius norms. ``error_ratios`` gives error / allowed as numbers; nothing is tuned by hand.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from rounding import Solved, rounding_costs
from torch import Tensor

from adasplash_kernels import reference
from adasplash_kernels.reference import attention_reference, entmax_reference

ROUNDINGS = {torch.float32: 8 * 2**-23, torch.float16: 4 * 2**-11, torch.bfloat16: 4 * 2**-8}
LOWEST_ALPHA = 1 + 1e-6  # what the general formula takes for an alpha closer to 1
REPORT_TO = "ADASPLASH_ERROR_RATIOS"  # a folder to which each test process writes its WORST, if this is set

# Largest ratio seen by this process, and the test that gave it, for each compared tensor.
WORST: dict[str, tuple[float, str]] = {}


def gradients(function: Callable[..., Tensor], inputs: tuple[Tensor, ...], upstream: Tensor) -> tuple[Tensor, ...]:
    """Return the output and its gradients to the inputs."""
    leaves = tuple(x.detach().requires_grad_() for x in inputs)
    out = function(*leaves)
    return out.detach(), *torch.autograd.grad(out, leaves, upstream.to(out.dtype))


def check_against_oracle(
    function: Callable[..., Tensor], low_precision: Callable[..., Tensor], q: Tensor, k: Tensor, v: Tensor,
    **options: Any,
) -> None:  # fmt: skip
    """Assert that output and gradients are finite and within the budget; arguments as for ``error_ratios``."""
    ratios = error_ratios(function, low_precision, q, k, v, **options)
    report(ratios, os.environ.get("PYTEST_CURRENT_TEST", "").removesuffix(" (call)"))
    for name, ratio in ratios.items():
        assert math.isfinite(ratio), f"{name} is not finite"
        assert ratio <= 1, f"{name}: {ratio:.3g} times the allowed error"


def error_ratios(
    function: Callable[..., Tensor], low_precision: Callable[..., Tensor], q: Tensor, k: Tensor, v: Tensor, *,
    upstream: Tensor | None = None, forward_only: bool = False, **options: Any,
) -> dict[str, float]:  # fmt: skip
    """Compare with the oracle.

    Args:
        function: what is tested; takes q, k, v and the options, and returns (B, H, N_q, D) in their dtype.
        low_precision: the same computation in plain PyTorch at the inputs' precision.
        q, k, v: (B, H, N_q, D) and twice (B, H_kv, N_k, D), float32, float16 or bfloat16.
        upstream: gradient that comes back to the output, of q's shape and dtype; by default standard normal, the
            same at each call.
        forward_only: compare the output alone, computed without gradients.
        options: as for ``entmax_attention``; a tensor alpha that requires grad is compared too.

    Returns:
        error / allowed for "output" and, unless ``forward_only``, "dq", "dk", "dv" and "dalpha"; infinite if the
        function's result is not finite.
    """
    alpha = options.pop("alpha", 1.5)
    learned = isinstance(alpha, Tensor) and alpha.requires_grad and not forward_only
    if upstream is None:
        upstream = torch.randn(q.shape, generator=torch.Generator().manual_seed(1)).to(q.device, q.dtype)
    inputs = (q, k, v, alpha) if learned else (q, k, v)

    def results(implementation: Callable[..., Tensor], inputs: tuple[Tensor, ...], alpha: Any) -> tuple[Tensor, ...]:
        def call(q: Tensor, k: Tensor, v: Tensor, own_alpha: Tensor | None = None) -> Tensor:
            return implementation(q, k, v, alpha=alpha if own_alpha is None else own_alpha, **options)

        if forward_only:
            with torch.no_grad():
                return (call(*inputs),)
        return gradients(call, inputs, upstream)

    exact_alpha = _as_documented(alpha)
    doubles = tuple(x.detach().double() for x in (q, k, v)) + ((exact_alpha,) if learned else ())
    exact, solved = _solve(lambda: results(attention_reference, doubles, exact_alpha))
    shrink = _overflow(exact, q.dtype)
    if shrink > 1:  # gradients no one can represent say nothing about an implementation
        upstream = (upstream.double() / shrink).to(q.dtype)
        exact, solved = _solve(lambda: results(attention_reference, doubles, exact_alpha))
    incoming = None if forward_only else upstream.double()
    costs = rounding_costs(solved, *doubles[:3], incoming, options.get("scale"), q.dtype)
    found, plain = results(function, inputs, alpha), results(low_precision, inputs, alpha)
    ratios = {}
    for name, x, a, b, e in zip(
        ("output", "dq", "dk", "dv", "dalpha"), (q, *inputs), found, plain, exact, strict=False
    ):
        assert a.shape == e.shape and a.dtype == x.dtype, (
            f"{name}: got {a.dtype} {tuple(a.shape)}, {x.dtype} {tuple(e.shape)} expected"
        )
        error, plain_error = (float((y.double() - e).norm()) for y in (a, b))
        if not math.isfinite(plain_error):
            plain_error = 0.0  # where plain PyTorch overflows it excuses nothing
        allowed = 2 * plain_error + ROUNDINGS[q.dtype] * float(e.norm()) + costs[name]
        ratios[name] = error / max(allowed, 1e-300) if math.isfinite(error) else math.inf
    return ratios


def _as_documented(alpha: float | Tensor) -> float | Tensor:
    """Return the alpha that counts: values of a tensor outside [1, 2] are the nearer end (and see LOWEST_ALPHA)."""
    if isinstance(alpha, Tensor):
        return alpha.detach().double().clamp(LOWEST_ALPHA, 2)
    return alpha if alpha == 1 else max(alpha, LOWEST_ALPHA)


def _solve(run: Callable[[], tuple[Tensor, ...]]) -> tuple[tuple[Tensor, ...], Solved]:
    """Run the oracle and overhear its scores and weights."""
    overheard = []

    def spy(scores: Tensor, alpha: float | Tensor) -> Tensor:
        weights = entmax_reference(scores, alpha)
        overheard.append(Solved(scores.detach(), weights.detach(), torch.as_tensor(alpha).detach().to(scores)))
        return weights

    with mock.patch.object(reference, "entmax_reference", spy):
        exact = run()
    (solved,) = overheard
    return exact, solved


def _overflow(exact: tuple[Tensor, ...], dtype: torch.dtype) -> float:
    """Return a power of two to divide the upstream gradient by, so that gradients keep clear of dtype's largest."""
    largest = max((float(x.abs().max()) for x in exact[1:] if x.numel()), default=0.0)
    return 2.0 ** math.ceil(math.log2(max(largest / torch.finfo(dtype).max, 2**-4)) + 4)


def report(ratios: dict[str, float], where: str) -> None:
    """Remember the largest ratios; with REPORT_TO set, in a file too, since pytest's workers are processes."""
    found = {n: (r, where) for n, r in ratios.items() if math.isfinite(r) and r > WORST.get(n, (-1.0, ""))[0]}
    WORST.update(found)
    if found and (folder := os.environ.get(REPORT_TO)):
        path = Path(folder, f"{os.getpid()}.json")
        path.with_suffix(".part").write_text(json.dumps(WORST), encoding="utf-8")
        path.with_suffix(".part").replace(path)
