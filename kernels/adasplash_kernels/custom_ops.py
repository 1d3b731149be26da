"""Defining ``torch.library`` ops with fake kernels, and gradients that refuse to be differentiated again.

``torch.library.custom_op`` makes the same ops, but spends as long on a call and its gradient as the launches of several
kernels take: on default values of arguments, and on comparing results with arguments, which ``opcheck`` does in tests.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .eager import TWICE

_LIBRARY = torch.library.Library("adasplash_kernels", "FRAGMENT")
_FUNCTIONS: dict[Any, Callable] = {}
_BACKENDS = tuple(
    torch._C.DispatchKeySet(key).raw_repr() for key in (torch._C.DispatchKey.CPU, torch._C.DispatchKey.CUDA)
)


def define(function: Callable, fake: Callable) -> Any:
    """Make a function an op of its own name and return the op.

    Args:
        function: computes on real tensors; its annotations are the op's schema, without default values. It changes no
            argument and returns no tensor that shares memory with one.
        fake: takes the same and returns empty tensors of the same shapes, dtypes and devices.
    """
    name = function.__name__
    schema = torch.library.infer_schema(function, mutates_args=())
    function = on_its_device(function)
    _LIBRARY.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))
    _LIBRARY.impl(name, torch._disable_dynamo(function), "CompositeExplicitAutograd")
    torch.library.register_fake(f"{_LIBRARY.ns}::{name}", fake, lib=_LIBRARY)
    op = getattr(getattr(torch.ops, _LIBRARY.ns), name).default
    _FUNCTIONS[op] = function
    return op


def on_its_device(function: Callable) -> Callable:
    """Let a function run with the GPU of its first argument as the current one, which is where Triton launches."""

    @functools.wraps(function)
    def run(first: Tensor, *others: Any) -> Any:
        if first.device.type != "cuda" or first.device.index == torch.cuda.current_device():
            return function(first, *others)
        with torch.cuda.device(first.device):
            return function(first, *others)

    return run


def no_gradient(x: Tensor) -> Tensor:
    """Return what an op, which cannot return None, returns as the gradient to an alpha that wants none."""
    return torch.empty(0, dtype=torch.float32, device=x.device)


def differentiate(op: Any, backward_op: Any, backward: Callable, save: Callable) -> None:
    """Give an op its gradient, computed by ``backward`` through ``backward_op``, which may not be differentiated again.

    A gradient penalty differentiates what the backward op returned: it must raise, not be left out.

    Args:
        backward: ``(ctx, *gradients)`` -> a gradient or None for each argument; a gradient is None for an output that
            has none, but not of all.
        save: ``(ctx, inputs, output)`` keeps what ``backward`` needs.
    """
    _differentiate(op, backward, save)
    _differentiate(backward_op, _refuse, lambda ctx, inputs, output: None)


def _refuse(ctx: Any, *gradients: Any) -> None:
    raise RuntimeError(TWICE)


def _differentiate(op: Any, backward: Callable, save: Callable) -> None:
    function = _FUNCTIONS[op]

    def compute(keys: torch._C.DispatchKeySet, arguments: tuple) -> Any:
        rest = keys & torch._C._after_autograd_keyset
        with torch._C._AutoDispatchBelowAutograd():
            if rest.raw_repr() in _BACKENDS:  # then the dispatcher would call just this, after a while
                return function(*arguments)
            return op.redispatch(rest, *arguments)

    class Differentiable(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *arguments: Any) -> Any:
            *inputs, keys = arguments  # last, so that ctx.needs_input_grad goes by the op's own arguments
            output = compute(keys, inputs)
            ctx.set_materialize_grads(False)  # zeros for outputs without a gradient take memory: lists, say, have none
            save(ctx, inputs, output)
            return output

        @staticmethod
        def backward(ctx: Any, *gradients: Any) -> tuple:
            if all(x is None for x in gradients):  # where what comes after stopped the gradient
                return (None,) * len(ctx.needs_input_grad)
            return *backward(ctx, *gradients), None

    @torch._disable_dynamo  # which traces what an op calls where it gave up on the caller
    def dispatch(keys: torch._C.DispatchKeySet, *arguments: Any) -> Any:
        if torch._C.is_grad_enabled() and torch._C._any_requires_grad(*arguments):
            return Differentiable.apply(*arguments, keys)
        return compute(keys, arguments)

    _LIBRARY.impl(op._opname, dispatch, "Autograd", with_keyset=True)
