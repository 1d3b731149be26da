"""What a trained model is scored on besides its own held-out text: other texts, HellaSwag and LAMBADA."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader
from transformers import GPT2LMHeadModel

from tasks.data.items import load_hellaswag, load_lambada
from tasks.data.sources import load_text
from tasks.data.tokenizer import Tokenizer, load_tokenizer
from tasks.data.tokens import TokenBlocks, tokenize_split
from tasks.errors import DataError
from tasks.language_modeling.module import CausalLanguageModel
from tasks.language_modeling.settings import Evaluation, EvaluationText, TrainSettings
from tasks.language_modeling.sources import evaluation_sources
from tasks.models.zero_shot import choose_endings, guess_last_words
from tasks.programs import Context
from tasks.records import Measurement

_AUTOCAST = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}


def score_benchmarks(model: GPT2LMHeadModel, settings: TrainSettings, facts: dict[str, Any],
                     context: Context) -> list[Measurement]:  # fmt: skip
    """Score a trained model on HellaSwag and LAMBADA where ``evaluation`` names them, at the precision of training.

    A metric whose data no source offers on this machine is recorded as not applicable.

    Args:
        model: in evaluation mode; moved to the GPU where there is one.
        settings: of the experiment.
        facts: parameters that every measurement carries.
        context: where data and caches are.

    Raises:
        DataError: beginning with the config key: data is there but wrong.
    """
    plan = settings.evaluation
    serving = evaluation_sources(settings, context.data_root, ask_hub=False)
    found: list[Measurement] = []
    for name, (metrics, score) in _BENCHMARKS.items():
        if plan is None or getattr(plan, name) is None:
            continue
        if serving[name] is None:
            found += [_missing(metric, unit, facts) for metric, unit in metrics]
            continue
        tokenizer = _prepare(model, settings, context)
        with _keyed(f"evaluation.{name}"), _precision(settings.train.precision, model.device.type):
            found += score(model, tokenizer, plan, facts, context.data_root)
    return found


def text_losses(model: GPT2LMHeadModel, settings: TrainSettings, facts: dict[str, Any],
                context: Context) -> list[Measurement]:  # fmt: skip
    """Measure the loss on each of ``evaluation.texts``; arguments and errors as :func:`score_benchmarks`."""
    plan = settings.evaluation
    serving = evaluation_sources(settings, context.data_root, ask_hub=False)
    found: list[Measurement] = []
    for name, spec in (plan.texts if plan else {}).items():
        about = facts | {"text": name}
        if serving[f"texts.{name}"] is None:
            found.append(_missing("text_loss", "nats/token", about))
            continue
        tokenizer = _prepare(model, settings, context)
        with _keyed(f"evaluation.texts.{name}"), _precision(settings.train.precision, model.device.type):
            found.append(_text(model, tokenizer, settings, spec, about, context))
    return found


def _prepare(model: GPT2LMHeadModel, settings: TrainSettings, context: Context) -> Tokenizer:
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    return load_tokenizer(settings.tokenizer, context.data_root, context.workspace / "data")


@contextmanager
def _keyed(key: str) -> Iterator[None]:
    try:
        yield
    except DataError as error:
        raise DataError(f"{key}: {error}") from error


def _missing(metric: str, unit: str, about: dict[str, Any]) -> Measurement:
    reason = "no source of its data serves on this machine"
    return Measurement(metric, None, unit, about | {"reason": reason}, status="not_applicable")


def _precision(name: str, device: str) -> AbstractContextManager[Any]:
    return torch.autocast(device, _AUTOCAST[name]) if name in _AUTOCAST else nullcontext()


def _text(model: GPT2LMHeadModel, tokenizer: Tokenizer, settings: TrainSettings, spec: EvaluationText,
          about: dict[str, Any], context: Context) -> Measurement:  # fmt: skip
    corpus = load_text(spec, context.data_root)
    file = tokenize_split(corpus, spec.split, tokenizer, context.workspace / "data", max_tokens=spec.max_tokens)
    blocks = TokenBlocks(file, settings.model.context, tokenizer.vocab_size)
    loss = text_loss(model, settings, blocks)
    params = about | {"text_data": corpus.source, "text_sha256": corpus.fingerprint,
                      "tokens": len(blocks) * settings.model.context}  # fmt: skip
    return Measurement("text_loss", loss, "nats/token", params)


@torch.no_grad()
def text_loss(model: GPT2LMHeadModel, settings: TrainSettings, blocks: TokenBlocks) -> float:
    """Mean cross-entropy, nats a token, over all windows of a text: as the validation loss of training is taken."""
    module = CausalLanguageModel(model, settings.train)
    sums = [module.loss(window.to(model.device)).item() * len(window)
            for window in DataLoader(blocks, settings.train.micro_batch_size)]  # fmt: skip
    return math.fsum(sums) / len(blocks)


def _hellaswag(model: GPT2LMHeadModel, tokenizer: Tokenizer, plan: Evaluation, facts: dict[str, Any],
               data_root: Path | None) -> Iterator[Measurement]:  # fmt: skip
    assert plan.hellaswag is not None
    data = load_hellaswag(plan.hellaswag, data_root)
    score = choose_endings(model, tokenizer, data.items, plan.batch_tokens)
    params = facts | {"items": score.items, "items_data": data.source, "items_sha256": data.fingerprint}
    stats = {"n": score.items, "std_error": 100 * _standard_error(score.accuracy_norm, score.items),
             "unnormalised": 100 * score.accuracy}  # fmt: skip
    yield Measurement("hellaswag_acc", 100 * score.accuracy_norm, "%", params, stats)


def _lambada(model: GPT2LMHeadModel, tokenizer: Tokenizer, plan: Evaluation, facts: dict[str, Any],
             data_root: Path | None) -> Iterator[Measurement]:  # fmt: skip
    assert plan.lambada is not None
    data = load_lambada(plan.lambada, data_root)
    score = guess_last_words(model, tokenizer, data.items, plan.batch_tokens)
    params = facts | {"items": score.items, "items_data": data.source, "items_sha256": data.fingerprint}
    stats = {"n": score.items, "std_error": 100 * _standard_error(score.accuracy, score.items)}
    yield Measurement("lambada_acc", 100 * score.accuracy, "%", params, stats)
    yield Measurement("lambada_ppl", score.perplexity, "", params)


def _standard_error(share: float, items: int) -> float:
    return math.sqrt(share * (1 - share) / max(1, items - 1))


_BENCHMARKS = {
    "hellaswag": ([("hellaswag_acc", "%")], _hellaswag),
    "lambada": ([("lambada_acc", "%"), ("lambada_ppl", "")], _lambada),
}
