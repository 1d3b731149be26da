"""A small trained model kept beside the records, for notebooks: half precision, safetensors, its tokenizer named."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import torch
from transformers import GPT2LMHeadModel

from adasplash_kernels.integrations.transformers import IMPLEMENTATION as ENTMAX
from adasplash_kernels.integrations.transformers import load_entmax
from tasks.data.tokenizer import load_tokenizer
from tasks.errors import UserError
from tasks.language_modeling.attentions import IMPLEMENTATIONS
from tasks.language_modeling.settings import TrainSettings
from tasks.language_modeling.training import TrainedRun
from tasks.programs import Context, Job

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}
FACTS = ("attention", "tokenizer", "tokenizer_sha256", "data", "train_tokens")


def export(run: TrainedRun, settings: TrainSettings, job: Job, context: Context) -> Path | None:
    """Write the model of the first seed to ``context.models / <system>`` where ``export`` says so and it is small.

    The folder holds config.json, whose ``trained`` says what attention, tokenizer and text the model had, and
    model.safetensors. A tokenizer made of embedded text comes along, as that text differs between Python versions.

    Returns:
        The folder, or None; what was not exported, and why, is told on the screen.

    Raises:
        UserError: the folder cannot be written.
    """
    if settings.export is None or context.models is None or job.seed != settings.train.seeds[0]:
        return None
    model = run.load_model().to(DTYPES[settings.export.dtype])
    size = sum(p.numel() * p.element_size() for p in model.parameters()) / 1e6
    if size > settings.export.max_mb:
        context.say(f"{job}: not exported: {size:.1f} MB in {settings.export.dtype}, export.max_mb is "
                    f"{settings.export.max_mb:g}")  # fmt: skip
        return None
    model.config.trained = {name: run.facts[name] for name in FACTS if name in run.facts} | {"seed": job.seed}
    model.config._name_or_path = ""  # else the folder of the workspace
    folder = context.models / job.system
    partial = folder.with_name(f".{folder.name}.partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        model.save_pretrained(partial)
        if str(run.facts["tokenizer"]).startswith("embedded:"):
            tokenizer = load_tokenizer(settings.tokenizer, context.data_root, context.workspace / "data")
            tokenizer.backend.save_pretrained(partial)
        for path in partial.iterdir():
            path.chmod(0o644)  # safetensors are written for their owner alone
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(partial, folder)
    except OSError as error:
        raise UserError(f"{folder}: the model cannot be exported: {error.strerror or error}") from error
    context.say(f"{job}: model exported, {size:.1f} MB in {settings.export.dtype}")
    return folder


def load_exported(folder: str | Path) -> GPT2LMHeadModel:
    """Return an exported model in float32, in evaluation mode, with the attention it was trained with.

    ``model.config.trained["tokenizer"]`` names its tokenizer, for example ``local:tokenizers/gpt2``.

    Raises:
        UserError: the folder holds no exported model.
    """
    try:
        attention = json.loads((Path(folder) / "config.json").read_text())["trained"]["attention"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{folder}: holds no exported model: {type(error).__name__}: {error}") from error
    if IMPLEMENTATIONS.get(attention) == ENTMAX:
        return load_entmax(GPT2LMHeadModel, folder, dtype=torch.float32).eval()
    implementation = IMPLEMENTATIONS.get(attention, attention)
    return GPT2LMHeadModel.from_pretrained(folder, attn_implementation=implementation, dtype=torch.float32).eval()
