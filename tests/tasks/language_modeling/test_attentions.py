"""The attention of each variant: which function it computes, and by what."""

from __future__ import annotations

import pytest
import torch

from tasks.language_modeling import attentions
from tasks.language_modeling.gpt2 import build_model, next_token_loss
from tasks.language_modeling.settings import Model, Variant

SIZE = Model(n_layer=2, n_head=2, n_embd=16, context=24)


def outcome(variant: Variant, sharpness: float = 8.0) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Loss and gradients of one model; ``sharpness`` scales queries and keys, so that entmax has zeros."""
    torch.manual_seed(0)
    model = build_model(SIZE, variant, 300)
    with torch.no_grad():
        for block in model.transformer.h:
            block.attn.c_attn.weight[:, :32] *= sharpness**2
    window = torch.randint(0, 300, (3, 25), generator=torch.Generator().manual_seed(1))
    loss = next_token_loss(model, window)
    loss.backward()
    return loss.detach(), [p.grad for p in model.parameters()]


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (Variant("flash"), Variant("sdpa")),
        (Variant("sort_torch"), Variant("adasplash", method="eager")),
        (Variant("sort_torch", alpha=2), Variant("adasplash", alpha=2, method="eager")),
        (Variant("bisection_torch"), Variant("adasplash")),
        (Variant("bisection_torch", alpha=1.25), Variant("adasplash", alpha=1.25)),
    ],
    ids=lambda v: f"{v.attention}-{v.alpha}",
)
def test_same_function_by_other_means(one, other):
    (loss, gradients), (expected, expected_gradients) = outcome(one), outcome(other)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(gradients, expected_gradients, rtol=1e-3, atol=1e-6)
    for different in () if one.attention == "flash" else (Variant("sdpa"), Variant("adasplash", alpha=1.75)):
        with pytest.raises(AssertionError):
            torch.testing.assert_close(gradients, outcome(different)[1], rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("attention", ["flash", "cudnn"])
def test_one_backend_is_allowed(attention, monkeypatch):
    """While PyTorch's attention runs, the other backends are off; before and after they are on."""
    seen = []

    def noted(*arguments, **keywords):
        cuda = torch.backends.cuda
        seen.append((cuda.flash_sdp_enabled(), cuda.cudnn_sdp_enabled(), cuda.math_sdp_enabled(),
                     cuda.mem_efficient_sdp_enabled()))  # fmt: skip
        assert keywords["attention_mask"] if "attention_mask" in keywords else arguments[4] is None
        return arguments[1].transpose(1, 2).contiguous(), None

    monkeypatch.setattr(attentions, "sdpa_attention_forward", noted)
    outcome(Variant(attention))
    assert seen == [(attention == "flash", attention == "cudnn", False, False)] * SIZE.n_layer
    assert torch.backends.cuda.math_sdp_enabled()


def test_cudnn_never_falls_back():
    """On the CPU, which cuDNN is not for, whatever devices there are."""
    with pytest.raises(attentions.BackendUnavailable, match="^PyTorch's CUDNN_ATTENTION does not take"):
        outcome(Variant("cudnn"))


@pytest.mark.parametrize("attention", ["flash", "sort_torch", "bisection_torch"])
def test_attention_survives_saving(attention, tmp_path):
    model = build_model(SIZE, Variant(attention, alpha=2), 300)
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path, attn_implementation=attentions.IMPLEMENTATIONS[attention])
    window = torch.randint(0, 300, (2, 25))
    with torch.no_grad():
        assert next_token_loss(loaded, window) == next_token_loss(model, window)


def test_bisection_refuses_padding():
    model = build_model(SIZE, Variant("bisection_torch"), 300)
    padded = torch.tensor([[1, 1, 1], [0, 1, 1]])
    with pytest.raises(ValueError, match="bisection_torch: takes windows without padding"):
        model(input_ids=torch.ones(2, 3, dtype=torch.int64), attention_mask=padded)
