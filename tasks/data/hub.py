"""Text datasets of the Hugging Face hub, streamed; and a check that fails fast without a network."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

from tasks.data.corpus import SPLITS, TextCorpus, check_split
from tasks.data.files import check_columns
from tasks.data.specs import HubSpec
from tasks.errors import DataError

NO_PACKAGE = "data.hub: needs the package datasets, which is not installed"
TIMEOUT_S = 10.0  # for connecting, and again for the answer


class Unavailable(Exception):
    """A source cannot serve on this machine; the next one named may."""


def is_offline() -> bool:
    """Tell whether ``HF_HUB_OFFLINE`` is set, in which case only the hub's local cache serves."""
    from huggingface_hub import constants

    return bool(constants.HF_HUB_OFFLINE)


def hub_commit(repository: str, revision: str | None, kind: str, key: str) -> str | None:
    """Ask the hub once which commit a revision is, and thereby whether the hub can be reached.

    The loaders of ``datasets`` and ``transformers`` repeat a failed request five times with growing pauses
    and have no setting for it: without a network they need 23 and 46 seconds to give up. One request settles
    it beforehand.

    Args:
        repository: ``owner/name`` or ``name``.
        revision: branch, tag or commit; None is the newest.
        kind: ``dataset`` or ``model``.
        key: the config key that messages begin with.

    Returns:
        The commit's hash, or None when ``HF_HUB_OFFLINE`` leaves only the cache.

    Raises:
        Unavailable: the hub does not answer, or answers with a failure of its own.
        DataError: no such repository or revision, or no access to it.
    """
    from huggingface_hub import HfApi
    from huggingface_hub import errors as hub_errors

    if is_offline():
        return None
    try:
        return HfApi().repo_info(repository, revision=revision, repo_type=kind, timeout=TIMEOUT_S).sha
    except hub_errors.GatedRepoError as error:
        terms = "needs its terms accepted on the hub and a login (HF_TOKEN)"
        raise DataError(f"{key}: {repository} {terms}") from error
    except hub_errors.RevisionNotFoundError as error:
        raise DataError(f"{key}.revision: {repository} has no revision {revision!r}") from error
    except hub_errors.RepositoryNotFoundError as error:
        raise DataError(f"{key}: no {kind} {repository!r} on the hub, or it is private") from error
    except hub_errors.HFValidationError as error:
        raise DataError(f"{key}: {first_line(error)}") from error
    except Exception as error:  # what the HTTP library of the day raises for no network and time-outs
        status = getattr(getattr(error, "response", None), "status_code", None)
        if status is not None and 400 <= status < 500 and status not in (408, 429):
            raise DataError(f"{key}: the hub refused {repository}: {first_line(error)}") from error
        reason = f"{type(error).__name__}: {first_line(error)}"
        raise Unavailable(f"{key}: cannot reach the Hugging Face hub for {repository} ({reason}); "
                          "with a filled cache, set HF_HUB_OFFLINE=1") from error


def first_line(error: BaseException) -> str:
    """Return an exception's message up to its first line's end."""
    return next(iter(str(error).strip().splitlines()), "no message")


def hub_source(spec: HubSpec) -> str:
    """Return the source name of a dataset, for example ``hub:HuggingFaceFW/fineweb:sample-10BT``."""
    return ":".join(["hub", spec.path] + ([spec.name] if spec.name else []))


def is_cached(spec: HubSpec) -> bool:
    """Tell whether the cache of ``datasets`` has a folder for this dataset."""
    from datasets import config

    return (config.HF_DATASETS_CACHE / spec.path.replace("/", "___")).is_dir()


class HubText(TextCorpus):
    """The text of a dataset on the hub; opening it fetches its description, not its rows.

    Raises:
        Unavailable: ``datasets`` is not installed, or the hub cannot be reached and its cache lacks the
            dataset.
        DataError: no such dataset, configuration or revision.
    """

    def __init__(self, spec: HubSpec) -> None:
        try:
            import datasets
        except ImportError as error:
            raise Unavailable(NO_PACKAGE) from error
        self.source = hub_source(spec)
        self._spec = spec
        commit = hub_commit(spec.path, spec.revision, "dataset", "data.hub")
        revision = commit or spec.revision
        try:
            self._builder = datasets.load_dataset_builder(spec.path, spec.name, revision=revision)
        except Exception as error:
            if commit is None:
                raise Unavailable(f"data.hub: HF_HUB_OFFLINE is set and {spec.path} is not in the cache "
                                  f"({first_line(error)})") from error
            raise DataError(f"data.hub: {self.source} cannot be opened: {first_line(error)}") from error
        self._commit = commit or str(self._builder.hash)

    @property
    def fingerprint(self) -> str:
        """SHA-256 over the dataset's commit and the settings that choose its documents."""
        chosen = {k: v for k, v in asdict(self._spec).items() if k not in ("revision", "streaming")}
        return hashlib.sha256(json.dumps([self._commit, chosen], sort_keys=True).encode()).hexdigest()

    def documents(self, split: str) -> Iterator[str]:
        """Yield the documents of a split as they arrive; nothing is kept."""
        check_split(split)
        unnamed = [s for s in SPLITS if s not in self._spec.splits]
        if split == "train" and split in unnamed:
            raise DataError("data.hub.splits: names no split for train")
        held_out = self._spec.held_out
        if split in unnamed and (not held_out or "train" not in self._spec.splits):
            raise DataError(f"data.hub.splits: names no split for {split}, and none is held out of train")
        rows = self._rows(self._spec.splits["train" if split in unnamed else split])
        if split in unnamed:
            rows = rows.skip(unnamed.index(split) * held_out).take(held_out)
        elif split == "train":
            rows = rows.skip(len(unnamed) * held_out)
        yield from itertools.islice(self._texts(rows), self._spec.max_documents)

    def rows(self, split: str) -> Iterator[dict[str, Any]]:
        """Yield whole rows of a split that the config names, at most ``max_documents`` of them."""
        rows = iter(self._rows(self._spec.splits[split]))
        yield from itertools.islice(self._each(rows), self._spec.max_documents)

    def _rows(self, name: str) -> Any:
        try:
            if self._spec.streaming:
                return self._builder.as_streaming_dataset(split=name)
            self._builder.download_and_prepare()
            return self._builder.as_dataset(split=name)
        except ValueError as error:  # "Bad split", "Unknown split": says which there are
            raise DataError(f"data.hub.splits: {self.source}: {first_line(error)}") from error
        except Exception as error:
            raise DataError(f"data.hub: {self.source}: split {name}: {first_line(error)}") from error

    def _texts(self, rows: Any) -> Iterator[str]:
        column = self._spec.text_column
        where = f"data.hub.text_column: {self.source}"
        for row in self._each(iter(rows)):
            check_columns(row, [column], where)
            if not isinstance(row[column], str):
                raise DataError(f"{where}: {column} holds {type(row[column]).__name__}, expected a string")
            if row[column].strip():
                yield row[column]

    def _each(self, rows: Iterator[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        while True:
            try:
                row = next(rows)
            except StopIteration:
                return
            except Exception as error:  # network, parquet and JSON errors alike
                raise DataError(f"data.hub: {self.source}: reading stopped: {first_line(error)}") from error
            yield row
