"""The one door to text. Sources are tried in the order the config names them, and the one used is told.

A source that this machine cannot offer (no such folder, no network, a package missing) is passed over and its
reason remembered; a source that is there but wrong (corrupt file, missing column, unknown dataset) is an
error at once, for falling back would hide it.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from tasks.data.corpus import SPLITS, TextCorpus
from tasks.data.embedded import EmbeddedText
from tasks.data.hub import NO_PACKAGE, HubText, Unavailable, hub_commit, hub_source, is_cached, is_offline
from tasks.data.local import LocalText
from tasks.data.specs import SOURCES, HubSpec, ItemSpec, TextSpec, TokenizerSpec
from tasks.errors import DataError

__all__ = ["DATA_ROOT_VARIABLE", "SOURCES", "SPLITS", "HubSpec", "TextCorpus", "TextSpec", "TokenizerSpec",
           "check_data_root", "find_data_root", "first_that_serves", "load_text", "local_folder", "resolve"]

DATA_ROOT_VARIABLE = "ADASPLASH_DATA"

Loaded = TypeVar("Loaded")


def check_data_root(path: str | Path, origin: str) -> Path:
    """Return an explicitly given data root as a Path.

    Args:
        path: the folder.
        origin: where it was given, ``--data-root`` or ``ADASPLASH_DATA``, as the message shows it.

    Raises:
        DataError: it is no folder, or may not be read: a mistake even where another source could serve.
    """
    root = Path(path).expanduser()
    if not root.exists():
        raise DataError(f"data_root: no such folder: {path} (from {origin})")
    if not root.is_dir():
        raise DataError(f"data_root: not a folder: {path} (from {origin})")
    if not os.access(root, os.R_OK | os.X_OK):
        raise DataError(f"data_root: may not be read: {path} (from {origin})")
    return root


def find_data_root(given: str | Path | None, origin: str = "--data-root") -> Path | None:
    """Return the data root given, else the one of the environment, else None; see :func:`check_data_root`."""
    if given is not None:
        return check_data_root(given, origin)
    if variable := os.environ.get(DATA_ROOT_VARIABLE):
        return check_data_root(variable, DATA_ROOT_VARIABLE)
    return None


def local_folder(local: str | None, root: Path | None, key: str) -> Path:
    """Return the folder ``local`` below the data root.

    Raises:
        Unavailable: there is no data root, or no such folder below it.
    """
    if root is None:
        raise Unavailable(f"{key}: {local} needs a data folder (--data-root or {DATA_ROOT_VARIABLE})")
    folder = root / str(local)
    if not folder.is_dir():
        raise Unavailable(f"{key}: no folder {local} below {root}")
    return folder


def first_that_serves(
    sources: tuple[str, ...], openers: dict[str, Callable[[], Loaded]], key: str
) -> tuple[Loaded, tuple[str, ...]]:
    """Open the first source that can serve.

    Args:
        sources: names in the order to try.
        openers: for each name, a function that opens it or raises Unavailable.
        key: the config key that the message begins with.

    Returns:
        What was opened, and why each source before it could not serve.

    Raises:
        DataError: none can serve; the message gives every reason. Errors other than Unavailable pass through.
    """
    reasons: list[str] = []
    for source in sources:
        try:
            return openers[source](), tuple(reasons)
        except Unavailable as error:
            reasons.append(str(error))
    raise DataError(f"{key}: none of {', '.join(sources)} can serve: {'; '.join(reasons)}")


def resolve(spec: TextSpec | ItemSpec, data_root: str | Path | None = None, *, ask_hub: bool = True) -> str:
    """Tell which source :func:`load_text`, or a reader of items, would use, without loading anything.

    Args:
        spec: the sources.
        data_root: the folder given, else ``ADASPLASH_DATA``.
        ask_hub: make one request to learn whether the hub answers; otherwise assume that it does.

    Returns:
        For example ``local:lm/wikitext2``, ``hub:HuggingFaceFW/fineweb:sample-10BT`` or ``embedded:lm``.

    Raises:
        DataError: none can serve, or the data root given is no folder.
    """
    root = find_data_root(data_root)

    def local() -> str:
        local_folder(spec.local, root, "data.local")
        return f"local:{spec.local}"

    def hub() -> str:
        assert spec.hub is not None
        if importlib.util.find_spec("datasets") is None:
            raise Unavailable(NO_PACKAGE)
        if is_offline() and not is_cached(spec.hub):
            raise Unavailable(f"data.hub: HF_HUB_OFFLINE is set and {spec.hub.path} is not in the cache")
        if ask_hub:
            hub_commit(spec.hub.path, spec.hub.revision, "dataset", "data.hub")
        return hub_source(spec.hub)

    openers = {"local": local, "hub": hub, "embedded": lambda: EmbeddedText.source}
    return first_that_serves(spec.sources, openers, "data.sources")[0]


def load_text(spec: TextSpec, data_root: str | Path | None = None) -> TextCorpus:
    """Open the first source that can serve; documents are read when they are asked for.

    Args:
        spec: the sources.
        data_root: the folder given, else ``ADASPLASH_DATA``.

    Returns:
        The corpus; its ``source`` and ``fingerprint`` belong in the record, its ``skipped`` before the user's
        eyes.

    Raises:
        DataError: none can serve, the data root given is no folder, or a source that is there is wrong.
    """
    root = find_data_root(data_root)

    def local() -> TextCorpus:
        local_folder(spec.local, root, "data.local")
        assert root is not None
        return LocalText(root, spec)

    def hub() -> TextCorpus:
        assert spec.hub is not None
        return HubText(spec.hub)

    openers: dict[str, Callable[[], TextCorpus]] = {"local": local, "hub": hub, "embedded": EmbeddedText}
    corpus, corpus_skipped = first_that_serves(spec.sources, openers, "data.sources")
    corpus.skipped = corpus_skipped
    return corpus
