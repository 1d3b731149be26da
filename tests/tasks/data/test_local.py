from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from tasks.data.corpus import SPLITS, hold_out
from tasks.data.local import LocalText, cut
from tasks.data.specs import TextSpec
from tasks.errors import DataError

MakeFiles = Callable[[dict[str, str | bytes]], Path]


def folder(**arguments: object) -> TextSpec:
    return TextSpec(("local",), local="lm/x", **arguments)


def by_split(corpus: LocalText) -> dict[str, list[str]]:
    return {split: list(corpus.documents(split)) for split in SPLITS}


def lines(count: int) -> str:
    return "".join(json.dumps({"text": f"document {i}"}) + "\n" for i in range(count))


def test_files_named_for_each_split_are_its_documents(make_files: MakeFiles) -> None:
    root = make_files({"lm/x/a.txt": "A", "lm/x/b.txt": "B", "lm/x/c.txt": "C", "lm/x/d.raw": "D"})
    corpus = LocalText(root, folder(train_files=("[ab].txt",), valid_files=("c.txt",), test_files=("d.raw",)))
    assert by_split(corpus) == {"train": ["A", "B"], "valid": ["C"], "test": ["D"]}
    assert corpus.source == "local:lm/x"


def test_documents_are_held_out_by_hash_whatever_the_source(make_files: MakeFiles) -> None:
    texts = [f"document {i}" for i in range(40)]
    files = make_files({f"lm/x/{i:02d}.txt": text for i, text in enumerate(texts)})
    from_files = by_split(LocalText(files, folder(held_out=0.1)))
    rows = make_files({"lm/y/all.jsonl": lines(40)})
    from_rows = by_split(LocalText(rows, TextSpec(("local",), local="lm/y", held_out=0.1)))
    assert from_files == from_rows
    assert [len(from_files[s]) for s in SPLITS] == [32, 4, 4]
    assert sorted(sum(from_files.values(), [])) == sorted(texts)


def test_repeated_documents_never_cross_splits(make_files: MakeFiles) -> None:
    root = make_files({"lm/x/all.jsonl": lines(10) * 3})
    splits = by_split(LocalText(root, folder(held_out=0.2)))
    assert [len(splits[s]) for s in SPLITS] == [18, 6, 6]
    assert not set(splits["train"]) & set(splits["valid"])
    assert not set(splits["train"] + splits["valid"]) & set(splits["test"])


def test_one_long_file_is_cut_into_contiguous_documents(make_files: MakeFiles) -> None:
    paragraphs = [f"Paragraph {i}. " + "Words and more words. " * (i % 9) for i in range(400)]
    text = "\n\n".join(paragraphs)
    root = make_files({"lm/x/book.txt": text, "lm/x/SOURCE.txt": "says where the book is from"})
    splits = by_split(LocalText(root, folder()))
    assert all(splits.values())
    pieces = sum(splits.values(), [])
    assert "".join(sorted(pieces, key=text.index)) == text
    assert all(piece.endswith("\n\n") for piece in pieces if not text.endswith(piece))


@pytest.mark.parametrize("separator", ["\n\n", "\n", " ", "-"])
def test_pieces_join_to_the_text_and_are_of_like_size(separator: str) -> None:
    text = separator.join("abcdefgh" for _ in range(5000))
    pieces = list(cut(text))
    assert "".join(pieces) == text
    assert max(map(len, pieces)) <= 2 * len(text) // 100 + 2
    assert len(pieces) > 40
    assert all(piece.endswith(separator) for piece in pieces[:-1]) or separator == "-"


def test_an_empty_text_has_no_pieces() -> None:
    assert list(cut("")) == []


def test_the_fingerprint_follows_content_and_splits_not_the_place(make_files: MakeFiles) -> None:
    def fingerprint(content: str, **arguments: object) -> str:
        return LocalText(make_files({"lm/x/all.jsonl": content}), folder(**arguments)).fingerprint

    first = fingerprint(lines(9))
    assert first == fingerprint(lines(9))
    assert len({first, fingerprint(lines(10)), fingerprint(lines(9), held_out=0.2),
                fingerprint(lines(9), train_files=("all.jsonl",))}) == 4


@pytest.mark.parametrize(
    ("files", "arguments", "message"),
    [
        ({"lm/x/a.csv": "1"}, {}, r"data.local: no \.txt or \.jsonl files in .*x"),
        ({"lm/x/a.txt": "1"}, {"valid_files": ("b.txt",)},
         r"data.valid_files: no file matches 'b\.txt' in .*x"),
        ({"lm/x/a.txt": "1"}, {"train_files": ("*.txt",), "test_files": ("a.txt",)},
         r"data.test_files: a\.txt is among data.train_files too"),
        ({"lm/x/a.txt": "1"}, {"train_files": ("a.txt",)},
         "data.valid_files: missing, the config names files for train only"),
        ({"lm/x/a.txt": "1", "lm/x/b.txt": "1"}, {}, "data.local: .*x: 1 distinct documents"),
        ({"lm/x/a.txt": b"\xff"}, {"valid_files": ("a.txt",)}, r"data.local: .*a\.txt:1: not UTF-8"),
        ({"lm/x/a.jsonl": '{"body": "b"}'}, {},
         r"data.local: .*a\.jsonl:1: no column text; present are body"),
        ({"lm/x/a.jsonl": '{"text": 3}'}, {},
         r"data.text_column: .*a\.jsonl: text holds int, expected a string"),
    ],
)
def test_what_is_wrong_with_a_folder_is_named(
    make_files: MakeFiles, files: dict, arguments: dict, message: str
) -> None:
    root = make_files(files)
    with pytest.raises(DataError, match=f"^{message}"):
        list(LocalText(root, folder(**arguments)).documents("valid"))


def test_a_slip_in_a_split_name_is_ours(make_files: MakeFiles) -> None:
    with pytest.raises(ValueError, match="split: got 'validation'"):
        list(LocalText(make_files({"lm/x/a.txt": "1"}), folder()).documents("validation"))


@pytest.mark.parametrize(("count", "sizes"), [(3, (1, 1)), (4, (1, 1)), (100, (5, 5))])
def test_holding_out_leaves_documents_to_train_on(count: int, sizes: tuple[int, int]) -> None:
    held_out = hold_out((i.to_bytes(2, "big") for i in range(count)), 0.05, "here")
    chosen = list(held_out.values())
    assert (chosen.count("valid"), chosen.count("test")) == sizes
