"""The mask half of ``attn_implementation="adasplash"``: transformers' masks in the kernels' terms.

transformers describes a mask by a 2D padding mask, the offsets of a cache and a *mask function*, a closure
over (batch, head, query, key) indices. The kernels take ``causal``, ``key_starts`` and ``key_lengths``. One
is translated into the other here, once per forward pass; what has no translation is refused by name, because
a mask that is dropped silently shows only as a slightly worse model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import masking_utils
from transformers.masking_utils import bidirectional_mask_function, causal_mask_function, sdpa_mask


class KeyRange(NamedTuple):
    """The keys each sequence may see: one contiguous run. Handed to the layers in place of a 4D mask.

    starts: (B,) int32, the first key that is not padding; None if that is key 0 everywhere.
    ends: (B,) int32, one past the last key that is not padding; None if that is ``length`` everywhere.
    length: the number of keys, to be held against what a layer gets.
    causal: whether the mask is causal (aligned bottom-right) on top of that.
    """

    starts: Tensor | None
    ends: Tensor | None
    length: int
    causal: bool


def key_range_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable = causal_mask_function,
    attention_mask: Tensor | None = None,
    local_size: int | None = None,
    **kwargs: object,
) -> KeyRange | Tensor | None:
    """Mask function for ``transformers.AttentionMaskInterface``; the parameters are those it passes.

    Waits for the device once when there is a padding mask, so that the layers never have to. While
    ``torch.compile`` traces, nothing can be read: the padding mask is then always kept, and its shape is
    checked by an assertion on the device.

    Returns:
        None for full attention without padding; the layer's own ``is_causal`` decides the rest, as in "sdpa".
        A KeyRange for full attention with padding. For a sliding window, whose layers keep softmax, what
        transformers' own function for "sdpa" makes of it: (B, 1, q_length, kv_length) bool, or None.

    Raises:
        ValueError: packed sequences, ``block_sequence_ids``, chunked attention, an ``or_mask_function`` or
            ``and_mask_function``, a static cache that is not full, a padding mask of the wrong shape or with
            holes.
    """
    if local_size is None and torch.compiler.is_compiling() and not kwargs.get("use_vmap"):
        mask_function = _without_packing(mask_function, batch_size, q_length, kwargs.get("device"))
    full = mask_function is causal_mask_function or mask_function is bidirectional_mask_function
    if not full:
        # A closure can only be taken apart outside a trace. Inside one, a chunked mask reaches the layers as
        # a 4D mask, which they refuse.
        if local_size is None or not torch.compiler.is_compiling():
            _refuse(mask_function, local=local_size is not None)
        return sdpa_mask(
            batch_size=batch_size,
            q_length=q_length,
            kv_length=kv_length,
            q_offset=q_offset,
            kv_offset=kv_offset,
            mask_function=mask_function,
            attention_mask=attention_mask,
            local_size=local_size,
            **kwargs,
        )
    causal = mask_function is causal_mask_function
    if causal:
        _check_alignment(q_length, kv_length, q_offset, kv_offset)
    if attention_mask is None:
        return None
    if attention_mask.ndim != 2 or attention_mask.shape[-1] != kv_offset + kv_length:
        raise ValueError(
            f"attention_mask: got shape {tuple(attention_mask.shape)}, attn_implementation='adasplash' needs "
            f"({batch_size}, {kv_offset + kv_length}), one entry for every key including the cached ones"
        )
    return _key_range(attention_mask[:, kv_offset:].bool(), causal)


def _without_packing(mask_function: Callable, batch_size: int, q_length: int, device: object) -> Callable:
    """While tracing: the causal mask in place of the packed one, after asserting that nothing is packed.

    Positions cannot be read in a trace, so transformers gets ready for packed sequences whenever there are
    positions but neither a padding mask nor a cache. No other mask is an ``and_mask`` without being local or
    the user's own (``use_vmap``). There is one sequence if and only if the last query sees the first key.
    """
    if mask_function is causal_mask_function or getattr(mask_function, "__name__", "") != "and_mask":
        return mask_function
    batch = torch.arange(batch_size, device=device)
    first = torch.zeros_like(batch)
    one_sequence = mask_function(batch, first, first + (q_length - 1), first)
    torch._assert_async(one_sequence.all(), _PACKED)
    return causal_mask_function


def _key_range(padding: Tensor, causal: bool) -> KeyRange | None:
    """Turn a (B, N) bool padding mask, True where there is a token, into each sequence's run of real keys."""
    length = padding.shape[1]
    ones = padding.to(torch.int32)
    count = ones.sum(-1, dtype=torch.int32)
    starts = ones.argmax(-1).to(torch.int32)
    ends = starts + count
    last = torch.where(count > 0, length - ones.flip(-1).argmax(-1), 0)
    holes = (ends != last).any()
    if torch.compiler.is_compiling():
        torch._assert_async(~holes, _HOLES)
        return KeyRange(starts, ends, length, causal)
    has_holes, left, right = torch.stack([holes, (starts > 0).any(), (ends < length).any()]).tolist()
    if has_holes:
        raise ValueError(_HOLES)
    if not left and not right:
        return None
    return KeyRange(starts if left else None, ends if right else None, length, causal)


_HOLES = (
    "attention_mask: there are holes between the real tokens of a sequence, attn_implementation='adasplash' "
    "allows padding at the left and at the right only (to generate, set tokenizer.padding_side = 'left')"
)


def _check_alignment(q_length: int, kv_length: int, q_offset: int | Tensor, kv_offset: int) -> None:
    """The kernels' causal mask lets the last query see the last key; empty room behind would break that."""
    if isinstance(q_offset, Tensor):  # static caches count on the device
        if torch.compiler.is_compiling():
            raise ValueError(_STATIC_CACHE)
        q_offset = int(q_offset)
    seen = q_offset + q_length
    held = kv_offset + kv_length
    if seen < held:
        raise ValueError(f"{_STATIC_CACHE} (got {held} keys for {seen} tokens)")
    if seen > held:
        raise ValueError(f"attention_mask: it ends at key {held}, but the queries end at token {seen}")


_STATIC_CACHE = (
    "past_key_values: a static cache (or an attention_mask) longer than the tokens seen so far is not "
    "supported by attn_implementation='adasplash'; use a DynamicCache (cache_implementation='dynamic' when "
    "generating)"
)

_PACKED = (
    "position_ids: packed sequences (positions that do not rise by one) are not supported by "
    "attn_implementation='adasplash'; pass one sequence a row, with an attention_mask"
)
_FACTORIES = {
    "packed_sequence_mask_function": _PACKED,
    "blockwise_overlay": "block_sequence_ids: not supported by attn_implementation='adasplash'",
    "chunked_overlay": "attention_chunk_size: not supported by attn_implementation='adasplash'",
}


def _refuse(mask_function: Callable, local: bool) -> None:
    """Raise, naming what ``mask_function`` is made of; but let a ``local`` one that is not chunked pass."""
    factories = set(_factories(mask_function))
    if local and "chunked_overlay" not in factories:
        return  # goes to "sdpa" as it is, which honours whatever was laid over the window
    for name, message in _FACTORIES.items():
        if name in factories:
            raise ValueError(message)
    raise ValueError(
        "or_mask_function, and_mask_function: not supported by attn_implementation='adasplash', allowed are "
        f"causal, bidirectional and sliding-window masks; got one made of {', '.join(sorted(factories))}"
    )


def _factories(mask_function: Callable) -> Iterator[str]:
    """Names of the functions of ``transformers.masking_utils`` that ``mask_function`` was put together by.

    A closure made by ``f`` is called ``f.<locals>.g``; what it combines is found in its cells. A function
    from elsewhere is yielded by its own name and not looked into.
    """
    name = getattr(mask_function, "__qualname__", type(mask_function).__name__)
    if getattr(mask_function, "__module__", None) != masking_utils.__name__:
        yield name
        return
    yield name.partition(".")[0]
    for cell in getattr(mask_function, "__closure__", None) or ():
        held = cell.cell_contents if isinstance(cell.cell_contents, tuple) else (cell.cell_contents,)
        for inner in held:
            if callable(inner) and not isinstance(inner, Tensor):
                yield from _factories(inner)
