"""Does a system give the same bits every time? Atomic additions, whose order changes, do not."""

from __future__ import annotations

import torch

from tasks.kernel_bench.inputs import Tensors
from tasks.kernel_bench.problem import Attention
from tasks.kernel_bench.timing import backward


def differing_runs(attention: Attention, tensors: Tensors, runs: int) -> int:
    """Return how many of ``runs`` differ from one before them, in a bit of the output or of a gradient."""

    def run() -> tuple[torch.Tensor, ...]:
        out = attention(*tensors.leaves)
        return out.detach(), *backward(out, tensors)

    first = run()
    return sum(not all(map(torch.equal, run(), first)) for _ in range(runs))
