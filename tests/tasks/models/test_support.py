"""The observed sparsity of a model against weights recomputed by hand."""

from __future__ import annotations

import torch
from transformers import GPT2Config, GPT2LMHeadModel

from adasplash_kernels.integrations.transformers import EntmaxAttentionConfig, observed, use_entmax
from adasplash_kernels.reference import entmax_reference
from tasks.models.support import nonzero_ratios


def make_model(layers=None):
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=50, n_positions=32, n_layer=2, n_head=2, n_embd=16, attn_pdrop=0.0,
                        bos_token_id=0, eos_token_id=0)  # fmt: skip
    return use_entmax(GPT2LMHeadModel(config).eval(), EntmaxAttentionConfig(alpha=2.0, layers=layers))


def test_ratio_of_the_first_layer_by_hand():
    model, tokens = make_model(), torch.arange(20)[None]
    with torch.no_grad():  # large projections, so that the support is not everything
        model.transformer.h[0].attn.c_attn.weight.mul_(40)
    block = model.transformer.h[0]
    hidden = block.ln_1(model.transformer.wte(tokens) + model.transformer.wpe(torch.arange(20)))
    q, k, _ = (x.view(1, 20, 2, 8).transpose(1, 2) for x in block.attn.c_attn(hidden).split(16, -1))
    causal = torch.ones(20, 20, dtype=torch.bool).tril()
    p = entmax_reference((q @ k.mT * 8**-0.5).masked_fill(~causal, -torch.inf), 2.0)
    expected = (p > 0).sum((0, 2, 3)) / causal.sum()
    found = nonzero_ratios(model, tokens)
    assert sorted(found) == [0, 1]
    torch.testing.assert_close(found[0], expected.float())
    assert float(expected.max()) < 0.9


def test_softmax_layers_are_left_out():
    assert list(nonzero_ratios(make_model(layers=(1,)), torch.arange(9)[None])) == [1]


def test_observer_is_gone_afterwards():
    model, seen = make_model(), []
    with observed(model, lambda layer, call: seen.append(layer)):
        model(torch.arange(5)[None])
    model(torch.arange(5)[None])
    assert seen == [0, 1]
