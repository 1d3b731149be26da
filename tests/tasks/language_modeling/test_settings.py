"""Settings as configs spell them: what is accepted, and the one line that says what is not."""

from __future__ import annotations

import pytest

from tasks.config import find_experiments, from_plain
from tasks.errors import ConfigError
from tasks.language_modeling.run import PROGRAMS
from tasks.language_modeling.settings import NonzeroSettings, Schedule, TrainSettings

EXPERIMENTS = [e for e in find_experiments() if e.family == "language_modeling" and e.program in PROGRAMS]
SDPA = {"attention": "sdpa"}
ENTMAX = {"attention": "adasplash"}
RAMP = {"start": 1.0, "end": 1.5, "steps": 4}


@pytest.mark.parametrize("scale", ["smoke", "lab", "paper"])
@pytest.mark.parametrize("experiment", EXPERIMENTS, ids=lambda e: e.id)
def test_configs(experiment, scale):
    settings = experiment.typed_settings(scale, PROGRAMS[experiment.program].settings)
    jobs = PROGRAMS[experiment.program].jobs(settings)
    assert jobs
    assert {job.system for job in jobs} <= set(experiment.systems)


def test_every_program_is_used():
    assert {e.program for e in EXPERIMENTS} == set(PROGRAMS)


def test_accepted(plain):
    variants = {"a": SDPA, "b": ENTMAX | {"alpha": 2, "layers": [0], "alpha_schedule": RAMP, "method": "eager"}}
    settings = from_plain(TrainSettings, plain(variants=variants), "test.yaml")
    assert list(settings.variants) == ["a", "b"]
    b = settings.variants["b"]
    assert (b.alpha, b.layers, b.alpha_schedule) == (2.0, (0,), Schedule(1.0, 1.5, 4))
    assert (settings.train.compile, settings.data.max_valid_tokens) == (False, 13 * 16 + 1)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"variants": {}}, "variants: empty"),
        ({"variants": {"x": {"attention": "fast"}}}, "variants.x.attention: got 'fast', allowed are sdpa, flash, "),
        ({"variants": {"x": {"attention": "sort_torch", "alpha": 1.7}}}, "variants.x.alpha: got 1.7, allowed with"),
        ({"variants": {"x": {"attention": "bisection_torch", "alpha": 1}}}, "variants.x.alpha: got 1.0, allowed with"),
        ({"variants": {"x": {"attention": "cudnn", "layers": [0]}}}, "variants.x.layers: goes with attention"),
        ({"variants": {"x": ENTMAX | {"alpha": 2.5}}}, "variants.x.alpha: got 2.5"),
        ({"variants": {"x": ENTMAX | {"method": "fast"}}}, "variants.x.method: got 'fast', allowed are auto"),
        ({"variants": {"x": ENTMAX | {"layers": [0, 1]}}}, "variants.x.layers: got [0, 1], allowed are 0 to 0"),
        ({"variants": {"x": ENTMAX | {"layers": [-1]}}}, "variants.x.layers: got [-1]"),
        ({"variants": {"x": ENTMAX | {"layers": []}}}, "variants.x.layers: got []"),
        ({"variants": {"x": ENTMAX | {"layers": [0, 0]}}}, "variants.x.layers: got [0, 0]"),
        ({"variants": {"x": SDPA | {"layers": [0]}}}, "variants.x.layers: goes with attention adasplash"),
        ({"variants": {"x": SDPA | {"alpha_schedule": RAMP}}}, "variants.x.alpha_schedule: goes with"),
        ({"variants": {"x": ENTMAX | {"alpha_schedule": RAMP | {"end": 3.0}}}}, "x.alpha_schedule.end: got 3.0"),
        ({"variants": {"x": ENTMAX | {"alpha_schedule": RAMP | {"steps": 0}}}}, "x.alpha_schedule.steps: got 0"),
        ({"variants": {"x": SDPA | {"learn_alpha": True}}}, "variants.x.learn_alpha: goes with attention adasplash"),
        ({"variants": {"x": ENTMAX | {"learn_alpha": True, "alpha_schedule": RAMP}}},
         "variants.x.learn_alpha: goes without alpha_schedule"),
        ({"variants": {"x": ENTMAX | {"learn_alpha": True, "alpha": 2}}},
         "variants.x.alpha: got 2.0, allowed with learn_alpha is a start between 1 and 2"),
        ({"variants": {"x": ENTMAX | {"learn_alpha": "yes"}}}, "variants.x.learn_alpha: got 'yes'"),
        ({"evaluation": {"hellaswag": {"sources": ["embedded"]}}},
         "evaluation.hellaswag.sources: got 'embedded', allowed are local, hub"),
        ({"evaluation": {"lambada": {"sources": ["local"]}}}, "evaluation.lambada.local: missing"),
        ({"evaluation": {"lambada": {"sources": ["local"], "local": "a", "max_items": 0}}},
         "evaluation.lambada.max_items: got 0"),
        ({"evaluation": {"piqa": None}}, "evaluation.piqa: unknown key"),
        ({"evaluation": {"batch_tokens": 0}}, "evaluation.batch_tokens: got 0"),
        ({"evaluation": {"texts": {"x": {"sources": ["embedded"], "split": "train"}}}},
         "evaluation.texts.x.split: got 'train', allowed are valid, test"),
        ({"evaluation": {"texts": {"x": {"sources": ["embedded"], "max_tokens": 0}}}},
         "evaluation.texts.x.max_tokens: got 0"),
        ({"export": {"max_mb": -1}}, "export.max_mb: got -1"),
        ({"export": {"dtype": "float32"}}, "export.dtype: got 'float32', allowed are bfloat16, float16"),
        ({"model": {"n_embd": 17}}, "model.n_embd: got 17, allowed is a multiple of n_head (2)"),
        ({"model": {"n_embd": 0}}, "model.n_embd: got 0"),
        ({"model": {"n_head": 0}}, "model.n_head: got 0"),
        ({"model": {"context": 0}}, "model.context: got 0"),
        ({"model": {"width": 8}}, "model.width: unknown key"),
        ({"data": {"max_train_tokens": 0}}, "data.max_train_tokens: got 0"),
        ({"data": {"max_valid_tokens": -1}}, "data.max_valid_tokens: got -1"),
        ({"data": {"local": None}}, "data.local: missing"),
        ({"train": {"batch_size": 5}}, "train.batch_size: got 5, allowed is a multiple of micro_batch_size (2)"),
        ({"train": {"precision": "fp8"}}, "train.precision: got 'fp8', allowed are 32-true, bf16-mixed, 16-mixed"),
        ({"train": {"steps": 0}}, "train.steps: got 0, allowed is 1 or more"),
        ({"train": {"checkpoint_every": 0}}, "train.checkpoint_every: got 0"),
        ({"train": {"warmup_steps": -1}}, "train.warmup_steps: got -1"),
        ({"train": {"lr": -1e-3}}, "train.lr: got -0.001"),
        ({"train": {"betas": [0.9]}}, "train.betas: got [0.9]"),
        ({"train": {"betas": [0.9, 1.0]}}, "train.betas: got [0.9, 1.0]"),
        ({"train": {"seeds": []}}, "train.seeds: got []"),
        ({"train": {"seeds": [1, 1]}}, "train.seeds: got [1, 1]"),
        ({"train": {"seeds": [-1]}}, "train.seeds: got [-1]"),
        ({"probe": {"tokens": 17}}, "probe.tokens: got 17, allowed is 1 to context, 16"),
        ({"probe": {"tokens": 0}}, "probe.tokens: got 0"),
    ],
)  # fmt: skip
def test_refused(plain, changes, message):
    schema = NonzeroSettings if "probe" in changes else TrainSettings
    with pytest.raises(ConfigError) as caught:
        from_plain(schema, plain(**changes), "test.yaml")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_not_a_number_is_refused():
    """Wherever YAML's .nan should come through: it is less than no bound."""
    with pytest.raises(ValueError, match="^start: got nan"):
        Schedule(float("nan"), 1.5, 1)
