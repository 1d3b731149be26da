"""Launching a compiled kernel again without Triton's own preparations, which take longer than a short kernel runs.

At every launch Triton binds arguments to names, works out what of them it compiles for, puts that into words, and looks
whether global constants have changed. A kernel under ``@launched_by_key`` is launched so once for each key, which is
shorter, and from then on as the ``CompiledKernel`` that came back.

The key may tell apart what Triton does not, at the price of one launch in the ordinary way, but never the reverse: that
would run a kernel on arguments that it was not compiled for.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from functools import lru_cache
from types import NoneType
from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor
from triton import knobs
from triton.compiler import CompiledKernel
from triton.runtime import driver

from .inputs import Sizes


def kinds(arguments: tuple) -> tuple:
    """Return what Triton for CUDA compiles for: one entry an argument, nested like them; a test compares with Triton.

    Of a tensor its dtype and whether it starts at a multiple of 16 bytes; of an integer its width, and whether it is 1
    or a multiple of 16; of a float that it is one; of anything else, compile-time constants among it, type and value.
    """
    return tuple([
        # written out for what there are fifty of in a launch
        int if type(x) is int and x & 15 and 1 < x < 2**31
        else NoneType if x is None
        else x.value if type(x) is tl.constexpr
        else ((x.dtype,) if x.data_ptr() & 15 else x.dtype) if isinstance(x, Tensor)
        else _kind(x)
        for x in arguments
    ])  # fmt: skip


def _kind(x: Any) -> Any:
    """Return the kind of an argument that ``kinds`` leaves over."""
    if type(x) is Sizes:
        return _kinds_of_sizes(x)
    if isinstance(x, tuple):
        return type(x), kinds(x)
    if type(x) is int:
        return x == 1, x & 15 == 0, -(2**31) <= x < 2**31, x < 2**63
    return float if type(x) is float else (type(x), x)


@lru_cache(maxsize=1024)  # numbers alone, for calls of the same shapes the same
def _kinds_of_sizes(sizes: Sizes) -> tuple:
    return Sizes, kinds(sizes)


class Launch(NamedTuple):
    """A launch, as a listener is told of it.

    Attributes:
        kernel: what was launched.
        compiled: what of it ran; None where that was left to Triton.
        grid: (programs,) in up to three dimensions.
        arguments: all of them by place, as they were.
        options: as given.
    """

    kernel: LaunchedByKey
    compiled: CompiledKernel | None
    grid: tuple[int, ...]
    arguments: tuple
    options: dict[str, Any]


_here = threading.local()  # each thread listens to its own launches

Listener = Callable[[Launch], contextlib.AbstractContextManager]


@contextlib.contextmanager
def listening(listener: Listener) -> Iterator[None]:
    """Tell a listener of each launch of this thread, and launch within what it returns; one listener at a time."""
    _here.listener = listener
    try:
        yield
    finally:
        _here.listener = None


@contextlib.contextmanager
def only_compiling() -> Iterator[list]:
    """Let launches of this thread compile their kernels, where that was not done, and launch nothing.

    Yields:
        a list that gets what Triton returns for each kernel.
    """
    _here.compiling = found = []
    try:
        yield found
    finally:
        _here.compiling = None


class LaunchedByKey:
    """A kernel, to be launched as ``kernel[grid](*arguments, **options)``; all else is as of the ``JITFunction``.

    In Triton's interpreter it is launched as ever, and listeners are told.
    """

    def __init__(self, kernel: Any) -> None:
        self._kernel = kernel
        self.interpreted = not isinstance(kernel, triton.JITFunction)
        self._names = frozenset(kernel.arg_names)
        self._defaults = () if self.interpreted else tuple(parameter.default for parameter in kernel.params)
        self._compiled: dict[tuple, CompiledKernel] = {}

    def __getattr__(self, name: str) -> Any:
        return getattr(self._kernel, name)

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., Any]:
        def run(*arguments: Any, **options: Any) -> Any:
            key = None if self.interpreted else self._key(arguments, options)
            compiled = self._compiled.get(key)
            found = getattr(_here, "compiling", None)
            if found is not None:
                return self._compile(found, key, compiled, grid, arguments, options)
            listener = getattr(_here, "listener", None)
            if listener is None:
                return self._run(key, compiled, grid, arguments, options)
            whole = (*arguments, *self._defaults[len(arguments) :])
            with listener(Launch(self, compiled, grid, whole, options)):
                return self._run(key, compiled, grid, arguments, options)

        return run

    def _run(
        self, key: tuple | None, compiled: CompiledKernel | None, grid: tuple[int, ...], arguments: tuple, options: dict
    ) -> Any:
        if compiled is not None:
            return compiled[(*grid, 1, 1)](*arguments, *self._defaults[len(arguments) :])
        compiled = self._kernel[grid](*arguments, **options)
        # what is still being compiled, or was not, is none; other backends compile for more than a key holds
        if key is not None and isinstance(compiled, CompiledKernel) and compiled.metadata.target.backend == "cuda":
            self._compiled[key] = compiled
        return compiled

    def _compile(
        self,
        found: list,
        key: tuple | None,
        compiled: CompiledKernel | None,
        grid: tuple[int, ...],
        arguments: tuple,
        options: dict,
    ) -> None:
        if key is not None and compiled is None:
            found.append(self._kernel.warmup(*arguments, grid=grid, **options))

    @property
    def hooks(self) -> list:
        """What Triton is to call before launches of this kernel."""
        return [] if self.interpreted else self._kernel.pre_run_hooks

    def _key(self, arguments: tuple, options: dict[str, Any]) -> tuple | None:
        """Return what tells which compiled kernel is to run; None to leave the launch to Triton."""
        runtime = knobs.runtime
        if self.hooks or getattr(runtime, "add_stages_inspection_hook", None):
            return None
        if not self._names.isdisjoint(options):  # a compiled kernel takes arguments by place alone
            return None
        return (
            driver.active.get_current_device(),
            runtime.debug or self._kernel.debug,
            knobs.compilation.instrumentation_mode,
            tuple(options.items()),
            tuple([arguments[i] for i in self._kernel.constexprs if i < len(arguments)]),
            kinds(arguments),
        )


def launched_by_key(kernel: Any) -> Any:
    """Make launches of a kernel cheap."""
    return LaunchedByKey(kernel)
