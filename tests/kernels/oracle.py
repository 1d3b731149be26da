"""Comparing with the float64 oracle, and how much error low precision is allowed."""

from __future__ import annotations

import torch
from torch import Tensor

from adasplash_kernels.reference import attention_reference

# Besides twice what plain PyTorch loses at the same precision, a few roundings of the result itself.
ROUNDINGS = {torch.float32: 8 * 2**-23, torch.float16: 4 * 2**-11, torch.bfloat16: 4 * 2**-8}


def gradients(function, inputs: tuple[Tensor, ...], upstream: Tensor) -> tuple[Tensor, ...]:
    """Return the output and its gradients to the inputs."""
    leaves = tuple(x.detach().requires_grad_() for x in inputs)
    out = function(*leaves)
    return out.detach(), *torch.autograd.grad(out, leaves, upstream.to(out.dtype))


def check_against_oracle(function, low_precision, q: Tensor, k: Tensor, v: Tensor, **options) -> None:
    """Assert that output and gradients err at most twice as much as ``low_precision``, plus a few roundings.

    Scores are float32 sums in every implementation: rounding one of size ``s`` moves its weight by ``2^-23 |s|``
    of itself, whatever the kernel does, so that much is allowed on top.

    Args:
        function: what is tested; takes q, k, v and the options.
        low_precision: the same computation in plain PyTorch at the inputs' precision.
    """
    upstream = torch.randn(q.shape, dtype=torch.float32, device=q.device).to(q.dtype)
    found = gradients(lambda *x: function(*x, **options), (q, k, v), upstream)
    plain = gradients(lambda *x: low_precision(*x, **options), (q, k, v), upstream)
    doubles = tuple(x.detach().double() for x in (q, k, v))
    exact = gradients(lambda *x: attention_reference(*x, **options), doubles, upstream.double())
    largest = float((q.double().norm(dim=-1).max() * k.double().norm(dim=-1).max()) * q.shape[-1] ** -0.5)
    band = ROUNDINGS[q.dtype] + 2**-23 * largest
    # Gradients that vanish (a single key, a row with one winner) leave only the rounding of dP - delta.
    natural = float(upstream.double().norm()) * float(v.double().norm()) * q.shape[-1] ** -0.5
    floors = (0.0, natural * float(k.double().norm()), natural * float(q.double().norm()), 0.0)
    for name, a, b, e, floor in zip(("output", "dq", "dk", "dv"), found, plain, exact, floors, strict=True):
        assert a.shape == e.shape and a.dtype == q.dtype
        assert a.isfinite().all(), f"{name} is not finite"
        error, plain_error = (float((x.double() - e).norm()) for x in (a, b))
        allowed = 2 * plain_error + band * float(e.norm()) + 2**-23 * floor
        assert error <= allowed, f"{name}: error {error:.2e}, allowed {allowed:.2e}"
