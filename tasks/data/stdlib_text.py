"""Text that every Python installation carries: the language reference of ``help()`` and the library's
docstrings.

Sources are parsed, never imported. What is found depends on the Python version, not on the machine.
"""

from __future__ import annotations

import ast
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from tasks.errors import DataError

# Installed packages, test suites, and what some distributions leave out.
EXCLUDED = {"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3", "turtledemo",
            "ensurepip", "pydoc_data", "__pycache__"}
EXCLUDED_PREFIXES = ("config-", "_sysconfigdata", "sitecustomize", "usercustomize")

_Scope = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True)
class Docstring:
    """One docstring, dedented.

    Attributes:
        module: dotted, for example ``asyncio.base_events``.
        name: inside the module, for example ``BaseEventLoop.run_forever``; empty for the module's own.
        text: the docstring.
    """

    module: str
    name: str
    text: str


@lru_cache(maxsize=1)
def docstrings() -> tuple[Docstring, ...]:
    """Return the standard library's docstrings, sorted by module and in the order of each file, without
    repeats.

    Raises:
        DataError: this Python carries no library sources.
    """
    seen: set[str] = set()
    found = []
    root = Path(sysconfig.get_path("stdlib"))
    for path in _source_files(root):
        module = ".".join(path.relative_to(root).with_suffix("").parts).removesuffix(".__init__")
        try:
            tree = ast.parse(path.read_bytes())
        except (SyntaxError, ValueError, OSError):
            continue  # one unreadable file is no reason to do without the rest
        for name, text in _walk(tree, ""):
            if text not in seen:
                seen.add(text)
                found.append(Docstring(module, name, text))
    if not found:
        raise DataError(f"embedded: this Python carries no library sources in {root}")
    return tuple(found)


def _source_files(root: Path) -> list[Path]:
    files = []
    for path in root.rglob("*.py"):
        parts = path.relative_to(root).parts
        if not EXCLUDED.intersection(parts) and not any(p.startswith(EXCLUDED_PREFIXES) for p in parts):
            files.append(path)
    return sorted(files, key=lambda p: p.relative_to(root).parts)


def _walk(scope: _Scope, name: str) -> Iterator[tuple[str, str]]:
    text = (ast.get_docstring(scope) or "").strip()
    if text:
        yield name, text
    pending = list(scope.body)
    while pending:
        node = pending.pop(0)
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield from _walk(node, f"{name}.{node.name}" if name else node.name)
        elif isinstance(node, ast.If | ast.Try):  # definitions that depend on the platform
            handlers = node.handlers if isinstance(node, ast.Try) else []
            pending[:0] = node.body + [s for h in handlers for s in h.body] + node.orelse


@lru_cache(maxsize=1)
def topics() -> dict[str, str]:
    """Return the chapters of the language reference that ``help()`` shows, by keyword, without repeats.

    Raises:
        DataError: this Python lacks ``pydoc_data``.
    """
    try:
        from pydoc_data.topics import topics as chapters
    except ImportError as error:
        raise DataError("embedded: this Python lacks pydoc_data.topics, part of its library") from error
    by_text = {text.strip(): keyword for keyword, text in sorted(chapters.items(), reverse=True)}
    return {keyword: text for text, keyword in sorted(by_text.items(), key=lambda item: item[1])}
