from __future__ import annotations

import re

import pytest

from tasks.claim import Claim
from tasks.config import FigureSpec
from tasks.errors import UserError
from tasks.records import records_path
from tasks.render import render_all, render_experiment
from tasks.render.files import write_if_changed

FIGURE = FigureSpec("lines", "n", "val_loss")
ROWS = [("softmax", "val_loss", 8, 3.5)]


def index(results) -> str:
    return (results / "README.md").read_text(encoding="utf-8")


@pytest.fixture
def three(make_experiment, make_record, store):
    """One experiment that was measured, one with the paper's numbers alone, one without anything."""
    table = make_experiment().render.table
    measured = make_experiment(rows=ROWS, table=table, figure=FIGURE, notes=("Batch size unknown, 8 here.",))
    reported = make_experiment("adasplash/figure6", rows=ROWS, item="Figure 6", figure=FIGURE)
    nothing = make_experiment("adasplash2/table1", item="Table 1", paper="AdaSplash-2", figure=FIGURE)
    store(measured, [make_record("softmax", 3.2, scale="smoke", n=n) for n in (8, 16)], "smoke")
    later = "2026-02-03T00:00:00+00:00"
    store(measured, [make_record("softmax", 3.3, n=8, created=later),
                     make_record("entmax", None, n=8, status="failed")])
    return [measured, reported, nothing]


def test_the_index_links_to_files_that_exist(three, results):
    paths = render_all(three, results, lambda e: e.paper == "AdaSplash")
    assert paths[-1] == results / "README.md"
    assert all(p.is_file() for p in paths)
    links = re.findall(r"\]\(([^)#]+)\)", index(results))
    assert all((results / link).is_file() for link in links)
    assert {(results / link) for link in links} == set(paths[:-1])
    anchors = set(re.findall(r'<a id="([^"]+)">', index(results)))
    assert set(re.findall(r"\]\(#([^)]+)\)", index(results))) == anchors
    assert len(anchors) == 3


def test_the_index_says_what_was_run(three, results):
    render_all(three, results, lambda e: e.paper == "AdaSplash")
    text = index(results)
    assert "python -m tasks render" in text.splitlines()[0]
    rows = [line.split(" | ")[3:] for line in text.splitlines() if "](#" in line]
    assert rows[0] == ["measured 2026-01-02", "measured 2026-02-03, 1 of 2 failed", "not run |"]
    assert rows[1] == ["not run", "not run", "not run |"]
    assert rows[2] == ["not implemented", "not implemented", "not implemented |"]


def test_a_chapter_shows_the_best_scale_and_the_notes(three, results):
    render_all(three, results, lambda e: True)
    text = index(results)
    assert text.index("## AdaSplash\n") < text.index("### Table 4") < text.index("## AdaSplash-2")
    assert "![AdaSplash, Table 4, lab](figures/adasplash/table4.lab.png)" in text
    assert "| Softmax | 3.5 | 3.300 |" in text and "3.200" not in text
    assert "- Batch size unknown, 8 here." in text
    assert "figures/adasplash/figure6.reported.png" in text
    assert "Nothing to draw yet" in text


def test_the_index_holds_each_verdict_twice_and_how_the_numbers_compare(make_experiment, make_record, results, store):
    claim = Claim("Entmax has half the loss (a | b).", "ratio", "val_loss", "softmax", 2, over="entmax")
    measured = make_experiment(rows=ROWS, claims=(claim,))
    waiting = make_experiment("adasplash/figure6", item="Figure 6", claims=(claim,))
    store(measured, [make_record("softmax", 3.0, n=8), make_record("entmax", 2.0, n=8)])
    render_all([measured, waiting, make_experiment("adasplash/table6")], results, lambda e: True)
    text = index(results)
    head, chapters = text[:text.index("## AdaSplash\n")], text[text.index("## AdaSplash\n"):]
    verdict = "**different**: 1.5 times (lab scale; the paper: 2 times)"
    assert f"| AdaSplash | [Table 4](#adasplash-table4) | Entmax has half the loss (a \\| b). | {verdict} |" in head
    nothing = "**not run**: no records of lab or paper scale (the paper: 2 times)"
    assert f"| [Figure 6](#adasplash-figure6) | Entmax has half the loss (a \\| b). | {nothing} |" in head
    assert f"Claims:\n\n- Entmax has half the loss (a \\| b). {verdict}.\n" in chapters
    assert chapters.count("Claims:") == 2  # nothing under the item without any
    assert "measured over reported: Validation loss 0.86 (1 of 1 reported cells)." in chapters


def test_targets_have_a_table_of_their_own(make_experiment, make_record, results, store):
    claims = (Claim("Half the loss.", "ratio", "val_loss", "softmax", 2, over="entmax"),
              Claim("A third of it.", "ratio", "val_loss", "softmax", over="entmax", target=3))
    measured = make_experiment(rows=ROWS, claims=claims)
    store(measured, [make_record("softmax", 4.0, n=8), make_record("entmax", 2.0, n=8)])
    render_all([measured], results, lambda e: True)
    head = index(results).split("## AdaSplash\n")[0]
    of_claims, of_targets = (head.split(f"## {x}\n")[1] for x in ("Claims", "Targets"))
    target = "| A third of it. | **not met**: 2 times (lab scale; the target: 3 times) |"
    assert "Half the loss." in of_claims and target not in of_claims.split("## Targets")[0] and target in of_targets
    assert "Half the loss." not in of_targets
    chapter = index(results).split("## AdaSplash\n")[1]
    assert "- Half the loss. **reproduced**" in chapter and "A third of it." not in chapter
    assert "[Targets](#targets)" in chapter


def test_without_claims_there_is_no_table_of_them(three, results):
    render_all(three, results, lambda e: True)
    assert "Claims" not in index(results)


def test_the_index_is_the_same_when_made_again(three, results):
    render_all(three, results, lambda e: True)
    before = {p: (p.read_bytes(), p.stat().st_mtime_ns) for p in results.rglob("*") if p.is_file()}
    render_all(three, results, lambda e: True)
    assert {p: (p.read_bytes(), p.stat().st_mtime_ns) for p in results.rglob("*") if p.is_file()} == before


def test_a_corrupt_record_file_does_not_stop_the_others(three, results):
    broken = records_path(results, three[0].id, "lab")
    broken.write_text(broken.read_text() + "{not json}\n")
    with pytest.raises(UserError, match=r"adasplash/table4: .*lab\.jsonl:3") as caught:
        render_all(three, results, lambda e: True)
    assert "\n" not in str(caught.value)
    assert (results / "figures/adasplash/figure6.reported.png").is_file()
    text = index(results)
    assert "**Not rendered:** records/adasplash/table4/lab.jsonl:3" in text
    assert str(results) not in text
    with pytest.raises(UserError, match="lab.jsonl:3"):
        render_experiment(three[0], results, lambda e: True)


def test_a_long_table_is_folded(make_experiment, make_record, results, store):
    systems = {f"s{i}": f"System {i}" for i in range(30)}
    experiment = make_experiment(systems=systems)
    store(experiment, [make_record(s, 1.0, n=8) for s in systems])
    render_all([experiment], results, lambda e: True)
    assert "<details><summary>Table, 30 rows</summary>\n\n" in index(results)


def test_a_file_that_cannot_be_written_is_one_clear_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        write_if_changed(tmp_path / "file" / "below.md", "text")


def test_a_write_that_fails_leaves_the_old_file(tmp_path, monkeypatch):
    path = write_if_changed(tmp_path / "a.md", "old")

    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("tasks.render.files.os.replace", fail)
    with pytest.raises(UserError, match="No space left"):
        write_if_changed(path, "new")
    assert [p.name for p in tmp_path.iterdir()] == ["a.md"] and path.read_text() == "old"
