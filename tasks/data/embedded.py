"""The embedded set: three views of the text that every Python installation carries.

It lets every experiment run on a machine without data and without a network. The views are the same on every
machine with the same Python; another version has slightly different text, which the fingerprints show.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Any

from tasks.data.corpus import SPLITS, TextCorpus, check_split, digest, hold_out
from tasks.data.stdlib_text import Docstring, docstrings, topics

TEXT_HELD_OUT = 0.1

# Top-level modules by what they are for. A module missing from a Python version is simply not there.
AREAS = {
    "command line and logging": (
        "argparse cmd getopt getpass logging optparse platform readline rlcompleter site sysconfig venv"
    ),
    "concurrency": (
        "_threading_local asyncio concurrent multiprocessing pty queue sched subprocess threading"
    ),
    "data structures": (
        "_collections_abc _py_abc _weakrefset abc bisect collections contextlib copy copyreg ctypes "
        "dataclasses dbm enum functools graphlib heapq operator pickle shelve sqlite3 weakref"
    ),
    "email": "base64 binhex email mailbox mailcap mimetypes quopri uu",
    "files and archives": (
        "_compression _pyio bz2 filecmp fileinput genericpath glob gzip io linecache lzma ntpath os "
        "pathlib posixpath shutil stat tarfile tempfile zipfile"
    ),
    "graphical interfaces": "curses tkinter turtle",
    "language tools": (
        "ast code codeop compileall dis imp importlib inspect modulefinder opcode pickletools pkgutil "
        "py_compile pyclbr pydoc runpy symtable tokenize types typing zipimport"
    ),
    "networking": (
        "asynchat asyncore cgi cgitb ftplib http imaplib ipaddress netrc nntplib poplib selectors smtpd "
        "smtplib socket socketserver ssl telnetlib urllib webbrowser wsgiref xmlrpc"
    ),
    "numbers and dates": (
        "_pydatetime _pydecimal _pylong _strptime calendar colorsys datetime decimal fractions hashlib "
        "hmac numbers random secrets statistics uuid zoneinfo"
    ),
    "testing and debugging": (
        "bdb cProfile doctest faulthandler pdb profile pstats timeit trace traceback tracemalloc unittest "
        "warnings"
    ),
    "text and data formats": (
        "_markupbase codecs configparser csv difflib fnmatch gettext html json locale plistlib pprint re "
        "reprlib shlex string stringprep textwrap tomllib xml"
    ),
}
PASSAGE_CHARACTERS = (60, 800)
PASSAGES = {"test": 40, "valid": 40, "train": 200}  # at most, for each label: labels are balanced
LARGEST_HELD_OUT_MODULE = 0.35  # of its label's passages; the largest modules train
SHINGLE_WORDS, LARGEST_OVERLAP = 4, 0.5

TITLE_CHARACTERS, SECTION_CHARACTERS = (20, 120), 100
QUERY_SHARES = {"test": 0.25, "valid": 0.1}


def _fingerprint(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


# --- language modelling -------------------------------------------------------------------------------------


class EmbeddedText(TextCorpus):
    """Documents for language modelling: a module's docstrings, or a chapter of the language reference."""

    source = "embedded:lm"

    @property
    def fingerprint(self) -> str:
        """SHA-256 over all documents by split."""
        return _fingerprint(_text_by_split())

    def documents(self, split: str) -> Iterator[str]:
        """Yield the documents of a split, modules before chapters, each in alphabetical order."""
        check_split(split)
        yield from _text_by_split()[split]


@lru_cache(maxsize=1)
def _text_by_split() -> dict[str, tuple[str, ...]]:
    modules: dict[str, list[str]] = defaultdict(list)
    for item in docstrings():
        heading = f"{item.module}.{item.name}" if item.name else item.module
        modules[item.module].append(f"{heading}\n\n{item.text}")
    documents = ["\n\n\n".join(parts) + "\n" for parts in modules.values()] + list(topics().values())
    held_out = hold_out((digest(d) for d in documents), TEXT_HELD_OUT, "embedded")
    by_split: dict[str, list[str]] = {split: [] for split in SPLITS}
    for document in documents:
        by_split[held_out.get(digest(document), "train")].append(document)
    return {split: tuple(texts) for split, texts in by_split.items()}


# --- classification -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Labelled:
    """A passage and the index of its label."""

    text: str
    label: int


@dataclass(frozen=True)
class LabelledSet:
    """Passages of docstrings; the label is the area of the standard library that they come from.

    A module's passages are all in one split, and held-out passages that share more than half of their
    four-word sequences with an earlier split are left out, so that no near-duplicate crosses.

    Attributes:
        labels: the areas, in alphabetical order.
        splits: passages of train, valid and test, in random but fixed order.
        fingerprint: SHA-256 over labels and passages.
    """

    labels: tuple[str, ...]
    splits: dict[str, tuple[Labelled, ...]]
    fingerprint: str
    source: str = "embedded:labelled"


@lru_cache(maxsize=1)
def labelled_passages() -> LabelledSet:
    """Cut the embedded classification set."""
    labels = tuple(sorted(AREAS))
    area_of = {module: area for area, modules in AREAS.items() for module in modules.split()}
    by_area: dict[str, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    for item in docstrings():
        if area := area_of.get(item.module.partition(".")[0]):
            by_area[area][item.module] += _passages(item)
    pools: dict[str, list[Labelled]] = {split: [] for split in SPLITS}
    for label, area in enumerate(labels):
        for module, split in _module_splits(by_area[area]).items():
            pools[split] += [Labelled(text, label) for text in by_area[area][module]]
    pools = _without_overlap(pools)
    chosen = {split: tuple(_balance(pool, PASSAGES[split])) for split, pool in pools.items()}
    content = [labels, {split: [asdict(p) for p in passages] for split, passages in chosen.items()}]
    return LabelledSet(labels, chosen, _fingerprint(content))


def _passages(item: Docstring) -> list[str]:
    """Cut a docstring at blank lines into passages; examples of interactive sessions are left out."""
    shortest, longest = PASSAGE_CHARACTERS
    passages, current = [], ""
    for block in re.split(r"\n\s*\n", item.text):
        lines = (line.strip() for line in block.splitlines())
        paragraph = " ".join(line for line in lines if not line.startswith((">>>", "...")))[:longest].strip()
        if current and len(current) + 1 + len(paragraph) > longest:
            passages.append(current)
            current = ""
        current = f"{current} {paragraph}".strip()
    return [p for p in (*passages, current) if len(p) >= shortest]


def _module_splits(modules: dict[str, list[str]]) -> dict[str, str]:
    """Give whole modules to test, then valid, until each has its passages; the rest trains."""
    total = sum(map(len, modules.values()))
    free = [m for m in sorted(modules, key=digest) if modules[m]]
    assigned = dict.fromkeys(free, "train")
    for split in ("test", "valid"):
        count = 0
        for module in free:
            size = len(modules[module])
            small = size <= LARGEST_HELD_OUT_MODULE * total
            if count < PASSAGES[split] and small and assigned[module] == "train":
                assigned[module] = split
                count += size
    return assigned


def _without_overlap(pools: dict[str, list[Labelled]]) -> dict[str, list[Labelled]]:
    """Drop repeated passages everywhere, and held-out ones that mostly repeat an earlier split's words."""
    seen_texts: set[str] = set()
    seen: set[tuple[str, ...]] = set()
    kept: dict[str, list[Labelled]] = {}
    for split in SPLITS:
        kept[split] = []
        for passage in pools[split]:
            shingles = _shingles(passage.text)
            overlap = len(shingles & seen) / len(shingles)
            if passage.text not in seen_texts and (split == "train" or overlap <= LARGEST_OVERLAP):
                seen_texts.add(passage.text)
                kept[split].append(passage)
        for passage in kept[split]:
            seen |= _shingles(passage.text)
    return kept


def _shingles(text: str) -> set[tuple[str, ...]]:
    words = re.findall(r"\w+", text.lower())
    return {tuple(words[i:i + SHINGLE_WORDS]) for i in range(max(1, len(words) - SHINGLE_WORDS + 1))}


def _balance(pool: list[Labelled], most: int) -> Iterator[Labelled]:
    """Yield at most ``most`` passages of each label, in the order of their hashes."""
    taken: Counter[int] = Counter()
    for passage in sorted(pool, key=lambda p: digest(p.text)):
        if taken[passage.label] < most:
            taken[passage.label] += 1
            yield passage


# --- retrieval ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class RetrievalSet:
    """Titles as queries, the sections below them as the corpus; laid out as BEIR does.

    Titles are the first lines of docstrings and the headings of the language reference. A title that heads
    two sections is left out, since either would be right.

    Attributes:
        corpus: section id to text, shared by the splits.
        queries: query id to title.
        qrels: for train, valid and test: query id to ``{section id: 1}``; each query has one relevant
            section.
        fingerprint: SHA-256 over all of it.
    """

    corpus: dict[str, str]
    queries: dict[str, str]
    qrels: dict[str, dict[str, dict[str, int]]]
    fingerprint: str
    source: str = "embedded:retrieval"


@lru_cache(maxsize=1)
def titled_sections() -> RetrievalSet:
    """Cut the embedded retrieval set."""
    pairs = [*_docstring_sections(), *_topic_sections()]
    repeated = Counter(title.lower() for title, _ in pairs)
    by_section = {section: title for title, section in reversed(pairs) if repeated[title.lower()] == 1}
    ordered = sorted(by_section, key=digest)
    corpus = {f"d{i:04d}": section for i, section in enumerate(ordered)}
    queries = {f"q{i:04d}": by_section[section] for i, section in enumerate(ordered)}
    qrels: dict[str, dict[str, dict[str, int]]] = {split: {} for split in SPLITS}
    # Sections are in the order of their hashes already, so ranges of them are a random choice.
    ends = {"test": round(QUERY_SHARES["test"] * len(ordered)),
            "valid": round(sum(QUERY_SHARES.values()) * len(ordered)), "train": len(ordered)}
    for i in range(len(ordered)):
        split = next(s for s, end in ends.items() if i < end)
        qrels[split][f"q{i:04d}"] = {f"d{i:04d}": 1}
    return RetrievalSet(corpus, queries, qrels, _fingerprint([corpus, queries, qrels]))


def _is_pair(title: str, section: str) -> bool:
    shortest, longest = TITLE_CHARACTERS
    return shortest <= len(title) <= longest and len(section) >= SECTION_CHARACTERS


def _docstring_sections() -> Iterator[tuple[str, str]]:
    for item in docstrings():
        title, _, section = item.text.partition("\n\n")
        title, section = title.strip().rstrip("."), section.strip()
        if "\n" not in title and _is_pair(title, section):
            yield title, section


def _topic_sections() -> Iterator[tuple[str, str]]:
    """Yield the chapters' sections: a heading is a line with a line of equal punctuation marks below it."""
    for text in topics().values():
        marks = [*re.finditer(r"^(?P<title>\S.*)\n(?P<mark>[*=~\-^\"])(?P=mark){3,}$", text, re.MULTILINE)]
        ends = [m.start() for m in marks[1:]] + [len(text)]
        for mark, end in zip(marks, ends, strict=True):
            title, section = mark["title"].strip(), text[mark.end():end].strip()
            if _is_pair(title, section):
                yield title, section
