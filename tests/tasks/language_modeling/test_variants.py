"""Variants of entmax: alpha learnt by each head, softmax in some layers; and the small models kept of them."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from adasplash_kernels.integrations.transformers import get_entmax_config, learned_alphas, observed
from tasks.data.tokenizer import load_tokenizer
from tasks.errors import UserError
from tasks.language_modeling.export import export, load_exported
from tasks.language_modeling.gpt2 import build_model
from tasks.language_modeling.module import CausalLanguageModel
from tasks.language_modeling.run import PROGRAMS
from tasks.language_modeling.settings import Model, Variant
from tasks.models.support import nonzero_ratios
from tasks.programs import Job
from tasks.render.metrics import load_metrics

VARIANTS = {
    "softmax": {"attention": "sdpa"},
    "learned": {"attention": "adasplash", "alpha": 1.5, "learn_alpha": True},
    "hybrid": {"attention": "adasplash", "alpha": 1.5, "layers": [1]},
    "learned_hybrid": {"attention": "adasplash", "alpha": 1.25, "learn_alpha": True, "layers": [1]},
}
TWO_LAYERS = {"variants": VARIANTS, "model": {"n_layer": 2}}


@pytest.fixture
def exporting(context, tmp_path):
    return dataclasses.replace(context, models=tmp_path / "models")


def test_alphas_are_no_subject_of_weight_decay(settings):
    model = build_model(Model(2, 2, 16, 32), Variant("adasplash", learn_alpha=True), 300)
    optimizer = CausalLanguageModel(model, settings().train).configure_optimizers()["optimizer"]
    logits = [p for name, p in model.named_parameters() if name.endswith("entmax_alpha_logit")]
    assert len(logits) == 2
    [group] = [g for g in optimizer.param_groups if any(p is logits[0] for p in g["params"])]
    assert group["weight_decay"] == 0.0
    assert sum(any(p is logit for p in group["params"]) for logit in logits) == 2


@pytest.mark.parametrize(("system", "start", "layers"), [("learned", 1.5, [0, 1]), ("learned_hybrid", 1.25, [1])])
def test_alphas_are_learnt_kept_and_recorded(system, start, layers, settings, context, train):
    wanted = settings(**TWO_LAYERS, train={"lr": 0.1})
    points = [m for m in PROGRAMS["train"].run(Job(system, 0), wanted, context) if m.metric == "alpha"]
    assert [(m.params["layer"], m.params["head"]) for m in points] == [(i, h) for i in layers for h in range(2)]
    assert all(1 < m.value < 2 and abs(m.value - start) > 1e-3 for m in points)  # every head's has moved
    assert len({round(m.value, 5) for m in points}) == len(points)
    assert {m.unit for m in points} == {load_metrics()["alpha"].unit or ""}
    run = train(wanted, system)
    kept = learned_alphas(run.load_model())
    assert [m.value for m in points] == [value for layer in layers for value in kept[layer].tolist()]
    fixed = settings(variants={system: {"attention": "adasplash", "alpha": start}}, model={"n_layer": 2},
                     train={"lr": 0.1})  # fmt: skip
    assert run.final_loss != train(fixed, system).final_loss
    assert "alpha" not in {m.metric for m in PROGRAMS["train"].run(Job(system, 0), fixed, context)}
    ratios = nonzero_ratios(run.load_model(), torch.arange(12)[None])
    assert sorted(ratios) == layers


def test_hybrid_keeps_softmax_in_its_first_layer(settings, train):
    model, seen = train(settings(**TWO_LAYERS), "hybrid").load_model(), []
    with observed(model, lambda layer, call: seen.append((layer, call["alpha"]))):
        model(torch.arange(5)[None])
    assert seen == [(1, 1.5)]


@pytest.mark.parametrize("system", list(VARIANTS))
def test_generation_with_a_cache_is_that_without(system, settings, train):
    """A trained model, greedy and step by step: each token is the best of a pass over all that precedes it."""
    model = train(settings(**TWO_LAYERS, train={"lr": 0.1}), system).load_model().double()
    prompt = torch.tensor([[5, 9, 12, 7], [30, 31, 5, 6]])
    cached, plain = (model.generate(prompt, max_new_tokens=9, do_sample=False, use_cache=use_cache, eos_token_id=None,
                                    pad_token_id=0, attention_mask=torch.ones_like(prompt))
                     for use_cache in (True, False))  # fmt: skip
    assert cached.shape == (2, 13) and torch.equal(cached, plain)
    with torch.no_grad():
        for end in range(4, 13):
            assert torch.equal(model(cached[:, :end]).logits[:, -1].argmax(-1), cached[:, end])


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("system", list(VARIANTS))
def test_exported_model_is_the_trained_one(system, dtype, settings, train, exporting):
    wanted = settings(**TWO_LAYERS, export={"max_mb": 12, "dtype": dtype})
    run = train(wanted, system)
    folder = export(run, wanted, Job(system, 0), exporting)
    assert folder == exporting.models / system
    assert sorted(p.suffix for p in folder.iterdir() if p.name != "generation_config.json") == [".json", ".safetensors"]
    assert not list(exporting.models.glob(".*"))
    config = json.loads((folder / "config.json").read_text())
    assert config["trained"]["tokenizer"] == "local:tokenizers/tiny"
    assert config["trained"]["attention"] == VARIANTS[system]["attention"]
    assert str(exporting.workspace) not in (folder / "config.json").read_text()
    loaded, trained = load_exported(folder), run.load_model()
    assert loaded.dtype == torch.float32 and not loaded.training
    if system != "softmax":
        assert get_entmax_config(loaded) == get_entmax_config(trained)
    tokens = torch.arange(3, 19)[None]
    with torch.no_grad():
        rounded, exact = loaded(tokens).logits, trained(tokens).logits
        unit = 2.0 ** (-8 if dtype == "bfloat16" else -11)
        assert 0 < (rounded - exact).abs().max() <= 8 * unit * exact.abs().max()
        for alpha, other in zip(*(learned_alphas(m).values() for m in (loaded, trained) if system != "softmax"),
                                strict=True) if system != "softmax" else ():  # fmt: skip
            torch.testing.assert_close(alpha, other, rtol=0, atol=unit)


def test_a_tokenizer_of_embedded_text_is_exported_too(settings, train, exporting):
    tokenizer = {"sources": ["embedded"], "vocab_size": 300}
    wanted = settings(tokenizer=tokenizer, export={}, train={"steps": 1})
    folder = export(train(wanted), wanted, Job("softmax", 0), exporting)
    loaded = PreTrainedTokenizerFast.from_pretrained(folder)
    original = load_tokenizer(wanted.tokenizer).backend
    text = "A river wears down stones."
    assert loaded(text)["input_ids"] == original(text)["input_ids"]
    assert (len(loaded), loaded.eos_token_id) == (len(original), original.eos_token_id)
    assert len(loaded) <= load_exported(folder).config.vocab_size


def test_too_large_a_model_is_told_and_not_exported(settings, train, exporting, said):
    wanted = settings(export={"max_mb": 0.001})
    assert export(train(wanted), wanted, Job("softmax", 0), exporting) is None
    assert not exporting.models.exists()
    assert said[-1].startswith("softmax (seed 0): not exported: 0.0 MB in bfloat16, export.max_mb is 0.001")


def test_only_the_first_seed_is_exported_and_only_if_asked(settings, train, exporting, context):
    wanted = settings(export={}, train={"steps": 1, "seeds": [3, 0]})
    run = train(wanted)
    assert export(run, wanted, Job("softmax", 0), exporting) is None
    assert export(run, settings(train={"steps": 1}), Job("softmax", 0), exporting) is None
    assert export(run, wanted, Job("softmax", 3), context) is None
    assert export(run, wanted, Job("softmax", 3), exporting) is not None
    assert export(run, wanted, Job("softmax", 3), exporting) is not None  # in place of the one before


def test_no_exported_model(tmp_path: Path):
    with pytest.raises(UserError, match="holds no exported model: FileNotFoundError"):
        load_exported(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError, match="holds no exported model: KeyError: 'trained'"):
        load_exported(tmp_path)
