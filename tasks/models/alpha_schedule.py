"""Alpha of a model's entmax attention as a function of the training step."""

from __future__ import annotations

from typing import Any

import pytorch_lightning as pl

from adasplash_kernels.integrations.transformers import EntmaxAttentionConfig, get_entmax_config

from ..errors import ConfigError


class AlphaSchedule(pl.Callback):
    """Moves alpha linearly from ``start`` to ``end`` over the first ``steps`` optimizer steps, then keeps it.

    AdaSplash (arXiv 2502.12082) trains this way from softmax to entmax: 1.01 to 1.5 or 2.0 over the
    first half of its continued pre-training.

    Alpha is computed from ``trainer.global_step`` before every training batch and nowhere remembered: a resumed
    run continues exactly, and all micro-batches of one optimizer step share one alpha. Validation during ``fit``
    uses the alpha of the last training batch. ``trainer.validate`` and ``trainer.test`` leave alpha alone: it is
    what training left, or what the model was built or loaded with (``save_pretrained`` stores it). Logged as
    ``alpha`` on every step.

    Args:
        start: alpha at step 0, in [1, 2].
        end: alpha from step ``steps`` on, in [1, 2].
        steps: length of the ramp in optimizer steps (``trainer.global_step``), at least 1.

    Raises:
        ConfigError: an argument has the wrong type or value; or, when fitting starts, the module trains no model
            with entmax attention (``use_entmax``), several, or one that learns its alphas.
    """

    def __init__(self, start: float, end: float, steps: int) -> None:
        self.start = _check_alpha("start", start)
        self.end = _check_alpha("end", end)
        if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
            raise ConfigError(f"steps: got {steps!r}, allowed is a whole number of optimizer steps from 1")
        self.steps = steps

    def alpha_at(self, step: int) -> float:
        """Return alpha for the training batch that belongs to optimizer step ``step``, counted from 0."""
        if step >= self.steps:
            return self.end
        return self.start + (self.end - self.start) * step / self.steps

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        _settings(pl_module)  # fails before the first batch is loaded

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        # As the last batch left it: where no step remains to be trained, nothing else would set it.
        if checkpoint["global_step"]:
            _settings(pl_module).alpha = self.alpha_at(checkpoint["global_step"] - 1)

    def on_sanity_check_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        _settings(pl_module).alpha = self.alpha_at(trainer.global_step)

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        alpha = self.alpha_at(trainer.global_step)
        _settings(pl_module).alpha = alpha
        pl_module.log("alpha", alpha, on_step=True, on_epoch=False)


def _settings(pl_module: pl.LightningModule) -> EntmaxAttentionConfig:
    try:
        live = get_entmax_config(pl_module)
    except ValueError as error:
        raise ConfigError(f"alpha schedule: {error}") from error
    if live.learn_alpha:
        raise ConfigError("alpha schedule: the model learns its alphas (learn_alpha); allowed is one of the two")
    return live


def _check_alpha(name: str, value: float) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 1 <= value <= 2:
        raise ConfigError(f"{name}: got {value!r}, allowed is a number from 1 (softmax) to 2 (sparsemax)")
    return float(value)
