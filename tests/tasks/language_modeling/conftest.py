"""What the tests of language modelling share: a small text, tiny settings, and a module that can be watched."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from torch import Tensor

from adasplash_kernels.integrations.transformers import get_entmax_config
from tasks.config import from_plain
from tasks.data import bpe
from tasks.language_modeling import training
from tasks.language_modeling.module import CausalLanguageModel
from tasks.language_modeling.settings import NonzeroSettings, TrainSettings
from tasks.language_modeling.training import TrainedRun
from tasks.programs import Context, Job

# 20 windows to train on and batches of 4: training goes through them more than twice. 13 windows to validate on:
# the last micro-batch is not full.
TINY: dict[str, Any] = {
    "data": {"sources": ["local"], "local": "lm/tiny", "train_files": ["train.txt"], "valid_files": ["valid.txt"],
             "max_train_tokens": 20 * 16 + 1, "max_valid_tokens": 13 * 16 + 1},
    "tokenizer": {"sources": ["local"], "local": "tokenizers/tiny"},
    "model": {"n_layer": 1, "n_head": 2, "n_embd": 16, "context": 16},
    "variants": {"softmax": {"attention": "sdpa"}, "entmax": {"attention": "adasplash", "alpha": 1.5}},
    "train": {"steps": 11, "batch_size": 4, "micro_batch_size": 2, "lr": 1e-2, "betas": [0.9, 0.95],
              "weight_decay": 0.1, "clip": 1.0, "warmup_steps": 3, "final_lr": 0.0, "precision": "32-true",
              "eval_every": 2, "seeds": [0], "timing_skip_steps": 1, "timing_steps": 5, "checkpoint_every": 3},
}  # fmt: skip


class Killed(Exception):
    """Stands for whatever ends a process in the middle of a training."""


@dataclass(frozen=True)
class Seen:
    """What one micro-batch was: its tokens, and the optimizer step, learning rate and alpha it met."""

    step: int
    tokens: tuple[tuple[int, ...], ...]
    lr: float
    alpha: float | None


@pytest.fixture(scope="session")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data root with a text that can be learnt (few words, repeated) and a byte-level tokenizer."""
    root = tmp_path_factory.mktemp("texts")
    draw = random.Random(0)
    words = ["the", "river", "a", "stone", "slowly", "wears", "down", "under", "bright", "water", "and", "wind"]
    lines = [" ".join(draw.choices(words, k=8)) for _ in range(400)]
    tokenizer = root / "tokenizers" / "tiny" / "tokenizer.json"
    for path, text in ((tokenizer, bpe.train(lines, 300).to_str()),
                       (root / "lm/tiny/train.txt", "\n".join(lines[:300])),
                       (root / "lm/tiny/valid.txt", "\n".join(lines[300:]))):  # fmt: skip
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


@pytest.fixture(scope="session")
def plain() -> Callable[..., dict[str, Any]]:
    """Return the tiny settings as a config holds them, with whole keys or parts of a mapping replaced."""

    def make(**changes: Any) -> dict[str, Any]:
        values = copy.deepcopy(TINY)
        for key, change in changes.items():
            merge = isinstance(change, dict) and key in values and key != "variants"
            values[key] = values[key] | change if merge else change
        return values

    return make


@pytest.fixture(scope="session")
def settings(plain: Callable[..., dict[str, Any]]) -> Callable[..., TrainSettings]:
    """As ``plain``, made into the dataclass that the programs take."""

    def make(**changes: Any) -> TrainSettings:
        return from_plain(NonzeroSettings if "probe" in changes else TrainSettings, plain(**changes), "test.yaml")

    return make


@pytest.fixture
def said() -> list[str]:
    """The lines of progress so far."""
    return []


@pytest.fixture
def make_context(tmp_path: Path, texts: Path, said: list[str]) -> Callable[[str], Context]:
    """Return a context with a workspace of its own by name."""
    return lambda name: Context(tmp_path / name, texts, said.append)


@pytest.fixture
def context(make_context: Callable[[str], Context]) -> Context:
    return make_context("work")


@pytest.fixture
def train(context: Context) -> Callable[..., TrainedRun]:
    """Return a function that trains a system of settings."""

    def run(settings: TrainSettings, system: str = "softmax", seed: int = 0, where: Context = context) -> TrainedRun:
        return training.trained(settings, Job(system, seed), where)

    return run


@pytest.fixture
def watch(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[Seen]]:
    """Return a function that has later trainings watched, and killed in a micro-batch of step ``step``, counted from
    0, or in the validation after so many steps."""

    def start(step: int | None = None, micro: int | Literal["validation"] = 0) -> list[Seen]:
        seen: list[Seen] = []

        class Watched(CausalLanguageModel):
            def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
                accumulate = self.trainer.accumulate_grad_batches
                if (self.global_step, batch_idx % accumulate) == (step, micro):
                    raise Killed
                entmax = self.model.config._attn_implementation == "adasplash"
                seen.append(Seen(self.global_step, tuple(map(tuple, batch.tolist())),
                                 self.trainer.optimizers[0].param_groups[0]["lr"],
                                 get_entmax_config(self).alpha if entmax else None))  # fmt: skip
                return super().training_step(batch, batch_idx)

            def validation_step(self, batch: Tensor, batch_idx: int) -> None:
                if (self.global_step, "validation") == (step, micro) and batch_idx:
                    raise Killed
                super().validation_step(batch, batch_idx)

        monkeypatch.setattr(training, "CausalLanguageModel", Watched)
        return seen

    return start


@pytest.fixture
def killed() -> Callable[[], Any]:
    """Return what expects the end that ``watch`` brings about."""
    return lambda: pytest.raises(Killed)


@pytest.fixture
def assert_same_run() -> Callable[[TrainedRun, TrainedRun], None]:
    """Return a check that two runs have bitwise the same weights, the same settings of attention and the same curve."""

    def check(one: TrainedRun, other: TrainedRun) -> None:
        assert one.curve == other.curve
        first, second = one.load_model(), other.load_model()
        where = {"_name_or_path": None}
        assert first.config.to_dict() | where == second.config.to_dict() | where
        a, b = first.state_dict(), second.state_dict()
        assert list(a) == list(b)
        assert [name for name in a if not torch.equal(a[name], b[name])] == []

    return check
