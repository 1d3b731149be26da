"""Tiny random models of every supported kind, built from hand-written configs: nothing is downloaded."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

TOKENS = {"vocab_size": 61, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
SIZES = {
    **TOKENS,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
}
GPT2 = {**TOKENS, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 64}
GPT2 |= {"attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0}
BERT = {**SIZES, "attention_probs_dropout_prob": 0.0, "hidden_dropout_prob": 0.0}
MODERNBERT = {**SIZES, "num_hidden_layers": 4, "local_attention": 6, "cls_token_id": 1, "sep_token_id": 2}
LLAMA = {**SIZES, "num_key_value_heads": 2}
QWEN2 = {**LLAMA, "use_sliding_window": True, "sliding_window": 5, "max_window_layers": 2}

MODELS = {
    "gpt2": ("GPT2LMHeadModel", "GPT2Config", GPT2),
    "bert": ("BertForMaskedLM", "BertConfig", BERT),
    "roberta": ("RobertaForMaskedLM", "RobertaConfig", BERT),
    "modernbert": ("ModernBertForMaskedLM", "ModernBertConfig", MODERNBERT),  # layers 0 and 3 are global
    "llama": ("LlamaForCausalLM", "LlamaConfig", LLAMA),
    "mistral": ("MistralForCausalLM", "MistralConfig", {**LLAMA, "sliding_window": 5}),  # all layers local
    "qwen2": ("Qwen2ForCausalLM", "Qwen2Config", QWEN2),  # layer 2 is local
}


@pytest.fixture
def make_model() -> Callable[..., torch.nn.Module]:
    """Return ``make(kind, **config_changes)``: the same weights for the same arguments, eval mode, "sdpa"."""
    transformers = pytest.importorskip("transformers", reason="transformers is not installed; kernels do not need it")

    def make(kind: str, **changes: object) -> torch.nn.Module:
        architecture, config, settings = MODELS[kind]
        # weights large enough that attention is far from uniform, so that a wrong mask or alpha shows
        config = getattr(transformers, config)(**{"initializer_range": 0.3, **settings, **changes})
        torch.manual_seed(0)
        return getattr(transformers, architecture)._from_config(config, attn_implementation="sdpa").eval()

    return make
