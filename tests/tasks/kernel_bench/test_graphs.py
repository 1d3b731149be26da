"""Calls as CUDA graphs, on a GPU."""

from __future__ import annotations

import pytest
import torch

from tasks.kernel_bench.graphs import checked, run_replay
from tasks.kernel_bench.inputs import Tensors
from tasks.kernel_bench.problem import NotMeasured
from tasks.kernel_bench.systems import SYSTEMS
from tasks.kernel_bench.timing import Clock, backward

pytestmark = pytest.mark.gpu
NAMES = ("fa2", "cudnn", "fa2_triton", "adasplash", "adasplash_nomask", "adasplash2", "columns", "columns_nolist")


@pytest.fixture
def tensors() -> Tensors:
    made = [torch.randn(1, 4, 1024, 64, device="cuda", dtype=torch.bfloat16) for _ in range(4)]
    return Tensors(*(x.requires_grad_() for x in made[:3]), made[3])


@pytest.mark.parametrize("name", NAMES)
def test_a_replay_computes_what_a_call_does(name, problem, tensors):
    """Also of other numbers in the same memory. FlashAttention-2 and cuDNN add up with atomics."""
    asked = problem("cuda", h=4, h_kv=4, n=1024, d=64, dtype=torch.bfloat16)
    attention = SYSTEMS[name].build(asked)
    for _ in range(3):
        backward(attention(*tensors.leaves), tensors)
    graph = checked(attention, tensors, lambda out, gradients: None)
    with torch.no_grad():
        for x in (*tensors.leaves, tensors.do):
            x.copy_(torch.randn_like(x))
    marks = run_replay(graph, tensors, clock := Clock(torch.device("cuda")))
    clock.wait()
    assert clock.between(*marks) > 0
    out = attention(*tensors.leaves)
    for found, expected in zip((graph.out, *graph.gradients), (out.detach(), *backward(out, tensors)), strict=True):
        assert torch.equal(found, expected) or name in ("fa2", "cudnn")
        assert (found.double() - expected.double()).norm() <= 0.01 * expected.double().norm()


def test_what_is_wrong_is_told(tensors):
    with pytest.raises(RuntimeError, match="off"):
        checked(lambda q, k, v: q + k + v, tensors, lambda out, gradients: "off")


def test_what_cannot_be_captured_is_not_measured_and_the_gpu_goes_on(tensors):
    with pytest.raises(NotMeasured, match="cannot be captured"):
        checked(lambda q, k, v: (q + k + v) * float(q.sum()), tensors, lambda out, gradients: None)
    assert float(torch.ones(3, device="cuda").sum()) == 3
