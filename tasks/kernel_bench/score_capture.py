"""Queries and keys of every layer of a model with entmax attention, as a file for ``training_trace`` of a config.

    python -m tasks.kernel_bench.score_capture --model DIR --tokens FILE.bin --length 128 --sequences 1 \\
        --out captured/table4-smoke/step-50.safetensors

Unlike ``tasks.kernel_bench.capture`` it leaves the model its own attention, so that later layers see what they saw in
training. The tokens are a file that the training left below ``data`` of its workspace.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tasks.data.tokens import TokenBlocks, TokenFile
from tasks.errors import UserError


@torch.inference_mode()
def capture_scores(model: Any, tokens: Tensor) -> dict[str, Tensor]:
    """Return q.<layer> (B, H, N, D) and k.<layer> (B, H_kv, N, D) of every entmax layer, on the CPU.

    Args:
        model: a transformers model with entmax attention.
        tokens: (B, N) int64 on the model's device. Scores are scaled by ``1/sqrt(D)``; where the model scales
            otherwise the difference goes into q.
    """
    from adasplash_kernels.integrations.transformers import observed

    found: dict[str, Tensor] = {}

    def look(layer: int | None, call: dict[str, Any]) -> None:
        q, scale = call["q"], call.get("scale")
        scaled = q if scale is None else q * (scale * q.shape[-1] ** 0.5)
        found[f"q.{layer}"], found[f"k.{layer}"] = (x.cpu().contiguous().clone() for x in (scaled, call["k"]))

    with observed(model, look):
        model.eval()(input_ids=tokens, use_cache=False)
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tasks.kernel_bench.score_capture",
                                     description=__doc__.split("\n")[0])  # fmt: skip
    parser.add_argument("--model", required=True, help="folder of a causal language model trained with entmax")
    parser.add_argument("--tokens", required=True, type=Path, help="tokens of held-out text, a .bin with its sidecar")
    parser.add_argument("--out", required=True, type=Path, help="safetensors file to write")
    parser.add_argument("--length", required=True, type=int, metavar="N", help="tokens of a sequence")
    parser.add_argument("--sequences", type=int, default=1, help="how many; default 1")
    options = parser.parse_args(arguments)
    try:
        found = _from_files(options)
    except (UserError, OSError, ValueError) as error:
        print("error: " + " ".join(str(error).split()), file=sys.stderr)
        return 2
    print(f"{options.out}: {len(found) // 2} layers, q {tuple(next(iter(found.values())).shape)}")
    return 0


def _from_files(options: argparse.Namespace) -> dict[str, Tensor]:
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM

    import adasplash_kernels.integrations.transformers  # noqa: F401 - registers the attention

    for name in ("length", "sequences"):
        if getattr(options, name) < 1:
            raise UserError(f"--{name}: got {getattr(options, name)}, allowed is 1 or more")
    blocks = TokenBlocks(TokenFile.load(options.tokens), options.length)
    if len(blocks) < options.sequences:
        raise UserError(
            f"--tokens: {options.tokens} holds {len(blocks)} sequences of {options.length}, "
            f"--sequences asks for {options.sequences}"
        )
    tokens = torch.stack([blocks[i][: options.length] for i in range(options.sequences)])
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = AutoModelForCausalLM.from_pretrained(options.model, attn_implementation="adasplash").to(device)
    found = capture_scores(model, tokens.to(device))
    options.out.parent.mkdir(parents=True, exist_ok=True)
    save_file(found, options.out)
    return found


if __name__ == "__main__":
    sys.exit(main())
