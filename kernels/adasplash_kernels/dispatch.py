"""Which method computes a call, and what alpha looks like to a kernel. Works without Triton."""

from __future__ import annotations

import torch
from torch import Tensor

from .arguments import KERNEL_DTYPES
from .thresholds import THRESHOLDS

# What "auto" takes on CUDA: the keys a query sees from which lists of columns pay, by the largest head dim this is for.
# From timings of N(0, 1) inputs at d = 64 on one H200 (docs/performance.md); above d = 64 a guess. Nothing is tuned or
# timed at run time.
COLUMNS_FROM = ((128, 4096), (256, 8192))
# Pairs of a query and a key, over all heads, below which the GPU is done with the lists before the host has launched
# what they take, 20 kernels for 5. From timings on the same GPU (adasplash2/runtime_trained, figure_runtime).
COLUMNS_PAIRS = 2**28
COLUMNS_QUERIES = 64  # with fewer queries the large blocks of the bound stay empty

METHODS = ("auto", "eager", "adasplash", "adasplash_nomask", "adasplash2", "columns", "columns_nolist")


def fastest_kernel(heads: int, queries: int, visible: int, head_dim: int) -> str:
    """Return the method that "auto" takes on CUDA: it depends on these numbers alone, and no other call changes it.

    Args:
        heads: B * H, of queries.
        queries: N_q.
        visible: the most keys that a query may see, as far as shapes tell.
        head_dim: D.
    """
    if queries < COLUMNS_QUERIES:
        return "adasplash_nomask"
    pays = next(keys for largest, keys in COLUMNS_FROM if head_dim <= largest)
    return "columns" if visible >= pays and heads * queries * visible >= COLUMNS_PAIRS else "columns_nolist"


def choose_method(method: str, x: Tensor, name: str, kernel: str = "adasplash2") -> str:
    """Return the method to use for a tensor; ``name`` is the argument it came in as.

    Args:
        kernel: what "auto" takes where kernels run.

    Raises:
        ValueError: no such method, or it cannot take this dtype or device.
    """
    if method == "auto":
        return "eager" if x.device.type == "cpu" or x.dtype == torch.float64 else kernel
    if method == "eager":
        return method
    if method not in METHODS and method not in THRESHOLDS:
        raise ValueError(f"method: got {method!r}, allowed are {', '.join(METHODS)}")
    if x.dtype not in KERNEL_DTYPES:
        raise ValueError(f"{name}: got {x.dtype}, allowed with method {method!r} are float16, bfloat16 and float32")
    if x.device.type == "cpu" and not kernels_interpreted():
        raise ValueError(
            f"method: {method!r} needs CUDA tensors, {name} is on the CPU; use 'auto' or 'eager', or set "
            "TRITON_INTERPRET=1 before importing triton to run the kernels in its interpreter"
        )
    return method


def kernels_interpreted() -> bool:
    """Tell whether Triton runs kernels on the CPU; False where Triton is not installed."""
    try:
        from .tile_sizes import INTERPRETED
    except ModuleNotFoundError:
        return False
    return INTERPRETED


def kernel_alpha(alpha: float | Tensor, device: torch.device) -> tuple[Tensor | None, str]:
    """Return alpha as the (1,) or (n,) float32 tensor kernels read, and "any"; or None and the closed form they use."""
    if isinstance(alpha, Tensor):
        return alpha.to(device=device, dtype=torch.float32).reshape(-1).contiguous(), "any"
    kind = {1.0: "1", 1.5: "1.5", 2.0: "2"}.get(alpha)
    return (torch.full((1,), alpha, dtype=torch.float32, device=device), "any") if kind is None else (None, kind)
