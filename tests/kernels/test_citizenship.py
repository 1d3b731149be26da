"""The kernels as PyTorch citizens: registered ops, compile, autocast, autograd, layouts, the same bits every time."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from calls import KERNELS, bind, in_turn, op_arguments, positions, random_qkv, stretch
from torch import Tensor

from adasplash_kernels.ops import backward_op, forward_op

every_method = pytest.mark.parametrize("method", KERNELS)
# What is the same code for all: on a GPU with each of them, in the interpreter with the two whose lists differ most.
one_of_each_kind = pytest.mark.parametrize(
    "method", [m if m in ("adasplash2", "columns") else pytest.param(m, marks=pytest.mark.gpu) for m in KERNELS]
)


def options_of(case: str, device: str, n: int) -> dict[str, Any]:
    """Return options of ``entmax_attention`` for n queries and keys, 2 heads and a batch of 1."""
    numbers = functools.partial(torch.tensor, device=device)
    return {
        "causal": {"causal": True},
        "window": {"window": n // 3, "alpha": 2.0},
        "padded": {"key_starts": positions(device, 2), "key_lengths": positions(device, n - 3), "alpha": 1.25},
        "packed": {"cu_seqlens_q": positions(device, 0, n // 3, n - 1), "causal": True},
        "ALiBi": {"alibi_slopes": numbers([0.5, 0.25]), "alpha": 1.0, "causal": True},
        "learned alpha": {"alpha": numbers(1.4, requires_grad=True), "causal": True},
        "learned alpha per head": {"alpha": numbers([1.2, 1.7], requires_grad=True)},
    }[case]


CASES = ("causal", "window", "padded", "packed", "ALiBi", "learned alpha", "learned alpha per head")


def differentiate(method: str, inputs: list[Tensor], upstream: Tensor | None = None, **options: Any) -> list[Tensor]:
    """Return the output and the gradients to the inputs and to a learned alpha."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    alpha = options.get("alpha")
    if isinstance(alpha, Tensor) and alpha.requires_grad:
        leaves.append(alpha)
    out = bind(method)(*leaves[:3], **options)
    return [out, *torch.autograd.grad(out, leaves, torch.ones_like(out) if upstream is None else upstream)]


def assert_same_bits(found: list[Tensor], expected: list[Tensor]) -> None:
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == b.dtype and torch.equal(a, b)


OPS = {
    "plain": {},
    "padded": {"key_starts": (3,), "key_lengths": (10,), "alpha": 1.0},
    "window": {"left": 5, "right": 5, "alpha": 2.0},
    "causal": {"right": 0, "alpha": 1.25},
    "packed": {"cu_seqlens_q": (0, 4, 9), "cu_seqlens_k": (0, 7, 12), "right": 0},
    "ALiBi": {"alibi_slopes": (0.5, 0.25)},
    "alpha per head": {"alpha": (1.2, 1.7)},
}


@pytest.mark.parametrize(("method", "case"), in_turn(tuple(OPS)))
def test_ops_keep_their_promises(device, method, case):
    options = {n: torch.tensor(x, device=device) if isinstance(x, tuple) else x for n, x in OPS[case].items()}
    q, k, v = random_qkv(device, 9, 12, heads=2, kv_heads=1)
    arguments = op_arguments(q, k, v, method, **options)
    leaves = (x if x is None else x.requires_grad_() for x in arguments[:4])
    torch.library.opcheck(forward_op, (*leaves, *arguments[4:]))
    arguments = [x.detach() if isinstance(x, Tensor) else x for x in arguments]
    out, out2, theta, tiles = forward_op(*arguments)
    for need_alpha in {False, arguments[3] is not None}:
        torch.library.opcheck(
            backward_op, (*arguments[:9], theta, out2, tiles, torch.randn_like(out), *arguments[9:14], need_alpha)
        )


@one_of_each_kind
def test_forward_op_without_gradients(device, method):
    for n_q, n_k in ((18, 12), (2, 40)):  # the second is computed as decoding is
        q, k, v = random_qkv(device, n_q, n_k, heads=2, kv_heads=1)
        torch.library.opcheck(forward_op, op_arguments(q, k, v, method, need_backward=False))


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.gpu)])
@pytest.mark.parametrize(("method", "case"), in_turn(CASES))
def test_compiles_whole_with_dynamic_lengths(device, method, backend, case):
    compiled = torch.compile(bind(method), fullgraph=True, dynamic=True, backend=backend)
    torch._dynamo.reset()
    with torch._dynamo.config.patch(error_on_recompile=True):
        for n in (11, 13):
            inputs = [x.requires_grad_() for x in random_qkv(device, n, heads=2, kv_heads=1, seed=n)]
            options = options_of(case, device, n)
            learned = [x for x in options.values() if isinstance(x, Tensor) and x.requires_grad]
            results = []
            for function in (compiled, bind(method)):
                out = function(*inputs, **options)
                results.append([out, *torch.autograd.grad(out.square().mean(), inputs + learned)])
            for found, expected in zip(*results, strict=True):
                torch.testing.assert_close(found, expected)


def test_the_compiler_does_not_look_into_ops(device):
    """Where it breaks the graph within a loop it leaves that function uncompiled, but goes on with what it calls."""
    arguments = op_arguments(*random_qkv(device, 9, heads=2), "columns")
    leaves = [x.requires_grad_() for x in arguments[:3]]

    def step() -> list[Tensor]:
        for _ in range(1):
            torch._dynamo.graph_break()
            out = forward_op(*arguments)[0]
            found = [out, *torch.autograd.grad(out, leaves, torch.ones_like(out))]
        return found

    torch._dynamo.reset()
    seen: list[Any] = []
    compiled = torch.compile(step, backend=lambda graph, inputs: seen.append(graph) or graph.forward)
    assert_same_bits(compiled(), step())
    assert not any(node.target in (torch.empty, torch.zeros) for graph in seen for node in graph.graph.nodes)


@every_method
@pytest.mark.parametrize("low", [torch.bfloat16, torch.float16])
def test_autocast(device, method, low):
    """As PyTorch's own attention: computed in autocast's dtype, whatever mix comes in; gradients in the inputs' own."""
    q, k, v = random_qkv(device, 19)
    expected = differentiate(method, [x.to(low) for x in (q, k, v)], causal=True)
    with torch.autocast(device, low):
        found = differentiate(method, [q, k, v.to(low)], causal=True)
    assert [x.dtype for x in found] == [low, torch.float32, torch.float32, low]
    assert_same_bits([x.to(low) for x in found], expected)


@every_method
def test_a_second_derivative_is_refused(device, method):
    q, k, v = (x.requires_grad_() for x in random_qkv(device, 8))
    alpha = torch.tensor(1.4, device=device, requires_grad=True)
    out = bind(method)(q, k, v, alpha=alpha)
    for x in (q, k, v, alpha):
        (gradient,) = torch.autograd.grad(out.square().sum(), x, create_graph=True)
        with pytest.raises(RuntimeError, match="differentiated twice"):
            (gradient.square().sum() + out.sum()).backward()  # must not drop the first term silently


@every_method
def test_gradient_that_stops_behind_the_op(device, method):
    """Nothing comes back where what follows has no gradient; zeros are not made up for it."""

    class Stop(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, upstream: Tensor) -> None:
            return None

    q, k, v = (x.requires_grad_() for x in random_qkv(device, 20))
    (Stop.apply(bind(method)(q, k, v)).sum() + v.sum()).backward()
    assert q.grad is None and k.grad is None and (v.grad == 1).all()


@every_method
def test_gradients_repeat_bit_for_bit(device, method):
    q, k, v = random_qkv(device, 18 * stretch(device, 40), heads=4, kv_heads=2)
    alpha = torch.tensor([1.2, 1.5, 1.8, 2.0], device=device, requires_grad=True)
    upstream = torch.randn(q.shape, device=device)
    run = functools.partial(differentiate, method, [q, k, v], upstream, alpha=alpha, causal=True)
    first = run()
    for _ in range(stretch(device, 19)):
        assert_same_bits(run(), first)


@every_method
def test_deterministic_flags_change_nothing(device, method):
    q, k, v = random_qkv(device, 18 * stretch(device))
    options = {"cu_seqlens_q": positions(device, 0, 5, 17), "causal": True}
    expected = differentiate(method, [q, k, v], **options)
    for flag in (True, False):
        assert_same_bits(differentiate(method, [q, k, v], deterministic=flag, **options), expected)
    torch.use_deterministic_algorithms(True)
    try:
        assert_same_bits(differentiate(method, [q, k, v], **options), expected)
    finally:
        torch.use_deterministic_algorithms(False)


@one_of_each_kind
def test_layouts_of_the_upstream_gradient(device, method):
    """``out.sum()`` sends back a gradient without memory of its own; a transposed use one with other strides."""
    q, k, v = random_qkv(device, 18 * stretch(device), heads=2)
    one = torch.ones((), device=device).expand(q.shape)
    assert_same_bits(differentiate(method, [q, k, v], one), differentiate(method, [q, k, v], one.contiguous()))
    upstream = torch.randn(q.shape, device=device)
    expected = differentiate(method, [q, k, v], upstream)
    for order in ((0, 1, 3, 2), (0, 2, 1, 3)):  # memory in this order of dimensions; each swap undoes itself
        assert_same_bits(
            differentiate(method, [q, k, v], upstream.permute(order).contiguous().permute(order)), expected
        )


@one_of_each_kind
def test_strided_inputs_give_the_same_bits(device, method):
    n = 18 * stretch(device)
    packed = torch.randn(2, n, 3, 2, 24, generator=torch.Generator().manual_seed(1)).to(device)
    q, k, v = (packed[:, :, i].transpose(1, 2) for i in range(3))  # (B, H, N, D) views of one projection
    expected = differentiate(method, [x.contiguous() for x in (q, k, v)], causal=True)
    assert_same_bits(differentiate(method, [q, k, v], causal=True), expected)
    turned = [x.mT.contiguous().mT for x in (q, k, v)]  # head dim not the fastest
    assert_same_bits(differentiate(method, turned, causal=True), expected)
    one = [x[:1, :1].expand_as(x) for x in (k, v)]  # no memory of their own for batch and heads
    expected = differentiate(method, [q.contiguous(), *(x.contiguous() for x in one)], causal=True)
    assert_same_bits(differentiate(method, [q, *one], causal=True), expected)
