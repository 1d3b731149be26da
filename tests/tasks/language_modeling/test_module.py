"""The model, its loss and its optimizer."""

from __future__ import annotations

import dataclasses
import math

import pytest
import pytorch_lightning as pl
import torch

from adasplash_kernels.integrations.transformers import get_entmax_config
from tasks.language_modeling import training
from tasks.language_modeling.gpt2 import build_model, learning_rate_factor
from tasks.language_modeling.module import CausalLanguageModel
from tasks.language_modeling.settings import Model, Schedule, Variant

SIZE = Model(n_layer=2, n_head=2, n_embd=16, context=32)
SOFTMAX, ENTMAX = Variant("sdpa"), Variant("adasplash", alpha=1.5)


@pytest.fixture
def recipe(settings):
    """Return a recipe with some of its values replaced."""
    return lambda **changes: dataclasses.replace(settings().train, **changes)


def fresh(variant: Variant = SOFTMAX, vocab_size: int = 300, seed: int = 0):
    pl.seed_everything(seed, verbose=False)
    return build_model(SIZE, variant, vocab_size)


def tokens(*shape: int) -> torch.Tensor:
    return torch.randint(0, 300, shape, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("variant", [SOFTMAX, ENTMAX], ids=["softmax", "entmax"])
def test_loss_is_the_one_of_transformers(variant, recipe):
    model = fresh(variant)
    window = tokens(3, 32)
    with torch.no_grad():
        ours = CausalLanguageModel(model, recipe()).loss(window)
        theirs = model(input_ids=window, labels=window).loss
        other = CausalLanguageModel(model, recipe()).loss(window.flip(1))
    torch.testing.assert_close(ours, theirs)
    assert abs(float(other) - float(theirs)) > 1e-5


@pytest.mark.parametrize("variant", [SOFTMAX, ENTMAX], ids=["softmax", "entmax"])
def test_untrained_model_knows_nothing(variant, recipe):
    model = fresh(variant)
    assert model.config.vocab_size == 320  # the next multiple of 64
    loss = CausalLanguageModel(model, recipe()).loss(tokens(8, 33))
    assert loss.item() == pytest.approx(math.log(320), abs=0.05)


@pytest.mark.parametrize(("vocab_size", "rounded"), [(300, 320), (320, 320), (321, 384), (50257, 50304)])
def test_vocabulary_is_rounded_up(vocab_size, rounded):
    with torch.device("meta"):
        assert fresh(vocab_size=vocab_size).config.vocab_size == rounded


def test_model_is_what_the_settings_say():
    model = fresh(Variant("adasplash", alpha=1.75, method="eager", layers=(1,)))
    config = model.config
    assert (config.n_layer, config.n_head, config.n_embd, config.n_positions) == (2, 2, 16, 32)
    assert {config.resid_pdrop, config.embd_pdrop, config.attn_pdrop} == {0.0}
    live = get_entmax_config(model)
    assert (live.alpha, live.method, live.layers) == (1.75, "eager", (1,))
    assert get_entmax_config(fresh(Variant("adasplash", alpha_schedule=Schedule(1.25, 2.0, 9)))).alpha == 1.25
    with pytest.raises(ValueError, match="contains 0 times"):
        get_entmax_config(fresh(SOFTMAX))


def test_variants_start_from_the_same_weights():
    softmax, entmax, other = (fresh(v, seed=s).state_dict() for v, s in ((SOFTMAX, 0), (ENTMAX, 0), (SOFTMAX, 1)))
    assert list(softmax) == list(entmax)
    assert all(torch.equal(softmax[name], entmax[name]) for name in softmax)
    assert not torch.equal(softmax["transformer.wte.weight"], other["transformer.wte.weight"])


def test_variants_differ_in_attention():
    """The same weights, blown up so that entmax has something to cut off, do not give the same output."""
    outputs = []
    for variant in (SOFTMAX, ENTMAX):
        model = fresh(variant)
        with torch.no_grad():
            for name, p in model.named_parameters():
                if name.endswith("c_attn.weight"):
                    p.mul_(20)
            outputs.append(model(input_ids=tokens(1, 32)).logits)
    assert (outputs[0] - outputs[1]).abs().max() > 1e-3


def test_matrices_decay_and_vectors_do_not(recipe):
    model = fresh()
    optimizer = CausalLanguageModel(model, recipe()).configure_optimizers()["optimizer"]
    assert isinstance(optimizer, torch.optim.AdamW)
    names = {id(p): name for name, p in model.named_parameters()}
    decayed, kept = ({names[id(p)] for p in group["params"]} for group in optimizer.param_groups)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.0]
    assert {name for name in decayed if name.endswith("bias") or ".ln_" in name} == set()
    assert {name for name in kept if not name.endswith("bias") and ".ln_" not in name} == set()
    assert decayed | kept == set(names.values())
    assert model.lm_head.weight is model.transformer.wte.weight
    counted = [id(p) for group in optimizer.param_groups for p in group["params"]]
    assert len(counted) == len(set(counted))
    assert counted.count(id(model.lm_head.weight)) == 1
    assert optimizer.defaults["betas"] == (0.9, 0.95)


def test_warm_up_and_cosine(recipe):
    factor = [learning_rate_factor(s, recipe(steps=14, warmup_steps=4, lr=1e-2, final_lr=1e-3)) for s in range(16)]
    assert factor[:4] == [0.25, 0.5, 0.75, 1.0]
    assert factor[4] == 1.0
    assert factor[9] == pytest.approx((1 + 0.1) / 2)  # half way down
    assert factor[14] == factor[15] == pytest.approx(0.1)  # final_lr, and no rise after it
    assert factor[4:15] == sorted(factor[4:15], reverse=True) and len(set(factor[4:15])) == 11
    quarter = 0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * 0.2))
    assert factor[6] == pytest.approx(quarter)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"steps": 2, "warmup_steps": 0}, {0: 1.0, 1: 0.5, 2: 0.0}),
        ({"steps": 4, "warmup_steps": 4}, {0: 0.25, 3: 1.0, 4: 1.0}),
        ({"steps": 3, "warmup_steps": 6}, {0: 1 / 6, 2: 0.5}),
        ({"steps": 1, "warmup_steps": 0}, {0: 1.0, 1: 0.0}),
        ({"steps": 2, "warmup_steps": 0, "lr": 0.0}, {0: 1.0, 2: 0.0}),
        ({"steps": 2, "warmup_steps": 0, "lr": 1e-3, "final_lr": 1e-3}, {0: 1.0, 1: 1.0, 2: 1.0}),
    ],
)
def test_learning_rate_at_the_edges(recipe, changes, expected):
    changed = recipe(**changes)
    assert {step: learning_rate_factor(step, changed) for step in expected} == pytest.approx(expected)


def test_training_follows_the_schedule(settings, train, watch):
    wanted = settings(train={"lr": 1e-2, "warmup_steps": 4, "final_lr": 1e-3})
    seen = watch()
    train(wanted)
    for one in seen:
        assert one.lr == pytest.approx(1e-2 * learning_rate_factor(one.step, wanted.train))


@pytest.mark.parametrize("clip", [0.01, 0.0])
def test_gradients_are_clipped_as_a_whole(clip, settings, train, monkeypatch):
    norms: list[tuple[float, float]] = []

    class Watched(CausalLanguageModel):
        def norm(self) -> float:
            return float(torch.nn.utils.get_total_norm([p.grad for p in self.parameters()]))

        def configure_gradient_clipping(self, *arguments, **keywords):
            before = self.norm()
            super().configure_gradient_clipping(*arguments, **keywords)
            norms.append((before, self.norm()))

    monkeypatch.setattr(training, "CausalLanguageModel", Watched)
    train(settings(train={"steps": 2, "clip": clip}))
    assert len(norms) == 2  # once an optimizer step
    for before, after in norms:
        assert before > 0.1
        assert after == (pytest.approx(clip, rel=1e-3) if clip else before)
