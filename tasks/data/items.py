"""Items of the zero-shot benchmarks HellaSwag and LAMBADA, laid out as EleutherAI's lm-evaluation-harness does.

HellaSwag (Zellers et al., 2019) as in ``lm_eval/tasks/hellaswag/utils.py``; LAMBADA (Paperno et al., 2016) in
OpenAI's formatting, as in ``lm_eval/tasks/lambada/lambada_openai.yaml``.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

from tasks.data.files import check_columns, read_jsonl
from tasks.data.hub import HubText, hub_source
from tasks.data.sources import find_data_root, first_that_serves, local_folder
from tasks.data.specs import ItemSpec
from tasks.errors import DataError


@dataclass(frozen=True)
class Choice:
    """A context, the endings to choose from (without the space before them), and the index of the right one."""

    context: str
    endings: tuple[str, ...]
    label: int


@dataclass(frozen=True)
class LastWord:
    """A passage up to its last word, and that word with the space before it."""

    context: str
    word: str


ItemT = TypeVar("ItemT", Choice, LastWord)


@dataclass(frozen=True)
class Items(Generic[ItemT]):
    """Items in the order of their source; ``fingerprint`` is the SHA-256 of their content."""

    items: tuple[ItemT, ...]
    source: str

    @property
    def fingerprint(self) -> str:
        return hashlib.sha256(json.dumps([asdict(item) for item in self.items]).encode()).hexdigest()


def load_hellaswag(spec: ItemSpec, data_root: str | Path | None = None) -> Items[Choice]:
    """Read HellaSwag: jsonl files of a folder, or ``Rowan/hellaswag``; rows as :func:`hellaswag_item` takes them.

    Raises:
        DataError: no source can serve, or a row is not one of HellaSwag's.
    """
    return _load(spec, data_root, hellaswag_item)


def load_lambada(spec: ItemSpec, data_root: str | Path | None = None) -> Items[LastWord]:
    """Read LAMBADA: jsonl files of a folder, or ``EleutherAI/lambada_openai``, with the column ``text``.

    Raises:
        DataError: no source can serve, or a row is not one of LAMBADA's.
    """
    return _load(spec, data_root, lambada_item)


def _load(spec: ItemSpec, data_root: str | Path | None, make: Callable[[dict[str, Any], str], ItemT]) -> Items[ItemT]:
    root = find_data_root(data_root)

    def local() -> tuple[Iterator[dict[str, Any]], str]:
        folder = local_folder(spec.local, root, "local")
        paths = sorted(folder.glob("*.jsonl"))
        if not paths:
            raise DataError(f"local: no .jsonl files in {folder}")
        return (row for path in paths for row in read_jsonl(path, "local")), f"local:{spec.local}"

    def hub() -> tuple[Iterator[dict[str, Any]], str]:
        assert spec.hub is not None
        return HubText(spec.hub).rows("test"), hub_source(spec.hub)

    (rows, source), _ = first_that_serves(spec.sources, {"local": local, "hub": hub}, "sources")
    items = []
    for row in rows:
        if spec.max_items is not None and len(items) >= spec.max_items:
            break
        items.append(make(row, f"{source}: item {len(items)}"))
    if not items:
        raise DataError(f"sources: {source} holds no items")
    return Items(tuple(items), source)


def hellaswag_item(row: dict[str, Any], where: str) -> Choice:
    """Lay out a row: ``activity_label: ctx_a Ctx_b`` and the endings, both without WikiHow's brackets.

    Args:
        row: activity_label, endings, label, and either ctx_a and ctx_b or only ctx, their concatenation. ctx_b is
            the begun sentence that the endings go on with, in lower case; it is found again in ctx as what follows
            the last full stop, where that begins with a small letter.
        where: what messages begin with.

    Raises:
        DataError: a column is missing or of the wrong type, or the label names no ending.
    """
    check_columns(row, ["activity_label", "endings", "label"], where)
    if "ctx_a" in row and "ctx_b" in row:
        begun, rest = row["ctx_a"], row["ctx_b"]
    else:
        check_columns(row, ["ctx"], where)
        begun, rest = _begun_sentence(str(row["ctx"]))
    endings = row["endings"]
    texts = [row["activity_label"], begun, rest, *(endings if isinstance(endings, list) else [None])]
    if not all(isinstance(text, str) for text in texts):
        raise DataError(f"{where}: activity_label, ctx and endings must be texts, endings a list of them")
    try:
        label = int(row["label"])
    except (TypeError, ValueError):
        label = -1
    cleaned = tuple(_without_brackets(ending) for ending in endings)
    if not 0 <= label < len(cleaned):
        raise DataError(f"{where}: label is {row['label']!r}, allowed is 0 to {len(cleaned) - 1}")
    if not all(cleaned):
        raise DataError(f"{where}: an ending is empty")
    return Choice(_without_brackets(f"{row['activity_label']}: {begun} {rest.capitalize()}"), cleaned, label)


def _begun_sentence(context: str) -> tuple[str, str]:
    """Split HellaSwag's ctx into ctx_a and ctx_b; where no begun sentence is found, ctx_b is empty."""
    found = re.fullmatch(r"(.*[.!?][\"')]*)\s+([a-z][^.!?]*)", context.strip(), re.DOTALL)
    return (found[1], found[2]) if found else (context, "")


def _without_brackets(text: str) -> str:
    text = text.strip().replace(" [title]", ". ")
    return re.sub(r"\[.*?\]", "", text).replace("  ", " ")


def lambada_item(row: dict[str, Any], where: str) -> LastWord:
    """Cut a passage before its last word, at the last space.

    Raises:
        DataError: the row has no text, or its text ends with a space.
    """
    check_columns(row, ["text"], where)
    if not isinstance(row["text"], str):
        raise DataError(f"{where}: text holds {type(row['text']).__name__}, expected a string")
    context, _, word = row["text"].rpartition(" ")
    if not word:
        raise DataError(f"{where}: the text has no last word")
    return LastWord(context, f" {word}")
