"""Triton's interpreter, made to round like a GPU, to run faster and to keep quiet about NaN: for tests on a CPU."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
import triton.language as tl
from triton.runtime import interpreter


@pytest.fixture(autouse=True)
def better_interpreter(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Round bfloat16 to nearest, which the interpreter cuts off instead; prepare each module once; use one thread.

    At each call of a device function the interpreter searches the language for what it must replace, finds that the
    launch of the kernel or an earlier call has replaced all of it, and spends a good part of a test's time so.
    Threads only wait for each other on tensors this small, for most of the time where other work shares the cores.
    """
    threads = torch.get_num_threads()
    if not torch.cuda.is_available():
        torch.set_num_threads(1)
        convert = interpreter.InterpreterBuilder.cast_impl
        monkeypatch.setattr(interpreter.InterpreterBuilder, "cast_impl", lambda *a: _cast(convert, *a))
        monkeypatch.setattr(interpreter.InterpretedFunction, "__call__", _call)
    with np.errstate(invalid="ignore"):
        yield
    torch.set_num_threads(threads)


_prepared: set[str] = set()  # modules; what such a call replaces stays replaced


def _call(function: Any, *args: Any, **kwargs: Any) -> Any:
    if function.fn.__module__ not in _prepared:
        interpreter._patch_lang(function.fn)
        _prepared.add(function.fn.__module__)
    return function.rewrite()(*args, **kwargs)


def _cast(convert: Any, builder: Any, source: Any, target: Any) -> Any:
    pair = (source.dtype.scalar, target.scalar)
    if pair == (tl.float32, tl.bfloat16):
        rounded = torch.from_numpy(np.ascontiguousarray(source.data)).bfloat16().view(torch.int16)
        return interpreter.TensorHandle(rounded.numpy().view(np.uint16).reshape(source.data.shape), tl.bfloat16)
    if pair == (tl.bfloat16, tl.float32):
        widened = np.asarray(source.data).astype(np.uint32) << 16
        return interpreter.TensorHandle(np.asarray(widened).view(np.float32), tl.float32)
    return convert(builder, source, target)
