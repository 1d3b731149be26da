"""Is it the same function? A system that is not gets no speed.

This is a gate against wrong results, not a comparison of precision: correct implementations in bfloat16 show relative
errors around 0.004, and what each has is recorded as ``rel_err``. tests/kernels hold our own kernels to far less. Where
parts cancel, as in the gradients to the queries of trained models whose keys have much in common, rounding alone makes
larger errors, and as much more is allowed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

# Relative Frobenius error. On a GPU float32 products may be TF32, which has float16's precision.
ALLOWED = {torch.bfloat16: 2e-2, torch.float16: 5e-3, torch.float32: 5e-3}
_TIMES_ROUNDING = 5  # as 2e-2 is to what rounding to bfloat16 does to well-conditioned parts
_MOST = 0.25  # however ill-conditioned: zeros are off by 1


def relative_error(found: Tensor, exact: Tensor) -> float:
    """Return ``|found - exact| / |exact|`` (Frobenius); the absolute error where ``exact`` is zero."""
    error, norm = (found.double() - exact).norm(), exact.norm()
    return float(error / norm if norm > 0 else error)


def relative_errors(found: Mapping[str, Tensor], exact: Mapping[str, Tensor]) -> dict[str, float]:
    """Return the error of every part of ``exact``."""
    return {name: relative_error(found[name], part) for name, part in exact.items()}


def allowed_error(dtype: torch.dtype, rounding: float = 0.0) -> float:
    """Return the relative error that a part may have in ``dtype`` where rounding alone makes one of ``rounding``."""
    return max(ALLOWED[dtype], min(_TIMES_ROUNDING * rounding, _MOST))


def fault(errors: Mapping[str, float], finite: bool, dtype: torch.dtype,
          rounding: Mapping[str, float] | None = None) -> str | None:  # fmt: skip
    """Say what is wrong with a system, in one line, or None.

    Args:
        errors: relative error of each part that was checked.
        finite: whether its whole output and all gradients are.
        dtype: of the inputs; decides how much error is allowed.
        rounding: what rounding alone does to each part, see :meth:`tasks.kernel_bench.exact.Exact.rounding`.
    """
    allowed = {name: allowed_error(dtype, (rounding or {}).get(name, 0.0)) for name in errors}
    wrong = [f"{name} is off by {error:.3g} (relative; allowed is {allowed[name]:.3g})"
             for name, error in errors.items() if not error <= allowed[name]]  # fmt: skip
    if wrong:
        return f"wrong result: {', '.join(wrong)}"
    return None if finite else "wrong result: output or gradients are not finite"


def worst(errors: Mapping[str, float]) -> float:
    """Return the largest error; NaN if any is."""
    return math.nan if any(math.isnan(e) for e in errors.values()) else max(errors.values())
