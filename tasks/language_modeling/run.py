"""The language-modelling programs: config and scale in, measurements out.

Lightning and transformers are imported by the jobs that need them: ``python -m tasks list`` reads this module too.
"""

from __future__ import annotations

import importlib.util
import statistics
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from tasks.data.sources import resolve
from tasks.language_modeling.settings import CostSettings, NonzeroSettings, ThroughputSettings, TrainSettings
from tasks.language_modeling.sources import evaluation_sources
from tasks.programs import Context, Job, Program
from tasks.records import Measurement

if TYPE_CHECKING:
    from tasks.language_modeling.training import TrainedRun

# Training a model in 6 x parameters x tokens operations; a CPU core does a few 10^10 a second.
_MOST_CPU_OPERATIONS = 1e15


def _jobs(settings: TrainSettings) -> list[Job]:
    return [Job(system, seed) for seed in settings.train.seeds for system in settings.variants]


def _entmax_jobs(settings: NonzeroSettings) -> list[Job]:
    return [job for job in _jobs(settings) if settings.variants[job.system].attention == "adasplash"]


def _measured_jobs(settings: CostSettings | ThroughputSettings) -> list[Job]:
    return [Job(system, seed) for seed in settings.train.seeds for system in settings.measure]


def _identity(settings: TrainSettings, data_root: Path | None) -> dict[str, Any]:
    found: dict[str, Any] = {"data": resolve(settings.data, data_root, ask_hub=False)}
    if settings.evaluation is not None:
        found["evaluation"] = evaluation_sources(settings, data_root, ask_hub=False)
    return found


def _obstacle(settings: TrainSettings, data_root: Path | None) -> str | None:
    resolve(settings.data, data_root)  # raises where no source of text can serve
    evaluation_sources(settings, data_root, ask_hub=True)
    jobs = _measured_jobs(settings) if isinstance(settings, ThroughputSettings) else _jobs(settings)
    steps = settings.train.steps * len(jobs)
    return _too_much(settings, steps, settings.tokenizer.vocab_size)


def _cost_obstacle(settings: CostSettings, data_root: Path | None) -> str | None:
    if importlib.util.find_spec("transformers") is None:
        return "needs the package transformers (extra: experiments)"
    steps = (settings.timing.skip_steps + settings.timing.steps) * len(_measured_jobs(settings))
    return _too_much(settings, steps, settings.vocab_size)


def _too_much(settings: TrainSettings, steps: int, vocab_size: int) -> str | None:
    """Tell why a machine without a GPU cannot take so many optimizer steps, or None."""
    if torch.cuda.is_available():
        return None
    size, train = settings.model, settings.train
    parameters = 12 * size.n_layer * size.n_embd**2 + vocab_size * size.n_embd
    operations = 6 * parameters * steps * train.batch_size * size.context
    if operations > _MOST_CPU_OPERATIONS:
        return f"needs a GPU: about {operations:.0e} operations of training"
    if train.precision == "16-mixed":
        return "needs a GPU: train.precision 16-mixed"
    return None


def _trained(job: Job, settings: TrainSettings, context: Context) -> TrainedRun:
    from tasks.language_modeling.training import trained

    return trained(settings, job, context)


def train(job: Job, settings: TrainSettings, context: Context) -> list[Measurement]:
    """Final validation loss, time of an optimizer step (median) and peak memory (AdaSplash, table 4).

    Then HellaSwag and LAMBADA where ``evaluation`` names them, and the alphas that were learnt.
    """
    from tasks.language_modeling.evaluation import score_benchmarks
    from tasks.language_modeling.export import export

    run = _trained(job, settings, context)
    export(run, settings, job, context)
    memory = {"status": "ok"} if run.peak_gb is not None else {"status": "not_applicable"}
    return [
        Measurement("val_loss", run.final_loss, "nats/token", run.facts),
        _step_time(run),
        Measurement("peak_gb", run.peak_gb, "GB", run.facts, **memory),
        *score_benchmarks(run.load_model(), settings, run.facts, context),
        *(_alphas(run) if settings.variants[job.system].learn_alpha else ()),
    ]


def _alphas(run: TrainedRun) -> list[Measurement]:
    from adasplash_kernels.integrations.transformers import learned_alphas

    return [Measurement("alpha", value, "", {"layer": layer, "head": head, **run.facts})
            for layer, alphas in sorted(learned_alphas(run.load_model()).items())
            for head, value in enumerate(alphas.tolist())]  # fmt: skip


def _step_time(run: TrainedRun) -> Measurement:
    if not run.step_seconds:  # a run resumed past the timed steps
        return Measurement("step_s", None, "s", run.facts, status="not_applicable")
    return Measurement("step_s", statistics.median(run.step_seconds), "s", run.facts, run.step_stats)


def loss_curve(job: Job, settings: TrainSettings, context: Context) -> list[Measurement]:
    """Validation loss by optimizer step (AdaSplash, figure 6)."""
    run = _trained(job, settings, context)
    return [Measurement("val_loss", loss, "nats/token", {"step": step, **run.facts})
            for step, loss in sorted(run.curve.items())]  # fmt: skip


def text_loss(job: Job, settings: TrainSettings, context: Context) -> list[Measurement]:
    """Loss on texts other than the one trained and validated on."""
    from tasks.language_modeling.evaluation import text_losses

    run = _trained(job, settings, context)
    return text_losses(run.load_model(), settings, run.facts, context)


def nonzero_ratio(job: Job, settings: NonzeroSettings, context: Context) -> list[Measurement]:
    """Share of attention weights above zero, by layer and head, on one held-out input (AdaSplash, figure 4)."""
    from tasks.language_modeling.data import TextDataModule
    from tasks.models.support import nonzero_ratios

    run = _trained(job, settings, context)
    data = TextDataModule(settings, context.data_root, context.workspace / "data", job.seed or 0)
    data.setup()
    window = data.valid_blocks[0][: settings.probe.tokens][None]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    ratios = nonzero_ratios(run.load_model().to(device), window.to(device))
    return [
        Measurement("nonzero_ratio", float(value), "ratio",
                    {"layer": layer, "head": head, "tokens": settings.probe.tokens, **run.facts})
        for layer, heads in sorted(ratios.items())
        for head, value in enumerate(heads.tolist())
    ]  # fmt: skip


def step_cost(job: Job, settings: CostSettings, context: Context) -> list[Measurement]:
    """Time and memory of an optimizer step on random tokens, and what it is to be seen beside (AdaSplash, table 4)."""
    from tasks.language_modeling.step_cost import measure, measurements

    assert job.seed is not None
    found = []
    for own in settings.by_context():
        cost = measure(job.system, job.seed, own, context.say)
        context.say(f"{job}, n = {own.model.context}: " + (
            f"{statistics.median(cost.step_seconds):.3f} s a step" if cost.status == "ok"
            else f"{cost.status}: {cost.reason}"))  # fmt: skip
        found += measurements(job.system, own, cost)
    return found


def throughput(job: Job, settings: TrainSettings, context: Context) -> list[Measurement]:
    """Tokens a second and memory of training on the devices at hand, through what trains Table 4's models."""
    from tasks.language_modeling.throughput import measure

    return measure(job, settings, context)


PROGRAMS = {
    "train": Program(TrainSettings, _jobs, train, _identity, _obstacle, distributed=True, seeds_apart=True),
    "loss_curve": Program(TrainSettings, _jobs, loss_curve, _identity, _obstacle, distributed=True, uses_base=True),
    "text_loss": Program(TrainSettings, _jobs, text_loss, _identity, _obstacle, distributed=True, uses_base=True),
    "nonzero_ratio": Program(NonzeroSettings, _entmax_jobs, nonzero_ratio, _identity, _obstacle, distributed=True,
                             uses_base=True),
    "throughput": Program(ThroughputSettings, _measured_jobs, throughput, _identity, _obstacle, distributed=True,
                          by_devices=True),
    "step_cost": Program(CostSettings, _measured_jobs, step_cost, obstacle=_cost_obstacle),
}
