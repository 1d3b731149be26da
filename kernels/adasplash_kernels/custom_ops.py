"""Defining ``torch.library`` ops with fake kernels, and gradients that refuse to be differentiated again.

``torch.library.custom_op`` makes the same ops, but spends as long on a call and its gradient as the launches of several
kernels take: on default values of arguments, and on comparing results with arguments, which ``opcheck`` does in tests.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from .eager import TWICE

_LIBRARY = torch.library.Library("adasplash_kernels", "FRAGMENT")


def define(function: Callable, fake: Callable) -> Any:
    """Make a function an op of its own name and return the op.

    Args:
        function: computes on real tensors; its annotations are the op's schema, without default values. It changes no
            argument and returns no tensor that shares memory with one.
        fake: takes the same and returns empty tensors of the same shapes, dtypes and devices.
    """
    name = function.__name__
    schema = torch.library.infer_schema(function, mutates_args=())
    _LIBRARY.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))
    _LIBRARY.impl(name, torch._disable_dynamo(function), "CompositeExplicitAutograd")
    torch.library.register_fake(f"{_LIBRARY.ns}::{name}", fake, lib=_LIBRARY)
    return getattr(getattr(torch.ops, _LIBRARY.ns), name).default


def differentiate(op: Any, backward_op: Any, backward: Callable, save: Callable) -> None:
    """Give an op its gradient, computed by ``backward`` through ``backward_op``, which may not be differentiated again.

    A gradient penalty differentiates what the backward op returned: it must raise, not be left out.

    Args:
        backward: ``(ctx, *gradients)`` -> a gradient or None for each argument.
        save: ``(ctx, inputs, output)`` keeps what ``backward`` needs.
    """
    _differentiate(op, backward, save)
    _differentiate(backward_op, _refuse, lambda ctx, inputs, output: None)


def _refuse(ctx: Any, *gradients: Any) -> None:
    raise RuntimeError(TWICE)


def _differentiate(op: Any, backward: Callable, save: Callable) -> None:
    def compute(keys: torch._C.DispatchKeySet, arguments: tuple) -> Any:
        with torch._C._AutoDispatchBelowAutograd():
            return op.redispatch(keys & torch._C._after_autograd_keyset, *arguments)

    class Differentiable(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *arguments: Any) -> Any:
            *inputs, keys = arguments  # last, so that ctx.needs_input_grad goes by the op's own arguments
            output = compute(keys, inputs)
            save(ctx, inputs, output)
            return output

        @staticmethod
        def backward(ctx: Any, *gradients: Any) -> tuple:
            return *backward(ctx, *gradients), None

    @torch._disable_dynamo  # which traces what an op calls where it gave up on the caller
    def dispatch(keys: torch._C.DispatchKeySet, *arguments: Any) -> Any:
        if torch._C.is_grad_enabled() and torch._C._any_requires_grad(*arguments):
            return Differentiable.apply(*arguments, keys)
        return compute(keys, arguments)

    _LIBRARY.impl(op._opname, dispatch, "Autograd", with_keyset=True)
