"""The order of training windows, and the data module that serves them."""

from __future__ import annotations

import pytest
import torch

from tasks.errors import DataError
from tasks.language_modeling import data as data_module
from tasks.language_modeling.data import TextDataModule, TrainingOrder


@pytest.fixture
def open_data(settings, texts, tmp_path, said):
    def make(seed: int = 0, **changes) -> TextDataModule:
        data = TextDataModule(settings(**changes), texts, tmp_path / "data", seed, said.append)
        data.prepare_data()
        data.setup()
        return data

    return make


def test_every_window_comes_once_a_pass():
    order = list(TrainingOrder(windows=10, total=34, seed=3))
    assert len(order) == 34
    passes = [order[i:i + 10] for i in range(0, 34, 10)]
    assert [sorted(p) for p in passes[:3]] == [list(range(10))] * 3
    assert len(set(passes[3])) == 4
    assert passes[0] != passes[1] and passes[1] != passes[2]
    assert passes[0] != list(range(10))


def test_order_is_the_seeds():
    def order(seed: int, total: int = 20) -> list[int]:
        return list(TrainingOrder(10, total, seed))

    assert order(3) == order(3)
    assert order(3) != order(4)
    assert order(3, 34)[:20] == order(3)  # a longer training begins like a shorter one
    before = torch.get_rng_state()
    order(5)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("consumed", [0, 1, 9, 10, 11, 25, 33, 34])
def test_resumed_order_is_the_rest(consumed):
    rest = TrainingOrder(10, 34, 3, consumed)
    assert list(rest) == list(TrainingOrder(10, 34, 3))[consumed:]
    assert len(rest) == 34  # Lightning counts the batches before as fetched


def test_batches_are_windows_in_that_order(open_data):
    data = open_data(seed=7)
    batches = list(data.train_dataloader())
    assert len(batches) == len(data.train_dataloader()) == 11 * 2
    windows = torch.cat(batches)
    assert windows.shape == (44, 17) and windows.dtype == torch.int64
    order = list(TrainingOrder(20, 44, 7))
    assert all(torch.equal(window, data.train_blocks[i]) for window, i in zip(windows, order, strict=True))
    tokens = torch.cat([data.train_blocks[0][:1], *(data.train_blocks[i][1:] for i in range(20))])
    assert tokens.tolist() == data.train_blocks.file.open().tolist()


def test_resumed_batches_are_the_rest(open_data):
    whole = list(open_data().train_dataloader())
    data = open_data()
    data.load_state_dict({"consumed": 3 * 4})
    rest = list(data.train_dataloader())
    assert len(rest) == len(whole) - 3 * 2
    assert all(torch.equal(a, b) for a, b in zip(rest, whole[3 * 2:], strict=True))


def test_validation_is_all_windows_in_their_order(open_data):
    data = open_data()
    windows = torch.cat(list(data.val_dataloader()))
    assert len(windows) == 13
    assert all(torch.equal(window, data.valid_blocks[i]) for i, window in enumerate(windows))
    assert windows[0, 0] != data.train_blocks[0][0] or not torch.equal(windows[0], data.train_blocks[0])


def test_identity_and_what_is_said(open_data, texts, said):
    data = open_data()
    assert data.identity["data"] == "local:lm/tiny"
    assert data.identity["tokenizer"] == "local:tokenizers/tiny"
    assert said == ["text local:lm/tiny, tokenizer local:tokenizers/tiny: 321 training and 209 validation tokens"]
    other = open_data(data={"train_files": ["valid.txt"], "valid_files": ["train.txt"]})
    assert other.identity["data_sha256"] != data.identity["data_sha256"]
    assert other.identity["tokenizer_sha256"] == data.identity["tokenizer_sha256"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": {"context": 321}}, "context: got 321, but the train split of local:lm/tiny has only 321 tokens"),
        ({"model": {"context": 209}}, "context: got 209, but the valid split of local:lm/tiny has only 209 tokens"),
        ({"data": {"local": "lm/missing"}}, "data.local: no folder lm/missing"),
        ({"data": {"valid_files": ["missing.txt"]}}, "missing.txt"),
        ({"tokenizer": {"local": "lm/tiny"}}, "tokenizer.local: no tokenizer in"),
    ],
)
def test_refused(open_data, changes, message):
    with pytest.raises(DataError) as caught:
        open_data(**changes)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_longest_context_that_fits(open_data):
    assert len(open_data(model={"context": 208}).valid_blocks) == 1


def test_progress_of_a_long_tokenisation(monkeypatch, said):
    """At most a line in so many seconds, counting from where an interrupted one goes on."""
    now = [100.0]
    monkeypatch.setattr(data_module.time, "monotonic", lambda: now[0])
    tell = data_module._progress("train", said.append)
    for seconds, tokens in ((0, 5000), (20, 7000), (20, 9000), (20, 10000), (20, 13000)):
        now[0] += seconds
        tell(tokens // 100, tokens)
    assert said == ["tokenising the train text: 9,000 tokens of 90 documents, 100 tokens/s",
                    "tokenising the train text: 13,000 tokens of 130 documents, 100 tokens/s"]
