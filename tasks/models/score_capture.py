"""Queries and keys of every entmax layer of a language model: what its attention's scores are made of."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from adasplash_kernels.integrations.transformers import observed


@torch.inference_mode()
def capture_scores(model: Any, tokens: Tensor) -> dict[str, Tensor]:
    """Return q.<layer> (B, H, N, D) and k.<layer> (B, H_kv, N, D) of every entmax layer, on the CPU.

    Args:
        model: a transformers model with entmax attention.
        tokens: (B, N) int64 on the model's device. Scores are scaled by ``1/sqrt(D)``; where the model scales
            otherwise the difference goes into q.
    """
    found: dict[str, Tensor] = {}

    def look(layer: int | None, call: dict[str, Any]) -> None:
        q, scale = call["q"], call.get("scale")
        scaled = q if scale is None else q * (scale * q.shape[-1] ** 0.5)
        found[f"q.{layer}"], found[f"k.{layer}"] = (x.cpu().contiguous().clone() for x in (scaled, call["k"]))

    with observed(model, look):
        model.eval()(input_ids=tokens, use_cache=False)
    return found
