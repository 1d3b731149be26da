"""Tokenizers: from a local folder, the Hugging Face hub, or trained on the embedded text in seconds."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

import tokenizers
from transformers import (
    AutoTokenizer,
    BertTokenizer,
    GPT2Tokenizer,
    PreTrainedTokenizerFast,
    RobertaTokenizer,
)

from tasks.data import bpe
from tasks.data.embedded import EmbeddedText
from tasks.data.files import read_text, write_atomically
from tasks.data.hub import Unavailable, first_line, hub_commit
from tasks.data.sources import find_data_root, first_that_serves, local_folder
from tasks.data.specs import TokenizerSpec
from tasks.errors import DataError

KEY = "tokenizer.local"
# A bare tokenizer.json does not say which token plays which part; these names do.
USUAL_NAMES = {
    "bos_token": ("<s>", "<|endoftext|>"),
    "eos_token": ("</s>", "<|endoftext|>"),
    "unk_token": ("<unk>", "[UNK]"),
    "pad_token": ("<pad>", "[PAD]", "<|padding|>"),
    "cls_token": ("<s>", "[CLS]"),
    "sep_token": ("</s>", "[SEP]"),
    "mask_token": ("<mask>", "[MASK]"),
}


@dataclass(frozen=True)
class Tokenizer:
    """A tokenizer and where it comes from.

    Attributes:
        backend: the Hugging Face tokenizer; where it has no padding token, the end-of-text token pads.
        source: for example ``local:tokenizers/gpt2``, ``hub:gpt2`` or ``embedded:bpe-4096``.
        fingerprint: SHA-256 over the rules, vocabulary and special tokens.
        skipped: one sentence for each source named before this one that could not serve.
    """

    backend: PreTrainedTokenizerFast
    source: str
    fingerprint: str
    skipped: tuple[str, ...] = ()

    @property
    def vocab_size(self) -> int:
        """Number of token ids, added tokens included: the smallest embedding that fits."""
        return len(self.backend)

    @property
    def separator_id(self) -> int:
        """The id that ends a document: end of text, or BERT's separator.

        Raises:
            DataError: the tokenizer has neither.
        """
        for token in (self.backend.eos_token_id, self.backend.sep_token_id):
            if token is not None:
                return int(token)
        raise DataError(f"tokenizer: {self.source} has no end-of-text or separator token to end documents")


def load_tokenizer(
    spec: TokenizerSpec, data_root: str | Path | None = None, cache_dir: str | Path | None = None
) -> Tokenizer:
    """Open the first source of a tokenizer that can serve.

    Args:
        spec: the sources. A local folder holds tokenizer.json, or vocab.json and merges.txt (GPT-2,
            RoBERTa), or vocab.txt (BERT).
        data_root: the folder given, else ``ADASPLASH_DATA``.
        cache_dir: where the tokenizer trained on embedded text is kept; None trains it anew.

    Raises:
        DataError: none can serve, or a folder that is there holds no tokenizer or a corrupt one.
    """
    root = find_data_root(data_root)

    def local() -> tuple[PreTrainedTokenizerFast, str]:
        return read_folder(local_folder(spec.local, root, KEY)), f"local:{spec.local}"

    def hub() -> tuple[PreTrainedTokenizerFast, str]:
        return _from_hub(str(spec.hub)), f"hub:{spec.hub}"

    def embedded() -> tuple[PreTrainedTokenizerFast, str]:
        return _embedded(spec.vocab_size, cache_dir and Path(cache_dir)), f"embedded:bpe-{spec.vocab_size}"

    openers = {"local": local, "hub": hub, "embedded": embedded}
    (backend, source), skipped = first_that_serves(spec.sources, openers, "tokenizer.sources")
    if backend.pad_token is None:
        backend.pad_token = backend.eos_token  # as is usual for GPT-2; padding is masked anyway
    return Tokenizer(backend, source, _fingerprint(backend), skipped)


def _fingerprint(backend: PreTrainedTokenizerFast) -> str:
    parts = [backend.backend_tokenizer.to_str(), backend.special_tokens_map]
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()


def read_folder(folder: Path) -> PreTrainedTokenizerFast:
    """Read a tokenizer folder of one of the three layouts.

    Raises:
        DataError: the folder has none of the layouts, or a file of it is corrupt.
    """
    if (path := folder / "tokenizer.json").is_file():
        raw = _parse(path)
        return PreTrainedTokenizerFast(tokenizer_object=raw, **_special_tokens(raw, folder))
    if (path := folder / "vocab.json").is_file() and (merges := folder / "merges.txt").is_file():
        vocabulary = _vocabulary(path)
        kind = RobertaTokenizer if "<s>" in vocabulary else GPT2Tokenizer
        if kind is GPT2Tokenizer and "<|endoftext|>" not in vocabulary:
            raise DataError(f"{KEY}: {path} is neither GPT-2's (with <|endoftext|>) nor RoBERTa's (with <s>)")
        return _build(kind, folder, vocab=vocabulary, merges=_merges(merges))
    if (path := folder / "vocab.txt").is_file():
        tokens = read_text(path, KEY).rstrip("\n").split("\n")
        # Uncased vocabularies hold no upper-case letters outside their special tokens.
        uncased = not any(t != t.lower() for t in tokens if not t.startswith("["))
        vocabulary = {token: i for i, token in enumerate(tokens)}
        return _build(BertTokenizer, folder, vocab=vocabulary, do_lower_case=uncased)
    raise DataError(f"{KEY}: no tokenizer in {folder}; expected tokenizer.json, vocab.json with merges.txt, "
                    "or vocab.txt")


def _build(kind: type[PreTrainedTokenizerFast], folder: Path, **arguments: object) -> PreTrainedTokenizerFast:
    try:
        return kind(**arguments)
    except Exception as error:  # the Rust library raises bare Exception
        raise DataError(f"{KEY}: {folder} holds no usable tokenizer: {first_line(error)}") from error


def _parse(path: Path) -> tokenizers.Tokenizer:
    try:
        return tokenizers.Tokenizer.from_str(read_text(path, KEY))
    except DataError:
        raise
    except Exception as error:  # the Rust library raises bare Exception
        raise DataError(f"{KEY}: {path} is not a tokenizer: {first_line(error)}") from error


def _read_json(path: Path) -> dict:
    try:
        content = json.loads(read_text(path, KEY))
    except ValueError as error:
        raise DataError(f"{KEY}: {path} is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise DataError(f"{KEY}: {path} holds {type(content).__name__}, expected an object")
    return content


def _vocabulary(path: Path) -> dict[str, int]:
    vocabulary = _read_json(path)
    if not all(isinstance(i, int) for i in vocabulary.values()):
        raise DataError(f"{KEY}: {path} is not a vocabulary: an id is not an integer")
    return vocabulary


def _merges(path: Path) -> list[tuple[str, str]]:
    merges = []
    for number, line in enumerate(read_text(path, KEY).split("\n"), 1):
        if line and not (number == 1 and line.startswith("#version")):
            left, _, right = line.partition(" ")
            if not left or not right or " " in right:
                raise DataError(f"{KEY}: {path}:{number}: got {line!r}, expected two tokens with a space")
            merges.append((left, right))
    return merges


def _special_tokens(raw: tokenizers.Tokenizer, folder: Path) -> dict[str, str]:
    """Return which token plays which part: as tokenizer_config.json says, else by its usual name."""
    path = folder / "tokenizer_config.json"
    named = _read_json(path) if path.is_file() else {}
    found = {}
    for part, usual in USUAL_NAMES.items():
        given = named.get(part)
        token = given.get("content") if isinstance(given, dict) else given
        token = token or next((t for t in usual if raw.token_to_id(t) is not None), None)
        if token is not None and raw.token_to_id(token) is None:
            raise DataError(f"{KEY}: {path} names {token!r} as {part}, which is not in the vocabulary")
        if token is not None:
            found[part] = token
    return found


def _from_hub(repository: str) -> PreTrainedTokenizerFast:
    commit = hub_commit(repository, None, "model", "tokenizer.hub")
    try:
        backend = AutoTokenizer.from_pretrained(repository, revision=commit or "main")
    except Exception as error:
        if commit is None:
            where = "HF_HUB_OFFLINE is set and the cache lacks"
            raise Unavailable(f"tokenizer.hub: {where} {repository}") from error
        raise DataError(f"tokenizer.hub: {repository} cannot be loaded: {first_line(error)}") from error
    if not isinstance(backend, PreTrainedTokenizerFast):
        raise DataError(f"tokenizer.hub: {repository} is not built on the tokenizers library")
    return backend


def _embedded(vocab_size: int, cache_dir: Path | None) -> PreTrainedTokenizerFast:
    """Return the byte-level BPE of the embedded training text, from the cache where it is there and whole."""
    text = EmbeddedText()
    key = hashlib.sha256(json.dumps([text.fingerprint, vocab_size, bpe.SPECIAL, tokenizers.__version__])
                         .encode()).hexdigest()
    path = cache_dir and cache_dir / "tokenizers" / f"embedded-{vocab_size}-{key[:16]}" / "tokenizer.json"
    raw = None
    if path and path.is_file():
        try:
            raw = _parse(path)
        except DataError:
            raw = None  # damaged from outside; training takes seconds
    if raw is None or raw.get_vocab_size() != vocab_size:
        raw = bpe.train(text.documents("train"), vocab_size)
        if path:
            write_atomically(path, raw.to_str().encode(), "cache_dir")
    parts = {part: name for part, names in USUAL_NAMES.items() for name in names if name in bpe.SPECIAL}
    return PreTrainedTokenizerFast(tokenizer_object=raw, **parts)
