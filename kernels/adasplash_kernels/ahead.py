"""Compiling all kernels of a call side by side, before the first of them is launched.

Triton compiles a kernel at its first launch, one after the other, each for about a second. Much of that is not Python
and can run beside the same of other kernels. So before a call of a new kind runs, it is gone through once with launches
that only compile; what a tensor holds decides nothing in it, and what it returns is dropped.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
import triton
from torch import Tensor
from triton.compiler import CompiledKernel
from triton.runtime import driver
from triton.runtime._async_compile import active_mode

from .launching import only_compiling

MOST_THREADS = 16
_seen: set[tuple] = set()
_watchers = 0


@contextlib.contextmanager
def nothing_ahead() -> Iterator[None]:
    """Compile kernels when they are launched, in all threads: whoever watches a call from outside sees it once."""
    global _watchers
    _watchers += 1
    try:
        yield
    finally:
        _watchers -= 1


def compile_together(function: Callable[..., Any], arguments: tuple) -> None:
    """Compile what ``function(*arguments)`` is going to launch, unless a call much like it was seen before.

    Calls that are alike in dtypes, head dim and options have the same kernels, but for a few that depend on lengths;
    those compile when they are launched. So does all else that this leaves out: a kernel that does not compile raises
    there, and while a CUDA graph is captured nothing is gone through twice.

    Args:
        arguments: tensors, None and hashable values; of the numbers among them only types count.
    """
    if _watchers:
        return
    kind = function, torch.cuda.current_device(), tuple(map(_alike, arguments))
    if kind in _seen or active_mode.get() is not None or torch.cuda.is_current_stream_capturing():
        return
    _seen.add(kind)
    threads = min(MOST_THREADS, os.cpu_count() or 1)
    with ThreadPoolExecutor(threads) as pool:
        with triton.AsyncCompileMode(pool, ignore_errors=True), only_compiling() as found:
            function(*arguments)
        kernels = [x.kernel if isinstance(x, triton.FutureKernel) else x for x in found]
        list(pool.map(_make_launcher, {id(x): x for x in kernels if x is not None}.values()))


def _make_launcher(kernel: CompiledKernel) -> None:
    """Make what puts a kernel's arguments in order: up to Triton 3.6 a C program, which it keeps on disk."""
    with contextlib.suppress(Exception):  # the launch will raise it
        driver.active.launcher_cls(kernel.src, kernel.metadata)


def _alike(x: Any) -> Any:
    if isinstance(x, Tensor):
        return x.dtype, x.shape[-1:], x.data_ptr() & 15
    return type(x) if type(x) in (int, float) else x
