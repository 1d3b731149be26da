"""The hub is played by files on disk, which the real ``datasets`` library reads; nothing uses a network."""

from __future__ import annotations

import itertools
import json
import socket
from collections.abc import Callable
from pathlib import Path

import datasets
import huggingface_hub
import pytest

from tasks.data import hub
from tasks.data.hub import HubText, Unavailable, hub_commit
from tasks.data.sources import TextSpec, load_text, resolve
from tasks.data.specs import HubSpec
from tasks.errors import DataError

OpenFake = Callable[..., HubText]


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> OpenFake:
    """Return a function that opens a dataset of the given rows as if it were on the hub."""
    real = datasets.load_dataset_builder

    def open_fake(data: dict[str, list[dict]], commit: str = "c0ffee", **arguments: object) -> HubText:
        files = {}
        for name, rows in data.items():
            files[name] = str(tmp_path / f"{name}.jsonl")
            Path(files[name]).write_text("".join(json.dumps(row) + "\n" for row in rows))
        monkeypatch.setattr(hub, "hub_commit", lambda *_: commit)
        monkeypatch.setattr(datasets, "load_dataset_builder", lambda *_, **__: real(
            "json", data_files=files, cache_dir=str(tmp_path / "cache")))
        return HubText(HubSpec("owner/name", **arguments))

    return open_fake


def rows(count: int, name: str = "document") -> list[dict]:
    return [{"text": f"{name} {i}", "id": i} for i in range(count)]


@pytest.mark.parametrize("streaming", [True, False])
def test_splits_are_mapped_or_held_out_from_the_head(fake: OpenFake, streaming: bool) -> None:
    corpus = fake({"train": rows(10), "dev": rows(3, "dev")}, splits={"train": "train", "valid": "dev"},
                  held_out=2, streaming=streaming)
    assert list(corpus.documents("valid")) == [f"dev {i}" for i in range(3)]
    assert list(corpus.documents("test")) == ["document 0", "document 1"]
    assert list(corpus.documents("train")) == [f"document {i}" for i in range(2, 10)]
    assert corpus.source == "hub:owner/name"


def test_rows_are_those_of_the_named_split(fake: OpenFake) -> None:
    corpus = fake({"train": rows(2), "dev": rows(3, "dev")}, splits={"test": "dev"})
    assert list(corpus.rows("test")) == rows(3, "dev")
    assert len(list(fake({"dev": rows(3)}, splits={"test": "dev"}, max_documents=2).rows("test"))) == 2


def test_valid_and_test_share_no_document(fake: OpenFake) -> None:
    corpus = fake({"train": rows(10)}, held_out=2, max_documents=3)
    assert [list(corpus.documents(s)) for s in ("valid", "test", "train")] == [
        [f"document {i}" for i in chosen] for chosen in ([0, 1], [2, 3], [4, 5, 6])]


def test_a_stream_is_read_no_further_than_asked(fake: OpenFake, monkeypatch: pytest.MonkeyPatch) -> None:
    corpus = fake({"train": rows(1)}, held_out=0)
    asked = []

    class Endless:
        def skip(self, _: int) -> Endless:
            return self

        def __iter__(self):
            for i in itertools.count():
                asked.append(i)
                yield {"text": str(i)}

    monkeypatch.setattr(corpus, "_rows", lambda _: Endless())
    assert list(itertools.islice(corpus.documents("train"), 5)) == list("01234")
    assert len(asked) == 5


def test_the_fingerprint_follows_commit_and_choice_of_documents(fake: OpenFake) -> None:
    data = {"train": rows(3)}
    same = [fake(data).fingerprint, fake(data, streaming=False).fingerprint]
    other = [fake(data, commit="decaf").fingerprint, fake(data, max_documents=2).fingerprint,
             fake(data, held_out=1).fingerprint, fake(data, name="config").fingerprint]
    assert same[0] == same[1]
    assert len({same[0], *other}) == 5


@pytest.mark.parametrize(
    ("arguments", "split", "message"),
    [
        ({"text_column": "body"}, "train",
         "data.hub.text_column: hub:owner/name: no column body; present are text, id"),
        ({"text_column": "id"}, "train",
         "data.hub.text_column: hub:owner/name: id holds int, expected a string"),
        ({"splits": {"train": "training"}}, "train", "data.hub.splits: hub:owner/name: .*training"),
        ({"splits": {"train": "training"}, "streaming": False}, "train",
         "data.hub.splits: hub:owner/name: .*training"),
        ({"splits": {"valid": "train"}}, "train", "data.hub.splits: names no split for train"),
        ({"splits": {"valid": "train"}}, "test", "data.hub.splits: names no split for test"),
        ({"held_out": 0}, "test", "data.hub.splits: names no split for test, and none is held out of train"),
    ],
)
def test_what_is_wrong_with_a_dataset_is_named(
    fake: OpenFake, arguments: dict, split: str, message: str
) -> None:
    corpus = fake({"train": rows(3)}, **{"held_out": 1} | arguments)
    with pytest.raises(DataError, match=f"^{message}"):
        list(corpus.documents(split))


def test_a_stream_that_breaks_off_is_a_data_error(fake: OpenFake, tmp_path: Path) -> None:
    corpus = fake({"train": rows(3)}, held_out=0)
    (tmp_path / "train.jsonl").write_text('{"text": "whole"}\n{"text": "bro')
    with pytest.raises(DataError, match="^data.hub: hub:owner/name: reading stopped: "):
        list(corpus.documents("train"))


def test_a_dataset_that_cannot_be_opened_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise ValueError("BuilderConfig 'sample' not found.\nAvailable: ...")

    monkeypatch.setattr(datasets, "load_dataset_builder", refuse)
    monkeypatch.setattr(hub, "hub_commit", lambda *_: "c0ffee")
    message = "^data.hub: hub:owner/name:sample cannot be opened: BuilderConfig 'sample'"
    with pytest.raises(DataError, match=message):
        HubText(HubSpec("owner/name", "sample"))


@pytest.fixture
def online(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Return a function that points the hub's client at an address, whatever the environment says."""

    def point(endpoint: str) -> None:
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", endpoint)

    return point


def closed_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return taken.getsockname()[1]


def test_an_unreachable_hub_is_asked_once_and_passed_over(
    online: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    online(f"http://127.0.0.1:{closed_port()}")
    monkeypatch.setattr(datasets, "load_dataset_builder", lambda *_, **__: pytest.fail("tried all the same"))
    spec = TextSpec(("hub", "embedded"), hub=HubSpec("owner/name"))
    corpus = load_text(spec)
    assert corpus.source == resolve(spec) == "embedded:lm"
    assert corpus.skipped[0].startswith("data.hub: cannot reach the Hugging Face hub for owner/name (")
    with pytest.raises(DataError, match="^data.sources: none of hub can serve: data.hub: cannot reach"):
        load_text(TextSpec(("hub",), hub=HubSpec("owner/name")))


def test_a_hub_that_does_not_answer_is_given_up(online: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "TIMEOUT_S", 0.2)
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        online(f"http://127.0.0.1:{silent.getsockname()[1]}")
        with pytest.raises(Unavailable, match="^data.hub: cannot reach the Hugging Face hub for owner/name"):
            hub_commit("owner/name", None, "dataset", "data.hub")


@pytest.mark.parametrize(
    ("status", "code", "error", "message"),
    [
        (404, "RepoNotFound", DataError, "data.hub: no dataset 'owner/name' on the hub, or it is private"),
        (404, "RevisionNotFound", DataError, "data.hub.revision: owner/name has no revision 'v9'"),
        (403, "GatedRepo", DataError, "data.hub: owner/name needs its terms accepted"),
        (403, "", DataError, "data.hub: the hub refused owner/name: "),
        (503, "", Unavailable, "data.hub: cannot reach the Hugging Face hub for owner/name"),
    ],
)
def test_the_answers_of_the_hub_are_told_apart(
    online: Callable, status: int, code: str, error: type[Exception], message: str
) -> None:
    import http.server
    import threading

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status)
            if code:
                self.send_header("X-Error-Code", code)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            online(f"http://127.0.0.1:{server.server_port}")
            with pytest.raises(error, match=f"^{message}"):
                hub_commit("owner/name", "v9", "dataset", "data.hub")
        finally:
            server.shutdown()
            thread.join()


def test_offline_only_the_cache_serves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "is_offline", lambda: True)

    def refuse(*_: object, **__: object) -> None:
        raise ConnectionError("Couldn't reach 'owner/name' on the Hub (OfflineModeIsEnabled)")

    monkeypatch.setattr(datasets, "load_dataset_builder", refuse)
    message = "^data.hub: HF_HUB_OFFLINE is set and owner/name is not in the cache"
    with pytest.raises(Unavailable, match=message):
        HubText(HubSpec("owner/name"))


def test_resolving_offline_looks_into_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    spec = TextSpec(("hub", "embedded"), hub=HubSpec("owner/name"))
    assert resolve(spec) == "embedded:lm"
    (tmp_path / "owner___name").mkdir()
    assert resolve(spec) == "hub:owner/name"


def test_a_missing_package_passes_the_hub_over(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)
    assert load_text(TextSpec(("hub", "embedded"), hub=HubSpec("owner/name"))).skipped == (hub.NO_PACKAGE,)
