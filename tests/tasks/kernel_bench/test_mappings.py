"""Surfaces of mappings: closed forms of three scores, ties, the grid, and settings that are refused."""

from __future__ import annotations

import copy
import math

import pytest
import torch

from tasks.config import CONFIGS, load_experiment
from tasks.kernel_bench.mappings import Grid, Mapping, SurfaceSettings, jobs, mapping_surfaces, probabilities
from tasks.programs import Context
from tasks.records import read_records, records_path
from tasks.render import render_experiment
from tasks.runner import DONE, Options, run_experiment
from tasks.schema import Misfit, convert

EXPERIMENT = load_experiment(CONFIGS / "adasplash2/figure_mappings.yaml")
SOFTMAX, TOP_2, ENTMAX, SPARSEMAX = Mapping(1.0), Mapping(1.0, k=2), Mapping(1.5), Mapping(2.0)
E1, E2 = math.e, math.e**2


@pytest.mark.parametrize(
    ("mapping", "scores", "expected"),
    [
        (SOFTMAX, (1, 2, 0), (E1 / (1 + E1 + E2), E2 / (1 + E1 + E2), 1 / (1 + E1 + E2))),
        (TOP_2, (1, 2, 0), (E1 / (E1 + E2), E2 / (E1 + E2), 0)),
        (TOP_2, (-1, -2, 0), (1 / (1 + E1), 0, E1 / (1 + E1))),
        (TOP_2, (-1, -1, 0), (1 / (1 + E1), 0, E1 / (1 + E1))),  # of equal scores the first
        (TOP_2, (0, 1, 0), (1 / (1 + E1), E1 / (1 + E1), 0)),
        (Mapping(1.0, k=1), (1, 2, 0), (0, 1, 0)),
        # sparsemax: the mean of those in the support is shifted to 1 over their number
        (SPARSEMAX, (0.5, 0.2, 0.0), (0.5 + 0.1, 0.2 + 0.1, 0.1)),
        (SPARSEMAX, (0.9, 0.2, 0.0), (0.85, 0.15, 0.0)),
        (SPARSEMAX, (1.0, 0.0, -9.0), (1.0, 0.0, 0.0)),
        # entmax 1.5 of two scores d apart: (s + d/4)^2 + (s - d/4)^2 = 1
        (ENTMAX, (1.0, 0.0, -9.0), ((math.sqrt(0.5 - 1 / 16) + 0.25) ** 2, (math.sqrt(0.5 - 1 / 16) - 0.25) ** 2, 0)),
        (ENTMAX, (2.0, 0.0, 0.0), (1.0, 0.0, 0.0)),
        (ENTMAX, (0.0, 0.0, 0.0), (1 / 3, 1 / 3, 1 / 3)),
    ],
)
def test_by_hand(mapping, scores, expected):
    found = probabilities(mapping, torch.tensor(scores, dtype=torch.float64))
    assert found.tolist() == pytest.approx(expected, abs=1e-12)


def test_grid():
    grid = Grid(-0.3, 0.3, 3, (7.0, 8.0), "z1")
    assert grid.axis == [-0.3, 0.0, 0.3]
    assert Grid(-3.0, 3.0, 25, (), "z1").axis[1] == -2.75
    assert Grid(0.0, 1.0, 11, (), "z1").axis[3] == 0.3
    assert grid.scores.shape == (3, 3, 4)
    assert grid.scores[0, 2].tolist() == [-0.3, 0.3, 7.0, 8.0]


@pytest.mark.parametrize(("of", "at"), [("z1", 0), ("z2", 1)])
def test_measurements(of, at, tmp_path):
    settings = SurfaceSettings({"a": SPARSEMAX, "b": TOP_2}, Grid(-1.0, 1.0, 3, (0.0,), of))
    context = Context(tmp_path, None, say=print)
    assert [j.system for j in jobs(settings)] == ["a", "b"]
    for job in jobs(settings):
        found = mapping_surfaces(job, settings, context)
        assert len({(m.params["z1"], m.params["z2"]) for m in found}) == len(found) == 9
        for m in found:
            scores = torch.tensor([m.params["z1"], m.params["z2"], 0.0], dtype=torch.float64)
            assert m.metric == "probability" and m.params["probability_of"] == of
            assert m.value == probabilities(settings.mappings[job.system], scores)[at]


def test_the_smoke_run(tmp_path):
    options = Options("smoke", results=tmp_path)
    assert run_experiment(EXPERIMENT, options).state == DONE
    found = read_records(records_path(tmp_path, EXPERIMENT.id, "smoke"))
    assert {r.system for r in found} == set(EXPERIMENT.systems) and len(found) == 4 * 7 * 7
    assert all(r.status == "ok" and 0 <= r.value <= 1 for r in found)
    files = render_experiment(EXPERIMENT, tmp_path, lambda e: True)
    assert any(f.name == "figure_mappings.smoke.png" for f in files)


def test_records_stay_small():
    for scale in ("smoke", "lab", "paper"):
        settings = EXPERIMENT.typed_settings(scale, SurfaceSettings)
        assert set(settings.mappings) == set(EXPERIMENT.systems)
        assert len(settings.mappings) * settings.grid.points**2 <= 2500  # lines of about 700 bytes


@pytest.mark.parametrize(
    ("part", "changes", "key", "message"),
    [
        ("grid", {"low": 3.0}, "grid.low", "got 3.0, allowed is a number below high (3.0)"),
        ("grid", {"points": 1}, "grid.points", "got 1, allowed is 2 or more"),
        ("grid", {"probability_of": "z3"}, "grid.probability_of", "got 'z3', allowed are z1, z2"),
        ("grid", {"further_scores": ["a"]}, "grid.further_scores[0]", "allowed is a number"),
        ("mappings", {"softmax": {"alpha": 0.5}}, "mappings.softmax.alpha", "got 0.5, allowed is 1 (softmax) to 2"),
        ("mappings", {"topk_softmax": {"alpha": 1.0, "k": 0}}, "mappings.topk_softmax.k", "got 0, allowed is 1"),
        ("mappings", {"topk_softmax": {"alpha": 1.0, "k": 4}}, "mappings.topk_softmax.k", "got 4, allowed is 1 to 3"),
    ],
)  # fmt: skip
def test_refused(part, changes, key, message):
    values = copy.deepcopy(EXPERIMENT.settings("smoke"))
    values[part] |= changes
    with pytest.raises(Misfit) as caught:
        convert(SurfaceSettings, values)
    assert caught.value.key == key and message in caught.value.reason


def test_no_mapping_is_refused():
    with pytest.raises(ValueError, match="^mappings: got none"):
        SurfaceSettings({}, Grid(0.0, 1.0, 2, (), "z1"))
