"""Tokens for language modelling: one pass order for every variant, resumable at any step."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Sampler

from tasks.data.sources import load_text
from tasks.data.tokenizer import Tokenizer, load_tokenizer
from tasks.data.tokens import TokenBlocks, tokenize_split
from tasks.language_modeling.settings import TrainSettings

# The held-out text is large enough in batches for any model that trains in such batches.
_WORKERS = 0  # windows are slices of a memory map; worker processes would only add start-up time


class TrainingOrder(Sampler[int]):
    """Window indices for a whole training run: pass after pass, each shuffled by its own seed.

    ``consumed`` windows are left out at the front, while the length stays that of the whole run: Lightning counts
    resumed batches as fetched already.
    """

    def __init__(self, windows: int, total: int, seed: int, consumed: int = 0) -> None:
        self.windows, self.total, self.seed, self.consumed = windows, total, seed, consumed

    def __len__(self) -> int:
        return self.total

    def __iter__(self) -> Iterator[int]:
        position = self.consumed
        while position < self.total:
            number, offset = divmod(position, self.windows)
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + number)
            order = torch.randperm(self.windows, generator=generator)[offset:][: self.total - position]
            yield from order.tolist()
            position += len(order)


class TextDataModule(pl.LightningDataModule):
    """Tokenises once (see tasks/data/tokens.py) and serves windows of ``context + 1`` tokens, (B, context + 1) int64.

    Args:
        settings: which text, which tokenizer, how many windows a step.
        data_root: the local data folder, if any.
        cache_dir: where tokenised text is kept.
        seed: of the training order; variants trained with one seed see the same windows in the same order.
        say: prints one line of progress.

    Raises:
        DataError: on :meth:`prepare_data` or :meth:`setup`, naming the config key.
    """

    def __init__(self, settings: TrainSettings, data_root: Path | None, cache_dir: Path, seed: int,
                 say: Callable[[str], None] = lambda line: None) -> None:  # fmt: skip
        super().__init__()
        self.settings, self.data_root, self.cache_dir, self.seed, self.say = settings, data_root, cache_dir, seed, say
        self._consumed = 0
        self.tokenizer: Tokenizer | None = None

    def prepare_data(self) -> None:
        self._open(announce=True)

    def setup(self, stage: str | None = None) -> None:
        self._open(announce=False)

    def _open(self, announce: bool) -> None:
        if self.tokenizer is not None:
            return
        data = self.settings.data
        corpus = load_text(data, self.data_root)
        tokenizer = load_tokenizer(self.settings.tokenizer, self.data_root, self.cache_dir)
        blocks = {}
        for split, cap in (("train", data.max_train_tokens), ("valid", data.max_valid_tokens)):
            file = tokenize_split(corpus, split, tokenizer, self.cache_dir, max_tokens=cap)
            blocks[split] = TokenBlocks(file, self.settings.model.context, tokenizer.vocab_size)
        self.train_blocks, self.valid_blocks = blocks["train"], blocks["valid"]
        self.tokenizer = tokenizer
        self.identity = {"data": corpus.source, "data_sha256": corpus.fingerprint,
                         "tokenizer": tokenizer.source, "tokenizer_sha256": tokenizer.fingerprint}  # fmt: skip
        if announce:
            self.say(f"text {corpus.source}, tokenizer {tokenizer.source}: {self.train_blocks.file.tokens:,} training "
                     f"and {self.valid_blocks.file.tokens:,} validation tokens")  # fmt: skip

    def train_dataloader(self) -> DataLoader[Tensor]:
        train = self.settings.train
        order = TrainingOrder(len(self.train_blocks), train.steps * train.batch_size, self.seed, self._consumed)
        return DataLoader(self.train_blocks, train.micro_batch_size, sampler=order, drop_last=True,
                          num_workers=_WORKERS, pin_memory=torch.cuda.is_available())  # fmt: skip

    def val_dataloader(self) -> DataLoader[Tensor]:
        return DataLoader(self.valid_blocks, self.settings.train.micro_batch_size, num_workers=_WORKERS)

    def state_dict(self) -> dict[str, Any]:
        assert self.trainer is not None
        return {"consumed": self.trainer.global_step * self.settings.train.batch_size}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._consumed = int(state["consumed"])
