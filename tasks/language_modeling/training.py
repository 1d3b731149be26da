"""One training run, from a variant and a seed to a trained model. Runs are kept, shared and resumed by their key."""

from __future__ import annotations

import glob
import json
import logging
import os
import shutil
import statistics
import sys
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import RichProgressBar
from pytorch_lightning.loggers import CSVLogger
from safetensors import SafetensorError
from transformers import GPT2LMHeadModel
from transformers.utils import logging as transformers_logging

from adasplash_kernels.integrations.transformers import IMPLEMENTATION as ENTMAX
from adasplash_kernels.integrations.transformers import load_entmax
from tasks.code_used import code_sha256
from tasks.distributed import Devices, local_rank
from tasks.errors import ConfigError, UserError
from tasks.language_modeling.attentions import IMPLEMENTATIONS
from tasks.language_modeling.callbacks import LossCurve, StepTimer
from tasks.language_modeling.captures import ScoreCapture
from tasks.language_modeling.data import TextDataModule
from tasks.language_modeling.gpt2 import build_model
from tasks.language_modeling.module import CausalLanguageModel
from tasks.language_modeling.settings import TrainSettings, Variant
from tasks.language_modeling.sharding import is_sharded, strategy_of, whole_state
from tasks.models.alpha_schedule import AlphaSchedule
from tasks.models.checkpoints import StepCheckpoint, WholeCheckpointIO, is_readable
from tasks.programs import Context, Job
from tasks.records import environment, sha256_of


@dataclass(frozen=True)
class TrainedRun:
    """A finished run.

    Attributes:
        folder: holds the model (safetensors) and the logs.
        curve: optimizer step to validation loss, nats a token.
        step_seconds: wall time of the timed optimizer steps.
        peak_gb: most memory the (first) GPU's allocator held, in GB (10^9 bytes); None on a CPU.
        facts: what a record says of the run: data, tokenizer, parameters, tokens, devices.
    """

    folder: Path
    curve: dict[int, float]
    step_seconds: list[float]
    peak_gb: float | None
    facts: dict[str, Any]

    @property
    def final_loss(self) -> float:
        return self.curve[max(self.curve)]

    @property
    def step_stats(self) -> dict[str, float] | None:
        """n, min, max and standard deviation of the timed steps, seconds."""
        s = self.step_seconds
        return {"n": len(s), "min": min(s), "max": max(s), "std": statistics.pstdev(s)} if s else None

    def load_model(self) -> GPT2LMHeadModel:
        """Return the trained model on the CPU, in evaluation mode, with the attention it was trained with."""
        attention = IMPLEMENTATIONS[self.facts["attention"]]
        if attention == ENTMAX:
            return load_entmax(GPT2LMHeadModel, self.folder / "model").eval()
        return GPT2LMHeadModel.from_pretrained(self.folder / "model", attn_implementation=attention).eval()


def trained(settings: TrainSettings, job: Job, context: Context, by_devices: bool = False) -> TrainedRun:
    """Return the finished run of a variant and seed, training it if it is not there yet.

    The key is a hash of everything that decides the outcome, so several tables and figures share one training. A
    run that was interrupted goes on from its last checkpoint. With ``by_devices`` a run on other devices does not
    serve, as where its time is what counts.

    Raises:
        UserError: the data or settings are wrong, or the workspace cannot be written.
    """
    assert job.seed is not None
    _quiet_libraries()
    variant = settings.variants[job.system]
    devices = context.devices
    _check_devices(settings, devices)
    if torch.cuda.is_available() and devices.world > 1:
        torch.cuda.set_device(local_rank())
    data = TextDataModule(settings, context.data_root, context.workspace / "data", job.seed, context.say, devices.world,
                          devices.strategy == "fsdp")  # fmt: skip
    data.prepare_data()
    caps = [settings.data.max_train_tokens, settings.data.max_valid_tokens]
    key = sha256_of({"train": asdict(settings.train) | {"seeds": None}, "model": asdict(settings.model),
                     "variant": asdict(variant), "seed": job.seed, "code": code_sha256(__package__),
                     "env": environment(), "caps": caps, **data.identity})  # fmt: skip
    runs, name = context.workspace / "language_modeling", f"{job.system}-seed{job.seed}-{key[:12]}"
    # A finished run serves whatever it was trained on; a checkpoint counts the micro-batches of one process.
    # The optimizer's state is numbered in another order where the model is sharded.
    several = f"-{devices.world}-devices" if devices.world > 1 else ""
    folder = runs / (name + several + ("-fsdp" if devices.strategy == "fsdp" else ""))
    others = () if by_devices else sorted(runs.glob(f"{glob.escape(name)}*"))
    for earlier in (folder, *others):
        if (finished := _load(earlier)) is not None:
            context.say(f"{job}: already trained for another table or figure")
            return finished
    try:
        folder.mkdir(parents=True, exist_ok=True)
        return _train(settings, variant, job, data, folder, context)
    except (OSError, SafetensorError) as error:  # the latter, no OSError, is a disk full while the model is written
        raise UserError(f"{folder}: training cannot be saved: {getattr(error, 'strerror', None) or error}") from error


def _check_devices(settings: TrainSettings, devices: Devices) -> None:
    """Raise ConfigError unless the devices can share the sequences of an optimizer step evenly, in this precision."""
    if devices.strategy == "fsdp" and settings.train.precision == "16-mixed":
        raise ConfigError("train.precision: got '16-mixed', allowed with --strategy fsdp are 32-true and bf16-mixed")
    at_once = settings.train.micro_batch_size * devices.world
    if settings.train.batch_size % at_once:
        raise ConfigError(f"train.batch_size: got {settings.train.batch_size}, allowed with {devices.world} devices is "
                          f"a multiple of micro_batch_size x devices ({at_once})")


def _train(settings: TrainSettings, variant: Variant, job: Job, data: TextDataModule, folder: Path,
           context: Context) -> TrainedRun:  # fmt: skip
    recipe, say, devices = settings.train, context.say, context.devices
    pl.seed_everything(job.seed, verbose=False)
    assert data.tokenizer is not None
    model = build_model(settings.model, variant, data.tokenizer.vocab_size)
    parameters = sum(p.numel() for p in model.parameters())
    step = f"{recipe.batch_size} x {settings.model.context} tokens"
    say(f"{job}: {parameters:,} parameters, {recipe.steps} steps of {step}")
    module = CausalLanguageModel(model, recipe)
    if recipe.compile:
        model.compile()  # not the module: Lightning calls its training_step, which that would leave as it is
    curve = LossCurve(say, str(job), recipe.steps)
    timer = StepTimer(recipe.timing_skip_steps, recipe.timing_steps)
    checkpoint = folder / "checkpoints" / "last.ckpt"
    eval_every = min(recipe.eval_every, recipe.steps)
    saver = StepCheckpoint(checkpoint, recipe.checkpoint_every, eval_every)
    callbacks: list[pl.Callback] = [curve, timer, saver]
    if variant.alpha_schedule is not None:
        callbacks.append(AlphaSchedule(**asdict(variant.alpha_schedule)))
    kept = settings.captures
    if kept is not None and (job.system, job.seed) == (kept.system, recipe.seeds[0]):
        callbacks.append(ScoreCapture(kept, context.workspace / kept.folder, say, str(job)))
    interactive = sys.stderr.isatty()
    if interactive:
        callbacks.append(RichProgressBar())
    accumulate = recipe.batch_size // (recipe.micro_batch_size * devices.world)
    trainer = pl.Trainer(
        max_steps=recipe.steps, max_epochs=1, accelerator="auto", devices=devices.count, num_nodes=devices.nodes,
        strategy=strategy_of(devices), use_distributed_sampler=False, precision=recipe.precision,
        accumulate_grad_batches=accumulate, gradient_clip_val=recipe.clip or None,
        val_check_interval=eval_every * accumulate, num_sanity_val_steps=0, callbacks=callbacks,
        logger=CSVLogger(folder, name="logs"), log_every_n_steps=max(1, recipe.eval_every // 5),
        enable_progress_bar=interactive, enable_model_summary=False, default_root_dir=folder,
        plugins=[WholeCheckpointIO()],
    )  # fmt: skip
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    _fit(trainer, module, data, _resume_from(checkpoint, job, say))
    if recipe.steps not in curve.points:  # eval_every does not divide the number of steps
        trainer.validate(module, datamodule=data, verbose=False)
        curve.points[recipe.steps] = float(trainer.callback_metrics["val_loss"])
    if is_sharded(trainer):
        state = whole_state(trainer, "model.")
        if trainer.is_global_zero:
            model = build_model(settings.model, variant, data.tokenizer.vocab_size)
            model.load_state_dict(state)
    if trainer.is_global_zero:
        model.save_pretrained(folder / "model")
    peak = torch.cuda.max_memory_allocated() / 1e9 if torch.cuda.is_available() else None
    facts = {"data": data.identity["data"], "data_sha256": data.identity["data_sha256"],
             "tokenizer": data.identity["tokenizer"], "tokenizer_sha256": data.identity["tokenizer_sha256"],
             "parameters": parameters,
             "train_tokens": recipe.steps * recipe.batch_size * settings.model.context,
             "valid_tokens": len(data.valid_blocks) * settings.model.context, "context": settings.model.context,
             "attention": variant.attention, "devices": devices.world}  # fmt: skip
    if is_sharded(trainer):
        facts["strategy"] = devices.strategy
    run = TrainedRun(folder, dict(curve.points), list(timer.seconds), peak, facts)
    if trainer.is_global_zero:
        _save(run)
        shutil.rmtree(folder / "checkpoints", ignore_errors=True)  # the model is saved; optimizer state is not needed
    trainer.strategy.barrier()  # the other processes may load the model now
    return run


def _resume_from(checkpoint: Path, job: Job, say: Callable[[str], None]) -> Path | None:
    if not checkpoint.exists():
        return None
    if not is_readable(checkpoint):
        say(f"{job}: the checkpoint {checkpoint} is damaged; training from the start")
        return None
    say(f"{job}: resuming from an earlier, interrupted run")
    return checkpoint


def _fit(trainer: pl.Trainer, module: pl.LightningModule, data: TextDataModule, checkpoint: Path | None) -> None:
    """Train. Lightning leaves the interpreter on Ctrl+C, and on SIGTERM with status 0; both are interruptions."""
    try:
        trainer.fit(module, datamodule=data, ckpt_path=checkpoint, weights_only=True)
    except SystemExit as stop:
        raise KeyboardInterrupt from stop


def _save(run: TrainedRun) -> None:
    content = {**asdict(run), "folder": None}
    partial = run.folder / "run.json.partial"
    partial.write_text(json.dumps(content, indent=1))
    os.replace(partial, run.folder / "run.json")  # its presence says that the run is complete


def _load(folder: Path) -> TrainedRun | None:
    try:
        content = json.loads((folder / "run.json").read_text())
        curve = {int(step): float(loss) for step, loss in content["curve"].items()}
        if not any((folder / "model").glob("*.safetensors")):  # anything in the workspace may be deleted
            return None
        return TrainedRun(**{**content, "folder": folder, "curve": curve})
    except FileNotFoundError:
        return None
    except (ValueError, TypeError, KeyError, AttributeError, OSError) as error:
        logging.getLogger(__name__).warning("%s: unreadable (%s); training again", folder / "run.json", error)
        return None


def _quiet_libraries() -> None:
    """Send the libraries' remarks to the log file: the screen is for progress."""
    transformers_logging.disable_default_handler()
    transformers_logging.enable_propagation()
    transformers_logging.disable_progress_bar()
    for name in ("pytorch_lightning", "lightning"):
        logger = logging.getLogger(name)
        logger.handlers.clear()
        logger.propagate = True
    # The data is a memory map and the loader has no work to spread; the advice to add workers does not apply.
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
