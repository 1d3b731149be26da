from __future__ import annotations

import csv
import dataclasses
import math
import re
import statistics

import pytest

from tasks.config import TableSpec
from tasks.errors import ConfigError
from tasks.render import latex, markdown, render_experiment
from tasks.render.grid import make_grid

PAPER = [("softmax", "val_loss", 512, 3.283), ("entmax", "val_loss", 512, 3.263),
         ("softmax", "val_loss", 64, "oom")]


def texts(grid) -> list[list[str]]:
    return [[t for column in grid.columns for t in grid.texts(row, column)] for row in grid.rows]


def read(results, suffix: str) -> str:
    return (results / "tables" / "adasplash" / f"table4{suffix}").read_text(encoding="utf-8")


def test_paper_beside_measured_for_every_status(make_experiment, make_record, metrics):
    records = [
        make_record("softmax", 3.2, seed=0, n=512), make_record("softmax", 3.4, seed=1, n=512),
        make_record("softmax", None, status="oom", n=64), make_record("entmax", 3.25, n=512),
        make_record("entmax", None, status="failed", n=64),
        make_record("softmax", None, status="not_applicable", n=4096),
    ]
    grid = make_grid(make_experiment(rows=PAPER), records, "lab", metrics)
    assert grid.rows == [("softmax",), ("entmax",)]
    assert grid.columns == [("val_loss", 64), ("val_loss", 512), ("val_loss", 4096)]
    assert texts(grid) == [
        ["OOM", "OOM", "3.283", "3.300 ± 0.141 (2)", "–", "n/a"],
        ["–", "failed", "3.263", "3.250", "–", "not run"],
    ]


def test_a_lost_seed_is_told(make_experiment, make_record, metrics):
    records = [make_record("softmax", 3.2, n=512), make_record("softmax", None, seed=1, status="oom", n=512)]
    grid = make_grid(make_experiment(), records, "lab", metrics)
    assert texts(grid)[0] == ["–", "3.200 (1, 1 without result)"]


def test_systems_and_metrics_without_any_number_have_their_place(make_experiment, metrics):
    table = TableSpec(("system",), ("metric",), ("val_loss", "accuracy"))
    grid = make_grid(make_experiment(table=table), [], None, metrics)
    assert (grid.rows, grid.columns) == ([("softmax",), ("entmax",)], [("val_loss",), ("accuracy",)])
    assert texts(grid) == [["–", "not run"] * 2] * 2


def test_metrics_that_the_table_does_not_name_stay_out(make_experiment, make_record, metrics):
    records = [make_record("softmax", 3.2, n=1), make_record("softmax", 9.0, metric="fwd_ms", unit="s", n=2)]
    assert make_grid(make_experiment(), records, "lab", metrics).columns == [("val_loss", 1)]


def test_systems_that_would_share_a_cell_are_refused(make_experiment, make_record, metrics):
    experiment = make_experiment(table=TableSpec(("n",), ("metric",), ("val_loss",)))
    records = [make_record("softmax", 3.2, n=1), make_record("entmax", 3.1, n=1)]
    with pytest.raises(ConfigError, match="render.table: system softmax and entmax share a cell"):
        make_grid(experiment, records, "lab", metrics)


def test_headings_carry_units_and_a_common_metric_stands_in_the_corner(make_experiment, make_record, metrics):
    record = make_record("softmax", 3.2, n=512)
    grid = make_grid(make_experiment(), [record], "lab", metrics)
    assert grid.row_headings == [["System", "Validation loss (nats) ↓"]]
    assert grid.column_labels(grid.columns[0]) == ["n = 512"]
    two = TableSpec(("system",), ("metric", "n"), ("val_loss", "accuracy"))
    grid = make_grid(make_experiment(table=two), [record], "lab", metrics)
    assert grid.row_headings == [["System"]]
    assert [grid.column_labels(c) for c in grid.columns] == [
        ["Validation loss (nats) ↓", "n = 512"], ["Accuracy (%) ↑"]]


def test_each_metric_over_parameters_gets_a_block_of_its_own(make_experiment, make_record, metrics):
    table = TableSpec(("system",), ("metric", "n"), ("val_loss", "fwd_ms"))
    records = [make_record("softmax", 3.2, n=8), make_record("softmax", 3.1, n=16),
               make_record("softmax", 0.5, metric="fwd_ms", unit="ms", n=8)]
    grid = make_grid(make_experiment(table=table), records, "lab", metrics)
    text = markdown.section(grid)
    assert "| System<br>Validation loss (nats) ↓ | n = 8<br>paper | n = 8<br>measured | n = 16<br>paper" in text
    assert "| System<br>Forward (ms) ↓ | n = 8<br>paper | n = 8<br>measured |\n" in text
    assert "| Softmax | – | 3.200 | – | 3.100 |" in text and "| Softmax | – | 0.50 |" in text
    assert latex.table(grid).count(r"\begin{tabular}") == 2
    assert latex.table(grid).count(r"\caption") == 1


def test_markdown_has_a_section_a_scale_with_its_origin(make_experiment, make_record, results, store):
    experiment = make_experiment(rows=PAPER, notes=("Seeds | unknown, *three* here.",))
    store(experiment, [make_record("softmax", 3.2, scale="smoke", gpu=None, n=512)], "smoke")
    store(experiment, [make_record("softmax", 3.25, seed=s, n=512) for s in range(3)])
    render_experiment(experiment, results, lambda e: True)
    text = read(results, ".md")
    assert text.index("## Scale smoke") < text.index("hardware CPU") < text.index("## Scale lab")
    versions = "hardware Some GPU; torch 2.13.0, triton 3.7.1, python 3.11.9"
    assert text.index("## Scale lab") < text.index(versions)
    assert "measured 2026-01-02; 3 seeds" in text
    assert "Not run: paper." in text
    assert "paper: The paper, Table 4" in text
    assert r"- Seeds \| unknown, \*three\* here." in text
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert {line.count(" | ") for line in rows} == {4}  # one leading column, two lengths, two sides


def test_without_records_the_papers_numbers_stand_alone(make_experiment, results):
    render_experiment(make_experiment(rows=PAPER), results, lambda e: True)
    text = read(results, ".md")
    assert "Not run at any scale" in text
    assert "| Softmax | OOM | not run | 3.283 | not run |" in text
    assert "Not run: smoke" not in text


def test_rivals_get_a_footnote(make_experiment, make_record, metrics):
    records = [make_record("softmax", 1.0, n=8, dtype=d) for d in ("fp16", "bf16")]
    grid = make_grid(make_experiment(), records, "lab", metrics)
    assert "differ in dtype; the newest is shown" in markdown.section(grid)


def test_csv_read_again_holds_the_values(make_experiment, make_record, results, store):
    values = [1 / 3, math.pi, 2.7182818284590455]
    experiment = make_experiment(rows=PAPER)
    store(experiment, [
        dataclasses.replace(make_record("softmax", v, seed=s), params={"n": 512, "value": "an odd name"})
        for s, v in enumerate(values)])
    store(experiment, [make_record("entmax", None, status="oom", n=512)])
    render_experiment(experiment, results, lambda e: True)
    lines = list(csv.DictReader(read(results, ".csv").splitlines()))
    key = {(x["source"], x["system"], x["param.n"]): x for x in lines}
    assert len(key) == len(lines) == 3 + 4
    mean = key["measured", "softmax", "512"]
    assert float(mean["value"]) == statistics.fmean(values)
    assert float(mean["std"]) == statistics.stdev(values)
    assert (float(mean["min"]), float(mean["max"]), mean["seeds"]) == (min(values), max(values), "3")
    assert (mean["param.value"], mean["unit"], mean["scale"]) == ("an odd name", "nats", "lab")
    assert float(key["paper", "softmax", "512"]["value"]) == 3.283
    assert [key["paper", "softmax", "64"][k] for k in ("value", "status", "scale")] == ["", "oom", ""]
    assert [key["measured", "entmax", "512"][k] for k in ("value", "status")] == ["", "oom"]
    assert key["measured", "entmax", "64"]["status"] == "not_run"


def test_csv_holds_the_papers_numbers_once_for_all_scales(make_experiment, make_record, results, store):
    experiment = make_experiment(rows=PAPER)
    for scale in ("smoke", "lab"):
        store(experiment, [make_record("softmax", 3.2, scale=scale, n=512)], scale)
    render_experiment(experiment, results, lambda e: True)
    sources = [x["source"] for x in csv.DictReader(read(results, ".csv").splitlines())]
    assert sources.count("paper") == len(PAPER)


def test_latex_is_escaped_and_balanced(make_experiment, make_record, metrics):
    experiment = make_experiment(
        rows=PAPER, title=r"50 % of a_b & c#d {x} $y$ ~ ^ \z <α>",
        systems={"softmax": "Soft_max [100 %]", "entmax": "[entmax] & co"})
    records = [make_record("softmax", v, seed=s, n=512) for s, v in enumerate((3.2, 3.4))]
    text = latex.table(make_grid(experiment, records, "lab", metrics))
    assert (r"50 \% of a\_b \& c\#d \{x\} \$y\$ \textasciitilde{} \textasciicircum{} \textbackslash{}z "
            r"\textless{}$\alpha$\textgreater{}") in text
    assert r"Soft\_max [100 \%] & OOM & not run & 3.283 & 3.300 $\pm$ 0.141 (2) \\" in text
    assert r"{[entmax] \& co} & -- & not run" in text  # a bracket after \\ would be an argument
    assert r"\cmidrule(lr){2-3}\cmidrule(lr){4-5}" in text
    assert text.isascii()
    bare = re.sub(r"\\[{}]", "", text)
    assert bare.count("{") == bare.count("}")
    body = text[text.index(r"\midrule"):text.index(r"\bottomrule")]
    assert {len(re.findall(r"(?<!\\)&", line)) for line in body.splitlines()[1:]} == {4}
    for command in ("toprule", "midrule", "bottomrule"):
        assert text.count("\\" + command) == 1


@pytest.mark.parametrize(("text", "expected"), [
    ("a|b", r"a\|b"), ("<br>", "&lt;br&gt;"), ("key_lengths of `a_*b`", "key_lengths of `a_*b`"),
    ("_x_ *y* [z]", r"\_x\_ \*y\* \[z\]"), ("one ` alone", r"one \` alone"), ("two\nlines", "two lines"),
])
def test_markdown_text_is_literal(text, expected):
    assert markdown.escape(text) == expected
