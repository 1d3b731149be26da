"""GPT-2 (Hugging Face), its loss and its optimizer: what every way of training it shares."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import GPT2Config, GPT2LMHeadModel

from tasks.language_modeling.attentions import set_attention
from tasks.language_modeling.settings import Model, Train, Variant


def build_model(size: Model, variant: Variant, vocab_size: int) -> GPT2LMHeadModel:
    """Return a GPT-2 with fresh weights and the variant's attention.

    Dropout is off, as in the llm.c recipe, and the vocabulary is rounded up to a multiple of 64 as it is there.
    """
    config = GPT2Config(
        vocab_size=math.ceil(vocab_size / 64) * 64, n_positions=size.context, n_layer=size.n_layer,
        n_head=size.n_head, n_embd=size.n_embd, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
        bos_token_id=0, eos_token_id=0, use_cache=False,
    )  # fmt: skip
    config._attn_implementation = "sdpa"
    model = GPT2LMHeadModel(config)
    set_attention(model, variant)
    return model


def next_token_loss(model: GPT2LMHeadModel, window: Tensor, compiled: bool = False) -> Tensor:
    """Mean cross-entropy (nats) of (B, T + 1) int64 tokens: position t predicts token t + 1.

    ``compiled`` compiles the loss; the model is compiled apart. A (B, T, V) tensor of float32 is 13 GB for 65,536
    tokens of GPT-2's vocabulary, and without compiling it is written and read several times.
    """
    logits = model(input_ids=window[:, :-1]).logits
    return (_compiled_cross_entropy() if compiled else _cross_entropy)(logits, window[:, 1:])


def _cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(logits.float().flatten(0, 1), targets.flatten())


@cache
def _compiled_cross_entropy() -> Callable[[Tensor, Tensor], Tensor]:
    return torch.compile(_cross_entropy)


def adamw(module: nn.Module, recipe: Train, fused: bool) -> torch.optim.AdamW:
    """Return the recipe's optimizer over a module's parameters; vectors and scalars have no weight decay."""
    trained = [p for p in module.parameters() if p.requires_grad]
    groups = [{"params": [p for p in trained if p.ndim >= 2], "weight_decay": recipe.weight_decay},
              {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0}]  # fmt: skip
    return torch.optim.AdamW(groups, lr=recipe.lr, betas=tuple(recipe.betas), fused=fused)


def learning_rate_factor(step: int, recipe: Train) -> float:
    """Learning rate relative to ``recipe.lr``: linear warm-up, then a cosine down to ``final_lr`` at the last step."""
    if step < recipe.warmup_steps:
        return (step + 1) / recipe.warmup_steps
    done = (step - recipe.warmup_steps) / max(1, recipe.steps - recipe.warmup_steps)
    lowest = recipe.final_lr / recipe.lr if recipe.lr else 0.0
    return lowest + (1 - lowest) * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))
