"""Kernels of a call are compiled together before it, once for calls that are alike; what is computed is the same."""

from __future__ import annotations

import threading
from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch
import triton
import triton.language as tl
from calls import bind, random_qkv
from triton.runtime import jit

from adasplash_kernels import ahead, launch, ops
from adasplash_kernels.ahead import compile_together, nothing_ahead
from adasplash_kernels.launching import LaunchedByKey, launched_by_key
from adasplash_kernels.replays import replayed


@pytest.fixture(autouse=True)
def compiled_ahead(monkeypatch):
    """Undo what conftest.py does, and forget earlier tests."""
    monkeypatch.setattr(ahead, "_seen", set())


@pytest.fixture
def state(monkeypatch):
    """What PyTorch would say of a GPU, to be changed."""
    found = SimpleNamespace(device=0, capturing=False)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: found.device)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: found.capturing)
    return found


@pytest.fixture
def compiled(monkeypatch):
    """The names of kernels that are compiled, in order, and whether that was within a launch."""
    names, compile_one = [], jit.JITFunction._do_compile

    def spy(self, *arguments, **options):
        names.append((self.fn.__name__, ahead.active_mode.get() is None))
        return compile_one(self, *arguments, **options)

    monkeypatch.setattr(jit.JITFunction, "_do_compile", spy)
    return names


def test_calls_that_are_alike_are_gone_through_once(state):
    seen = []

    def note(x, *rest):
        seen.append((x.dtype, x.shape[-1], rest))

    x = torch.empty(4, 8)
    for arguments in ((x, 1, "a", None), (x, 2, "a", None), (torch.empty(9, 8), 3, "a", None)):
        compile_together(note, arguments)
    assert len(seen) == 1
    others = [(x, 1, "b", None), (x, 1, "a", x), (x, 0.5, "a", None), (x, True, "a", None), (x[..., :4], 1, "a", None),
              (x.half(), 1, "a", None), (torch.empty(33)[1:].view(4, 8), 1, "a", None)]  # fmt: skip
    for number, arguments in enumerate(others, 2):
        compile_together(note, arguments)
        assert len(seen) == number
    state.device = 1
    compile_together(note, (x, 1, "a", None))
    compile_together(lambda *arguments: note(*arguments), (x, 1, "a", None))
    assert len(seen) == len(others) + 3


def test_not_while_a_graph_is_captured_nor_within_another_compilation(state):
    seen = []
    state.capturing = True
    compile_together(seen.append, (1,))
    state.capturing = False
    with triton.AsyncCompileMode(SimpleNamespace(submit=None)):
        compile_together(seen.append, (1,))
    with nothing_ahead(), nothing_ahead():
        compile_together(seen.append, (1,))
    assert not seen
    compile_together(seen.append, (1,))
    assert seen == [1]


def test_kernels_are_compiled_in_threads_and_a_failure_is_left_to_the_launch(state, monkeypatch):
    """Three kernels wait for one another: in turn they would for ever. One of them raises."""
    together, mode, made = threading.Barrier(3, timeout=30), [], []

    def compile_one(name):
        together.wait()
        if name == "broken":
            raise RuntimeError("does not compile")
        return name

    def warmup(self, name, *, grid):
        current = ahead.active_mode.get()
        mode.append(current.submit(name, lambda: compile_one(name), lambda _: None))
        return mode[-1]

    def make_launcher(kernel):
        made.append(kernel)

    kernels = [launched_by_key(jit.JITFunction(_nothing)) for _ in range(3)]
    monkeypatch.setattr(jit.JITFunction, "warmup", warmup)
    monkeypatch.setattr("adasplash_kernels.launching.LaunchedByKey._key", lambda self, arguments, options: arguments)
    monkeypatch.setattr(ahead.os, "cpu_count", lambda: 3)
    monkeypatch.setattr(ahead, "_make_launcher", make_launcher)

    def call(*names):
        for kernel, name in zip(kernels, names, strict=True):
            kernel[(1,)](name)

    compile_together(call, ("one", "broken", "three"))
    assert [x.kernel for x in mode] == ["one", None, "three"]
    assert ahead.active_mode.get() is None
    assert sorted(made) == ["one", "three"]


def _nothing(x):
    pass


def test_launchers_are_made_and_their_failure_too_is_left_to_the_launch(monkeypatch):
    made = []

    def launcher(source, metadata):
        made.append((source, metadata))
        raise RuntimeError("no compiler for C")

    monkeypatch.setattr(ahead, "driver", SimpleNamespace(active=SimpleNamespace(launcher_cls=launcher)))
    ahead._make_launcher(SimpleNamespace(src="a", metadata="b"))
    assert made == [("a", "b")]


@pytest.mark.gpu
def test_a_first_call_compiles_then_computes(compiled):

    @launched_by_key
    @triton.jit
    def double_kernel(x, y, n, BLOCK: tl.constexpr):
        at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        tl.store(y + at, 2 * tl.load(x + at, mask=at < n), mask=at < n)

    @replayed(tuple)
    def double(x):
        y = torch.empty_like(x)
        double_kernel[(triton.cdiv(x.numel(), 64),)](x, y, x.numel(), 64)
        return (y,)

    for n in (100, 100, 100, 101):
        x = torch.randn(n, device="cuda")
        assert torch.equal(double(x)[0], 2 * x)
    assert compiled == [("double_kernel", False)]


@pytest.mark.gpu
@pytest.mark.parametrize("wanted", [False, True])
def test_the_gradients_kernels_are_compiled_with_the_outputs(monkeypatch, compiled, wanted):
    """Where there are to be gradients; then the backward pass finds them all."""
    for found in (ops._attend.records, ops._gradients.records):
        found.clear()
    q, k, v = (x.requires_grad_(wanted) for x in random_qkv("cuda", 300, head_dim=24, dtype=torch.float16))
    for kernel in vars(launch).values():
        if isinstance(kernel, LaunchedByKey):
            monkeypatch.setattr(kernel, "_compiled", {})
            monkeypatch.setattr(kernel._kernel, "device_caches", defaultdict(kernel._kernel.create_binder))
    out = bind("columns")(q, k, v)
    assert (("grad_query_kernel", False) in compiled) == wanted and ("output_kernel", False) in compiled
    if wanted:
        out.sum().backward()
    assert not [name for name, launched in compiled if launched]
