"""The data door on real corpora and tokenizers of the data folder."""

from __future__ import annotations

from pathlib import Path

import pytest

from tasks.data.sources import TextSpec, TokenizerSpec, load_text, resolve
from tasks.data.tokenizer import load_tokenizer
from tasks.data.tokens import TokenBlocks, tokenize_split

pytestmark = pytest.mark.realdata

WIKITEXT = TextSpec(("local",), local="lm/wikitext2", train_files=("valid.txt",), valid_files=("test.txt",))


def local_tokenizer(name: str, root: Path):
    if not (root / "tokenizers" / name).is_dir():
        pytest.skip(f"no tokenizers/{name} in the data folder")
    return load_tokenizer(TokenizerSpec(("local",), local=f"tokenizers/{name}"), root)


@pytest.mark.parametrize(
    ("name", "ids", "size", "separator"),
    [
        ("gpt2", [15496, 995], 50257, 50256),
        ("roberta-base", [0, 31414, 232, 2], 50265, 2),
        ("bert-base-uncased", [101, 7592, 2088, 102], 30522, 102),
        ("olmo-neox", [12092, 1533], 50280, 50279),
    ],
)
def test_known_tokenizers_give_their_known_ids(
    data_root: Path, name: str, ids: list[int], size: int, separator: int
) -> None:
    found = local_tokenizer(name, data_root)
    assert found.backend("Hello world").input_ids == ids
    assert (found.vocab_size, found.separator_id) == (size, separator)


def test_robertas_mask_takes_the_space_before_it(data_root: Path) -> None:
    assert local_tokenizer("roberta-base", data_root).backend(" world <mask>").input_ids == [0, 232, 50264, 2]


def test_wikitext_goes_from_files_to_windows(data_root: Path, tmp_path: Path) -> None:
    if not (data_root / "lm" / "wikitext2").is_dir():
        pytest.skip("no lm/wikitext2 in the data folder")
    tokenizer = local_tokenizer("gpt2", data_root)
    corpus = load_text(WIKITEXT, data_root)
    assert corpus.source == resolve(WIKITEXT, data_root) == "local:lm/wikitext2"
    text = (data_root / "lm/wikitext2/test.txt").read_text(encoding="utf-8")
    assert list(corpus.documents("valid")) == [text]
    found = tokenize_split(corpus, "valid", tokenizer, tmp_path)
    ids = found.open()
    assert tokenizer.backend.decode(ids[:-1], clean_up_tokenization_spaces=False) == text
    assert ids[-1] == 50256
    blocks = TokenBlocks(found, context=1024, vocab_size=50257)
    assert len(blocks) == (found.tokens - 1) // 1024
    assert len(blocks) > 250
