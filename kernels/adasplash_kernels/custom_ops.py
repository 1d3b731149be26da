"""Defining ``torch.library`` ops.

By the lower-level calls, not ``torch.library.custom_op``: its wrappers check every call for aliases and cost several
times what launching the kernels does. opcheck tests the same promises.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from .eager import TWICE

_NAMESPACE = "adasplash_kernels"
_library = torch.library.Library(_NAMESPACE, "FRAGMENT")


def define(function: Callable, fake: Callable) -> Any:
    """Make a function an op of its own name and return the op.

    Args:
        function: computes on real tensors; its annotations are the op's schema. It changes no argument and returns
            no tensor that shares memory with one.
        fake: takes the same and returns empty tensors of the same shapes, dtypes and devices.
    """
    name = function.__name__
    _library.define(name + torch.library.infer_schema(function, mutates_args=()))
    _library.impl(name, function, "CompositeExplicitAutograd")
    torch.library.register_fake(f"{_NAMESPACE}::{name}", fake)
    return getattr(getattr(torch.ops, _NAMESPACE), name).default


def differentiate(op: Any, backward_op: Any, backward: Callable, save: Callable) -> None:
    """Give an op its gradient, computed by ``backward`` through ``backward_op``, which may not be differentiated again.

    A gradient penalty differentiates what the backward op returned: it must raise, not be left out.
    """
    torch.library.register_autograd(op, backward, setup_context=save)
    torch.library.register_autograd(backward_op, _refuse)


def _refuse(ctx: Any, *gradients: Any) -> None:
    raise RuntimeError(TWICE)
