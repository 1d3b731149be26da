"""Checkpoints that a training can always go on from: whole files, each the state between two optimizer steps.

Lightning's own ``ModelCheckpoint`` saves before the validation due at the same step, which a resumed run then
leaves out; saves once more in the middle of the first accumulated step after resuming; and writes to the system's
temporary folder first, so that where this is another disk the file under the final name can be cut short.
"""

from __future__ import annotations

import io
import logging
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Checkpoint
from pytorch_lightning.plugins.io import TorchCheckpointIO

from ..data.files import write_atomically


class WholeCheckpointIO(TorchCheckpointIO):
    """Writes a checkpoint beside its final name, down to the disk, and then renames it.

    Raises:
        DataError: beginning with ``workspace``: the disk is full or the folder cannot be written. An earlier
            checkpoint of that name is untouched.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        buffer = io.BytesIO()
        torch.save(checkpoint, buffer)
        write_atomically(Path(path), buffer.getvalue(), "workspace")


class StepCheckpoint(Checkpoint):
    """Saves the training state over and over at ``path``.

    Args:
        path: the file.
        every: optimizer steps between two checkpoints.
        validation_every: optimizer steps between two validations. Where one is due, the checkpoint waits for it.
    """

    def __init__(self, path: Path, every: int, validation_every: int) -> None:
        self._path, self._every, self._validation_every = path, every, validation_every
        self._step = 0

    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        self._step = trainer.global_step

    def on_train_batch_end(self, trainer: pl.Trainer, module: pl.LightningModule, outputs: Any, batch: Any,
                           batch_idx: int) -> None:  # fmt: skip
        if trainer.global_step == self._step:
            return  # between two micro-batches: their gradients are no part of a checkpoint
        self._step = trainer.global_step
        if self._step % self._every == 0 and self._step % self._validation_every:
            trainer.save_checkpoint(self._path)

    def on_validation_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        fitting = trainer.state.fn == "fit" and not trainer.sanity_checking
        if fitting and trainer.global_step % self._every == 0:
            trainer.save_checkpoint(self._path)


def is_readable(path: Path) -> bool:
    """Tell whether a checkpoint can be loaded; the log says why not. Nothing in it is executed."""
    try:
        torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch, pickle and zip raise whatever the damage leads them to
        logging.getLogger(__name__).warning("%s cannot be loaded: %s: %s", path, type(error).__name__, error)
        return False
    return True
