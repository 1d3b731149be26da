"""A learned alpha for each head: what it computes, its gradient, and how it is saved and loaded."""

from __future__ import annotations

import copy
import json
import math

import pytest
import torch

transformers = pytest.importorskip("transformers", reason="transformers is not installed; kernels do not need it")

from adasplash_kernels.integrations.transformers import (  # noqa: E402
    EntmaxAttentionConfig,
    get_entmax_config,
    learned_alphas,
    load_entmax,
    use_entmax,
)
from adasplash_kernels.reference import entmax_reference  # noqa: E402

KINDS = ["gpt2", "bert", "roberta", "modernbert", "llama", "qwen2"]
ENTMAX_LAYERS = {"modernbert": [0, 3], "qwen2": [0, 1]}  # the others keep softmax: a sliding window


@pytest.fixture
def tokens() -> torch.Tensor:
    return torch.randint(3, 61, (2, 11), generator=torch.Generator().manual_seed(1))


def learned(alpha: float = 1.25, **settings) -> EntmaxAttentionConfig:
    return EntmaxAttentionConfig(alpha=alpha, learn_alpha=True, **settings)


def logits_of(model: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if name.endswith("entmax_alpha_logit")}


@pytest.mark.parametrize("kind", KINDS)
def test_starts_as_the_same_number_does(make_model, tokens, kind):
    fixed, model = use_entmax(make_model(kind), EntmaxAttentionConfig(1.25)), use_entmax(make_model(kind), learned())
    torch.testing.assert_close(model(input_ids=tokens).logits, fixed(input_ids=tokens).logits, rtol=1e-4, atol=1e-4)
    assert sorted(learned_alphas(model)) == ENTMAX_LAYERS.get(kind, [0, 1, 2])
    for alpha in learned_alphas(model).values():
        torch.testing.assert_close(alpha, torch.full((4,), 1.25))
    assert learned_alphas(fixed) == {} and logits_of(fixed) == {}


@pytest.mark.parametrize("kind", KINDS)
def test_gradient_reaches_every_head(make_model, tokens, kind):
    model = use_entmax(make_model(kind), learned())
    model(input_ids=tokens, labels=tokens).loss.backward()
    found = logits_of(model)
    assert len(found) == len(ENTMAX_LAYERS.get(kind, [0, 1, 2]))
    for parameter in found.values():
        assert parameter.shape == (4,) and parameter.dtype == torch.float32
        assert (parameter.grad.abs() > 0).all()


def test_gradient_is_the_slope_of_the_loss(make_model, tokens):
    """Against central differences in one head's logit, and a step down the gradient lowers the loss."""
    model = use_entmax(make_model("gpt2"), learned())
    logit = model.transformer.h[1].attn.entmax_alpha_logit

    def loss() -> torch.Tensor:
        return model(input_ids=tokens, labels=tokens).loss

    loss().backward()
    with torch.no_grad():
        for head in range(4):
            logit[head] += 0.05
            above = loss().item()
            logit[head] -= 0.1
            slope = (above - loss().item()) / 0.1
            logit[head] += 0.05
            assert logit.grad[head].item() == pytest.approx(slope, rel=0.1, abs=2e-5)


def test_every_head_has_its_own(make_model, tokens):
    """The weights of a head by hand: entmax of its own alpha, 1 + sigmoid of its logit."""
    model = use_entmax(make_model("gpt2"), learned())
    attention, block = model.transformer.h[0].attn, model.transformer.h[0]
    with torch.no_grad():
        attention.entmax_alpha_logit.copy_(torch.tensor([-2.0, 0.0, 1.0, 3.0]))
        hidden = block.ln_1(model.transformer.wte(tokens) + model.transformer.wpe(torch.arange(11)))
        q, k, v = (x.view(2, 11, 4, 8).transpose(1, 2) for x in attention.c_attn(hidden).split(32, -1))
        hidden_keys = torch.ones(11, 11, dtype=torch.bool).triu(1)
        scores = (q @ k.mT * 8**-0.5).masked_fill(hidden_keys, -torch.inf)
        alphas = [1 + 1 / (1 + math.exp(-x)) for x in (-2.0, 0.0, 1.0, 3.0)]
        weights = torch.stack([entmax_reference(scores[:, h], alphas[h]) for h in range(4)], 1)
        expected = attention.c_proj((weights.float() @ v).transpose(1, 2).reshape(2, 11, 32))
        found = attention(hidden)[0]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(learned_alphas(model)[0], torch.tensor(alphas))


@pytest.mark.parametrize("kind", ["gpt2", "modernbert", "llama"])
def test_save_and_load(make_model, tokens, tmp_path, kind, caplog, monkeypatch):
    monkeypatch.setattr(transformers.utils.logging.get_logger(), "propagate", True)
    layers = (0, 3) if kind == "modernbert" else (0, 2)
    model = use_entmax(make_model(kind), learned(layers=layers))
    with torch.no_grad():
        for i, parameter in enumerate(logits_of(model).values()):
            parameter.copy_(torch.linspace(-1, 2, 4) + i)
    model.save_pretrained(tmp_path)
    stored = json.loads((tmp_path / "config.json").read_text())["entmax_attention"]
    assert stored == {"alpha": 1.25, "method": "auto", "layers": list(layers), "learn_alpha": True}
    caplog.clear()
    loaded = load_entmax(type(model), tmp_path)
    assert "UNEXPECTED" not in caplog.text
    assert torch.equal(loaded(input_ids=tokens).logits, model(input_ids=tokens).logits)
    assert list(loaded.state_dict()) == list(model.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(logits_of(loaded).values(), logits_of(model).values(), strict=True))
    bare = type(model).from_pretrained(tmp_path, attn_implementation="adasplash")
    assert "UNEXPECTED" in caplog.text
    with pytest.raises(ValueError, match="learn_alpha: .*load_entmax"):
        bare(input_ids=tokens)
    (tmp_path / "model.safetensors").unlink()
    make_model(kind).save_pretrained(tmp_path / "other")
    (tmp_path / "other" / "model.safetensors").rename(tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="learn_alpha: .*entmax_alpha_logit is in no safetensors"):
        load_entmax(type(model), tmp_path)


def test_load_entmax_without_learned_alphas(make_model, tokens, tmp_path):
    model = use_entmax(make_model("gpt2"), EntmaxAttentionConfig(1.75, layers=(1,)))
    model.save_pretrained(tmp_path)
    loaded = load_entmax(type(model), tmp_path)
    assert torch.equal(loaded(input_ids=tokens).logits, model(input_ids=tokens).logits)


def test_use_entmax_again_starts_anew(make_model):
    model = use_entmax(make_model("gpt2"), learned())
    with torch.no_grad():
        logits_of(model)["transformer.h.0.attn.entmax_alpha_logit"].add_(1)
    use_entmax(model, learned(1.5, layers=(1,)))
    assert list(logits_of(model)) == ["transformer.h.1.attn.entmax_alpha_logit"]
    assert learned_alphas(model)[1].tolist() == [1.5] * 4
    assert logits_of(use_entmax(model, EntmaxAttentionConfig(1.5))) == {}


def test_copies_are_independent(make_model):
    model = use_entmax(make_model("gpt2"), learned())
    twin = copy.deepcopy(model)
    with torch.no_grad():
        twin.transformer.h[0].attn.entmax_alpha_logit.zero_()
    assert learned_alphas(twin)[0].tolist() == [1.5] * 4
    assert learned_alphas(model)[0].tolist() == [1.25] * 4


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(make_model, tokens, dtype):
    model = use_entmax(make_model("gpt2"), learned(1.3)).to(dtype)
    assert learned_alphas(model)[0].dtype == torch.float32
    torch.testing.assert_close(learned_alphas(model)[0], torch.full((4,), 1.3), rtol=0, atol=2e-3)
    assert model(input_ids=tokens).logits.isfinite().all()


@pytest.mark.parametrize("alpha", [1.0, 2.0])
def test_ends_of_the_range_cannot_be_learnt(alpha):
    with pytest.raises(ValueError, match=f"^alpha: got {alpha}, allowed with learn_alpha is a start between 1 and 2"):
        learned(alpha)


def test_parameters_are_not_undone_by_settings(make_model):
    live = get_entmax_config(use_entmax(make_model("gpt2"), learned()))
    for name, value in (("alpha", 1.5), ("layers", (0,)), ("learn_alpha", False)):
        with pytest.raises(ValueError, match=f"^{name}: got .*use_entmax"):
            setattr(live, name, value)
    live.method = "eager"
    fixed = get_entmax_config(use_entmax(make_model("gpt2")))
    with pytest.raises(ValueError, match="^learn_alpha: got True, the model was built with False"):
        fixed.learn_alpha = True
    with pytest.raises(ValueError, match="^learn_alpha: got 1, allowed are True and False"):
        EntmaxAttentionConfig(learn_alpha=1)


@pytest.mark.parametrize("layers", [None, (1, 2)])
@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_generate_with_cache_equals_without(make_model, tokens, kind, layers):
    model = use_entmax(make_model(kind).double(), learned(layers=layers))
    with torch.no_grad():
        for parameter in logits_of(model).values():
            parameter.copy_(torch.linspace(-2, 3, 4))
    settings = {"max_new_tokens": 7, "do_sample": False, "eos_token_id": None}
    cached, plain = (model.generate(tokens, use_cache=use_cache, **settings) for use_cache in (True, False))
    assert cached.shape == (2, 18) and torch.equal(cached, plain)
