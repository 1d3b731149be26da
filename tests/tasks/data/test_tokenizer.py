from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tasks.data import bpe, hub, tokenizer
from tasks.data.embedded import EmbeddedText
from tasks.data.sources import TokenizerSpec
from tasks.data.tokenizer import load_tokenizer
from tasks.errors import DataError

pytestmark = pytest.mark.usefixtures("no_environment")
MakeFiles = Callable[[dict[str, str | bytes]], Path]

LOCAL = TokenizerSpec(("local",), local="tokenizers/x")
EMBEDDED = TokenizerSpec(("embedded",), vocab_size=512)
GPT2_VOCABULARY = {"<|endoftext|>": 0, "a": 1, "b": 2, "ab": 3, "\u0120": 4}


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


def test_the_embedded_tokenizer_round_trips_any_text(cache: Path) -> None:
    found = load_tokenizer(EMBEDDED, cache_dir=cache)
    assert (found.source, found.vocab_size, found.skipped) == ("embedded:bpe-512", 512, ())
    unseen = next(EmbeddedText().documents("test"))
    for text in ("Hello  world\n\n\tdef f(x):", "naïve café ☕ 漢字 \N{GRINNING FACE}", unseen):
        ids = found.backend(text).input_ids
        assert found.backend.decode(ids, skip_special_tokens=True) == text
        assert (ids[0], ids[-1]) == (found.backend.cls_token_id, found.backend.sep_token_id)
    special = [found.backend.pad_token_id, found.backend.mask_token_id, found.separator_id, ids[0]]
    assert sorted(special) == [0, 1, 2, 3]


def test_training_gives_the_same_merges_in_another_process() -> None:
    script = ("from tasks.data.bpe import train; from tasks.data.embedded import EmbeddedText; "
              "print(train(EmbeddedText().documents('valid'), 400).to_str())")
    root = Path(bpe.__file__).parents[2]
    environment = {**os.environ, "PYTHONHASHSEED": "7", "RAYON_NUM_THREADS": "1"}
    other = subprocess.run([sys.executable, "-c", script], cwd=root, env=environment, check=True,
                           capture_output=True, text=True, encoding="utf-8").stdout
    assert other.strip() == bpe.train(EmbeddedText().documents("valid"), 400).to_str()


def test_a_kept_tokenizer_is_used_and_a_damaged_one_trained_anew(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = load_tokenizer(EMBEDDED, cache_dir=cache)
    (path,) = cache.rglob("tokenizer.json")
    with monkeypatch.context() as patch:
        patch.setattr(bpe, "train", lambda *_: pytest.fail("trained again"))
        assert load_tokenizer(EMBEDDED, cache_dir=cache).fingerprint == first.fingerprint
    whole = path.read_bytes()
    path.write_bytes(whole[:1000])
    assert load_tokenizer(EMBEDDED, cache_dir=cache).fingerprint == first.fingerprint
    assert path.read_bytes() == whole


def test_two_files_make_a_gpt2_tokenizer(make_files: MakeFiles) -> None:
    root = make_files({"tokenizers/x/vocab.json": json.dumps(GPT2_VOCABULARY),
                       "tokenizers/x/merges.txt": "#version: 0.2\na b\n"})
    found = load_tokenizer(LOCAL, root)
    assert found.backend("abab ba").input_ids == [3, 3, 4, 2, 1]
    assert (found.source, found.separator_id, found.backend.pad_token_id) == ("local:tokenizers/x", 0, 0)


def test_two_files_with_robertas_special_tokens_make_robertas_tokenizer(make_files: MakeFiles) -> None:
    tokens = ["<s>", "<pad>", "</s>", "<unk>", "a", "b", "ab", "<mask>"]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    found = load_tokenizer(LOCAL, make_files({"tokenizers/x/vocab.json": json.dumps(vocabulary),
                                              "tokenizers/x/merges.txt": "a b\n"}))
    assert found.backend("aba <mask>").input_ids == [0, 6, 4, 7, 2]
    assert (found.vocab_size, found.backend.pad_token_id) == (len(tokens), 1)


@pytest.mark.parametrize(
    ("words", "ids"), [(["hello", "world"], [2, 4, 5, 3]), (["Hello", "world"], [2, 0, 5, 3])])
def test_a_vocabulary_file_makes_a_bert_tokenizer(make_files: MakeFiles, words: list, ids: list) -> None:
    tokens = ["[UNK]", "[PAD]", "[CLS]", "[SEP]", *words]
    found = load_tokenizer(LOCAL, make_files({"tokenizers/x/vocab.txt": "\n".join(tokens) + "\n"}))
    assert found.backend("hello world").input_ids == ids, "case is kept where the vocabulary has capitals"
    assert found.separator_id == 3


def test_a_tokenizer_file_gets_its_special_tokens_by_name_or_config(
    make_files: MakeFiles, cache: Path
) -> None:
    load_tokenizer(EMBEDDED, cache_dir=cache)
    (path,) = cache.rglob("tokenizer.json")
    root = make_files({"tokenizers/x/tokenizer.json": path.read_bytes()})
    backend = load_tokenizer(LOCAL, root).backend
    assert (backend.bos_token, backend.eos_token, backend.pad_token) == ("<s>", "</s>", "<pad>")
    assert len(backend) == 512
    config = {"eos_token": {"content": "<mask>"}, "pad_token": "<s>"}
    make_files({"tokenizers/x/tokenizer_config.json": json.dumps(config)})
    backend = load_tokenizer(LOCAL, root).backend
    assert (backend.eos_token, backend.pad_token, backend.sep_token) == ("<mask>", "<s>", "</s>")
    make_files({"tokenizers/x/tokenizer_config.json": json.dumps({"eos_token": "<stop>"})})
    message = r"^tokenizer.local: .*tokenizer_config\.json names '<stop>' as eos_token"
    with pytest.raises(DataError, match=message):
        load_tokenizer(LOCAL, root)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"README": ""}, "no tokenizer in .*x; expected tokenizer.json, vocab.json with merges.txt, or "),
        ({"vocab.json": "{}"}, "no tokenizer in "),
        ({"tokenizer.json": '{"model": '}, r".*tokenizer\.json is not a tokenizer: "),
        ({"tokenizer.json": b"\xff"}, r".*tokenizer\.json:1: not UTF-8"),
        ({"vocab.json": '{"a": 0', "merges.txt": ""}, r".*vocab\.json is not JSON"),
        ({"vocab.json": "[]", "merges.txt": ""}, r".*vocab\.json holds list, expected an object"),
        ({"vocab.json": '{"a": "b"}', "merges.txt": ""}, r".*vocab\.json is not a vocabulary: an id is not "),
        ({"vocab.json": '{"a": 0}', "merges.txt": ""}, r".*vocab\.json is neither GPT-2's "),
        ({"vocab.json": '{"<s>": 0}', "merges.txt": "#version\na b\nabc\n"}, r".*merges\.txt:3: got 'abc'"),
        ({"vocab.json": '{"<s>": 0}', "merges.txt": "x y"}, "holds no usable tokenizer: "),
    ],
)
def test_a_corrupt_folder_is_named(make_files: MakeFiles, files: dict, message: str) -> None:
    root = make_files({f"tokenizers/x/{name}": content for name, content in files.items()})
    with pytest.raises(DataError, match=f"^tokenizer.local: (.*x )?{message}"):
        load_tokenizer(LOCAL, root)


def test_the_next_source_serves_and_the_reasons_are_kept(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise hub.Unavailable("tokenizer.hub: cannot reach the Hugging Face hub")

    monkeypatch.setattr(tokenizer, "hub_commit", refuse)
    spec = TokenizerSpec(("local", "hub", "embedded"), local="tokenizers/x", hub="gpt2", vocab_size=512)
    found = load_tokenizer(spec, tmp_path, cache)
    assert found.source == "embedded:bpe-512"
    assert [reason.partition(":")[0] for reason in found.skipped] == ["tokenizer.local", "tokenizer.hub"]
    message = "^tokenizer.sources: none of hub can serve: tokenizer.hub: cannot reach"
    with pytest.raises(DataError, match=message):
        load_tokenizer(TokenizerSpec(("hub",), hub="gpt2"))


@pytest.mark.parametrize(
    ("commit", "message"),
    [("c0ffee", "tokenizer.hub: gpt2 cannot be loaded: broken"),
     (None, "tokenizer.sources: none of hub can serve: tokenizer.hub: HF_HUB_OFFLINE is set and the cache ")],
)
def test_a_hub_tokenizer_that_fails_is_named(
    commit: str | None, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise OSError("broken\nand more")

    monkeypatch.setattr(tokenizer, "hub_commit", lambda *_: commit)
    monkeypatch.setattr(tokenizer.AutoTokenizer, "from_pretrained", fail)
    with pytest.raises(DataError, match=f"^{message}"):
        load_tokenizer(TokenizerSpec(("hub",), hub="gpt2"))


def test_a_hub_tokenizer_is_pinned_to_the_commit_asked_for(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend = load_tokenizer(EMBEDDED, cache_dir=cache).backend
    monkeypatch.setattr(tokenizer, "hub_commit", lambda *_: "c0ffee")
    asked = []
    monkeypatch.setattr(tokenizer.AutoTokenizer, "from_pretrained",
                        lambda name, revision: asked.append((name, revision)) or backend)
    assert load_tokenizer(TokenizerSpec(("hub",), hub="owner/name")).source == "hub:owner/name"
    assert asked == [("owner/name", "c0ffee")]


def test_more_merges_than_the_text_has_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    class Short(EmbeddedText):
        def documents(self, _: str):
            yield "a few words"

    monkeypatch.setattr(tokenizer, "EmbeddedText", Short)
    with pytest.raises(DataError, match="^tokenizer.vocab_size: got 512, the embedded text yields only 26"):
        load_tokenizer(EMBEDDED)


def test_a_tokenizer_without_an_end_cannot_join_documents(make_files: MakeFiles) -> None:
    root = make_files({"tokenizers/x/vocab.txt": "[UNK]\n[PAD]\n[CLS]\n[SEP]\nhello\n"})
    found = load_tokenizer(LOCAL, root)
    found.backend.sep_token = None
    with pytest.raises(DataError, match="^tokenizer: local:tokenizers/x has no end-of-text or separator "):
        _ = found.separator_id
