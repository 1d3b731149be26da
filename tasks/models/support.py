"""How sparse a model's attention is on an input."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from adasplash_kernels import support_map
from adasplash_kernels.integrations.transformers import observed


@torch.no_grad()
def nonzero_ratios(model: PreTrainedModel, input_ids: Tensor) -> dict[int, Tensor]:
    """Return, by layer, the share of allowed attention weights that are above zero in each head.

    Args:
        model: a transformers model with entmax attention.
        input_ids: (B, N) int64 tokens.

    Returns:
        Layer index to (H,) float tensor: nonzero weights over weights the mask allows, over all sequences. Layers
        that use softmax are left out: all their weights are above zero.
    """
    ratios: dict[int, Tensor] = {}

    def look(layer: int | None, call: dict[str, Any]) -> None:
        found = support_map(**{k: v for k, v in call.items() if k not in ("v", "method")})
        assert layer is not None
        ratios[layer] = (found.counts.sum((0, 2)) / found.allowed.sum((0, 2)).clamp_min(1)).cpu()

    with observed(model, look):
        model(input_ids=input_ids, use_cache=False)
    return ratios
