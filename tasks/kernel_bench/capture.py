"""Queries, keys and values of a trained model on a text, as a file for ``data: capture:FILE``.

    python -m tasks.kernel_bench.capture --model gpt2 --text novel.txt --out captured/gpt2.safetensors --length 1024

Taken where a Hugging Face model calls its attention: after rotary embedding, keys and values before they are repeated
for grouped queries. Tested with GPT-2 and Llama; any causal model with ``AttentionInterface`` should do. A model
folder or a name on the hub serves; no code of a model's own is run.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tasks.errors import UserError

_IMPLEMENTATION = "kernel_bench_capture"


def capture(model: torch.nn.Module, tokens: Tensor, layer: int | None = None) -> dict[str, Tensor]:
    """Return q (1, H, N, D), k and v (1, H_kv, N, D) of one layer, in the model's dtype, on the CPU.

    Args:
        model: a Hugging Face causal model, with a language-modelling head or without; its attention is left switched.
        tokens: (1, N) token ids on the model's device.
        layer: counted from 0; by default the one in the middle. Scores are scaled by ``1/sqrt(D)`` in the benchmarks;
            where the model scales otherwise the difference goes into q.

    Raises:
        UserError: no such layer, or the model's attention cannot be seen.
    """
    from transformers import AttentionInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

    layers = model.config.num_hidden_layers
    layer = layers // 2 if layer is None else layer
    if not 0 <= layer < layers:
        raise UserError(f"--layer: got {layer}, allowed are 0 to {layers - 1}")
    found: dict[str, Tensor] = {}

    def attention(module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, **options: Any) -> Any:
        if getattr(module, "layer_idx", None) == layer:
            scale = options.get("scaling")
            q_scaled = q if scale is None else q * (scale * q.shape[-1] ** 0.5)
            found.update({name: x.detach().cpu().contiguous() for name, x in zip("qkv", (q_scaled, k, v), strict=True)})
        return sdpa_attention_forward(module, q, k, v, mask, **options)

    AttentionInterface.register(_IMPLEMENTATION, attention)
    AttentionMaskInterface.register(_IMPLEMENTATION, sdpa_mask)
    model.set_attn_implementation(_IMPLEMENTATION)
    with torch.inference_mode():
        model.eval()(tokens, use_cache=False)
    if not found:
        raise UserError(f"--model: {type(model).__name__} does not call its attention through AttentionInterface")
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tasks.kernel_bench.capture", description=__doc__.split("\n")[0])
    parser.add_argument("--model", required=True, help="folder or hub name of a causal language model")
    parser.add_argument("--text", required=True, type=Path, help="UTF-8 text with at least --length tokens")
    parser.add_argument("--out", required=True, type=Path, help="safetensors file to write")
    parser.add_argument("--length", required=True, type=int, metavar="N", help="tokens")
    parser.add_argument("--layer", type=int, help="counted from 0; default: the one in the middle")
    options = parser.parse_args(arguments)
    try:
        found = _from_files(options)
    except (UserError, OSError, UnicodeDecodeError) as error:
        print("error: " + " ".join(str(error).split()), file=sys.stderr)
        return 2
    print(f"{options.out}: " + ", ".join(f"{name} {tuple(x.shape)}" for name, x in found.items()))
    return 0


def _from_files(options: argparse.Namespace) -> dict[str, Tensor]:
    from safetensors.torch import save_file
    from transformers import AutoModel, AutoTokenizer

    if options.length < 1:
        raise UserError(f"--length: got {options.length}, allowed is 1 or more")
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    ids = tokenizer(options.text.read_text(encoding="utf-8"), verbose=False)["input_ids"][: options.length]
    if len(ids) < options.length:
        raise UserError(f"--text: {options.text} has {len(ids)} tokens, --length asks for {options.length}")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = AutoModel.from_pretrained(options.model).to(device)
    longest = getattr(model.config, "max_position_embeddings", None)
    if longest is not None and options.length > longest:
        raise UserError(f"--length: got {options.length}, {options.model} takes at most {longest}")
    found = capture(model, torch.tensor([ids], device=device), options.layer)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    save_file(found, options.out, metadata={"model": Path(options.model).name, "tokens": str(options.length)})
    return found


if __name__ == "__main__":
    sys.exit(main())
