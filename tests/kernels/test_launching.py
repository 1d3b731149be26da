"""Launches by key: a key tells all that Triton compiles for, and what it does not cover is left to Triton."""

from __future__ import annotations

import contextlib
import itertools
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from calls import KERNELS, bind, random_qkv
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import CUDABackend
from triton.compiler import CompiledKernel
from triton.runtime import jit

from adasplash_kernels import launch, launching, limits
from adasplash_kernels.inputs import Sizes, sealed
from adasplash_kernels.launching import LaunchedByKey, launched_by_key, listening, only_compiling
from adasplash_kernels.thresholds.settle import Settle


def _kernel(x, size, n, free, CONSTANT: tl.constexpr, last=None):
    pass


KERNEL = jit.JITFunction(_kernel, do_not_specialize=["free"])  # also where triton.jit makes an interpreted one
PLAIN = {"x": torch.empty(4), "size": None, "n": 7, "free": 7, "CONSTANT": 7}
SIZES = Sizes(*map(sealed, range(21)), 0.5)
SETTLE = Settle(torch.empty(4), tl.constexpr(3), tl.constexpr(0.5))


def shifted(dtype: torch.dtype, count: int) -> Tensor:
    """Return a tensor that starts so many elements after a multiple of 16 bytes."""
    x = torch.empty(16, dtype=dtype)
    assert x.data_ptr() % 16 == 0
    return x[count:]


INTEGERS = (0, 1, 2, 7, 8, 16, 32, -1, -16, 2**31 - 1, 2**31, 2**31 + 1, -(2**31), -(2**31) - 1, 2**63 - 1, 2**63)
TENSORS = tuple(shifted(d, n) for d in (torch.bfloat16, torch.float16, torch.float32, torch.int32) for n in (0, 1, 8))
VARIATIONS = [
    *({"n": n} for n in (*INTEGERS, 0.5, 16.0, 1.0, True, False, None, *TENSORS)),
    *({"free": n} for n in (*INTEGERS, 0.5, None)),
    *({"x": x} for x in (*TENSORS, None, 7, tl.constexpr(7), tl.constexpr(None))),
    *({"CONSTANT": c} for c in (1, 16, 17, 0.5, None, "all", tl.constexpr(16), tl.constexpr("all"))),
    *({"size": SIZES._replace(n_k=n)} for n in (*map(sealed, (5, 16, 2**30, 2**31)), 1, 16, 48)),
    *({"size": SIZES._replace(scale=scale)} for scale in (0.5, 1.0, 0.25)),
    *({"size": SETTLE._replace(count=x)} for x in (*TENSORS, None)),
    *({"size": SETTLE._replace(PASSES=tl.constexpr(n))} for n in (1, 3, 16, None)),
    *({"size": x} for x in (tuple(SIZES), tuple(SETTLE), (7, 16), (7, (16, 7)), ((7, 16), 7), ())),
    {"last": 7}, {"last": 16}, {"last": None},
]  # fmt: skip


def by_triton(arguments: dict[str, Any], options: dict[str, Any]) -> str:
    """Return what Triton keeps a compiled kernel under."""
    backend = CUDABackend(GPUTarget("cuda", 90, 32))
    binder = jit.create_function_from_signature(KERNEL.signature, KERNEL.params, backend)
    _, specialization, rest = binder(**arguments, **options)
    return jit.compute_cache_key({}, specialization, rest)


@pytest.fixture(autouse=True)
def _first_device(monkeypatch):
    if not torch.cuda.is_available():
        monkeypatch.setattr(launching, "driver", SimpleNamespace(active=SimpleNamespace(get_current_device=lambda: 0)))


def test_a_key_tells_what_triton_compiles_for():
    """Wherever two launches have one key, Triton has one kernel for them."""
    kernel = LaunchedByKey(KERNEL)
    by_key: dict[tuple, set[str]] = {}
    for variation in VARIATIONS:
        arguments = PLAIN | variation
        key = kernel._key(tuple(arguments.values()), {"num_warps": 4})
        by_key.setdefault(key, set()).add(by_triton(arguments, {"num_warps": 4}))
    assert all(len(found) == 1 for found in by_key.values())
    assert len(by_key) < len(VARIATIONS) - 20  # and most numbers of a kind share a key


def test_other_lengths_share_a_key():
    kernel = LaunchedByKey(KERNEL)
    keys = set()
    for n in (1, 16, 113, 512, 4096):
        sizes = SIZES._replace(n_q=sealed(n), n_k=sealed(2 * n), q_head=sealed(64 * n), scale=1 / n)
        keys.add(kernel._key((torch.empty(n), sizes, 7, 7, 7), {}))
    assert len(keys) == 1


def test_options_devices_and_debugging_have_keys_of_their_own(monkeypatch):
    kernel, arguments = LaunchedByKey(KERNEL), tuple(PLAIN.values())
    keys = [kernel._key(arguments, options) for options in ({}, {"num_warps": 4}, {"num_warps": 8}, {"maxnreg": 4})]
    for device in (1, 2):
        fake = SimpleNamespace(active=SimpleNamespace(get_current_device=lambda device=device: device))
        monkeypatch.setattr(launching, "driver", fake)
        keys.append(kernel._key(arguments, {}))
    monkeypatch.setattr(triton.knobs.runtime, "debug", True)
    keys.append(kernel._key(arguments, {}))
    monkeypatch.setattr(triton.knobs.compilation, "instrumentation_mode", "some")
    keys.append(kernel._key(arguments, {}))
    assert all(a != b for a, b in itertools.combinations(keys, 2)) and None not in keys


class Compiled(CompiledKernel):
    """What a stand-in for a kernel "compiles"; it notes its launches."""

    def __init__(self, seen: list, backend: str) -> None:
        self.seen, self.metadata = seen, SimpleNamespace(target=GPUTarget(backend, 90, 32))

    def __getitem__(self, grid):
        return lambda *arguments: self.seen.append(("by key", grid[:3], arguments))


@pytest.fixture
def launched(monkeypatch):
    """Launch ``KERNEL`` with arguments that differ from ``PLAIN``; return how, and the grid and arguments there."""
    seen: list = []
    result = {"backend": "cuda", "kind": Compiled}

    def run(self, *arguments, grid, warmup, **options):
        seen.append(("compiled" if warmup else "by Triton", grid, arguments))
        return result["kind"](seen, result["backend"])

    monkeypatch.setattr(jit.JITFunction, "run", run)
    kernel = LaunchedByKey(KERNEL)

    def call(grid: tuple[int, ...] = (3,), options: dict[str, Any] | None = None, **others: Any) -> tuple:
        seen.clear()
        kernel[grid](*(PLAIN | others).values(), **({"num_warps": 4} if options is None else options))
        (found,) = seen
        return found

    call.result = result
    return call


def test_the_second_launch_goes_by_key(launched):
    assert launched()[0] == "by Triton"
    x = torch.empty(8)
    how, grid, arguments = launched((5, 2), x=x, n=9, free=11)
    assert how == "by key" and grid == (5, 2, 1)
    assert arguments[0] is x and arguments[1:] == (None, 9, 11, 7, None)  # the default of ``last`` filled in
    assert launched(last=None)[2][-1] is None
    assert launched(x=shifted(torch.float32, 1))[0] == "by Triton"
    assert launched(x=shifted(torch.float32, 1))[0] == "by key"


@pytest.mark.parametrize(
    "change", ["named", "another backend", "not compiled yet", "hook of the kernel", "hook of the compiler"]
)
def test_what_keys_do_not_cover_is_left_to_triton(launched, monkeypatch, change):
    options = {"CONSTANT": 7} if change == "named" else None
    if change == "another backend":
        launched.result["backend"] = "hip"
    if change == "not compiled yet":
        launched.result["kind"] = lambda seen, backend: SimpleNamespace()
    if change == "hook of the kernel":
        monkeypatch.setattr(KERNEL, "pre_run_hooks", [print])
    if change == "hook of the compiler":
        monkeypatch.setattr(triton.knobs.runtime, "add_stages_inspection_hook", lambda: ("", ""))
    for _ in range(3):
        assert launched(options=options)[0] == "by Triton"


def test_interpreted_kernels_are_launched_as_ever():
    assert launch.output_kernel.interpreted == limits.INTERPRETED
    seen = []

    class Interpreted:
        """Not a ``JITFunction``."""

        arg_names = ("x", "n")

        def __getitem__(self, grid):
            return lambda *arguments, **options: seen.append((grid, arguments, options))

    kernel = launched_by_key(Interpreted())
    for _ in range(3):
        kernel[(2, 3)](5, n=7)
    assert seen == [((2, 3), (5,), {"n": 7})] * 3 and kernel.interpreted


@pytest.mark.parametrize("inside", [False, True])
def test_a_listener_is_told_of_launches_in_its_context_alone(launched, inside):
    heard = []

    @contextlib.contextmanager
    def listener(launch):
        heard.append((launch.compiled is not None, launch.grid, launch.arguments, launch.options))
        yield
        heard.append("launched")

    launched(n=9)
    with listening(listener) if inside else contextlib.nullcontext():
        how = launched((5, 2), n=9)[0]
    launched(n=9)
    assert how == "by key"
    arguments = (PLAIN["x"], None, 9, 7, 7, None)  # the default of ``last`` filled in
    assert heard == ([(True, (5, 2), arguments, {"num_warps": 4}), "launched"] if inside else [])


def test_only_compiling_launches_nothing(launched):
    with only_compiling():
        how, _, arguments = launched(n=9)
        assert how == "compiled" and arguments[:3] == (PLAIN["x"], None, 9)
    assert launched(n=9)[0] == "by Triton"
    with only_compiling(), pytest.raises(ValueError, match="not enough"):
        launched(n=9)  # compiled before: nothing is left to do
    assert launched(n=9)[0] == "by key"


@pytest.mark.gpu
@pytest.mark.parametrize("method", KERNELS)
def test_results_are_those_of_triton_in_whatever_order(method, monkeypatch):
    """Alignments, dtypes, layouts and lengths in turn, with keys from the calls before: the same bits each time."""
    calls = []
    for dtype, n, offset in itertools.product((torch.bfloat16, torch.float32), (64, 300, 1025), (0, 1, 8)):
        q, k, v = (
            torch.empty(x.numel() + offset, dtype=dtype, device="cuda")[offset:].view(x.shape).copy_(x)
            for x in random_qkv("cuda", n, head_dim=40, heads=4, kv_heads=2, dtype=dtype, seed=n)
        )
        calls.append(([q, k, v], {"causal": offset != 8, "alpha": 1.25 if n == 64 else 1.5}))
    calls.append(([x.transpose(1, 2).contiguous().transpose(1, 2) for x in calls[0][0]], {}))

    def train(inputs: list[Tensor], options: dict[str, Any]) -> list[Tensor]:
        leaves = [x.detach().requires_grad_() for x in inputs]
        out = bind(method)(*leaves, **options)
        return [out.detach(), *torch.autograd.grad(out, leaves, inputs[0])]

    with monkeypatch.context() as patch:
        patch.setattr(LaunchedByKey, "_key", lambda *_: None)
        expected = [train(*call) for call in calls]
    for known in (False, True):
        if known:  # every key, from the first time on
            monkeypatch.setattr(jit.JITFunction, "run", lambda *_, **__: pytest.fail("launched by Triton"))
        for call, results in zip(calls, expected, strict=True):
            assert all(map(torch.equal, train(*call), results))
