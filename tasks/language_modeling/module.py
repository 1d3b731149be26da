"""GPT-2 (Hugging Face) in a LightningModule: next-token loss, AdamW, warm-up and cosine decay."""

from __future__ import annotations

import math
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import GPT2Config, GPT2LMHeadModel

from adasplash_kernels.integrations.transformers import EntmaxAttentionConfig, use_entmax
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
    if variant.attention == "adasplash":
        start = variant.alpha_schedule.start if variant.alpha_schedule else variant.alpha
        use_entmax(model, EntmaxAttentionConfig(alpha=start, method=variant.method, layers=variant.layers,
                                                learn_alpha=variant.learn_alpha))  # fmt: skip
    return model


class CausalLanguageModel(pl.LightningModule):
    """Trains a causal language model on windows of tokens; logs ``train_loss`` and ``val_loss`` in nats a token."""

    def __init__(self, model: GPT2LMHeadModel, recipe: Train) -> None:
        super().__init__()
        self.model = model
        self.recipe = recipe

    def loss(self, window: Tensor) -> Tensor:
        """Mean cross-entropy of (B, T + 1) int64 tokens: position t predicts token t + 1."""
        logits = self.model(input_ids=window[:, :-1]).logits
        return F.cross_entropy(logits.float().flatten(0, 1), window[:, 1:].flatten())

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        loss = self.loss(batch)
        self.log("train_loss", loss.detach(), prog_bar=True)
        return loss

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        self.log("val_loss", self.loss(batch), batch_size=batch.shape[0], prog_bar=True, sync_dist=True)

    @property
    def _scales_gradients(self) -> bool:
        return self.recipe.precision == "16-mixed"

    def configure_gradient_clipping(
        self, optimizer: Any, gradient_clip_val: float | None = None, gradient_clip_algorithm: str | None = None
    ) -> None:
        """Clip the global norm. Lightning refuses fused optimizers under any mixed precision, for fear of scaled
        gradients; only float16 has those, and gets no fused optimizer here."""
        if self._scales_gradients:
            self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)
        elif gradient_clip_val:
            torch.nn.utils.clip_grad_norm_(self.parameters(), gradient_clip_val)

    def configure_optimizers(self) -> dict:
        recipe = self.recipe
        matrices = [p for p in self.parameters() if p.requires_grad and p.ndim >= 2]
        vectors = [p for p in self.parameters() if p.requires_grad and p.ndim < 2]
        groups = [{"params": matrices, "weight_decay": recipe.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
        optimizer = torch.optim.AdamW(groups, lr=recipe.lr, betas=tuple(recipe.betas),
                                      fused=next(self.parameters()).is_cuda and not self._scales_gradients)  # fmt: skip
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: learning_rate_factor(step, recipe))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def learning_rate_factor(step: int, recipe: Train) -> float:
    """Learning rate relative to ``recipe.lr``: linear warm-up, then a cosine down to ``final_lr`` at the last step."""
    if step < recipe.warmup_steps:
        return (step + 1) / recipe.warmup_steps
    done = (step - recipe.warmup_steps) / max(1, recipe.steps - recipe.warmup_steps)
    lowest = recipe.final_lr / recipe.lr if recipe.lr else 0.0
    return lowest + (1 - lowest) * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))
