"""Scores after training: benchmarks, other texts, and what is recorded where their data is missing."""

from __future__ import annotations

import dataclasses
import json
import shutil

import pytest
import torch

from tasks.data import sources
from tasks.data.hub import Unavailable
from tasks.data.items import load_hellaswag
from tasks.data.specs import ItemSpec
from tasks.errors import DataError
from tasks.language_modeling.evaluation import score_benchmarks, text_losses
from tasks.language_modeling.run import PROGRAMS
from tasks.models.zero_shot import choose_endings
from tasks.programs import Job
from tasks.render.metrics import load_metrics

HELLASWAG = {"sources": ["local"], "local": "eval/hellaswag"}
LAMBADA = {"sources": ["local"], "local": "eval/lambada"}
BENCHMARKS = {"hellaswag": HELLASWAG, "lambada": LAMBADA}
ROWS = [{"activity_label": "wind", "ctx": "the river wears", "label": i % 3,
         "endings": ["slowly down", "under a bright stone", "and " * 12 + "water"]} for i in range(5)]  # fmt: skip
PASSAGES = ["the river slowly wears down under bright water and wind a stone", "a river and the wind", "bright water"]


@pytest.fixture
def data_context(context, texts, tmp_path):
    """The tiny texts and, beside them, benchmarks of the same words."""
    root = shutil.copytree(texts, tmp_path / "with_benchmarks")
    for name, rows in (("hellaswag", ROWS), ("lambada", [{"text": text} for text in PASSAGES])):
        path = root / "eval" / name / "items.jsonl"
        path.parent.mkdir(parents=True)
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return dataclasses.replace(context, data_root=root)


def test_benchmarks_are_measured_with_the_table(settings, data_context):
    wanted = settings(evaluation=BENCHMARKS)
    found = {m.metric: m for m in PROGRAMS["train"].run(Job("entmax", 0), wanted, data_context)}
    assert list(found) == ["val_loss", "step_s", "peak_gb", "hellaswag_acc", "lambada_acc", "lambada_ppl"]
    for name in ("hellaswag_acc", "lambada_acc", "lambada_ppl"):
        assert found[name].unit == (load_metrics()[name].unit or "")
        assert found[name].params["data"] == "local:lm/tiny"
    hellaswag = found["hellaswag_acc"]
    assert (hellaswag.params["items"], hellaswag.params["items_data"]) == (5, "local:eval/hellaswag")
    share = hellaswag.value / 100
    assert share in (0.0, 0.2, 0.4)  # the same ending is chosen for all five, and the label goes round
    assert hellaswag.stats["std_error"] == pytest.approx(100 * (share * (1 - share) / 4) ** 0.5)
    assert found["lambada_acc"].params["items"] == 3 and found["lambada_ppl"].value > 1


def test_scores_are_of_the_trained_model(settings, data_context, train):
    wanted = settings(evaluation={"hellaswag": HELLASWAG | {"max_items": 4}})
    run = train(wanted, "entmax", where=data_context)
    [found] = score_benchmarks(run.load_model(), wanted, run.facts, data_context)
    from tasks.data.tokenizer import load_tokenizer

    items = load_hellaswag(ItemSpec(("local",), local="eval/hellaswag"), data_context.data_root).items[:4]
    score = choose_endings(run.load_model(), load_tokenizer(wanted.tokenizer, data_context.data_root), items)
    assert found.value == 100 * score.accuracy_norm
    assert found.stats["unnormalised"] == 100 * score.accuracy
    assert found.params["items"] == 4


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_text_loss_of_the_validation_text_is_the_validation_loss(settings, context, precision):
    """The same windows at the same precision: what training measured, from the model on the disk."""
    tiny = settings().data
    text = {"sources": ["local"], "local": tiny.local, "valid_files": ["valid.txt"], "split": "valid",
            "max_tokens": tiny.max_valid_tokens}  # fmt: skip
    other = {"sources": ["local"], "local": tiny.local, "test_files": ["train.txt"], "max_tokens": 100}
    wanted = settings(evaluation={"texts": {"same": text, "other": other}}, train={"precision": precision})
    loss = PROGRAMS["train"].run(Job("entmax", 0), wanted, context)[0]
    same, shorter = PROGRAMS["text_loss"].run(Job("entmax", 0), wanted, context)
    assert loss.metric == "val_loss" and {same.metric, shorter.metric} == {"text_loss"}
    assert same.value == pytest.approx(loss.value, abs=1e-5)
    assert same.unit == load_metrics()["text_loss"].unit
    assert (same.params["text"], shorter.params["text"]) == ("same", "other")
    assert (same.params["tokens"], shorter.params["tokens"]) == (13 * 16, 6 * 16)
    assert shorter.value != same.value


def test_missing_data_is_not_applicable(settings, context, train):
    text = {"sources": ["local"], "local": "lm/nowhere"}
    wanted = settings(evaluation=BENCHMARKS | {"texts": {"web": text}})
    run = train(wanted, where=context)
    found = score_benchmarks(run.load_model(), wanted, run.facts, context)
    found += text_losses(run.load_model(), wanted, run.facts, context)
    assert [m.metric for m in found] == ["hellaswag_acc", "lambada_acc", "lambada_ppl", "text_loss"]
    for measurement in found:
        assert (measurement.value, measurement.status) == (None, "not_applicable")
        assert measurement.params["reason"] == "no source of its data serves on this machine"
    assert found[-1].params["text"] == "web"


def test_identity_names_the_sources_of_the_evaluation(settings, context, data_context):
    identity = PROGRAMS["train"].identity
    wanted = settings(evaluation=BENCHMARKS)
    assert identity(wanted, data_context.data_root)["evaluation"] == {
        "hellaswag": "local:eval/hellaswag", "lambada": "local:eval/lambada"}  # fmt: skip
    assert identity(wanted, context.data_root)["evaluation"] == {"hellaswag": None, "lambada": None}
    assert "evaluation" not in identity(settings(), context.data_root)


def test_a_hub_that_is_to_serve_and_does_not_is_told_before_training(settings, context, monkeypatch):
    def refuse(*_: object) -> None:
        raise Unavailable("data.hub: cannot reach the Hugging Face hub")

    monkeypatch.setattr(sources, "is_offline", lambda: False)
    monkeypatch.setattr(sources, "hub_commit", refuse)
    hub = {"path": "Rowan/hellaswag", "splits": {"test": "validation"}}
    wanted = settings(evaluation={"hellaswag": {"sources": ["local", "hub"], "local": "eval/nowhere", "hub": hub}})
    assert PROGRAMS["train"].identity(wanted, context.data_root)["evaluation"] == {"hellaswag": "hub:Rowan/hellaswag"}
    with pytest.raises(DataError, match="^evaluation.hellaswag: .*cannot reach the Hugging Face hub.*null leaves"):
        PROGRAMS["train"].obstacle(wanted, context.data_root)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("hellaswag", '{"ctx": "a"}', "evaluation.hellaswag: local:eval/hellaswag: item 0: no column activity_label"),
        ("lambada", '{"text": ""}', "evaluation.lambada: local:eval/lambada: item 0: the text has no last word"),
        ("lambada", "{", "evaluation.lambada: local: "),
    ],
)
def test_wrong_data_is_named(settings, data_context, train, name, content, message):
    (data_context.data_root / "eval" / name / "items.jsonl").write_text(content)
    wanted = settings(evaluation=BENCHMARKS, train={"steps": 1})
    run = train(wanted, where=data_context)
    with pytest.raises(DataError) as caught:
        score_benchmarks(run.load_model(), wanted, run.facts, data_context)
    assert str(caught.value).startswith(message)


def test_a_text_that_is_too_short_is_named(settings, context, train):
    text = {"sources": ["local"], "local": "lm/tiny", "test_files": ["valid.txt"], "max_tokens": 16}
    wanted = settings(evaluation={"texts": {"short": text}}, train={"steps": 1})
    run = train(wanted, where=context)
    with pytest.raises(DataError, match="^evaluation.texts.short: context: got 16, but the test split"):
        text_losses(run.load_model(), wanted, run.facts, context)


def test_nothing_is_asked_for(settings, context, train):
    run = train(settings(train={"steps": 1}))
    assert score_benchmarks(run.load_model(), settings(), run.facts, context) == []
    assert text_losses(run.load_model(), settings(), run.facts, context) == []
    assert not torch.is_autocast_enabled("cpu")
