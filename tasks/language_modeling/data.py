"""Tokens for language modelling: one pass order for every variant, resumable at any step."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Sampler

from tasks.data.sources import load_text
from tasks.data.tokenizer import Tokenizer, load_tokenizer
from tasks.data.tokens import Progress, TokenBlocks, tokenize_split, wait_for_split
from tasks.distributed import rank
from tasks.errors import DataError
from tasks.language_modeling.settings import TrainSettings

# The held-out text is large enough in batches for any model that trains in such batches.
_WORKERS = 0  # windows are slices of a memory map; worker processes would only add start-up time
_PROGRESS_SECONDS = 30.0


class TrainingOrder(Sampler[int]):
    """Window indices for a whole training run: pass after pass, each shuffled by its own seed.

    With several processes each takes every ``world``-th micro-batch of this one order, so that the windows of an
    optimizer step are the same however many there are.

    Args:
        windows: in a pass.
        total: windows of the whole run, over all processes.
        seed: of the order.
        consumed: windows left out at the front, over all processes, while the length stays that of the whole run:
            Lightning counts resumed batches as fetched already.
        micro_batch: windows that a process takes at once.
        rank, world: which process of how many this is. ``total`` and ``consumed`` are multiples of
            ``micro_batch * world``.
    """

    def __init__(self, windows: int, total: int, seed: int, consumed: int = 0, micro_batch: int = 1, rank: int = 0,
                 world: int = 1) -> None:  # fmt: skip
        self.windows, self.total, self.seed, self.consumed = windows, total, seed, consumed
        self.micro_batch, self.rank, self.world = micro_batch, rank, world

    def __len__(self) -> int:
        return self.total // self.world

    def __iter__(self) -> Iterator[int]:
        position = self.consumed
        while position < self.total:
            number, offset = divmod(position, self.windows)
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + number)
            order = torch.randperm(self.windows, generator=generator)[offset:][: self.total - position]
            owner = torch.arange(position, position + len(order)) // self.micro_batch % self.world
            for part in order[owner == self.rank].split(1 << 16):  # millions of Python integers take much room
                yield from part.tolist()
            position += len(order)


class TextDataModule(pl.LightningDataModule):
    """Tokenises once (see tasks/data/tokens.py) and serves windows of ``context + 1`` tokens, (B, context + 1) int64.

    Args:
        settings: which text, which tokenizer, how many windows a step.
        data_root: the local data folder, if any.
        cache_dir: where tokenised text is kept.
        seed: of the training order; variants trained with one seed see the same windows in the same order.
        say: prints one line of progress.
        world: processes that train together. The first one tokenises, and the others wait for its files.
        together: validate in as many batches in each process, as a sharded model needs: where one has a batch less it
            gets one of a window that it had, which is not to be counted (see ``counts``).

    Raises:
        DataError: on :meth:`prepare_data` or :meth:`setup`, naming the config key.
    """

    def __init__(self, settings: TrainSettings, data_root: Path | None, cache_dir: Path, seed: int,
                 say: Callable[[str], None] = lambda line: None, world: int = 1,
                 together: bool = False) -> None:  # fmt: skip
        super().__init__()
        self._together = together
        self.world, self.rank = world, rank() if world > 1 else 0
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
            if self.rank:
                file = wait_for_split(corpus, split, tokenizer, self.cache_dir, max_tokens=cap)
            else:
                file = tokenize_split(corpus, split, tokenizer, self.cache_dir, max_tokens=cap,
                                      progress=_progress(split, self.say))  # fmt: skip
            blocks[split] = TokenBlocks(file, self.settings.model.context, tokenizer.vocab_size)
        if len(blocks["valid"]) < self.world:
            raise DataError(f"data.max_valid_tokens: the validation text has {len(blocks['valid'])} windows, allowed "
                            f"with {self.world} devices are as many or more")
        self.train_blocks, self.valid_blocks = blocks["train"], blocks["valid"]
        self.tokenizer = tokenizer
        self.identity = {"data": corpus.source, "data_sha256": corpus.fingerprint,
                         "tokenizer": tokenizer.source, "tokenizer_sha256": tokenizer.fingerprint}  # fmt: skip
        if announce:
            self.say(f"text {corpus.source}, tokenizer {tokenizer.source}: {self.train_blocks.file.tokens:,} training "
                     f"and {self.valid_blocks.file.tokens:,} validation tokens")  # fmt: skip

    def train_dataloader(self) -> DataLoader[Tensor]:
        train = self.settings.train
        order = TrainingOrder(len(self.train_blocks), train.steps * train.batch_size, self.seed, self._consumed,
                              train.micro_batch_size, self.rank, self.world)  # fmt: skip
        return DataLoader(self.train_blocks, train.micro_batch_size, sampler=order, drop_last=True,
                          num_workers=_WORKERS, pin_memory=torch.cuda.is_available())  # fmt: skip

    def val_dataloader(self) -> DataLoader[Tensor]:
        share = [*self._share(self.rank)]
        if self._together and self._batches(self.rank) < self._batches(0):
            share.append(share[-1])  # its last batch is full, or it would not have fewer: this is one more
        return DataLoader(self.valid_blocks, self.settings.train.micro_batch_size, sampler=share, num_workers=_WORKERS)

    def counts(self, batch_idx: int) -> bool:
        """Tell whether a batch of the validation is this process's own."""
        return batch_idx < self._batches(self.rank)

    def _share(self, rank: int) -> range:
        return range(rank, len(self.valid_blocks), self.world)

    def _batches(self, rank: int) -> int:
        return -(-len(self._share(rank)) // self.settings.train.micro_batch_size)

    def state_dict(self) -> dict[str, Any]:
        assert self.trainer is not None
        return {"consumed": self.trainer.global_step * self.settings.train.batch_size}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._consumed = int(state["consumed"])


def _progress(split: str, say: Callable[[str], None]) -> Progress:
    """Return what tells, now and then, how far the tokenisation of a split has come."""
    began = told = time.monotonic()
    first = None

    def tell(documents: int, tokens: int) -> None:
        nonlocal told, first
        now = time.monotonic()
        first = tokens if first is None else first  # more than a batch where an interrupted one goes on
        if now - told >= _PROGRESS_SECONDS:
            told = now
            say(f"tokenising the {split} text: {tokens:,} tokens of {documents:,} documents, "
                f"{(tokens - first) / (now - began):,.0f} tokens/s")

    return tell
