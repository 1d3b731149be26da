from __future__ import annotations

import pytest

from tasks.config import from_plain
from tasks.data.specs import HubSpec, TextSpec, TokenizerSpec
from tasks.errors import ConfigError


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"sources": []}, "data.sources: empty"),
        ({"sources": ["disk"]}, r"data.sources\[0\]: got 'disk', allowed are local, hub, embedded"),
        ({"sources": ["embedded", "embedded"]}, r"data.sources\[1\]: 'embedded' is named twice"),
        ({"sources": ["local"]}, "data.local: missing"),
        ({"sources": ["hub"]}, "data.hub: missing"),
        ({"sources": ["local"], "local": "/data/lm"}, "data.local: got '/data/lm'"),
        ({"sources": ["local"], "local": "../lm"}, "data.local: got '../lm'"),
        ({"sources": ["local"], "local": "lm", "valid_files": []}, "data.valid_files: empty"),
        ({"sources": ["local"], "local": "lm", "test_files": ["../x"]}, r"data.test_files\[0\]: got '../x'"),
        ({"sources": ["embedded"], "held_out": 0.5}, "data.held_out: got 0.5"),
        ({"sources": ["hub"], "hub": {"path": "a/b/c"}}, "data.hub.path: got 'a/b/c'"),
        ({"sources": ["hub"], "hub": {"path": "./here"}}, "data.hub.path: got './here'"),
        ({"sources": ["hub"], "hub": {"path": "a", "splits": {"dev": "x"}}},
         "data.hub.splits.dev: unknown key"),
        ({"sources": ["hub"], "hub": {"path": "a", "splits": {}}}, "data.hub.splits: empty"),
        ({"sources": ["hub"], "hub": {"path": "a", "max_documents": 0}}, "data.hub.max_documents: got 0"),
        ({"sources": ["hub"], "hub": {"path": "a", "held_out": -1}}, "data.hub.held_out: got -1"),
        ({"sources": ["embedded"], "locale": "x"}, "data.locale: unknown key"),
    ],
)
def test_a_wrong_text_spec_names_its_key(values: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=f"^{message}"):
        from_plain(TextSpec, values, "data")


def test_a_tokenizer_spec_names_its_key() -> None:
    with pytest.raises(ConfigError, match=r"^tokenizer.vocab_size: got 100, allowed is 300 or more"):
        from_plain(TokenizerSpec, {"sources": ["embedded"], "vocab_size": 100}, "tokenizer")
    with pytest.raises(ConfigError, match=r"^tokenizer.local: missing"):
        from_plain(TokenizerSpec, {"sources": ["local", "embedded"]}, "tokenizer")


def test_specs_load_from_yaml_values() -> None:
    hub = {"path": "HuggingFaceFW/fineweb", "name": "sample-10BT", "splits": {"train": "train"}}
    values = {"sources": ["local", "hub"], "local": "lm/web", "valid_files": ["v.txt"], "hub": hub}
    spec = from_plain(TextSpec, values, "data")
    assert spec.hub == HubSpec("HuggingFaceFW/fineweb", "sample-10BT")
    assert spec.files == {"valid": ("v.txt",)}
