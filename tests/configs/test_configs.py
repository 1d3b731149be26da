"""Every shipped config: it loads, fits the code that runs it, and speaks of systems and metrics that exist."""

from __future__ import annotations

import itertools

import pytest
import yaml

from tasks.config import CONFIGS, FAMILIES, PAPERS, REPOSITORY, SCALES, find_experiments, load_experiment
from tasks.programs import find_program, is_implemented
from tasks.render.metrics import load_metrics

FILES = sorted(CONFIGS.rglob("*.y*ml"))
EXPERIMENTS = find_experiments()

# Every table and figure of both papers that is listed for reproduction, and three that the papers' claims call for.
ITEMS = {
    "adasplash": ["blocksize", "figure1", "figure2", "figure3", "figure4", "figure5", "figure6", "pretraining", "reads",
                  "section3_1", "table1", "table2", "table3", "table4", "table5", "table6"],
    "adasplash2": ["figure_mappings", "figure_runtime", "iterations", "table1", "table2", "table5"],
}  # fmt: skip


def named(experiments):
    return pytest.mark.parametrize("experiment", experiments, ids=lambda e: e.id)


def test_no_config_is_passed_over():
    assert [e.path for e in EXPERIMENTS] == [f.resolve() for f in FILES]
    assert len(EXPERIMENTS) >= 20


def test_every_item_of_the_papers_is_there():
    expected = {f"{folder}/{name}" for folder, names in ITEMS.items() for name in names}
    assert expected - {e.id for e in EXPERIMENTS} == set()


@named(EXPERIMENTS)
def test_a_config_is_where_its_id_and_paper_say(experiment):
    folder, _, name = experiment.id.partition("/")
    assert experiment.path == CONFIGS / folder / f"{name}.yaml"
    assert {"adasplash": "AdaSplash", "adasplash2": "AdaSplash-2"}[folder] == experiment.paper
    assert load_experiment(experiment.path) == experiment
    assert experiment.item and experiment.title and experiment.systems


@named(EXPERIMENTS)
def test_the_settings_of_every_scale_merge(experiment):
    for scale in SCALES:
        assert experiment.settings(scale)


@named([e for e in EXPERIMENTS if is_implemented(e)])
def test_the_settings_fit_the_program_at_every_scale(experiment):
    program = find_program(experiment)
    for scale in SCALES:
        settings = experiment.typed_settings(scale, program.settings)
        jobs = list(program.jobs(settings))
        assert jobs and len(set(jobs)) == len(jobs)
        assert {j.system for j in jobs} <= set(experiment.systems)


def test_some_experiments_of_the_two_papers_are_implemented():
    assert any(is_implemented(e) for e in EXPERIMENTS)


@named([e for e in EXPERIMENTS if e.reported])
def test_reported_numbers_name_known_systems_and_metrics_once(experiment):
    cells = list(experiment.reported.cells())
    assert cells and experiment.reported.source
    assert {c["system"] for c in cells} <= set(experiment.systems)
    assert {c["metric"] for c in cells} <= set(load_metrics())
    keys = [(c["system"], c["metric"], *c["params"].items()) for c in cells]
    assert len(set(keys)) == len(keys)
    assert all((c["value"] is None) == (c["status"] == "oom") for c in cells)


@named(EXPERIMENTS)
def test_what_is_rendered_are_known_metrics_and_fields(experiment):
    table, figure = experiment.render.table, experiment.render.figure
    known = set(load_metrics())
    if table:
        assert set(table.metrics) <= known
        assert not set(table.rows) & set(table.columns)
        assert {"system", "metric"} <= {*table.rows, *table.columns} or len(table.metrics) == 1
    if figure:
        assert (figure.metric if figure.kind == "heatmap" else figure.y) in known
        assert {figure.xscale, figure.yscale} <= {"linear", "log"}


def test_ids_and_items_are_not_used_twice():
    for key in (lambda e: e.id, lambda e: (e.paper, e.item)):
        for _, group in itertools.groupby(sorted(EXPERIMENTS, key=key), key):
            assert len(list(group)) == 1


def test_every_paper_and_family_has_an_experiment():
    assert {e.paper for e in EXPERIMENTS} == set(PAPERS)
    assert {e.family for e in EXPERIMENTS} == set(FAMILIES)


@named(EXPERIMENTS)
def test_nothing_in_a_config_belongs_to_one_machine(experiment):
    def strings(value):
        if isinstance(value, dict):
            yield from itertools.chain.from_iterable(strings(v) for v in value.values())
        elif isinstance(value, list):
            yield from itertools.chain.from_iterable(strings(v) for v in value)
        elif isinstance(value, str):
            yield value

    content = yaml.safe_load(experiment.path.read_text(encoding="utf-8"))
    paths = [s for s in strings([content.get("common"), content.get("scales")]) if s.startswith(("/", "~", "file:"))]
    assert paths == []
    assert str(REPOSITORY) not in experiment.path.read_text(encoding="utf-8")
