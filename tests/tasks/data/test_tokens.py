from __future__ import annotations

import dataclasses
import errno
import json
import os
import pickle
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import tokenizers
import torch

from tasks.data import files, tokens
from tasks.data.corpus import TextCorpus
from tasks.data.embedded import EmbeddedText
from tasks.data.sources import TokenizerSpec
from tasks.data.tokenizer import Tokenizer, load_tokenizer
from tasks.data.tokens import TokenBlocks, TokenFile, tokenize_split
from tasks.errors import DataError


class Corpus(TextCorpus):
    source = "test:documents"
    fingerprint = "f" * 64

    def __init__(self, documents: list[str]) -> None:
        self._documents, self.read = documents, 0

    def documents(self, split: str) -> Iterator[str]:
        for document in self._documents if split == "train" else []:
            self.read += 1
            yield document


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return load_tokenizer(TokenizerSpec(("embedded",), vocab_size=300))


def expected(documents: list[str], tokenizer: Tokenizer) -> list[int]:
    ids = []
    for document in documents:
        ids += [*tokenizer.backend(document, add_special_tokens=False).input_ids, tokenizer.separator_id]
    return ids


def test_tokens_on_disk_are_the_documents_joined_by_the_separator(
    tmp_path: Path, tokenizer: Tokenizer
) -> None:
    documents = ["One document.\n", "Another, naïve one.", " third"]
    found = tokenize_split(Corpus(documents), "train", tokenizer, tmp_path)
    ids = found.open()
    assert ids.tolist() == expected(documents, tokenizer)
    assert (found.tokens, found.documents, found.largest) == (len(ids), 3, ids.max())
    assert (ids.dtype, found.vocab_size) == (np.uint16, 300)
    assert sorted(p.suffix for p in (tmp_path / "tokens").iterdir()) == [".bin", ".json"]
    assert tokenizer.backend.decode(ids[:-1]).split("</s>") == documents


def test_special_tokens_in_a_text_are_text(tmp_path: Path, tokenizer: Tokenizer) -> None:
    ids = tokenize_split(Corpus(["a</s>b<mask>"]), "train", tokenizer, tmp_path).open()
    assert ids.tolist().count(tokenizer.separator_id) == 1
    assert tokenizer.backend.mask_token_id not in ids
    assert tokenizer.backend.decode(ids[:-1]) == "a</s>b<mask>"
    assert tokenizer.backend("a</s>", add_special_tokens=False).input_ids[-1] == tokenizer.separator_id, \
        "the tokenizer that was handed in is as it was"


def test_a_second_call_reads_no_text(tmp_path: Path, tokenizer: Tokenizer) -> None:
    corpus = Corpus(["text"])
    first = tokenize_split(corpus, "train", tokenizer, tmp_path)
    assert tokenize_split(corpus, "train", tokenizer, tmp_path) == first == TokenFile.load(first.path)
    assert corpus.read == 1


def test_each_choice_has_its_own_file(tmp_path: Path, tokenizer: Tokenizer) -> None:
    corpus, other = Corpus(["some text"]), Corpus(["some text"])
    other.fingerprint = "e" * 64
    choices = [(corpus, tokenizer, None), (other, tokenizer, None), (corpus, tokenizer, 2),
               (corpus, dataclasses.replace(tokenizer, fingerprint="d"), None)]
    assert len({tokenize_split(c, "train", t, tmp_path, max_tokens=m).path for c, t, m in choices}) == 4


def test_the_cap_is_exact_and_stops_reading(
    tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokens, "BATCH_CHARACTERS", 50)
    corpus = Corpus(["ten chars."] * 1000)
    found = tokenize_split(corpus, "train", tokenizer, tmp_path, max_tokens=30)
    assert found.open().tolist() == expected(["ten chars."] * 10, tokenizer)[:30]
    assert corpus.read < 30


def test_progress_is_told_after_every_batch(
    tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokens, "BATCH_CHARACTERS", 10)
    told: list[tuple[int, int]] = []
    found = tokenize_split(Corpus(["0123456789"] * 3), "train", tokenizer, tmp_path,
                           progress=lambda d, t: told.append((d, t)))
    assert [d for d, _ in told] == [1, 2, 3]
    assert told[-1] == (found.documents, found.tokens)


def test_a_long_document_is_encoded_in_pieces_without_a_seam(
    tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    document = "\n\n".join(EmbeddedText().documents("test"))[:60_000]
    pieces = tokens._pieces(document, 1000)
    assert len(pieces) > 50
    assert "".join(pieces) == document
    monkeypatch.setattr(tokens, "PIECE_CHARACTERS", 1000)
    monkeypatch.setattr(tokens, "BATCH_CHARACTERS", 2500)
    found = tokenize_split(Corpus([document]), "train", tokenizer, tmp_path)
    assert found.open().tolist() == expected([document], tokenizer)
    assert found.documents == 1


def test_only_documents_that_show_no_seam_are_cut(tokenizer: Tokenizer) -> None:
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"?": 0}, unk_token="?"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    assert tokens._can_cut(words)
    words.normalizer = tokenizers.normalizers.Prepend("mark ")
    assert not tokens._can_cut(words)
    assert tokens._can_cut(tokenizer.backend.backend_tokenizer)
    assert tokens._pieces("no_place_to_cut" * 10, 20) == ["no_place_to_cut" * 10]


def test_large_vocabularies_take_four_bytes(tmp_path: Path, tokenizer: Tokenizer) -> None:
    class Large(Tokenizer):
        vocab_size = (1 << 16) + 1

    large = Large(tokenizer.backend, tokenizer.source, tokenizer.fingerprint)
    found = tokenize_split(Corpus(["text"]), "train", large, tmp_path)
    assert found.dtype == "uint32"
    assert found.open().tolist() == expected(["text"], tokenizer)


def test_an_id_outside_the_vocabulary_is_named(tmp_path: Path, tokenizer: Tokenizer) -> None:
    class Small(Tokenizer):
        vocab_size = 5

    small = Small(tokenizer.backend, tokenizer.source, tokenizer.fingerprint)
    with pytest.raises(DataError, match="^tokenizer: embedded:bpe-300 produced the id .* vocabulary has 5$"):
        tokenize_split(Corpus(["text"]), "train", small, tmp_path)
    assert os.listdir(tmp_path / "tokens") == []


def test_an_empty_split_and_a_wrong_cap_are_named(tmp_path: Path, tokenizer: Tokenizer) -> None:
    with pytest.raises(DataError, match="^data: the valid split of test:documents is empty"):
        tokenize_split(Corpus(["text"]), "valid", tokenizer, tmp_path)
    with pytest.raises(DataError, match="^max_tokens: got 0"):
        tokenize_split(Corpus(["text"]), "train", tokenizer, tmp_path, max_tokens=0)


def damage(path: Path, how: str) -> None:
    sidecar = path.with_suffix(".json")
    values = json.loads(sidecar.read_text())
    if how == "truncated":
        path.write_bytes(path.read_bytes()[:-2])
    elif how == "gone":
        path.unlink()
    elif how == "no sidecar":
        sidecar.unlink()
    elif how == "torn sidecar":
        sidecar.write_text(sidecar.read_text()[:40])
    elif how == "foreign sidecar":
        sidecar.write_text(json.dumps({"dtype": "uint16"}))
    else:
        key, value = how.split("=")
        sidecar.write_text(json.dumps({**values, key: json.loads(value)}))


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("truncated", r"has \d+ bytes, the sidecar says \d+: truncated or overwritten"),
        ("gone", r"is missing, the sidecar says \d+"),
        ("no sidecar", r"no sidecar .*\.json"),
        ("torn sidecar", "the sidecar is not readable"),
        ("foreign sidecar", "the sidecar is not readable: .*missing"),
        ("tokens=-1", "the sidecar's tokens is -1"),
        ('largest="x"', "the sidecar's largest is 'x'"),
        ("format=0", "format 0 of 'uint16' is not understood"),
        ('dtype="float32"', "format 1 of 'float32' is not understood"),
    ],
)
def test_damaged_files_are_detected_and_made_again(
    tmp_path: Path, tokenizer: Tokenizer, how: str, message: str
) -> None:
    corpus = Corpus(["some text"])
    found = tokenize_split(corpus, "train", tokenizer, tmp_path)
    damage(found.path, how)
    with pytest.raises(DataError, match=rf"^tokens: .*\.bin: {message}"):
        TokenFile.load(found.path)
    assert tokenize_split(corpus, "train", tokenizer, tmp_path) == found == TokenFile.load(found.path)
    assert corpus.read == 2


def test_a_sidecar_of_other_data_is_not_believed(tmp_path: Path, tokenizer: Tokenizer) -> None:
    corpus = Corpus(["some text"])
    found = tokenize_split(corpus, "train", tokenizer, tmp_path)
    damage(found.path, 'corpus_fingerprint="other"')
    assert tokenize_split(corpus, "train", tokenizer, tmp_path) == found
    assert corpus.read == 2


def test_a_full_disk_leaves_no_half_file(
    tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(files.os, "fsync", full)
        with pytest.raises(DataError, match=r"^cache_dir: .*\.bin not written: no space left on the disk"):
            tokenize_split(Corpus(["text"]), "train", tokenizer, tmp_path)
    assert os.listdir(tmp_path / "tokens") == []
    assert tokenize_split(Corpus(["text"]), "train", tokenizer, tmp_path).tokens > 0


def test_an_error_of_the_corpus_is_not_taken_for_one_of_the_disk(
    tmp_path: Path, tokenizer: Tokenizer
) -> None:
    class Broken(Corpus):
        def documents(self, split: str) -> Iterator[str]:
            yield "text"
            raise DataError("data.hub: reading stopped")

    with pytest.raises(DataError, match="^data.hub: reading stopped"):
        tokenize_split(Broken([]), "train", tokenizer, tmp_path)
    assert os.listdir(tmp_path / "tokens") == []


def test_a_run_that_was_stopped_while_writing_starts_over(
    tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(tokens, "BATCH_CHARACTERS", 10)
    corpus = Corpus(["0123456789"] * 3)
    with pytest.raises(KeyboardInterrupt):
        tokenize_split(corpus, "train", tokenizer, tmp_path, progress=stop)
    assert os.listdir(tmp_path / "tokens") == []
    found = tokenize_split(corpus, "train", tokenizer, tmp_path)
    assert found.open().tolist() == expected(["0123456789"] * 3, tokenizer)


def test_a_run_killed_between_tokens_and_sidecar_starts_over(
    tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(*_: object) -> None:
        raise SystemExit

    corpus = Corpus(["some text"])
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(tokens, "write_atomically", killed)
        tokenize_split(corpus, "train", tokenizer, tmp_path)
    (half,) = (tmp_path / "tokens").iterdir()
    half.write_bytes(b"")
    assert tokenize_split(corpus, "train", tokenizer, tmp_path).open().tolist() == \
        expected(["some text"], tokenizer)


@pytest.fixture
def numbers(tmp_path: Path) -> TokenFile:
    """Ids 0 to 21 on disk."""
    path = tmp_path / "numbers.bin"
    np.arange(22, dtype="<u2").tofile(path)
    return TokenFile(path, "uint16", 22, 21, 1, 30, "train", None, "corpus", "c", "tokenizer", "t")


def test_windows_cover_every_token_as_a_target_once(numbers: TokenFile) -> None:
    blocks = TokenBlocks(numbers, context=5)
    assert len(blocks) == 4
    assert [b.tolist() for b in (blocks[0], blocks[1])] == [[0, 1, 2, 3, 4, 5], [5, 6, 7, 8, 9, 10]]
    assert all(b.dtype == torch.int64 and b.shape == (6,) for b in blocks)
    assert [t for block in blocks for t in block[1:].tolist()] == list(range(1, 21))
    with pytest.raises(IndexError):
        blocks[4]


def test_the_shortest_split_gives_one_window(numbers: TokenFile) -> None:
    assert TokenBlocks(numbers, context=21)[0].tolist() == list(range(22))
    with pytest.raises(DataError, match="^context: got 22, but the train split of corpus has only 22 "):
        TokenBlocks(numbers, context=22)
    with pytest.raises(DataError, match="^context: got 0"):
        TokenBlocks(numbers, context=0)


def test_a_model_too_small_for_the_tokenizer_is_named(numbers: TokenFile) -> None:
    assert len(TokenBlocks(numbers, 5, vocab_size=22)) == 4
    with pytest.raises(DataError, match="^tokenizer: tokenizer uses the id 21, but the model's .* has 21$"):
        TokenBlocks(numbers, 5, vocab_size=21)


def test_windows_are_writable_and_leave_the_file_alone(numbers: TokenFile) -> None:
    blocks = TokenBlocks(numbers, 5)
    blocks[0].fill_(-100)
    assert blocks[0].tolist() == [0, 1, 2, 3, 4, 5]


def test_workers_get_the_path_and_not_the_tokens(numbers: TokenFile) -> None:
    blocks = TokenBlocks(numbers, 5)
    assert blocks[1].tolist() == [5, 6, 7, 8, 9, 10]
    copy = pickle.loads(pickle.dumps(blocks))
    assert copy._ids is None
    assert copy[1].tolist() == [5, 6, 7, 8, 9, 10]
