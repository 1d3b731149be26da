"""Which files decide what a family of tasks measures: their hash tells whether a record is still this code's.

Code that a family never imports, other families and the drawing of figures among it, may change without making its
records out of date.
"""

from __future__ import annotations

import ast
import hashlib
from collections.abc import Iterable, Iterator
from functools import lru_cache
from pathlib import Path

from tasks.config import REPOSITORY

_TASKS = "tasks"


@lru_cache
def code_sha256(package: str | None = None, root: Path = REPOSITORY) -> str:
    """Hash names and content of code files.

    Args:
        package: such as ``tasks.kernel_bench``: hash what :func:`files_of` returns for it. None: every file below
            kernels/ and tasks/.
        root: the repository.
    """
    digest = hashlib.sha256()
    every = [path for folder in ("kernels", _TASKS) for path in _below(root / folder, root)]
    for path in every if package is None else files_of(package, root):
        digest.update(path.relative_to(root).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()


def files_of(package: str, root: Path = REPOSITORY) -> list[Path]:
    """Return, sorted, all files below kernels/ and the package's folder, and what of tasks/ that imports.

    Imports count whether direct or not and wherever they stand; a folder of which a module is imported counts with the
    files in it that are not Python: a prompt or a table decides outcomes too.
    """
    found = {*_below(root / "kernels", root), *_below(root.joinpath(*package.split(".")), root)}
    open_ends = sorted(path for path in found if path.suffix == ".py" and path.is_relative_to(root / _TASKS))
    while open_ends:
        path = open_ends.pop()
        for module in _imported(path, root):
            for file in _files_of_module(module, root):
                if file not in found:
                    found |= {file, *(p for p in _sources(file.parent.iterdir(), root) if p.suffix != ".py")}
                    open_ends.append(file)
    return sorted(found)


def _imported(path: Path, root: Path) -> Iterator[str]:
    """Name the modules of tasks/ that a file may import; what is imported from one may be a module or not."""
    here = path.relative_to(root).with_suffix("").parts
    for node in ast.walk(ast.parse(path.read_bytes())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            above = ".".join(here[: len(here) - node.level]) if node.level else ""
            module = ".".join(filter(None, (above, node.module)))
            names = [module, *(f"{module}.{alias.name}" for alias in node.names)]
        else:
            continue
        yield from (name for name in names if name.split(".")[0] == _TASKS)


def _files_of_module(module: str, root: Path) -> Iterator[Path]:
    """Find the file of a module, and those of the packages that Python imports on the way to it."""
    parts = module.split(".")
    for end in range(1, len(parts) + 1):
        place = root.joinpath(*parts[:end])
        yield from (path for path in (place.with_suffix(".py"), place / "__init__.py") if path.is_file())


def _below(folder: Path, root: Path) -> list[Path]:
    return sorted(_sources(folder.rglob("*"), root)) if folder.is_dir() else []


def _sources(paths: Iterable[Path], root: Path) -> Iterator[Path]:
    return (path for path in paths if _is_source(path.relative_to(root)) and path.is_file())


def _is_source(path: Path) -> bool:
    """Leave out what tools leave behind: byte code, hidden files and folders, an editor's backup copies."""
    made = any(p.startswith(".") or p == "__pycache__" or p.endswith(".egg-info") for p in path.parts)
    return not made and path.suffix != ".pyc" and not path.name.endswith("~")
