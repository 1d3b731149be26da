"""NaN beside a number: a GPU's maximum and minimum return the number, Triton's interpreter the NaN."""

from __future__ import annotations

import numpy as np
import pytest
from triton.runtime.interpreter import InterpreterBuilder

from adasplash_kernels.tile_sizes import INTERPRETED


@pytest.fixture
def maximum_drops_nan(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the interpreter do as a GPU does, so that NaN which only a GPU loses is missed here too."""
    if INTERPRETED:
        for name, function in (("create_maxnumf", np.fmax), ("create_minnumf", np.fmin)):
            monkeypatch.setattr(InterpreterBuilder, name, lambda self, a, b, f=function: self.binary_op(a, b, f))
