"""What the README promises: its Python runs, its files and links exist, its table names every experiment."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tasks.config import REPOSITORY, find_experiments
from tasks.render.report import MARKS

TEXT = (REPOSITORY / "README.md").read_text(encoding="utf-8")
PYTHON = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)


@pytest.mark.parametrize("block", PYTHON, ids=range(len(PYTHON)))
def test_python_blocks_run(block):
    exec(compile(block, "README.md", "exec"), {})


def test_links_lead_somewhere():
    targets = [t.split("#")[0] for t in re.findall(r"\]\(([^)]+)\)", TEXT) if not t.startswith("http")]
    assert targets
    assert [t for t in targets if t and not Path(REPOSITORY / t).exists()] == []


def test_named_files_exist():
    names = re.findall(r"(configs/[\w/]+\.yaml|\./run_\w+\.sh|environment\.yml|constraints\.txt|CITATION\.cff)", TEXT)
    assert names
    assert [n for n in names if not (REPOSITORY / n).exists()] == []


def test_overview_names_every_experiment():
    table = TEXT.split(MARKS[0])[1].split(MARKS[1])[0]
    missing = [e.id for e in find_experiments() if f"#{e.id.replace('/', '-')})" not in table]
    assert missing == [], "run: python -m tasks render --readme"
