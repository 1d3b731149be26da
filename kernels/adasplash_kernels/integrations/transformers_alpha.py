"""A learned alpha for each head of a transformers model: one parameter a layer, kept in the model's state dict.

As in Correia, Niculae and Martins (2019), "Adaptively Sparse Transformers" (arXiv 1909.00015, sec. 4), alpha is
1 + sigmoid(x) of an unbounded x, and so stays strictly between 1 (softmax) and 2 (sparsemax).
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor, nn

PARAMETER = "entmax_alpha_logit"  # (heads,); one-dimensional, so recipes that spare vectors spare it from weight decay


def add_parameter(attention: nn.Module, start: float) -> None:
    """Give an attention module x, (heads,) float32, such that alpha begins at ``start``, between 1 and 2."""
    heads = attention.config.num_attention_heads
    logit = math.log((start - 1) / (2 - start))
    device = next((p.device for p in attention.parameters()), None)
    attention.register_parameter(PARAMETER, nn.Parameter(torch.full((heads,), logit, device=device)))


def remove_parameter(attention: nn.Module) -> None:
    """Undo :func:`add_parameter`, where it was done."""
    attention._parameters.pop(PARAMETER, None)


def alpha_of(attention: nn.Module) -> Tensor:
    """Return alpha, (heads,) float32, differentiable.

    Raises:
        ValueError: the module has no parameter for it.
    """
    logit = attention._parameters.get(PARAMETER)
    if logit is None:
        raise ValueError("learn_alpha: the attention has no learned alpha; build the model with use_entmax, and load a "
                         "saved one with load_entmax")  # fmt: skip
    return 1 + logit.float().sigmoid()


def read_parameters(folder: str | Path, names: Iterable[str]) -> dict[str, Tensor]:
    """Read tensors by name from the safetensors files of a folder.

    Raises:
        ValueError: a tensor is in none of them.
    """
    from safetensors import safe_open

    wanted, found = set(names), {}
    for path in sorted(Path(folder).glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            found |= {name: file.get_tensor(name) for name in wanted.intersection(file.keys())}
    if missing := sorted(wanted - set(found)):
        raise ValueError(f"learn_alpha: {missing[0]} is in no safetensors file of {folder}")
    return found
