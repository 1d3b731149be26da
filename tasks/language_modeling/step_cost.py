"""What an optimizer step costs, without data: a plain loop over random tokens, from random weights.

Attention's cost depends on its scores. Those of random weights differ little, so entmax keeps most of its weights;
how many is measured too, for a trained model may be sparser and thereby faster.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from tasks.language_modeling.attentions import BackendUnavailable
from tasks.language_modeling.gpt2 import adamw, build_model, learning_rate_factor, next_token_loss
from tasks.language_modeling.settings import ENTMAX, CostSettings, Model
from tasks.matmul_rate import matmul_rate, wait
from tasks.records import Measurement

_FEWEST_STEPS = 2
_PROBED = 8  # sequences whose attention is inspected


@dataclass
class Cost:
    """What was seen of one system.

    Attributes:
        step_seconds: of each timed optimizer step, from its first micro-batch to the update's end.
        peak_gb: most memory that tensors held during all steps, GB (10^9 bytes); None on a CPU.
        nonzero_ratio: nonzero attention weights over those the causal mask allows, mean over layers and heads, after
            the last step; None for softmax.
        parameters: of the model, tied ones once.
        matmul_flops: operations a second of a large bf16 matrix product on this device.
        status, reason: why there is no time, as records have it.
    """

    step_seconds: list[float] = field(default_factory=list)
    peak_gb: float | None = None
    nonzero_ratio: float | None = None
    parameters: int = 0
    matmul_flops: float = 0.0
    status: str = "ok"
    reason: str = ""


def measure(name: str, seed: int, settings: CostSettings, say: Callable[[str], None]) -> Cost:
    """Time a system's steps. Running out of memory, and a backend that is not there, are in the result."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    _free(device)  # what a system before this one left
    cost = Cost(matmul_flops=matmul_rate(device))
    _free(device)
    try:
        _run(cost, name, seed, settings, device, say)
    except torch.OutOfMemoryError as error:
        cost.status, cost.reason = "oom", f"out of memory: {str(error).split('. ')[0]}"
    except BackendUnavailable as error:
        cost.status, cost.reason = "not_applicable", str(error)
    return cost


def _run(cost: Cost, name: str, seed: int, settings: CostSettings, device: torch.device,
         say: Callable[[str], None]) -> None:  # fmt: skip
    recipe, timing, variant = settings.train, settings.timing, settings.variants[name]
    torch.manual_seed(seed)
    model = build_model(settings.model, variant, settings.vocab_size).to(device)
    _spread_scores(model, settings.query_scale)
    cost.parameters = sum(p.numel() for p in model.parameters())
    if recipe.compile:
        model.compile()
    optimizer = adamw(model, recipe, fused=device.type == "cuda")
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: learning_rate_factor(step, recipe))
    generator = torch.Generator(device).manual_seed(seed)

    def micro_batch(sequences: int) -> Tensor:
        shape = (sequences, settings.model.context + 1)
        return torch.randint(settings.vocab_size, shape, generator=generator, device=device)

    def step() -> float:
        wait(device)
        started = time.perf_counter()
        accumulate = recipe.batch_size // recipe.micro_batch_size
        for _ in range(accumulate):
            with _autocast(recipe.precision, device):
                loss = next_token_loss(model, micro_batch(recipe.micro_batch_size), recipe.compile)
            (loss / accumulate).backward()
        if recipe.clip:
            torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.clip)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        wait(device)
        return time.perf_counter() - started

    for _ in range(timing.skip_steps):
        step()
    for _ in range(timing.steps):
        cost.step_seconds.append(step())
        if len(cost.step_seconds) >= _FEWEST_STEPS and sum(cost.step_seconds) >= timing.max_seconds:
            say(f"{name}: {len(cost.step_seconds)} of {timing.steps} steps within {timing.max_seconds:g} s")
            break
    if device.type == "cuda":
        cost.peak_gb = torch.cuda.max_memory_allocated() / 1e9
    if variant.attention in ENTMAX:
        del optimizer, schedule
        cost.nonzero_ratio = _nonzero(model, variant.alpha, micro_batch(_PROBED)[:, :-1], recipe.precision)


@torch.no_grad()
def _spread_scores(model: Any, factor: float) -> None:
    """Multiply the queries of a GPT-2 by a factor, in place."""
    width = model.config.n_embd
    for block in model.transformer.h:
        block.attn.c_attn.weight[:, :width] *= factor  # of queries, keys and values, by columns
        block.attn.c_attn.bias[:width] *= factor


def _nonzero(model: Any, alpha: float, tokens: Tensor, precision: str) -> float:
    from adasplash_kernels.integrations.transformers import EntmaxAttentionConfig, get_entmax_config, use_entmax
    from tasks.models.support import nonzero_ratios

    if model.config._attn_implementation != "adasplash":  # the bisection: its weights, in attention that can be watched
        use_entmax(model, EntmaxAttentionConfig(alpha=alpha))
    get_entmax_config(model).method = "auto"
    with _autocast(precision, tokens.device):
        ratios = nonzero_ratios(model, tokens)
    return float(torch.stack(list(ratios.values())).mean())


def flops_per_token(parameters: int, size: Model) -> float:
    """Operations of training on a token: 6 N + 12 L h d T (Chowdhery et al. 2022, appendix B).

    N counts all parameters, tied ones once; L layers of h heads of dimension d attend to T tokens, all of them, be it
    that a causal mask hides half and entmax drops more: systems are compared by the same count.
    """
    return 6 * parameters + 12 * size.n_layer * size.n_embd * size.context


def measurements(name: str, settings: CostSettings, cost: Cost) -> list[Measurement]:
    """Return what the records hold of one system; all metrics, with the reason, where it did not run."""
    recipe, variant = settings.train, settings.variants[name]
    params = {"attention": variant.attention, "method": variant.method if variant.attention == "adasplash" else None,
              "alpha": variant.alpha if variant.attention in ENTMAX else None, "n": settings.model.context,
              "batch_size": recipe.batch_size, "micro_batch_size": recipe.micro_batch_size,
              "precision": recipe.precision, "compile": recipe.compile, "parameters": cost.parameters,
              "weights": "random", "query_scale": settings.query_scale, "data": "random"}  # fmt: skip

    def metric(name: str, value: float | None, unit: str, stats: dict[str, float] | None = None) -> Measurement:
        if cost.status != "ok":
            return Measurement(name, None, unit, params | {"reason": cost.reason}, status=cost.status)
        return Measurement(name, value, unit, params, stats, "ok" if value is not None else "not_applicable")

    rate = metric("matmul_tflops", cost.matmul_flops / 1e12, "TFLOP/s") if cost.status == "ok" else \
        Measurement("matmul_tflops", cost.matmul_flops / 1e12, "TFLOP/s", params)
    seconds = cost.step_seconds if cost.status == "ok" else []
    step = statistics.median(seconds) if seconds else None
    stats = {"n": len(seconds), "min": min(seconds), "max": max(seconds),
             "std": statistics.pstdev(seconds)} if seconds else None  # fmt: skip
    speed = recipe.batch_size * settings.model.context / step if step else None
    used = speed * flops_per_token(cost.parameters, settings.model) / cost.matmul_flops if speed else None
    return [
        metric("step_s", step, "s", stats),
        metric("peak_gb", cost.peak_gb, "GB"),
        metric("tokens_per_s", speed, "tokens/s"),
        metric("mfu", used and 100 * used, "%"),
        metric("nonzero_ratio", cost.nonzero_ratio, "ratio"),
        rate,
    ]


def _autocast(precision: str, device: torch.device) -> AbstractContextManager:
    return torch.autocast(device.type, torch.bfloat16) if precision == "bf16-mixed" else nullcontext()


def _free(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
