"""GPT-2 (Hugging Face) in a LightningModule: next-token loss, AdamW, warm-up and cosine decay."""

from __future__ import annotations

from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor
from transformers import GPT2LMHeadModel

from tasks.language_modeling.gpt2 import adamw, learning_rate_factor, next_token_loss
from tasks.language_modeling.settings import Train
from tasks.language_modeling.sharding import shard


class CausalLanguageModel(pl.LightningModule):
    """Trains a causal language model on windows of tokens; logs ``train_loss`` and ``val_loss`` in nats a token."""

    def __init__(self, model: GPT2LMHeadModel, recipe: Train) -> None:
        super().__init__()
        self.model = model
        self.recipe = recipe
        self._sharded = False

    def configure_model(self) -> None:
        """Shard the model where that is the strategy; Lightning calls this before training and before validation."""
        if self.device_mesh is not None and not self._sharded:
            shard(self.model, self.device_mesh["data_parallel"])
            self._sharded = True

    def loss(self, window: Tensor) -> Tensor:
        """Mean cross-entropy of (B, T + 1) int64 tokens: position t predicts token t + 1."""
        return next_token_loss(self.model, window, self.recipe.compile)

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        loss = self.loss(batch)
        self.log("train_loss", loss.detach(), prog_bar=True)
        return loss

    def on_validation_epoch_start(self) -> None:
        self._validated = torch.zeros(2, dtype=torch.float64, device=self.device)  # sum of losses, windows

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        loss = self.loss(batch).double()
        if self.trainer.datamodule.counts(batch_idx):
            self._validated += torch.stack([loss * len(batch), torch.full_like(loss, len(batch))])

    def on_validation_epoch_end(self) -> None:
        # Summed over processes here: Lightning's own mean rounds the number of windows a process has to a whole one.
        total, windows = self.trainer.strategy.reduce(self._validated, reduce_op="sum")
        self.log("val_loss", (total / windows).float(), prog_bar=True)

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
        optimizer = adamw(self, recipe, fused=next(self.parameters()).is_cuda and not self._scales_gradients)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: learning_rate_factor(step, recipe))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}
