"""The cost of an optimizer step: what is run, what is timed, and what is recorded of systems that cannot."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from adasplash_kernels.integrations.transformers import observed
from tasks import matmul_rate
from tasks.config import CONFIGS, from_plain, load_experiment
from tasks.errors import ConfigError
from tasks.language_modeling import step_cost
from tasks.language_modeling.run import PROGRAMS
from tasks.language_modeling.settings import CostSettings
from tasks.language_modeling.step_cost import Cost, flops_per_token, measure, measurements
from tasks.programs import Job
from tasks.render.metrics import load_metrics

METRICS = ["step_s", "peak_gb", "tokens_per_s", "mfu", "nonzero_ratio", "matmul_tflops"]
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
VARIANTS = {"fa2": {"attention": "flash"}, "cudnn": {"attention": "cudnn"}, "sort": {"attention": "sort_torch"},
            "bisection": {"attention": "bisection_torch"}, "auto": {"attention": "adasplash"}}  # fmt: skip


@pytest.fixture
def cost_settings(plain):
    def make(**changes) -> CostSettings:
        changes = {"variants": VARIANTS, "measure": ["fa2", "sort"], "vocab_size": 100,
                   "timing": {"skip_steps": 1, "steps": 3, "max_seconds": 100}} | changes  # fmt: skip
        return from_plain(CostSettings, plain(**changes), "test.yaml")

    return make


@pytest.fixture(autouse=True)
def small_product(monkeypatch):
    monkeypatch.setitem(matmul_rate._SIZES, "cpu", (16, 2))


@pytest.fixture
def models(monkeypatch):
    """The models built, made sharp enough for entmax to have zeros."""
    built, build = [], step_cost.build_model

    def noted(*arguments):
        model = build(*arguments)
        with torch.no_grad():
            model.transformer.h[0].attn.c_attn.weight[:, :32] *= 100
        built.append(model)
        return model

    monkeypatch.setattr(step_cost, "build_model", noted)
    return built


@pytest.mark.parametrize("system", ["fa2", "sort", "bisection", "auto"])
def test_everything_is_measured(system, cost_settings, context):
    # FlashAttention-2 takes 16-bit inputs alone on a GPU
    settings = cost_settings(train={"precision": "bf16-mixed" if DEVICE.type == "cuda" else "32-true"})
    found = PROGRAMS["step_cost"].run(Job(system, 0), settings, context)
    assert [m.metric for m in found] == METRICS
    assert all(m.unit == load_metrics()[m.metric].unit for m in found)
    by = {m.metric: m for m in found}
    assert by["step_s"].stats["n"] == 3 and by["step_s"].value > 0
    assert by["tokens_per_s"].value == pytest.approx(4 * 16 / by["step_s"].value)
    assert by["nonzero_ratio"].status == ("not_applicable" if system == "fa2" else "ok")
    assert by["step_s"].params["parameters"] == 128 * 16 + 16 * 16 + (12 * 16**2 + 13 * 16) + 2 * 16
    assert by["step_s"].params["weights"] == "random"


@pytest.mark.parametrize("system", ["fa2", "sort", "bisection", "auto"])
def test_mixed_precision(system, cost_settings, models):
    """The model keeps its float32 weights and attends in bfloat16."""
    seen = []
    settings = cost_settings(train={"precision": "bf16-mixed"})
    hook = torch.nn.modules.module.register_module_forward_hook(
        lambda module, _, out: seen.append(out.dtype) if type(module).__name__ == "Conv1D" else None)
    try:
        cost = measure(system, 0, settings, lambda line: None)
    finally:
        hook.remove()
    assert cost.status == "ok" and set(seen) == {torch.bfloat16}
    assert {p.dtype for p in models[0].parameters()} == {torch.float32}


def test_jobs_are_the_systems_named(cost_settings):
    jobs = PROGRAMS["step_cost"].jobs(cost_settings(measure=["sort", "cudnn"], train={"seeds": [4]}))
    assert jobs == [Job("sort", 4), Job("cudnn", 4)]


def test_share_of_model_operations(cost_settings):
    settings = cost_settings(model={"n_layer": 3, "n_head": 2, "n_embd": 16, "context": 16})
    assert flops_per_token(1000, settings.model) == 6 * 1000 + 12 * 3 * 2 * 8 * 16
    cost = Cost([2.0, 1.0, 4.0], None, 0.5, 1000, matmul_flops=1e6)
    by = {m.metric: m for m in measurements("sort", settings, cost)}
    assert by["step_s"].value == 2.0 and by["step_s"].stats["max"] == 4.0
    assert by["tokens_per_s"].value == 4 * 16 / 2
    assert by["mfu"].value == pytest.approx(100 * 32 * (6000 + 9216) / 1e6)
    assert by["matmul_tflops"].value == pytest.approx(1.0e-6)
    assert by["peak_gb"].status == "not_applicable"


@pytest.mark.parametrize("micro", [1, 2, 4])
def test_a_step_is_one_of_the_whole_batch(micro, cost_settings, models, monkeypatch):
    """However many micro-batches: the gradients and weights of a plain loop over batches of four."""
    clip, norms = torch.nn.utils.clip_grad_norm_, []
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", lambda *a: norms.append(float(clip(*a))))
    settings = cost_settings(train={"micro_batch_size": micro})
    measure("sort", 0, settings, lambda line: None)
    torch.manual_seed(0)
    model = step_cost.build_model(settings.model, settings.variants["sort"], 100).to(DEVICE)
    matrices, vectors = ([p for p in model.parameters() if (p.ndim > 1) == many] for many in (True, False))
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95))
    generator = torch.Generator(DEVICE).manual_seed(0)
    expected_norms = []
    for rate in (1 / 3, 2 / 3, 1.0, 1.0):  # warm-up of 3 steps, then the head of the cosine
        window = torch.randint(100, (4, 17), generator=generator, device=DEVICE)
        logits = model(input_ids=window[:, :-1]).logits
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(logits.transpose(1, 2), window[:, 1:]).backward()
        expected_norms.append(float(clip(model.parameters(), 1.0)))
        for group in optimizer.param_groups:
            group["lr"] = 1e-2 * rate
        optimizer.step()
    assert norms == pytest.approx(expected_norms, rel=1e-2)
    for mine, expected in zip(models[0].parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(mine, expected, rtol=1e-3, atol=5e-4)


def test_nonzero_weights_are_those_of_the_model(cost_settings, models):
    ratios = {s: measure(s, 0, cost_settings(), lambda line: None).nonzero_ratio for s in ("sort", "bisection", "auto")}
    assert 0 < ratios["auto"] < 0.95
    assert ratios["sort"] == pytest.approx(ratios["auto"], abs=0.02)
    assert ratios["bisection"] == pytest.approx(ratios["auto"], abs=0.02)


def test_slow_systems_take_fewer_steps(cost_settings):
    said = []
    timing = {"skip_steps": 0, "steps": 50, "max_seconds": 1e-6}
    cost = measure("sort", 0, cost_settings(timing=timing), said.append)
    assert len(cost.step_seconds) == 2 and said == ["sort: 2 of 50 steps within 1e-06 s"]


def test_contexts_have_as_many_tokens_a_step(cost_settings, context):
    settings = cost_settings(contexts=[8, 16, 32], train={"batch_size": 8, "micro_batch_size": 4})
    assert [(own.model.context, own.train.batch_size, own.train.micro_batch_size) for own in settings.by_context()] == [
        (8, 16, 8), (16, 8, 4), (32, 4, 2)]  # fmt: skip
    found = PROGRAMS["step_cost"].run(Job("sort", 0), settings, context)
    assert [(m.metric, m.params["n"]) for m in found] == [(name, n) for n in (8, 16, 32) for name in METRICS]
    assert {m.params["batch_size"] * m.params["n"] for m in found} == {8 * 16}
    assert [own.model.context for own in cost_settings().by_context()] == [16]


def test_training_step_has_scores_as_spread_as_those_of_gaussian_inputs():
    """What the config's notes say of its ``query_scale``, in two layers of its own width."""
    experiment = load_experiment(CONFIGS / "adasplash2" / "training_step.yaml")
    settings = experiment.typed_settings("paper", CostSettings)
    torch.manual_seed(0)
    model = step_cost.build_model(replace(settings.model, n_layer=2), settings.variants["auto"], 1000)
    step_cost._spread_scores(model, settings.query_scale)
    spread = []

    def look(layer, call):
        spread.append(float((call["q"] @ call["k"].mT * call["q"].shape[-1] ** -0.5).std()))

    with torch.no_grad(), observed(model, look):
        model(input_ids=torch.randint(1000, (1, 128)))
    assert len(spread) == 2 and spread == pytest.approx([1.0, 1.0], abs=0.1)


def test_scores_are_spread_by_the_queries_alone(cost_settings, monkeypatch):
    """Scores before the softmax of the first layer are so many times as large; nothing else of the model differs."""
    scores, build = {}, step_cost.build_model
    for factor in (1.0, 3.0):
        models = []
        monkeypatch.setattr(step_cost, "build_model", lambda *a, models=models: models.append(build(*a)) or models[-1])
        timing = {"skip_steps": 0, "steps": 2, "max_seconds": 100}
        settings = cost_settings(query_scale=factor, timing=timing, train={"lr": 0.0, "weight_decay": 0.0})
        cost = measure("sort", 0, settings, lambda line: None)
        assert measurements("sort", settings, cost)[0].params["query_scale"] == factor
        attention, block = models[0].transformer.h[0].attn, models[0].transformer.h[0]
        x = torch.randn(1, 5, 16, generator=torch.Generator().manual_seed(0)).to(DEVICE)
        q, k, v = attention.c_attn(block.ln_1(x)).split(16, dim=2)
        scores[factor] = (q @ k.mT, k, v)
    torch.testing.assert_close(scores[3.0][0], 3 * scores[1.0][0])
    assert torch.equal(scores[3.0][1], scores[1.0][1]) and torch.equal(scores[3.0][2], scores[1.0][2])


@pytest.mark.parametrize(
    ("system", "error", "status"),
    [("fa2", torch.OutOfMemoryError("CUDA out of memory. Tried"), "oom"), ("cudnn", None, "not_applicable")],
)
def test_systems_that_cannot(system, error, status, cost_settings, context, monkeypatch):
    def refuse(*_):
        raise error

    if error:
        monkeypatch.setattr(step_cost, "next_token_loss", refuse)
    elif torch.cuda.is_available():
        pytest.skip("needs a device without cuDNN attention, to see its absence recorded")
    found = PROGRAMS["step_cost"].run(Job(system, 0), cost_settings(), context)
    assert [m.metric for m in found] == METRICS
    assert {m.status for m in found[:-1]} == {status} and found[-1].status == "ok"
    assert all(m.params["reason"] for m in found[:-1])


def test_other_errors_are_not_swallowed(cost_settings, monkeypatch):
    def broken(*_):
        raise RuntimeError("a bug")

    monkeypatch.setattr(step_cost, "next_token_loss", broken)
    with pytest.raises(RuntimeError, match="a bug"):
        measure("fa2", 0, cost_settings(), lambda line: None)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"measure": []}, "measure: got []"),
        ({"measure": ["sort", "sort"]}, "measure: got ['sort', 'sort']"),
        ({"measure": ["sort", "other"]}, "measure[1]: got 'other', allowed are fa2, cudnn, sort, bisection, auto"),
        ({"vocab_size": 1}, "vocab_size: got 1"),
        ({"timing": {"skip_steps": -1, "steps": 3, "max_seconds": 1}}, "timing.skip_steps: got -1"),
        ({"timing": {"skip_steps": 0, "steps": 1, "max_seconds": 1}}, "timing.steps: got 1"),
        ({"timing": {"skip_steps": 0, "steps": 2, "max_seconds": 0}}, "timing.max_seconds: got 0"),
        ({"train": {"precision": "16-mixed"}}, "train.precision: got '16-mixed', allowed here are"),
        ({"contexts": [16, 16]}, "contexts: got [16, 16]"),
        ({"contexts": [16, 0]}, "contexts[1]: got 0"),
        ({"contexts": [16, 24]}, "contexts[1]: got 24, allowed is what divides the"),
        ({"query_scale": 0.0}, "query_scale: got 0"),
    ],
)
def test_refused(changes, message, cost_settings):
    with pytest.raises(ConfigError, match="^test.yaml: ") as caught:
        cost_settings(**changes)
    assert message in str(caught.value)
