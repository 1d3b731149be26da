from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tasks.data import hub, sources
from tasks.data.sources import HubSpec, TextSpec, check_data_root, find_data_root, load_text, resolve
from tasks.errors import DataError

pytestmark = pytest.mark.usefixtures("no_environment")
MakeFiles = Callable[[dict[str, str | bytes]], Path]

EVERYTHING = TextSpec(("local", "hub", "embedded"), local="lm/x", hub=HubSpec("owner/name"))
FILES = {f"lm/x/{i}.txt": str(i) for i in range(3)}


@pytest.fixture
def no_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    """Answer for the hub that it cannot be reached."""

    def refuse(*_: object) -> None:
        raise hub.Unavailable("data.hub: cannot reach the Hugging Face hub")

    monkeypatch.setattr(sources, "hub_commit", refuse)
    monkeypatch.setattr(hub, "hub_commit", refuse)


def test_a_local_folder_comes_first(make_files: MakeFiles) -> None:
    root = make_files(FILES)
    corpus = load_text(EVERYTHING, root)
    assert corpus.source == resolve(EVERYTHING, root) == "local:lm/x"
    assert corpus.skipped == ()
    assert list(corpus.documents("train"))


@pytest.mark.usefixtures("no_hub")
def test_the_next_source_serves_and_the_reasons_are_kept(tmp_path: Path) -> None:
    corpus = load_text(EVERYTHING, tmp_path)
    assert corpus.source == resolve(EVERYTHING, tmp_path) == "embedded:lm"
    assert corpus.skipped == (
        f"data.local: no folder lm/x below {tmp_path}", "data.hub: cannot reach the Hugging Face hub")


@pytest.mark.usefixtures("no_hub")
@pytest.mark.parametrize("function", [load_text, resolve])
def test_when_nothing_serves_every_reason_is_given(function: Callable) -> None:
    spec = TextSpec(("local", "hub"), local="lm/x", hub=HubSpec("owner/name"))
    with pytest.raises(DataError) as caught:
        function(spec)
    assert str(caught.value) == (
        "data.sources: none of local, hub can serve: data.local: lm/x needs a data folder (--data-root or "
        "ADASPLASH_DATA); data.hub: cannot reach the Hugging Face hub")


def test_a_source_that_is_there_but_wrong_is_not_passed_over(make_files: MakeFiles) -> None:
    root = make_files({"lm/x/a.txt": b"\xff", "lm/x/b.txt": "b"})
    with pytest.raises(DataError, match=r"^data.local: .*a\.txt:1: not UTF-8"):
        list(load_text(EVERYTHING, root).documents("train"))
    empty = make_files({"lm/empty/README": ""})
    with pytest.raises(DataError, match=r"^data.local: no \.txt or \.jsonl files"):
        load_text(TextSpec(("local", "embedded"), local="lm/empty"), empty)


@pytest.mark.parametrize("function", [load_text, resolve])
def test_a_wrong_data_root_is_an_error_even_if_nothing_needs_it(function: Callable, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"^data_root: no such folder: .*none \(from --data-root\)$"):
        function(TextSpec(("embedded",)), tmp_path / "none")


def test_the_data_root_says_where_it_was_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert check_data_root(str(tmp_path), "--data-root") == tmp_path
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(DataError, match=rf"^data_root: not a folder: {file} \(from --data-root\)$"):
        check_data_root(file, "--data-root")
    assert find_data_root(None) is None
    monkeypatch.setenv("ADASPLASH_DATA", str(tmp_path))
    assert find_data_root(None) == tmp_path
    monkeypatch.setenv("ADASPLASH_DATA", str(tmp_path / "none"))
    with pytest.raises(DataError, match=r"^data_root: no such folder: .*none \(from ADASPLASH_DATA\)$"):
        find_data_root(None)
    assert find_data_root(tmp_path) == tmp_path, "an argument wins over the environment"


def test_the_environment_names_the_data_root(make_files: MakeFiles, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ADASPLASH_DATA", str(make_files(FILES)))
    assert load_text(EVERYTHING).source == "local:lm/x"


def test_resolving_can_do_without_the_network(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "hub_commit", lambda *_: pytest.fail("asked the hub"))
    monkeypatch.setattr(sources, "is_offline", lambda: False)
    spec = TextSpec(("hub",), hub=HubSpec("owner/name", "config"))
    assert resolve(spec, ask_hub=False) == "hub:owner/name:config"
