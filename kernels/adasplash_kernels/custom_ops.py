"""Defining ``torch.library`` ops with fake kernels, and gradients that refuse to be differentiated again."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from .eager import TWICE

_NAMESPACE = "adasplash_kernels"


def define(function: Callable, fake: Callable) -> Any:
    """Make a function an op of its own name and return the op.

    Args:
        function: computes on real tensors; its annotations are the op's schema. It changes no argument and returns
            no tensor that shares memory with one.
        fake: takes the same and returns empty tensors of the same shapes, dtypes and devices.
    """
    op = torch.library.custom_op(f"{_NAMESPACE}::{function.__name__}", function, mutates_args=())
    op.register_fake(fake)
    return op


def differentiate(op: Any, backward_op: Any, backward: Callable, save: Callable) -> None:
    """Give an op its gradient, computed by ``backward`` through ``backward_op``, which may not be differentiated again.

    A gradient penalty differentiates what the backward op returned: it must raise, not be left out.
    """
    torch.library.register_autograd(op, backward, setup_context=save)
    torch.library.register_autograd(backward_op, _refuse)


def _refuse(ctx: Any, *gradients: Any) -> None:
    raise RuntimeError(TWICE)
