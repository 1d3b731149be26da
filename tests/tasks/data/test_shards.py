"""A long text in several files: the same ids and windows as in one, and a tokenisation that can be interrupted."""

from __future__ import annotations

import errno
import itertools
import json
import pickle
import random
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from tasks.data import files, tokens
from tasks.data.corpus import TextCorpus
from tasks.data.shards import Reached, ShardedIds, shard_lengths, shard_path
from tasks.data.sources import TokenizerSpec
from tasks.data.tokenizer import Tokenizer, load_tokenizer
from tasks.data.tokens import TokenBlocks, TokenFile, tokenize_split, wait_for_split
from tasks.errors import DataError

SHARD = 100


class Killed(Exception):
    """Stands for whatever ends a process."""


class Corpus(TextCorpus):
    source = "test:documents"
    fingerprint = "f" * 64

    def __init__(self, documents: list[str], fails_at: int | None = None) -> None:
        self._documents, self._fails_at = documents, fails_at

    def documents(self, split: str) -> Iterator[str]:
        for number, document in enumerate(self._documents):
            if number == self._fails_at:
                raise DataError("data.hub: reading stopped")
            yield document


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return load_tokenizer(TokenizerSpec(("embedded",), vocab_size=300))


@pytest.fixture(scope="module")
def texts() -> list[str]:
    """Documents of 1 to 40 ids, and one that is longer than two shards."""
    draw = random.Random(0)
    words = [" ".join("abcdefghij"[draw.randrange(10)] for _ in range(draw.randrange(1, 20))) for _ in range(30)]
    return [*words[:12], "x y z " * 60, *words[12:]]


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokens, "SHARD_TOKENS", SHARD)
    monkeypatch.setattr(tokens, "BATCH_CHARACTERS", 60)
    monkeypatch.setattr(tokens, "PIECE_CHARACTERS", 25)


@pytest.fixture
def encoded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The documents that were encoded, not only read."""
    seen: list[str] = []
    encode = tokens._encode
    monkeypatch.setattr(tokens, "_encode", lambda documents, tokenizer: encode(
        (seen.append(d) or d for d in documents), tokenizer))  # fmt: skip
    return seen


def content(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted((folder / "tokens").iterdir())}


def ids_of(texts: list[str], tokenizer: Tokenizer) -> list[list[int]]:
    return [[*tokenizer.backend(t, add_special_tokens=False).input_ids, tokenizer.separator_id] for t in texts]


def stop_after(wanted: int):
    def progress(_: int, written: int) -> None:
        if written >= wanted:
            raise Killed

    return progress


def test_shards_hold_the_documents(tmp_path: Path, tokenizer: Tokenizer, texts: list[str]) -> None:
    found = tokenize_split(Corpus(texts), "train", tokenizer, tmp_path)
    expected = list(itertools.chain(*ids_of(texts, tokenizer)))
    assert found == TokenFile.load(found.path)
    assert found.open().tolist() == expected and len(found.open()) == found.tokens == len(expected)
    assert found.documents == len(texts) and found.largest == max(expected)
    shards = [shard_path(found.path, i) for i in range(-(-len(expected) // SHARD))]
    assert len(shards) > 5 and sorted((tmp_path / "tokens").glob("*.bin")) == sorted(shards)
    for number, shard in enumerate(shards):
        assert np.fromfile(shard, "<u2").tolist() == expected[number * SHARD:(number + 1) * SHARD]


def test_one_shard_is_one_file(tmp_path: Path, tokenizer: Tokenizer) -> None:
    found = tokenize_split(Corpus(["a b", "c"]), "train", tokenizer, tmp_path)
    assert isinstance(found.open(), np.memmap)
    assert sorted(p.name for p in (tmp_path / "tokens").iterdir()) == [found.path.name, f"{found.path.stem}.json"]


@pytest.mark.parametrize("context", [1, 7, 30, 99, 100, 101, 250])
def test_windows_across_the_borders(
    tmp_path: Path, tokenizer: Tokenizer, texts: list[str], context: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_shards = TokenBlocks(tokenize_split(Corpus(texts), "train", tokenizer, tmp_path / "shards"), context)
    monkeypatch.setattr(tokens, "SHARD_TOKENS", 10**9)
    in_one = TokenBlocks(tokenize_split(Corpus(texts), "train", tokenizer, tmp_path / "one"), context)
    assert len(in_shards) == len(in_one) > 1
    assert [in_shards[i].tolist() for i in range(len(in_one))] == [in_one[i].tolist() for i in range(len(in_one))]
    copy = pickle.loads(pickle.dumps(in_shards))
    assert copy._ids is None and copy[1].tolist() == in_one[1].tolist()


@pytest.mark.parametrize("killed_at", [50, 100, 101, 199, 200, 350, 600])
def test_killed_and_called_again(
    tmp_path: Path, tokenizer: Tokenizer, texts: list[str], encoded: list[str], killed_at: int
) -> None:
    whole = tokenize_split(Corpus(texts), "train", tokenizer, tmp_path / "whole")
    with pytest.raises(Killed):
        tokenize_split(Corpus(texts), "train", tokenizer, tmp_path / "killed", progress=stop_after(killed_at))
    kept = content(tmp_path / "killed") if killed_at > SHARD else {}
    assert len([name for name in kept if name.endswith(".bin")]) == (killed_at - 1) // SHARD
    assert all(len(data) == 2 * SHARD for name, data in kept.items() if name.endswith(".bin"))
    encoded.clear()
    told: list[int] = []
    again = tokenize_split(Corpus(texts), "train", tokenizer, tmp_path / "killed", progress=lambda d, t: told.append(t))
    assert content(tmp_path / "killed") == content(tmp_path / "whole")
    assert (again.tokens, again.documents, again.largest) == (whole.tokens, whole.documents, whole.largest)
    border = (killed_at - 1) // SHARD * SHARD
    ended = sum(end <= border for end in itertools.accumulate(map(len, ids_of(texts, tokenizer))))
    assert encoded == texts[ended:]  # from the document that the border cuts
    assert border < told[0] and told[-1] == whole.tokens


def test_whole_shards_are_not_written_again(tmp_path: Path, tokenizer: Tokenizer, texts: list[str]) -> None:
    with pytest.raises(DataError, match="reading stopped"):
        tokenize_split(Corpus(texts, fails_at=25), "train", tokenizer, tmp_path)
    first = sorted((tmp_path / "tokens").glob("*.bin"))
    times = [p.stat().st_mtime_ns for p in first]
    assert len(first) >= 3
    tokenize_split(Corpus(texts), "train", tokenizer, tmp_path)
    assert [p.stat().st_mtime_ns for p in first] == times


def test_killed_before_the_last_sidecar(
    tmp_path: Path, tokenizer: Tokenizer, encoded: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The text ends where a shard does: nothing but the sidecar is missing, and no empty shard comes."""
    documents = ["a b c d"] * 100
    length = len(ids_of(documents[:1], tokenizer)[0])
    monkeypatch.setattr(tokens, "SHARD_TOKENS", 25 * length)

    def killed(*_: object) -> None:
        raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(tokens, "write_atomically", killed)
        tokenize_split(Corpus(documents), "train", tokenizer, tmp_path)
    encoded.clear()
    found = tokenize_split(Corpus(documents), "train", tokenizer, tmp_path)
    assert encoded == []
    assert (found.tokens, found.documents) == (100 * length, 100) and found == TokenFile.load(found.path)
    assert len(list((tmp_path / "tokens").glob("*.bin"))) == 4


@pytest.mark.parametrize("cap", [99, 100, 101, 200, 233])
def test_the_cap_and_the_borders(tmp_path: Path, tokenizer: Tokenizer, texts: list[str], cap: int) -> None:
    expected = list(itertools.chain(*ids_of(texts, tokenizer)))[:cap]
    if cap > SHARD:
        with pytest.raises(Killed):
            tokenize_split(Corpus(texts), "train", tokenizer, tmp_path, max_tokens=cap, progress=stop_after(cap))
    found = tokenize_split(Corpus(texts), "train", tokenizer, tmp_path, max_tokens=cap)
    assert found.open().tolist() == expected and found.tokens == cap
    assert found.documents == expected.count(tokenizer.separator_id)


@pytest.mark.parametrize("how", ["truncated", "gone", "note torn", "note of other data", "note gone"])
def test_damage_costs_the_shards_behind_it(
    tmp_path: Path, tokenizer: Tokenizer, texts: list[str], encoded: list[str], how: str
) -> None:
    found = tokenize_split(Corpus(texts), "train", tokenizer, tmp_path)
    before = content(tmp_path)
    shard = shard_path(found.path, 2)
    note = shard.with_suffix(".reached.json")
    if how == "truncated":
        shard.write_bytes(shard.read_bytes()[:-2])
    elif how == "gone":
        shard.unlink()
    else:
        found.path.with_suffix(".json").unlink()
        values = json.loads(note.read_text())
        changed = {"note torn": note.read_text()[:30], "note gone": None,
                   "note of other data": json.dumps(values | {"wanted": {"split": "valid"}})}[how]  # fmt: skip
        note.unlink() if changed is None else note.write_text(changed)
    if how in ("truncated", "gone"):
        with pytest.raises(DataError, match=rf"shard {shard.name} .*the sidecar says {2 * SHARD}"):
            TokenFile.load(found.path)
    encoded.clear()
    assert tokenize_split(Corpus(texts), "train", tokenizer, tmp_path) == found
    assert content(tmp_path) == before
    assert 0 < len(encoded) < len(texts)


def test_shards_of_another_length_are_not_taken_over(
    tmp_path: Path, tokenizer: Tokenizer, texts: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(Killed):
        tokenize_split(Corpus(texts), "train", tokenizer, tmp_path, progress=stop_after(450))
    monkeypatch.setattr(tokens, "SHARD_TOKENS", 130)
    found = tokenize_split(Corpus(texts), "train", tokenizer, tmp_path)
    assert found.open().tolist() == list(itertools.chain(*ids_of(texts, tokenizer)))


def test_a_full_disk_leaves_whole_shards(
    tmp_path: Path, tokenizer: Tokenizer, texts: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = tokenize_split(Corpus(texts), "train", tokenizer, tmp_path / "whole")
    writes = iter(range(100))

    def full_at_the_third_shard(_: int) -> None:
        if next(writes) == 4:  # each shard and each note is brought to the disk
            raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(files.os, "fsync", full_at_the_third_shard)
        with pytest.raises(DataError, match=r"^cache_dir: .*-00002\.bin not written: no space left on the disk"):
            tokenize_split(Corpus(texts), "train", tokenizer, tmp_path / "full")
    stem = whole.path.stem
    assert list(content(tmp_path / "full")) == sorted(
        f"{stem}{n}{e}" for n in ("", "-00001") for e in (".bin", ".reached.json"))
    tokenize_split(Corpus(texts), "train", tokenizer, tmp_path / "full")
    assert content(tmp_path / "full") == content(tmp_path / "whole")


def test_another_process_is_waited_for(
    tmp_path: Path, tokenizer: Tokenizer, texts: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It has not begun, is half way, has left a torn sidecar, and is done."""
    slept: list[float] = []

    def other_process(seconds: float) -> None:
        slept.append(seconds)
        if len(slept) == 1:
            with pytest.raises(Killed):
                tokenize_split(Corpus(texts), "train", tokenizer, tmp_path, progress=stop_after(250))
        elif len(slept) == 2:
            path = next((tmp_path / "tokens").glob("*-00001.bin"))
            path.with_name(path.name.replace("-00001.bin", ".json")).write_text("{")
        else:
            tokenize_split(Corpus(texts), "train", tokenizer, tmp_path)

    monkeypatch.setattr(tokens.time, "sleep", other_process)
    found = wait_for_split(Corpus(texts), "train", tokenizer, tmp_path)
    assert len(slept) == 3
    assert found == tokenize_split(Corpus(texts), "train", tokenizer, tmp_path)


def test_what_is_reached() -> None:
    ids, none = np.array([5, 9, 2, 7]), np.empty(0, dtype=np.int64)
    reached = Reached().after(ids, np.array([1, 3]))
    assert reached == Reached(tokens=4, largest=9, documents=2, partial=1)
    assert reached.after(ids[:3], none) == Reached(tokens=7, largest=9, documents=2, partial=4)
    assert reached.after(ids[:2], np.array([2])) == Reached(tokens=6, largest=9, documents=3, partial=0)


def test_slices_of_shards() -> None:
    ids = ShardedIds([np.arange(0, 4), np.arange(4, 5), np.arange(5, 9)])
    for start in range(10):
        for stop in range(10):
            assert ids[start:stop].tolist() == list(range(9))[start:stop]
    with pytest.raises(ValueError, match="^step: got 2"):
        ids[::2]
    assert [shard_lengths(n, 4) for n in (3, 4, 5, 8)] == [[3], [4], [4, 1], [4, 4]]
    assert shard_lengths(9, 0) == [9]
