"""The hash of a family's code changes with what the family uses, and with nothing else."""

from __future__ import annotations

from pathlib import Path

import pytest

from tasks.code_used import code_sha256, files_of
from tasks.config import REPOSITORY

FILES = {
    "kernels/k/a.py": "a",
    "kernels/k/table.json": "1",
    "tasks/__init__.py": "",
    "tasks/environment.sh": "true",
    "tasks/one/__init__.py": "",
    "tasks/one/run.py": "from tasks.shared import near\nfrom .inside.deep import thing\nimport tasks.single, os",
    "tasks/one/prompts/qa.yaml": "question",
    "tasks/one/inside/__init__.py": "",
    "tasks/one/inside/deep.py": "def thing():\n    from ...later import late\n",
    "tasks/shared/__init__.py": "",
    "tasks/shared/near.py": "from tasks import far",
    "tasks/shared/notes.txt": "said",
    "tasks/shared/unused.py": "from tasks.two import run",
    "tasks/single.py": "import torch",
    "tasks/later.py": "import tasks.shared.near",  # and around again
    "tasks/far.py": "",
    "tasks/two/__init__.py": "",
    "tasks/two/run.py": "from tasks.one import run",
    "tasks/render/draw.py": "from tasks.one.run import thing",
    "configs/c.yaml": "c",
    "README.md": "r",
}
NOT_CODE = ["README.md", "configs/c.yaml", "tasks/__pycache__/b.cpython-311.pyc", "tasks/.b.py.swp",
            "kernels/k.egg-info/PKG-INFO", "tasks/one/b.py~"]  # fmt: skip
OF_OTHERS = ["tasks/shared/unused.py", "tasks/two/__init__.py", "tasks/two/run.py", "tasks/render/draw.py"]


@pytest.fixture
def checkout(tmp_path) -> Path:
    for name, text in FILES.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    return tmp_path


def hashed(root: Path, package: str | None = "tasks.one") -> str:
    code_sha256.cache_clear()
    try:
        return code_sha256(package, root)
    finally:
        code_sha256.cache_clear()


def test_what_a_family_uses(checkout):
    """All of its own folder and of the kernels; and by import, however it is written, files with what lies by them."""
    found = {path.relative_to(checkout).as_posix() for path in files_of("tasks.one", checkout)}
    assert found == set(FILES) - {*OF_OTHERS, *NOT_CODE}


@pytest.mark.parametrize("package", ["tasks.one", None])
@pytest.mark.parametrize("name", [*sorted(set(FILES) - {*OF_OTHERS, *NOT_CODE}), "tasks/one/new.py",
                                  "kernels/k/new.json"])  # fmt: skip
def test_a_change_of_what_is_used_changes_the_hash(checkout, name, package):
    before = hashed(checkout, package)
    assert hashed(checkout, package) == before
    (checkout / name).write_text("changed = 1")
    assert hashed(checkout, package) != before


@pytest.mark.parametrize("name", OF_OTHERS)
def test_a_change_of_what_others_use_changes_only_the_hash_of_all(checkout, name):
    before, before_all = hashed(checkout), hashed(checkout, None)
    (checkout / name).write_text("changed = 1")
    assert hashed(checkout) == before and hashed(checkout, None) != before_all


@pytest.mark.parametrize("package", ["tasks.one", None])
@pytest.mark.parametrize("name", NOT_CODE)
def test_files_that_are_not_code_do_not_change_the_hash(checkout, name, package):
    before = hashed(checkout, package)
    (checkout / name).parent.mkdir(exist_ok=True)
    (checkout / name).write_text("changed")
    assert hashed(checkout, package) == before


def test_moved_and_removed_code_changes_the_hash(checkout):
    before = hashed(checkout)
    (checkout / "tasks/one/inside/deep.py").rename(checkout / "tasks/one/deep.py")
    moved = hashed(checkout)
    (checkout / "tasks/one/deep.py").unlink()
    assert len({before, moved, hashed(checkout)}) == 3


def test_a_family_without_code_has_the_kernels(checkout):
    found = {path.relative_to(checkout).as_posix() for path in files_of("tasks.none", checkout)}
    assert found == {"kernels/k/a.py", "kernels/k/table.json"}


@pytest.mark.parametrize("package", ["tasks.kernel_bench", "tasks.language_modeling"])
def test_the_families_of_this_repository(package):
    """Neither uses the other or the drawing of figures, and both use what runs and records them."""
    found = {path.relative_to(REPOSITORY).as_posix() for path in files_of(package)}
    folders = {"/".join(name.split("/")[:2]) for name in found}
    assert {"kernels/adasplash_kernels", "tasks/records.py", "tasks/programs.py", package.replace(".", "/")} <= folders
    others = {"tasks/kernel_bench", "tasks/language_modeling", "tasks/render", "tasks/__main__.py"}
    assert folders & others == {package.replace(".", "/")}
