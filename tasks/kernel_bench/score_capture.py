"""Queries and keys of every layer of a model with entmax attention, as a file for ``training_trace`` of a config.

    python -m tasks.kernel_bench.score_capture --model DIR --tokens FILE.bin --length 128 --sequences 1 \\
        --out captured/table4-smoke/step-50.safetensors

For a model that was kept; a training whose config says ``captures`` writes such files on its way. Unlike
``tasks.kernel_bench.capture`` it leaves the model its own attention, so that later layers see what they saw in
training. The tokens are a file that the training left below ``data`` of its workspace.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from tasks.data.tokens import TokenBlocks, TokenFile
from tasks.errors import UserError
from tasks.models.score_capture import capture_scores


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
