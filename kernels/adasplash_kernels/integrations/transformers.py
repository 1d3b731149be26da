"""Entmax attention in Hugging Face models: ``attn_implementation="adasplash"``.

    from adasplash_kernels.integrations.transformers import EntmaxAttentionConfig, use_entmax

    model = AutoModelForMaskedLM.from_pretrained(name, attention_probs_dropout_prob=0.0)
    use_entmax(model, EntmaxAttentionConfig(alpha=1.5))

Written for transformers 5.17 to 5.23 and tested with GPT-2, BERT, RoBERTa, ModernBERT, Llama (grouped
queries) and Qwen2; other models that use ``AttentionInterface`` work, or say what stands in the way.
Importing this module registers the implementation, so a model saved after ``use_entmax`` loads again with
``from_pretrained(path, attn_implementation="adasplash")``: the settings travel in its config.json. Loaded
without that argument it is an ordinary softmax model.

What to know:

- Sliding-window layers (ModernBERT's local layers) keep softmax, as in AdaSplash (arXiv 2502.12082). They,
  and the layers left out of ``EntmaxAttentionConfig.layers``, run transformers' own "sdpa".
- ``learn_alpha=True`` makes alpha a parameter of each head. It is part of the state dict: such a model is loaded
  with ``load_entmax(type(model), path)``.
- Attention dropout does not exist here: training with it raises. Build or load the model with it set to 0.
- Attention weights are never formed: ``output_attentions=True`` raises where the model passes it on, and
  yields an empty tuple where it does not (transformers decides, as for "sdpa").
  ``adasplash_kernels.support_map`` shows what was attended.
- Padding is read once per forward pass, which waits for the device once, as "sdpa" does.
- Packed sequences are refused when transformers sees them, which is in decoders called with ``position_ids``,
  without a padding mask and with ``use_cache=False``. Elsewhere it ignores them, here as in "sdpa".
- Under ``torch.compile`` a changed alpha may compile again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedConfig, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface

from ..attention import entmax_attention
from ..masks import allowed_keys
from .transformers_alpha import PARAMETER, add_parameter, alpha_of, read_parameters, remove_parameter
from .transformers_masks import KeyRange, key_range_mask
from .transformers_settings import ATTRIBUTE as _ATTRIBUTE
from .transformers_settings import EntmaxAttentionConfig

__all__ = ["IMPLEMENTATION", "EntmaxAttentionConfig", "entmax_attention_forward", "get_entmax_config",
           "learned_alphas", "load_entmax", "observed", "register", "use_entmax"]  # fmt: skip

IMPLEMENTATION = "adasplash"
_OBSERVER = "entmax_observer"
ModelT = TypeVar("ModelT", bound=nn.Module)


def register() -> None:
    """Make ``attn_implementation="adasplash"`` known to transformers. Importing this module does it, too.

    The mask function matters as much as the attention function: an implementation without one gets
    ``attention_mask=None`` from transformers, and padding would be attended to.
    """
    AttentionInterface.register(IMPLEMENTATION, entmax_attention_forward)
    AttentionMaskInterface.register(IMPLEMENTATION, key_range_mask)


def use_entmax(model: ModelT, config: EntmaxAttentionConfig | None = None) -> ModelT:
    """Give a transformers model entmax attention, in place.

    Args:
        model: a ``PreTrainedModel``, or a module around exactly one, such as a SentenceTransformer.
        config: defaults to ``EntmaxAttentionConfig()``. The object stays live: assigning ``config.alpha``
            changes every layer from the next forward pass on. Saved in config.json, not in the state dict. With
            ``learn_alpha`` the state dict gets a parameter a layer, ``...entmax_alpha_logit`` (heads,), anew at every
            call: make the optimizer afterwards.

    Returns:
        ``model``.

    Raises:
        ValueError: no model or several, the architecture does not let its attention be replaced, ``layers``
            names a layer that does not exist or has a sliding window, or no layer is left to use entmax.
    """
    config = EntmaxAttentionConfig() if config is None else config
    if not isinstance(config, EntmaxAttentionConfig):
        raise ValueError(f"config: got {type(config).__name__}, allowed is an EntmaxAttentionConfig or None")
    root = _only_root(model, "a transformers model", _outermost(model))
    _check_against(root, config)
    register()
    root.set_attn_implementation(IMPLEMENTATION)
    if root.config._attn_implementation != IMPLEMENTATION:  # transformers warns and goes on
        raise ValueError(f"model: the attention implementation of {type(root).__name__} cannot be replaced")
    _attach(root, config)
    for attention in _attention_modules(root):
        remove_parameter(attention)
    for attention in _learning(root, config).values():
        add_parameter(attention, config.alpha)
    return model


def load_entmax(model_class: type[ModelT], folder: str | Path, **keywords: Any) -> ModelT:
    """Load a model saved after ``use_entmax``, its learned alphas included.

    Args:
        model_class: what ``from_pretrained`` is called of, for example ``GPT2LMHeadModel``.
        folder: a local folder written by ``save_pretrained``.
        keywords: for ``from_pretrained``.

    Returns:
        The model, in evaluation mode.

    Raises:
        ValueError: it is to learn its alphas, but the safetensors files of the folder lack them.
    """
    with _expected(model_class, PARAMETER):
        model = model_class.from_pretrained(folder, attn_implementation=IMPLEMENTATION, **keywords)
    live = get_entmax_config(model)
    learning = _learning(model, live)
    for attention in learning.values():
        add_parameter(attention, live.alpha)
    stored = read_parameters(folder, learning) if learning else {}
    for name, attention in learning.items():
        attention._parameters[PARAMETER].data.copy_(stored[name])
    return model


@contextmanager
def _expected(model_class: type[nn.Module], pattern: str) -> Iterator[None]:
    """Within the block, ``from_pretrained`` does not warn of tensors of this name that it leaves out."""
    name = "_keys_to_ignore_on_load_unexpected"
    before = getattr(model_class, name, None)
    setattr(model_class, name, [*(before or ()), pattern])
    try:
        yield
    finally:
        setattr(model_class, name, before)


def learned_alphas(model: nn.Module) -> dict[int, Tensor]:
    """Return the present alphas of a model that learns them: layer index to (heads,) float32, detached.

    Empty where alpha is a setting. Layers that keep softmax are left out.

    Raises:
        ValueError: as ``get_entmax_config``.
    """
    live = get_entmax_config(model)
    root = _only_root(model, "a transformers model", _outermost(model))
    return {attention.layer_idx: alpha_of(attention).detach() for attention in _learning(root, live).values()}


def get_entmax_config(model: nn.Module) -> EntmaxAttentionConfig:
    """Return the live settings of the one entmax model in ``model``; assign to its fields to change them.

    A model loaded with ``attn_implementation="adasplash"`` takes them from its config, or the defaults.

    Raises:
        ValueError: ``model`` contains no model that uses entmax attention, or several.
    """
    uses = [root for root in _outermost(model) if root.config._attn_implementation == IMPLEMENTATION]
    root = _only_root(model, "a model with attn_implementation='adasplash' (see use_entmax)", uses)
    live = root.__dict__.get(_ATTRIBUTE)
    if live is None:
        live = EntmaxAttentionConfig.from_dict(getattr(root.config, _ATTRIBUTE, None) or {})
        _check_against(root, live)
        _attach(root, live)
    return live


@contextmanager
def observed(model: nn.Module, observer: Callable[[int | None, dict[str, Any]], None]) -> Iterator[None]:
    """Within the block, call ``observer(layer, call)`` before each entmax attention of the model in ``model``.

    ``call`` holds the arguments of ``entmax_attention`` by name (q, k, v, alpha, causal, scale, key_starts,
    key_lengths, method): what ``support_map`` needs. Layers that use softmax are not observed.

    Raises:
        ValueError: as ``get_entmax_config``.
    """
    get_entmax_config(model)
    modules = [m for root in _outermost(model) for m in _configured_modules(root)]
    for module in modules:
        setattr(module, _OBSERVER, observer)
    try:
        yield
    finally:
        for module in modules:
            delattr(module, _OBSERVER)


def _outermost(model: nn.Module) -> list[PreTrainedModel]:
    """The transformers models in ``model`` that are not inside another one."""
    if isinstance(model, PreTrainedModel):
        return [model]
    return [root for child in model.children() for root in _outermost(child)]


def _only_root(model: nn.Module, wanted: str, roots: list[PreTrainedModel]) -> PreTrainedModel:
    unique = list({id(root): root for root in roots}.values())
    if len(unique) != 1:
        raise ValueError(f"model: {type(model).__name__} contains {len(unique)} times {wanted}, allowed is 1")
    return unique[0]


def _configured_modules(root: nn.Module) -> Iterator[nn.Module]:
    """Modules with a config. Attention modules are among them: it names their implementation."""
    return (m for m in root.modules() if isinstance(getattr(m, "config", None), PreTrainedConfig))


def _attention_modules(root: PreTrainedModel) -> list[nn.Module]:
    modules = [m for m in _configured_modules(root) if not isinstance(m, PreTrainedModel)]
    return [m for m in modules if hasattr(m, "is_causal")]


def _learning(root: PreTrainedModel, live: EntmaxAttentionConfig) -> dict[str, nn.Module]:
    """The attention modules that have an alpha to learn, by the parameter's name in the state dict."""
    if not live.learn_alpha:
        return {}
    names = {module: f"{name}.{PARAMETER}" for name, module in root.named_modules()}
    return {names[m]: m for m in _attention_modules(root)
            if not _has_window(m) and live.uses_entmax(getattr(m, "layer_idx", None))}  # fmt: skip


def _attach(root: PreTrainedModel, live: EntmaxAttentionConfig) -> None:
    stored = live._stored_copy()
    for module in _configured_modules(root):
        setattr(module, _ATTRIBUTE, live)
        setattr(module.config, _ATTRIBUTE, stored)


def _check_against(root: PreTrainedModel, config: EntmaxAttentionConfig) -> None:
    """Check ``config.layers`` against the model, and that at least one layer will use entmax."""
    attention = _attention_modules(root)
    sliding = {getattr(m, "layer_idx", None) for m in attention if _has_window(m)}
    full = {getattr(m, "layer_idx", None) for m in attention if not _has_window(m)}
    if config.layers is None:
        if sliding and not full:
            raise ValueError(
                f"model: every attention layer of {type(root).__name__} has a sliding window, and those keep "
                "softmax; set sliding_window=None in its config to use entmax"
            )
        return
    if None in full:
        raise ValueError(f"layers: the layers of {type(root).__name__} carry no index, allowed is None")
    for layer in config.layers:
        if layer not in full:
            why = "has a sliding window and keeps softmax" if layer in sliding else "does not exist"
            raise ValueError(f"layers: layer {layer} {why}, allowed are {', '.join(map(str, sorted(full)))}")


def _has_window(attention: nn.Module) -> bool:
    layer_types = getattr(attention.config, "layer_types", None)
    layer = getattr(attention, "layer_idx", None)
    if layer_types is not None and layer is not None:
        return layer_types[layer] != "full_attention"
    return getattr(attention, "sliding_window", getattr(attention.config, "sliding_window", None)) is not None


# Arguments that change the result (soft-capping, sinks, biases, sparse indices, packed sequences, paged
# caches) or ask for one that does not exist. Dropping them would be wrong without a sign of it.
_UNSUPPORTED = (
    "softcap",
    "s_aux",
    "sinks",
    "position_bias",
    "head_mask",
    "indices",
    "block_indices",
    "cache",
    "cu_seq_lens_q",
    "cu_seq_lens_k",
    "output_attentions",
)


def entmax_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: KeyRange | Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention function for ``transformers.AttentionInterface``. Never waits for the device.

    Args:
        module: the attention module; its settings are read from it, see ``use_entmax``.
        query: (B, H, N_q, D).
        key, value: (B, H_kv, N_k, D), H a multiple of H_kv.
        attention_mask: what ``key_range_mask`` returned. A ``KeyRange`` also tells if attention is causal.
        dropout: must be 0 where entmax is used.
        scaling: factor on the scores, ``1/sqrt(D)`` by default.
        is_causal: without a mask, whether attention is causal; by default what ``module.is_causal`` says.
        sliding_window: not None marks a local layer, which keeps softmax.

    Returns:
        (B, N_q, H, D) contiguous, and None in place of the attention weights.

    Raises:
        ValueError: dropout, a mask this implementation did not make, or an argument it cannot honour.
    """
    for name in _UNSUPPORTED:
        if kwargs.get(name) is not None and kwargs[name] is not False:
            raise ValueError(f"{name}: not supported by attn_implementation='adasplash'")
    live = _settings(module)
    causal = is_causal if is_causal is not None else getattr(module, "is_causal", True)
    if sliding_window is not None or not live.uses_entmax(getattr(module, "layer_idx", None)):
        mask = _dense_mask(query, key, attention_mask, causal and sliding_window is None)
        kwargs.update(dropout=dropout, scaling=scaling, is_causal=is_causal)
        return sdpa_attention_forward(module, query, key, value, mask, **kwargs)
    if dropout > 0:
        raise ValueError(
            f"dropout: got {dropout}, attn_implementation='adasplash' allows 0; make or load the model with "
            "attn_pdrop, attention_probs_dropout_prob or attention_dropout (whichever it has) set to 0"
        )
    starts = ends = None
    if attention_mask is not None:
        starts, ends, causal = _check_range(attention_mask, key)
    alpha = alpha_of(module) if live.learn_alpha else live.alpha
    call = dict(q=query, k=key, v=value, alpha=alpha, causal=causal, scale=scaling, key_starts=starts,
                key_lengths=ends, method=live.method)  # fmt: skip
    if (observer := module.__dict__.get(_OBSERVER)) is not None:
        observer(getattr(module, "layer_idx", None), call)
    out = entmax_attention(call.pop("q"), call.pop("k"), call.pop("v"), **call)
    return out.transpose(1, 2).contiguous(), None


def _settings(module: nn.Module) -> EntmaxAttentionConfig:
    """The live settings of an attention module; of a model only loaded, read once from its config."""
    live = module.__dict__.get(_ATTRIBUTE)
    if live is None:
        live = EntmaxAttentionConfig.from_dict(getattr(module.config, _ATTRIBUTE, None) or {})
        if live.layers is not None and getattr(module, "layer_idx", None) is None:
            raise ValueError(f"layers: {type(module).__name__} carries no layer index, allowed is None")
        setattr(module, _ATTRIBUTE, live)
    return live


def _check_range(mask: KeyRange | Tensor, key: Tensor) -> tuple[Tensor | None, Tensor | None, bool]:
    """Return (starts, ends, causal) of a mask made by ``key_range_mask`` for these keys."""
    if not isinstance(mask, KeyRange):
        raise ValueError(
            f"attention_mask: a custom mask of shape {tuple(mask.shape)} is not supported by "
            "attn_implementation='adasplash', allowed is a 2D padding mask (batch, keys) given to the model"
        )
    if mask.length != key.shape[2]:
        raise ValueError(f"attention_mask: made for {mask.length} keys, but the layer has {key.shape[2]}")
    return mask.starts, mask.ends, mask.causal


def _dense_mask(query: Tensor, key: Tensor, mask: KeyRange | Tensor | None, causal: bool) -> Tensor | None:
    """The mask of a softmax layer as "sdpa" takes it: (B or 1, 1, N_q, N_k) bool, or None.

    Without a mask "sdpa" aligns causal attention top-left, which is right only for N_q = N_k (and N_q = 1,
    which it treats apart); here queries that follow a cache are the last of the keys.
    """
    n_q, n_k = query.shape[2], key.shape[2]
    if isinstance(mask, KeyRange):
        starts, ends, causal = _check_range(mask, key)
        return allowed_keys(n_q, n_k, causal=causal, key_starts=starts, key_lengths=ends, device=query.device)
    if mask is None and causal and 1 < n_q < n_k:
        return allowed_keys(n_q, n_k, causal=True, device=query.device)
    return mask


register()
