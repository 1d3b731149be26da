"""How fast a model is trained on the devices at hand: the program that trains it, for a few steps, with its times kept.

Everything a long training has is there: Lightning, the data on disk, mixed precision, accumulation, compilation,
gradients shared between devices, validation and checkpoints. The last two fall between the timed steps.
"""

from __future__ import annotations

import statistics

import torch

from tasks.distributed import local_rank
from tasks.language_modeling.settings import TrainSettings
from tasks.language_modeling.step_cost import flops_per_token
from tasks.language_modeling.training import trained
from tasks.matmul_rate import matmul_rate
from tasks.programs import Context, Job
from tasks.records import Measurement


def measure(job: Job, settings: TrainSettings, context: Context) -> list[Measurement]:
    """Train a variant and return its times.

    Tokens a second are those of all devices together. ``mfu`` holds the operations of the model on one device against
    the rate of a large bf16 matrix product there, measured before the training in the same process.
    """
    if torch.cuda.is_available():
        torch.cuda.set_device(local_rank())
    rate = matmul_rate(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    run = trained(settings, job, context, by_devices=True)
    devices, recipe = context.devices, settings.train
    shared = devices.strategy if devices.strategy == "fsdp" else "ddp"
    params = run.facts | {"strategy": shared if devices.world > 1 else "one device", "nodes": devices.nodes,
                          "batch_size": recipe.batch_size, "micro_batch_size": recipe.micro_batch_size,
                          "precision": recipe.precision, "compile": recipe.compile}  # fmt: skip

    def metric(name: str, value: float | None, unit: str, stats: dict[str, float] | None = None) -> Measurement:
        return Measurement(name, value, unit, params, stats, "ok" if value is not None else "not_applicable")

    step = statistics.median(run.step_seconds) if run.step_seconds else None  # none: resumed past the timed steps
    speed = recipe.batch_size * settings.model.context / step if step else None
    flops = flops_per_token(run.facts["parameters"], settings.model)
    return [
        metric("step_s", step, "s", run.step_stats),
        metric("tokens_per_s", speed, "tokens/s"),
        metric("mfu", speed and 100 * speed * flops / devices.world / rate, "%"),
        metric("peak_gb", run.peak_gb, "GB"),
        metric("matmul_tflops", rate / 1e12, "TFLOP/s"),
        metric("val_loss", run.final_loss, "nats/token"),
    ]
