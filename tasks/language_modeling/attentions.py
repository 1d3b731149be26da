"""What each ``attention`` of a config is to transformers: the name of an attention implementation, registered here.

Beside PyTorch's own choice (``sdpa``) and the kernels (``adasplash``) there are the systems that the papers compare
with: one backend of PyTorch's attention and no other (``flash``, ``cudnn``), and exact entmax that stores all scores,
by sorting and by bisection.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import AttentionInterface, GPT2LMHeadModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from adasplash_kernels.eager import masked_scores
from adasplash_kernels.integrations.transformers import EntmaxAttentionConfig, use_entmax
from adasplash_kernels.masks import AttentionMask
from tasks.language_modeling.settings import Variant
from tasks.models.bisection import Bisection

_ITERATIONS = 50  # of the bisection; the usual choice for float32
# Not named after flash: transformers takes every such name for one of the flash-attn packages.
_BACKENDS = {"sdpa_fa2": SDPBackend.FLASH_ATTENTION, "sdpa_cudnn": SDPBackend.CUDNN_ATTENTION}
_BISECTION = "entmax_bisection"
IMPLEMENTATIONS = {"sdpa": "sdpa", "flash": "sdpa_fa2", "cudnn": "sdpa_cudnn", "adasplash": "adasplash",
                   "sort_torch": "adasplash", "bisection_torch": _BISECTION}  # fmt: skip


def set_attention(model: GPT2LMHeadModel, variant: Variant) -> None:
    """Give a model the attention of a variant, in place. It is stored with the model's config."""
    if variant.attention in ("adasplash", "sort_torch"):
        start = variant.alpha_schedule.start if variant.alpha_schedule else variant.alpha
        method = "eager" if variant.attention == "sort_torch" else variant.method  # which sorts for alpha 1.5 and 2
        use_entmax(model, EntmaxAttentionConfig(alpha=start, method=method, layers=variant.layers,
                                                learn_alpha=variant.learn_alpha))  # fmt: skip
        return
    if variant.attention == "bisection_torch":
        model.config.entmax_bisection_alpha = variant.alpha
    model.set_attn_implementation(IMPLEMENTATIONS[variant.attention])


class BackendUnavailable(RuntimeError):
    """PyTorch's attention cannot take these inputs by the one backend allowed, or lacks it on this device."""


def _one_backend(module: nn.Module, *arguments: Any, **keywords: Any) -> tuple[Tensor, None]:
    """PyTorch's attention by one backend; raises BackendUnavailable rather than fall back to another."""
    backend = _BACKENDS[module.config._attn_implementation]
    with sdpa_kernel(backend):
        try:
            return sdpa_attention_forward(module, *arguments, **keywords)
        except RuntimeError as error:
            if str(error).startswith(("No available kernel", "No viable backend")):  # on a GPU, on a CPU
                raise BackendUnavailable(f"PyTorch's {backend.name} does not take these inputs here") from error
            raise


def _bisection(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None,
    dropout: float = 0.0, scaling: float | None = None, **keywords: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    """Causal entmax of (B, H, N, D), scores and weights in float32 and the product with V in its own dtype; returns
    (B, N, H, D). For whole windows: masks and dropout are refused."""
    if attention_mask is not None or dropout:
        raise ValueError("bisection_torch: takes windows without padding and no attention dropout")
    with torch.autocast(query.device.type, enabled=False):
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        scores = masked_scores(query, key, scale=scale, mask=AttentionMask(causal=True))
        p = Bisection.apply(scores, module.config.entmax_bisection_alpha, _ITERATIONS)
        return (p.to(value.dtype) @ value).transpose(1, 2).contiguous(), None


for _name, _forward in {**dict.fromkeys(_BACKENDS, _one_backend), _BISECTION: _bisection}.items():
    AttentionInterface.register(_name, _forward)
    AttentionMaskInterface.register(_name, sdpa_mask)  # None for a causal window without padding
