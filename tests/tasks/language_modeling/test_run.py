"""The programs, from settings to measurements and records."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
import yaml

from tasks.config import load_experiment
from tasks.errors import DataError
from tasks.language_modeling import training
from tasks.language_modeling.data import TextDataModule
from tasks.language_modeling.run import PROGRAMS
from tasks.language_modeling.settings import NonzeroSettings
from tasks.models import support
from tasks.programs import Job
from tasks.records import read_records, records_path
from tasks.render.metrics import load_metrics
from tasks.runner import DONE, SKIPPED, Options, run_experiment

STEPS = 11


def by_metric(measurements: list) -> dict:
    return {m.metric: m for m in measurements}


def test_jobs(settings):
    wanted = settings(train={"seeds": [3, 1]}, probe={"tokens": 8})
    order = [("softmax", 3), ("entmax", 3), ("softmax", 1), ("entmax", 1)]
    assert [(j.system, j.seed) for j in PROGRAMS["train"].jobs(wanted)] == order
    assert [(j.system, j.seed) for j in PROGRAMS["loss_curve"].jobs(wanted)] == order
    assert [(j.system, j.seed) for j in PROGRAMS["nonzero_ratio"].jobs(wanted)] == [("entmax", 3), ("entmax", 1)]


def test_identity_names_the_source(settings, texts):
    assert PROGRAMS["train"].identity(settings(), texts)["data"] == "local:lm/tiny"
    either = settings(data={"sources": ["local", "embedded"]})
    assert PROGRAMS["train"].identity(either, texts / "lm")["data"] == "embedded:lm"


def test_obstacle(settings, texts, monkeypatch):
    """What a machine without a GPU cannot run."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    obstacle = PROGRAMS["train"].obstacle
    assert obstacle(settings(), texts) is None
    assert obstacle(settings(train={"precision": "16-mixed"}), texts) == "needs a GPU: train.precision 16-mixed"
    large = settings(model={"n_layer": 12, "n_head": 12, "n_embd": 768}, train={"steps": 10_000, "batch_size": 512})
    assert obstacle(large, texts).startswith("needs a GPU: about ")
    with pytest.raises(DataError, match="data.local"):
        obstacle(settings(), texts / "lm")


@pytest.mark.parametrize("system", ["softmax", "entmax"])
def test_train(system, settings, context):
    wanted = settings(train={"timing_skip_steps": 2, "timing_steps": 5})
    found = by_metric(PROGRAMS["train"].run(Job(system, 0), wanted, context))
    assert list(found) == ["val_loss", "step_s", "peak_gb"]
    kept = training.trained(wanted, Job(system, 0), context)
    assert found["val_loss"].value == kept.curve[STEPS]
    assert found["step_s"].value == sorted(kept.step_seconds)[2] > 0
    stats = found["step_s"].stats
    assert (stats["n"], stats["min"], stats["max"]) == (5, min(kept.step_seconds), max(kept.step_seconds))
    assert stats["std"] == pytest.approx(float(torch.tensor(kept.step_seconds).std(unbiased=False)), abs=1e-6)
    if not torch.cuda.is_available():
        assert (found["peak_gb"].value, found["peak_gb"].status) == (None, "not_applicable")
    for measurement in found.values():
        assert measurement.unit == load_metrics()[measurement.metric].unit
        assert measurement.params["data"] == "local:lm/tiny"
        assert measurement.params["tokenizer"] == "local:tokenizers/tiny"


def test_no_step_was_timed(settings, context):
    wanted = settings(train={"timing_skip_steps": 100})
    step = by_metric(PROGRAMS["train"].run(Job("softmax", 0), wanted, context))["step_s"]
    assert (step.value, step.status, step.unit) == (None, "not_applicable", "s")


def test_loss_curve_shares_the_run(settings, context, watch):
    [loss, *_] = PROGRAMS["train"].run(Job("softmax", 0), settings(), context)
    seen = watch()
    points = PROGRAMS["loss_curve"].run(Job("softmax", 0), settings(), context)
    assert seen == []
    assert [p.params["step"] for p in points] == [2, 4, 6, 8, 10, 11]
    assert {p.metric for p in points} == {"val_loss"}
    assert {p.unit for p in points} == {load_metrics()["val_loss"].unit}
    assert {p.params["data"] for p in points} == {"local:lm/tiny"}
    assert points[-1].value == loss.value
    assert points[0].value > points[-1].value


@pytest.mark.parametrize("layers", [None, [1]])
def test_nonzero_ratio(layers, settings, context, watch):
    variants = {"entmax": {"attention": "adasplash", "alpha": 1.5, "layers": layers}}
    wanted = settings(variants=variants, model={"n_layer": 2, "n_head": 4}, probe={"tokens": 12},
                      train={"lr": 0.1, "steps": 20, "warmup_steps": 2})  # fmt: skip
    seen = watch()
    points = PROGRAMS["nonzero_ratio"].run(Job("entmax", 0), wanted, context)
    assert len(seen) == 40
    shown = range(2) if layers is None else layers
    assert [(p.params["layer"], p.params["head"]) for p in points] == [(i, h) for i in shown for h in range(4)]
    assert {p.metric for p in points} == {"nonzero_ratio"}
    assert {p.unit for p in points} == {load_metrics()["nonzero_ratio"].unit}
    assert {(p.params["tokens"], p.params["data"]) for p in points} == {(12, "local:lm/tiny")}
    values = [p.value for p in points]
    assert all(0 < value <= 1 for value in values)
    assert min(values) < 1  # after such a training the scores differ enough for entmax to cut some off
    allowed = 12 * 13 // 2  # a causal mask lets 12 tokens see so many keys
    assert all(value * allowed == pytest.approx(round(value * allowed), abs=1e-4) for value in values)


def test_nonzero_ratio_is_of_the_trained_model(settings, context, train, monkeypatch):
    """The first tokens of the validation text, through the weights on the disk."""
    wanted = settings(probe={"tokens": 5})
    asked = []

    def noted(model, tokens):
        asked.append((model, tokens))
        return {0: torch.tensor([0.5, 1.0])}

    monkeypatch.setattr(support, "nonzero_ratios", noted)
    points = PROGRAMS["nonzero_ratio"].run(Job("entmax", 0), wanted, context)
    assert [p.value for p in points] == [0.5, 1.0]
    [(model, tokens)] = asked
    kept = train(settings(), "entmax").load_model()
    assert all(torch.equal(a.cpu(), b) for a, b in zip(model.parameters(), kept.parameters(), strict=True))
    assert model.config._attn_implementation == "adasplash"
    data = TextDataModule(wanted, context.data_root, context.workspace / "data", 0)
    data.setup()
    assert tokens.tolist() == [data.valid_blocks.file.open()[:5].tolist()]


def test_layer_kept_softmax_after_loading(settings, context):
    """Which layers use entmax travels with the model."""
    variants = {"entmax": {"attention": "adasplash", "layers": [1]}}
    kept = training.trained(settings(variants=variants, model={"n_layer": 2}), Job("entmax", 0), context)
    stored = json.loads((kept.folder / "model" / "config.json").read_text())["entmax_attention"]
    assert stored == {"alpha": 1.5, "method": "auto", "layers": [1]}


@pytest.fixture
def experiment(plain, tmp_path):
    """Return an experiment of its own with tiny settings."""

    def make(program: str, render: dict, **changes):
        config = {"experiment": f"adasplash/{program}", "paper": "AdaSplash", "item": "Table 0", "title": "Tiny",
                  "family": "language_modeling", "program": program, "notes": [],
                  "systems": {"softmax": "Softmax", "entmax": "Entmax 1.5"}, "reported": None,
                  "common": plain(**changes), "scales": {"smoke": {}, "lab": {}, "paper": {}},
                  "render": render}  # fmt: skip
        path = tmp_path / f"{program}.yaml"
        path.write_text(yaml.safe_dump(config, sort_keys=False))
        return load_experiment(path)

    return make


def test_records(experiment, texts, tmp_path, watch, capsys):
    options = Options("smoke", texts, results=tmp_path / "results")
    table = experiment("train", {"table": {"rows": ["system"], "columns": ["metric"], "metrics": ["val_loss"]}})
    seen = watch()
    assert run_experiment(table, options).state == DONE
    assert {len(seen)} == {2 * STEPS * 2}
    records = read_records(records_path(options.results, table.id, "smoke"))
    assert [(r.system, r.metric, r.seed) for r in records] == [
        (s, m, 0) for s in ("softmax", "entmax") for m in ("val_loss", "step_s", "peak_gb")
    ]
    assert all(r.params["data"] == "local:lm/tiny" and r.status in ("ok", "not_applicable") for r in records)
    seen.clear()
    figure = {"figure": {"kind": "lines", "x": "step", "y": "val_loss"}}
    assert run_experiment(experiment("loss_curve", figure), options).state == DONE
    assert run_experiment(table, options).state == SKIPPED
    assert seen == []  # the curve is of the runs that the table trained
    assert capsys.readouterr().out.count("already trained") == 2
    changed = experiment("train", {"table": table.render.table.__dict__}, train={"lr": 0.02})
    assert run_experiment(changed, options).state == DONE
    assert len(seen) == 2 * STEPS * 2


def test_embedded_text_is_learnt(settings, make_context, tmp_path_factory):
    """What every machine can run: the text of the Python installation, and a vocabulary learnt from it."""
    embedded = {"sources": ["embedded"], "max_train_tokens": 20_001, "max_valid_tokens": 2_001}
    wanted = settings(
        data=embedded | {"local": None, "train_files": None, "valid_files": None},
        tokenizer={"sources": ["embedded"], "local": None, "vocab_size": 384},
        model={"n_layer": 2, "n_embd": 32, "context": 32},
        train={"steps": 40, "batch_size": 8, "micro_batch_size": 8, "eval_every": 4},
    )
    for system in wanted.variants:
        points = PROGRAMS["loss_curve"].run(Job(system, 0), wanted, make_context("embedded"))
        losses = [p.value for p in points]
        assert losses[-1] < losses[0] - 0.3
        assert losses[-1] < math.log(384) - 0.8
        assert {p.params["data"] for p in points} == {"embedded:lm"}


@pytest.mark.realdata
def test_gpt2_vocabulary_on_wikitext(data_root: Path, settings, tmp_path, make_context):
    for folder in ("lm/wikitext2", "tokenizers/gpt2"):
        if not (data_root / folder).is_dir():
            pytest.skip(f"no {folder} in the data folder")
    wanted = settings(
        data={"local": "lm/wikitext2", "train_files": ["valid.txt"], "valid_files": ["test.txt"],
              "max_train_tokens": None, "max_valid_tokens": 2_001},
        tokenizer={"local": "tokenizers/gpt2"},
        model={"n_layer": 2, "n_head": 2, "n_embd": 32, "context": 64},
        train={"steps": 30, "lr": 1e-2, "eval_every": 15, "checkpoint_every": 15, "timing_skip_steps": 10},
        probe={"tokens": 64},
    )  # fmt: skip
    assert isinstance(wanted, NonzeroSettings)
    context = make_context("real")
    context = type(context)(context.workspace, data_root, context.say)
    for system in ("softmax", "entmax"):
        loss = by_metric(PROGRAMS["train"].run(Job(system, 0), wanted, context))["val_loss"]
        assert loss.params["data"] == "local:lm/wikitext2"
        assert loss.params["tokenizer"] == "local:tokenizers/gpt2"
        assert loss.params["parameters"] > 50_257 * 32
        assert 5 < loss.value < 8.5  # ln(50257) is 10.8
    ratios = PROGRAMS["nonzero_ratio"].run(Job("entmax", 0), wanted, context)
    assert len(ratios) == 4 and all(0 < r.value <= 1 for r in ratios)
