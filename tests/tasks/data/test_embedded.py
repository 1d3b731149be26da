from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
from collections import Counter
from pathlib import Path

import pytest

from tasks.data import embedded, stdlib_text
from tasks.data.corpus import SPLITS
from tasks.data.embedded import EmbeddedText, labelled_passages, titled_sections
from tasks.errors import DataError

HAS_TKINTER = Path(sysconfig.get_path("stdlib"), "tkinter").is_dir()  # a package of its own in some distributions


def test_documents_are_plenty_and_in_one_split_only() -> None:
    splits = {split: list(EmbeddedText().documents(split)) for split in SPLITS}
    everything = sum(splits.values(), [])
    assert len(set(everything)) == len(everything)
    assert sum(map(len, splits["train"])) > 1_500_000
    assert min(sum(map(len, splits[split])) for split in ("valid", "test")) > 50_000


def test_documents_hold_docstrings_under_their_names_and_chapters_of_the_reference() -> None:
    text = "\n".join(d for split in SPLITS for d in EmbeddedText().documents(split))
    assert "textwrap.TextWrapper.fill\n\nfill(text : string) -> string" in text
    assert 'The "with" statement' in text


def test_nothing_comes_from_installed_packages_or_test_suites() -> None:
    modules = {item.module for item in stdlib_text.docstrings()}
    assert {"asyncio.base_events", "json"} <= modules
    assert ("tkinter.ttk" in modules) == HAS_TKINTER
    assert not [m for m in modules if {"pytest", "torch", "test", "idlelib"} & set(m.split("."))]


def test_views_are_the_same_in_another_process() -> None:
    script = ("from tasks.data.embedded import *; print(EmbeddedText().fingerprint, "
              "labelled_passages().fingerprint, titled_sections().fingerprint)")
    root = Path(embedded.__file__).parents[2]
    environment = {**os.environ, "PYTHONHASHSEED": "7"}
    other = subprocess.run([sys.executable, "-c", script], cwd=root, env=environment, check=True,
                           capture_output=True, text=True).stdout.split()
    here = [EmbeddedText().fingerprint, labelled_passages().fingerprint, titled_sections().fingerprint]
    assert other == here


@pytest.mark.skipif(not HAS_TKINTER, reason="this Python lacks tkinter, which most passages of one label are from")
def test_labels_are_balanced_and_in_every_split() -> None:
    found = labelled_passages()
    assert 8 <= len(found.labels) <= 12
    for split, least, most in (("train", 150, 200), ("valid", 30, 40), ("test", 30, 40)):
        counts = Counter(passage.label for passage in found.splits[split])
        assert set(counts) == set(range(len(found.labels)))
        assert least <= min(counts.values()) <= max(counts.values()) <= most


def test_passages_have_a_length_to_classify() -> None:
    lengths = [len(passage.text) for split in SPLITS for passage in labelled_passages().splits[split]]
    assert embedded.PASSAGE_CHARACTERS[0] <= min(lengths)
    assert max(lengths) <= embedded.PASSAGE_CHARACTERS[1]


def test_no_held_out_passage_repeats_most_of_an_earlier_split() -> None:
    splits = labelled_passages().splits
    seen: set[tuple[str, ...]] = set()
    texts: set[str] = set()
    for split in ("train", "valid", "test"):
        for passage in splits[split]:
            assert passage.text not in texts
            words = embedded._shingles(passage.text)
            assert split == "train" or len(words & seen) <= embedded.LARGEST_OVERLAP * len(words)
        texts |= {passage.text for passage in splits[split]}
        for passage in splits[split]:
            seen |= embedded._shingles(passage.text)


def test_whole_modules_are_held_out_and_the_largest_one_trains() -> None:
    modules = {f"m{i}": ["passage"] * size for i, size in enumerate([400, 60, 50, 30, 20, 20, 10])}
    assigned = embedded._module_splits(modules)
    assert assigned["m0"] == "train"
    sizes = Counter()
    for module, split in assigned.items():
        sizes[split] += len(modules[module])
    assert sizes["test"] >= 40
    assert sizes["valid"] >= 40


def test_each_query_has_one_section_and_no_title_is_ambiguous() -> None:
    found = titled_sections()
    assert len(found.corpus) > 1500
    assert len({q.lower() for q in found.queries.values()}) == len(found.queries)
    assert len(set(found.corpus.values())) == len(found.corpus)
    judged = [query for split in SPLITS for query in found.qrels[split]]
    assert sorted(judged) == sorted(found.queries)
    for split in SPLITS:
        for relevant in found.qrels[split].values():
            assert list(relevant.values()) == [1]
            assert set(relevant) <= set(found.corpus)
    assert len(found.qrels["train"]) > 1000
    assert len(found.qrels["valid"]) > 100
    assert len(found.qrels["test"]) > 300


def test_a_title_is_followed_by_its_own_section(monkeypatch: pytest.MonkeyPatch) -> None:
    body = "A section needs a hundred characters or it would not be worth finding. " * 2
    chapter = f"Title of the chapter\n********************\n\n{body}\n\nTitle of a part of it\n"
    chapter += f"=====================\n\nOther. {body}\n\nShort title\n-----------\n\n{body}\n"
    monkeypatch.setattr(embedded, "topics", lambda: {"chapter": chapter})
    assert list(embedded._topic_sections()) == [
        ("Title of the chapter", body.strip()), ("Title of a part of it", f"Other. {body}".strip())]
    items = [stdlib_text.Docstring("m", "f", f"Do what this function does.\n\n{body}"),
             stdlib_text.Docstring("m", "g", f"Two lines\nof title.\n\n{body}"),
             stdlib_text.Docstring("m", "h", "Nothing but this one line.")]
    monkeypatch.setattr(embedded, "docstrings", lambda: items)
    assert list(embedded._docstring_sections()) == [("Do what this function does", body.strip())]
    found = embedded.titled_sections.__wrapped__()
    by_title = {title: found.corpus["d" + query[1:]] for query, title in found.queries.items()}
    assert by_title == {"Do what this function does": body.strip(),
                        "Title of a part of it": f"Other. {body}".strip()}, "a repeated section has one title"


def test_definitions_under_conditions_are_found_and_repeats_dropped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "pkg").mkdir()
    (tmp_path / "pkg" / "__init__.py").write_text(
        '"""Package."""\nimport sys\nif sys.platform == "x":\n    def f():\n        """On x."""\nelse:\n'
        '    def f():\n        """Elsewhere."""\nclass C:\n    """Package."""\n    async def g(self): "Async."\n')
    (tmp_path / "broken.py").write_text("def (:")
    (tmp_path / "test").mkdir()
    (tmp_path / "test" / "a.py").write_text('"""A test."""')
    monkeypatch.setattr(stdlib_text.sysconfig, "get_path", lambda _: str(tmp_path))
    found = stdlib_text.docstrings.__wrapped__()
    assert [(d.module, d.name, d.text) for d in found] == [
        ("pkg", "", "Package."), ("pkg", "f", "On x."), ("pkg", "f", "Elsewhere."), ("pkg", "C.g", "Async.")]


def test_a_python_without_its_library_text_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stdlib_text.sysconfig, "get_path", lambda _: str(tmp_path))
    with pytest.raises(DataError, match="^embedded: this Python carries no library sources in "):
        stdlib_text.docstrings.__wrapped__()
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", None)
    with pytest.raises(DataError, match="^embedded: this Python lacks pydoc_data.topics"):
        stdlib_text.topics.__wrapped__()
