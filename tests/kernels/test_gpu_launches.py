"""What a launch must not do on a GPU: wait for it, resist a CUDA graph, or compile again for another length."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from calls import KERNELS, bind, positions, random_qkv
from torch import Tensor

from adasplash_kernels.thresholds import THRESHOLDS

pytestmark = pytest.mark.gpu
every_method = pytest.mark.parametrize("method", KERNELS)

CASES = ("dense", "causal", "window", "padded", "packed", "ALiBi", "alpha", "learned alpha")


def case_of(name: str, n: int, head_dim: int = 64) -> tuple[list[Tensor], dict[str, Any]]:
    """Return q, k, v that require grad and options, all on the GPU: 4 query heads, 2 key heads, batch 1."""
    qkv = random_qkv("cuda", n, head_dim=head_dim, heads=4, kv_heads=2, dtype=torch.bfloat16, seed=n)
    learned = torch.tensor([1.2, 1.4, 1.6, 1.9], device="cuda", requires_grad=True)
    options = {
        "dense": {},
        "causal": {"causal": True},
        "window": {"window": n // 4 + 1},
        "padded": {"key_starts": positions("cuda", n // 5), "key_lengths": positions("cuda", n - n // 7)},
        "packed": {"cu_seqlens_q": positions("cuda", 0, n // 3, n - n // 5, n), "causal": True},
        "ALiBi": {"alibi_slopes": torch.tensor([0.5, 0.25, 0.1, 0.0], device="cuda"), "causal": True},
        "alpha": {"alpha": 1.25},
        "learned alpha": {"alpha": learned},
    }[name]
    return [x.requires_grad_() for x in qkv], options


def train(method: str, inputs: list[Tensor], upstream: Tensor, options: dict[str, Any]) -> list[Tensor]:
    """Run forward and backward; return the output and all gradients."""
    alpha = options.get("alpha")
    leaves = [*inputs, alpha] if isinstance(alpha, Tensor) and alpha.requires_grad else inputs
    out = bind(method)(*inputs, **options)
    return [out, *torch.autograd.grad(out, leaves, upstream)]


def infer(method: str, inputs: list[Tensor], upstream: Tensor, options: dict[str, Any]) -> list[Tensor]:
    """Run forward without gradients."""
    with torch.no_grad():
        return [bind(method)(*inputs, **options)]


@contextmanager
def no_waiting() -> Iterator[None]:
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@every_method
@pytest.mark.parametrize("run", [train, infer])
@pytest.mark.parametrize("case", CASES)
def test_nothing_waits_for_the_gpu(method, case, run):
    inputs, options = case_of(case, 300)
    upstream = torch.randn_like(inputs[0])
    run(method, inputs, upstream, options)  # compiling may wait
    with no_waiting():
        run(method, inputs, upstream, options)


@every_method
def test_decoding_does_not_wait_either(method):
    (q, k, v), _ = case_of("dense", 5000)
    lengths = positions("cuda", 4321)
    infer(method, [q[:, :, :1], k, v], q, {"key_lengths": lengths})
    with no_waiting():
        infer(method, [q[:, :, :1], k, v], q, {"key_lengths": lengths})


@every_method
@pytest.mark.parametrize("run", [train, infer])
@pytest.mark.parametrize("case", CASES)
def test_cuda_graphs_replay_with_new_data(method, case, run: Callable[..., list[Tensor]]):
    inputs, options = case_of(case, 300)
    upstream = torch.randn_like(inputs[0])
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # compiling, and autograd's own buffers, stay out of the capture
        for _ in range(3):
            run(method, inputs, upstream, options)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run(method, inputs, upstream, options)
    for seed in (1, 2):
        fresh = torch.Generator("cuda").manual_seed(seed)
        with torch.no_grad():
            for x in (*inputs, upstream):
                x.copy_(torch.randn(x.shape, generator=fresh, device="cuda"))
            if case == "padded":  # other lengths, which the host never reads
                options["key_lengths"].fill_(150 + seed)
        graph.replay()
        for found, expected in zip(captured, run(method, inputs, upstream, options), strict=True):
            assert torch.equal(found, expected)


@contextmanager
def compilations(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Collect the kernels that are specialised anew, whether they come from Triton's disk cache or not."""
    seen: list[str] = []

    def note(*_: Any, **call: Any) -> None:
        seen.append(call["repr"])

    with monkeypatch.context() as patch:
        patch.setattr(triton.knobs.runtime, "jit_cache_hook", note)
        yield seen


@triton.jit
def _probe(x):
    tl.store(x, 1)


def test_compilations_are_noticed(monkeypatch):
    with compilations(monkeypatch) as seen:
        for dtype in (torch.int32, torch.int32, torch.float32):
            _probe[(1,)](torch.zeros(1, dtype=dtype, device="cuda"))
    assert len(seen) == 2


@every_method
@pytest.mark.parametrize("head_dim", [64, 40])
@pytest.mark.parametrize("case", CASES)
def test_another_length_compiles_nothing(method, case, head_dim, monkeypatch):
    def both(n: int) -> None:
        inputs, options = case_of(case, n, head_dim)
        train(method, inputs, torch.randn_like(inputs[0]), options)
        infer(method, inputs, inputs[0], options)

    # where all scores of a block stay on chip, a kernel for each of three widths of tiles, and those for longer rows
    for n in (100, 200, 400, 600) if THRESHOLDS[method].on_chip else (256,):
        both(n)
        if (
            head_dim % 16
        ):  # then an odd length aligns rows of q, k and v differently, which Triton knows two kernels for
            both(n + 1)
    with compilations(monkeypatch) as seen:
        for n in (113, 300, 512, 1000, 1025, 17, 16):
            both(n)
    assert not seen


@every_method
def test_another_cache_length_compiles_nothing(method, monkeypatch):
    def decode(n: int) -> None:
        (q, k, v), _ = case_of("dense", n)
        infer(method, [q[:, :, :1], k, v], q, {"key_lengths": positions("cuda", n - 3)})

    decode(4096)
    with compilations(monkeypatch) as seen:
        for n in (1024, 1500, 2049, 3333, 4097, 9000):
            decode(n)
    assert not seen
