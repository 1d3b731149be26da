"""What this device's matrix units do at best: the rate of a large bf16 matrix product, to hold other work against."""

from __future__ import annotations

import statistics
import time

import torch

_SIZES = {"cuda": (8192, 20), "cpu": (512, 5)}  # side of the square matrices, and how often they are multiplied
_WARMUP = 3


def matmul_rate(device: torch.device) -> float:
    """Return the operations a second of bf16 products of large square matrices, the median of several."""
    side, repeats = _SIZES[device.type]
    a, b = (torch.randn(side, side, device=device, dtype=torch.bfloat16) for _ in range(2))
    seconds = []
    for number in range(_WARMUP + repeats):
        wait(device)
        started = time.perf_counter()
        a @ b
        wait(device)
        if number >= _WARMUP:
            seconds.append(time.perf_counter() - started)
    return 2 * side**3 / statistics.median(seconds)


def wait(device: torch.device) -> None:
    """Return when a GPU has done what it was given; on a CPU at once."""
    if device.type == "cuda":
        torch.cuda.synchronize()
