"""Queries and keys along a training, kept as files for ``training_trace`` of adasplash2/iterations."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from safetensors.torch import save_file

from tasks.language_modeling.settings import Captures
from tasks.language_modeling.sharding import is_sharded
from tasks.models.score_capture import capture_scores


class ScoreCapture(pl.Callback):
    """Writes one file every so many optimizer steps, from the first process alone.

    Args:
        wanted: how often, and of how many windows; fewer if the validation text has fewer.
        folder: where the files go.
        say: prints one line of progress.
        name: of the run.
    """

    def __init__(self, wanted: Captures, folder: Path, say: Callable[[str], None], name: str) -> None:
        self._wanted, self._folder, self._say, self._name = wanted, folder, say, name
        self._done = 0

    def on_train_batch_end(self, trainer: pl.Trainer, module: pl.LightningModule, outputs: Any, batch: Any,
                           batch_idx: int) -> None:  # fmt: skip
        step = trainer.global_step
        if step % self._wanted.every_steps or step in (0, self._done):
            return
        if not (trainer.is_global_zero or is_sharded(trainer)):
            return
        self._done = step  # a step may have several micro-batches
        blocks = trainer.datamodule.valid_blocks
        number = min(self._wanted.sequences, len(blocks))
        tokens = torch.stack([blocks[i][:-1] for i in range(number)]).to(module.device)
        training = module.training
        with trainer.precision_plugin.forward_context():
            found = capture_scores(module.model, tokens)
        module.train(training)
        if not trainer.is_global_zero:  # which took part because the model is sharded
            return
        self._folder.mkdir(parents=True, exist_ok=True)
        path = self._folder / f"step-{step}.safetensors"
        partial = path.with_name(f".{path.name}.partial")
        save_file(found, partial)
        os.replace(partial, path)
        self._say(f"{self._name}: step {step}, queries and keys of every entmax layer kept: {path.name}")
