"""The tensors that all systems of a case are given."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from tasks.kernel_bench import captured
from tasks.kernel_bench.problem import Problem
from tasks.kernel_bench.settings import CAPTURE, DTYPES, GAUSSIAN, Case, Inputs


@dataclass(frozen=True)
class Tensors:
    """q (b, h, n, d), k and v (b, h_kv, n, d), which require grad, and do (b, h, n, d), the gradient to the output."""

    q: Tensor
    k: Tensor
    v: Tensor
    do: Tensor

    @property
    def leaves(self) -> tuple[Tensor, Tensor, Tensor]:
        """What attention is called with."""
        return self.q, self.k, self.v

    @property
    def nbytes(self) -> int:
        """Memory of the four."""
        return sum(x.nbytes for x in (self.q, self.k, self.v, self.do))


def make_problem(inputs: Inputs, case: Case, device: torch.device) -> Problem:
    """Return what the systems of a case have to compute."""
    return Problem(inputs.b, inputs.h, inputs.h_kv, case.n, inputs.d, DTYPES[inputs.dtype], inputs.causal,
                   inputs.alpha, device)  # fmt: skip


def make_tensors(inputs: Inputs, case: Case, device: torch.device, data_root: Path | None) -> Tensors:
    """Draw the inputs of a case, on the CPU so that they are the same on every machine, or read captured ones.

    Raises:
        ConfigError: the captured file is missing, is none, or does not fit; the message names ``inputs.data``.
    """
    generator = torch.Generator().manual_seed(case.seed)

    def draw(heads: int, deviation: float) -> Tensor:
        x = torch.randn(inputs.b, heads, case.n, inputs.d, generator=generator)
        return x.mul_(deviation)

    if inputs.data == GAUSSIAN:
        q = draw(inputs.h, inputs.query_variance**0.5)
        k = draw(inputs.h_kv, inputs.key_variance**0.5)
        v = draw(inputs.h_kv, inputs.value_variance**0.5)
    else:
        path = captured.locate(inputs.data.removeprefix(CAPTURE), data_root)
        q, k, v = captured.load(path, (inputs.h, inputs.h_kv, max(inputs.n), inputs.d), case.n)
    q = q * case.query_scale
    dtype = DTYPES[inputs.dtype]
    q, k, v, do = (x.to(device, dtype) for x in (q, k, v, draw(inputs.h, 1.0)))
    return Tensors(*(x.contiguous().requires_grad_() for x in (q, k, v)), do)
