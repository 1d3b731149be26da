"""What is watched during training: the validation curve, the time of a step, and lines for a plain terminal."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytorch_lightning as pl
import torch


class LossCurve(pl.Callback):
    """Keeps the validation loss (nats a token) by optimizer step, across resumes."""

    def __init__(self, say: Callable[[str], None], name: str, total_steps: int) -> None:
        self.points: dict[int, float] = {}
        self._say, self._name, self._total = say, name, total_steps

    def on_validation_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        if trainer.sanity_checking:
            return
        self.points[trainer.global_step] = float(trainer.callback_metrics["val_loss"])
        if trainer.is_global_zero:
            self._say(f"{self._name}: step {trainer.global_step}/{self._total}, "
                      f"validation loss {self.points[trainer.global_step]:.4f}")  # fmt: skip

    def state_dict(self) -> dict[str, Any]:
        return {"points": dict(self.points)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.points = {int(step): float(loss) for step, loss in state["points"].items()}


class StepTimer(pl.Callback):
    """Times optimizer steps ``skip`` to ``skip + count``: seconds from the first micro-batch to the update's end.

    The device is waited for at both ends of a timed step and of no other. Validation falls between steps.
    """

    def __init__(self, skip: int, count: int) -> None:
        self.seconds: list[float] = []
        self._skip, self._count = skip, count
        self._started: float | None = None
        self._step = -1

    def on_train_batch_start(self, trainer: pl.Trainer, module: pl.LightningModule, batch: Any, batch_idx: int) -> None:
        if self._skip <= trainer.global_step < self._skip + self._count and trainer.global_step != self._step:
            self._step = trainer.global_step
            _wait()
            self._started = time.perf_counter()

    def on_train_batch_end(self, trainer: pl.Trainer, module: pl.LightningModule, outputs: Any, batch: Any,
                           batch_idx: int) -> None:  # fmt: skip
        if self._started is not None and trainer.global_step > self._step:
            _wait()
            self.seconds.append(time.perf_counter() - self._started)
            self._started = None

    def state_dict(self) -> dict[str, Any]:
        return {"seconds": list(self.seconds)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.seconds = [float(s) for s in state["seconds"]]


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
