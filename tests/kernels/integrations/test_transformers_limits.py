"""Settings, saving and loading, and what attn_implementation="adasplash" must refuse by name."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys

import pytest
import torch
from torch import nn

transformers = pytest.importorskip("transformers", reason="transformers is not installed; kernels do not need it")

from transformers import masking_utils  # noqa: E402

from adasplash_kernels.integrations import transformers as integration  # noqa: E402
from adasplash_kernels.integrations.transformers import (  # noqa: E402
    EntmaxAttentionConfig,
    entmax_attention_forward,
    get_entmax_config,
    register,
    use_entmax,
)
from adasplash_kernels.integrations.transformers_masks import KeyRange  # noqa: E402

N = 9


@pytest.fixture
def tokens() -> torch.Tensor:
    return torch.randint(3, 61, (2, N), generator=torch.Generator().manual_seed(1))


# settings


@pytest.mark.parametrize(
    ("field", "value"),
    [("alpha", v) for v in (0.99, 2.01, float("nan"), True, "1.5", None, torch.tensor(1.5))]
    + [("method", v) for v in ("", "flash", None, 3)]
    + [("layers", v) for v in ((), (-1,), (0, 0), (0.5,), (True,), 3, "01")],
)
def test_config_names_the_bad_field(field, value):
    with pytest.raises(ValueError, match=f"^{field}: "):
        EntmaxAttentionConfig(**{field: value})
    config = EntmaxAttentionConfig()
    with pytest.raises(ValueError, match=f"^{field}: "):
        setattr(config, field, value)
    assert config == EntmaxAttentionConfig()


def test_config_dict_round_trip():
    config = EntmaxAttentionConfig(alpha=2, method="eager", layers=[3, 1])
    assert config.layers == (1, 3)
    assert EntmaxAttentionConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    assert EntmaxAttentionConfig.from_dict({}) == EntmaxAttentionConfig(1.5, "auto", None)
    with pytest.raises(ValueError, match="alhpa.*alpha, method, layers"):
        EntmaxAttentionConfig.from_dict({"alhpa": 1.5})
    with pytest.raises(ValueError, match="mapping"):
        EntmaxAttentionConfig.from_dict([1.5])
    with pytest.raises(ValueError, match="^alhpa: "):
        config.alhpa = 1.2


def test_use_entmax_checks_layers_against_the_model(make_model):
    with pytest.raises(ValueError, match="layers: layer 3 does not exist, allowed are 0, 1, 2"):
        use_entmax(make_model("llama"), EntmaxAttentionConfig(layers=(0, 3)))
    with pytest.raises(ValueError, match="layers: layer 1 has a sliding window.*allowed are 0, 3"):
        use_entmax(make_model("modernbert"), EntmaxAttentionConfig(layers=(0, 1)))
    with pytest.raises(ValueError, match="every attention layer .* sliding window"):
        use_entmax(make_model("mistral"))
    use_entmax(make_model("mistral", sliding_window=None))
    with pytest.raises(ValueError, match="^config: got dict"):
        use_entmax(make_model("llama"), {"alpha": 1.5})


def test_refused_model_is_left_alone(make_model):
    model = make_model("llama")
    with pytest.raises(ValueError):
        use_entmax(model, EntmaxAttentionConfig(layers=(7,)))
    assert model.config._attn_implementation == "sdpa"
    with pytest.raises(ValueError, match="use_entmax"):
        get_entmax_config(model)


def test_model_that_cannot_change_its_attention():
    config = transformers.XLNetConfig(vocab_size=11, d_model=8, n_layer=1, n_head=2, d_inner=8)
    with pytest.raises(ValueError, match="XLNetLMHeadModel cannot be replaced"):
        use_entmax(transformers.XLNetLMHeadModel(config))


def test_model_inside_another_module(make_model):
    config = EntmaxAttentionConfig(alpha=1.2)
    wrapped = nn.Sequential(nn.Identity(), use_entmax(make_model("bert"), config))
    assert get_entmax_config(wrapped) is config
    assert use_entmax(wrapped, config) is wrapped
    with pytest.raises(ValueError, match="contains 0 times"):
        use_entmax(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="contains 2 times"):
        get_entmax_config(nn.ModuleList([wrapped, use_entmax(make_model("bert"))]))


@pytest.mark.parametrize("kind", ["gpt2", "roberta", "modernbert", "llama"])
def test_save_and_load(make_model, tokens, tmp_path, kind):
    layers = (0, 3) if kind == "modernbert" else (0, 2)
    model = use_entmax(make_model(kind), EntmaxAttentionConfig(alpha=1.1, layers=layers))
    get_entmax_config(model).alpha = 1.8
    model.save_pretrained(tmp_path)
    stored = json.loads((tmp_path / "config.json").read_text())["entmax_attention"]
    assert stored == {"alpha": 1.8, "method": "auto", "layers": list(layers)}
    expected = model(input_ids=tokens).logits
    loaded = type(model).from_pretrained(tmp_path, attn_implementation="adasplash").eval()
    assert torch.equal(loaded(input_ids=tokens).logits, expected)
    # the settings that the first call above made for each layer are replaced by shared ones
    assert get_entmax_config(loaded) == EntmaxAttentionConfig(1.8, "auto", layers)
    get_entmax_config(loaded).alpha = 1.3
    get_entmax_config(model).alpha = 1.3
    changed = model(input_ids=tokens).logits
    assert torch.equal(loaded(input_ids=tokens).logits, changed)
    assert not torch.equal(changed, expected)
    assert loaded.config.entmax_attention["alpha"] == 1.3
    softmax = type(model).from_pretrained(tmp_path).eval()
    assert softmax.config._attn_implementation == "sdpa"


def test_loaded_without_settings_uses_the_defaults(make_model, tokens, tmp_path):
    make_model("llama").save_pretrained(tmp_path)
    loaded = transformers.LlamaForCausalLM.from_pretrained(tmp_path, attn_implementation="adasplash").eval()
    expected = use_entmax(make_model("llama"), EntmaxAttentionConfig(1.5))(input_ids=tokens).logits
    assert torch.equal(loaded(input_ids=tokens).logits, expected)
    assert get_entmax_config(loaded) == EntmaxAttentionConfig()


def test_copies_are_independent(make_model):
    model = use_entmax(make_model("gpt2"), EntmaxAttentionConfig(1.2))
    twin = copy.deepcopy(model)
    get_entmax_config(twin).alpha = 1.9
    assert get_entmax_config(model).alpha == model.config.entmax_attention["alpha"] == 1.2
    assert twin.config.entmax_attention["alpha"] == twin.transformer.h[2].attn.entmax_attention.alpha == 1.9


def test_one_config_for_two_models(make_model):
    config = EntmaxAttentionConfig(1.2)
    models = [use_entmax(make_model(kind), config) for kind in ("gpt2", "bert")]
    config.alpha = 1.4
    assert [m.config.entmax_attention["alpha"] for m in models] == [1.4, 1.4]


def test_register_twice_and_import_alone():
    register()
    register()
    assert transformers.AttentionInterface()["adasplash"] is entmax_attention_forward
    code = "import sys, adasplash_kernels; assert 'transformers' not in sys.modules"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment)


# what is refused


def make_mask(model, tokens, function=masking_utils.create_causal_mask, **kwargs):
    embeds = model.get_input_embeddings()(tokens)
    given = {"attention_mask": None, "past_key_values": None, **kwargs}
    return function(config=model.config, inputs_embeds=embeds, **given)


def sees_all(batch_idx, head_idx, q_idx, kv_idx):
    return kv_idx >= 0


@pytest.mark.parametrize("name", ["or_mask_function", "and_mask_function"])
@pytest.mark.parametrize("function", ["create_causal_mask", "create_bidirectional_mask"])
def test_custom_mask_functions(make_model, tokens, function, name):
    model = use_entmax(make_model("llama"))
    function = getattr(masking_utils, function)
    kwargs = {} if function is masking_utils.create_causal_mask else {"encoder_hidden_states": None}
    assert make_mask(model, tokens, function, **kwargs) is None
    with pytest.raises(ValueError, match="and_mask_function.*sees_all"):
        make_mask(model, tokens, function, **kwargs, **{name: sees_all})
    with pytest.raises(ValueError, match="and_mask_function"):  # made of known parts, but not plain causal
        make_mask(model, tokens, function, **kwargs, **{name: masking_utils.sliding_window_overlay(3)})


def test_packed_sequences(make_model, tokens):
    packed = torch.cat([torch.arange(5), torch.arange(4)])[None].expand(2, -1)
    for kind in ("gpt2", "llama"):
        model = use_entmax(make_model(kind))
        with pytest.raises(ValueError, match="^position_ids: packed sequences"):
            model(input_ids=tokens, position_ids=packed, use_cache=False)
        with pytest.raises(ValueError, match="^cu_seq_lens_q"):
            model(input_ids=tokens, cu_seq_lens_q=torch.tensor([0, 5, 9]))


def test_block_sequence_ids(make_model, tokens):
    ids = torch.tensor([[-1, -1, 0, 0, 0, -1, -1, 1, 1]] * 2)
    with pytest.raises(ValueError, match="^block_sequence_ids"):
        make_mask(use_entmax(make_model("llama")), tokens, block_sequence_ids=ids)


def test_chunked_attention(make_model, tokens):
    model = use_entmax(make_model("llama"))
    model.config.attention_chunk_size = 4
    with pytest.raises(ValueError, match="^attention_chunk_size"):
        make_mask(model, tokens, masking_utils.create_chunked_causal_mask)


def test_sliding_window_masks_are_those_of_sdpa(make_model, tokens):
    """Local layers run "sdpa", so anything may be laid over their window."""
    padding = torch.ones_like(tokens)
    padding[0, 6:] = 0
    for kind, function in (
        ("qwen2", masking_utils.create_sliding_window_causal_mask),
        ("modernbert", masking_utils.create_bidirectional_sliding_window_mask),
    ):
        model = make_model(kind)
        cases = [{"attention_mask": padding}, {}, {"and_mask_function": sees_all}]
        expected = [make_mask(model, tokens, function, **case) for case in cases]
        use_entmax(model)
        actual = [make_mask(model, tokens, function, **case) for case in cases]
        assert all(torch.equal(a, e) for a, e in zip(actual, expected, strict=True))


@pytest.mark.parametrize("kind", ["gpt2", "bert", "modernbert", "llama"])
def test_custom_4d_mask(make_model, tokens, kind):
    model = use_entmax(make_model(kind))
    with pytest.raises(ValueError, match=r"^attention_mask: a custom mask of shape \(2, 1, 9, 9\)"):
        model(input_ids=tokens, attention_mask=torch.ones(2, 1, N, N, dtype=torch.bool))


@pytest.mark.parametrize("kind", ["gpt2", "bert", "modernbert", "llama"])
def test_holes_in_the_padding_mask(make_model, tokens, kind):
    model = use_entmax(make_model(kind))
    mask = torch.ones_like(tokens)
    mask[1, 4] = 0
    with pytest.raises(ValueError, match="^attention_mask: there are holes"):
        model(input_ids=tokens, attention_mask=mask)


def test_right_padded_generation(make_model, tokens):
    mask = torch.ones_like(tokens)
    mask[1, 6:] = 0
    with pytest.raises(ValueError, match="padding_side = 'left'"):
        use_entmax(make_model("gpt2")).generate(tokens, attention_mask=mask, max_new_tokens=3, eos_token_id=None)


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_static_cache(make_model, tokens, kind):
    model = use_entmax(make_model(kind))
    cache = transformers.StaticCache(config=model.config, max_cache_len=N + 1)
    with pytest.raises(ValueError, match="^past_key_values: a static cache"):
        model(input_ids=tokens, past_key_values=cache)
    full = transformers.StaticCache(config=model.config, max_cache_len=N)
    assert torch.equal(model(input_ids=tokens, past_key_values=full).logits, model(input_ids=tokens).logits)


def test_padding_mask_of_the_wrong_length(make_model, tokens):
    decoder, encoder = use_entmax(make_model("llama")), use_entmax(make_model("bert"))
    cache = transformers.DynamicCache(config=decoder.config)
    decoder(input_ids=tokens, past_key_values=cache)
    with pytest.raises(ValueError, match=r"attention_mask: got shape \(2, 9\).*\(2, 18\)"):
        decoder(input_ids=tokens, past_key_values=cache, attention_mask=torch.ones_like(tokens))
    with pytest.raises(ValueError, match="attention_mask"):
        decoder(input_ids=tokens, attention_mask=torch.ones(2, N + 2))
    with pytest.raises(ValueError, match="attention_mask: made for 11 keys, but the layer has 9"):
        encoder(input_ids=tokens, attention_mask=torch.tensor([[1] * 10 + [0]] * 2))


def test_dropout_while_training(make_model, tokens):
    for kind, key in (
        ("gpt2", "attn_pdrop"),
        ("bert", "attention_probs_dropout_prob"),
        ("roberta", "attention_probs_dropout_prob"),
        ("modernbert", "attention_dropout"),
        ("llama", "attention_dropout"),
    ):
        model = use_entmax(make_model(kind, **{key: 0.1}))
        model(input_ids=tokens)
        with pytest.raises(ValueError, match=f"^dropout: got 0.1.*{key}"):
            model.train()(input_ids=tokens)


def call_attention(module=None, q_length=4, kv_length=4, mask=None, **kwargs):
    q, k, v = (torch.randn(2, 4, n, 8) for n in (q_length, kv_length, kv_length))
    module = nn.Module() if module is None else module
    module.entmax_attention = EntmaxAttentionConfig()
    return entmax_attention_forward(module, q, k, v, mask, **kwargs)


@pytest.mark.parametrize("name", ["softcap", "s_aux", "sinks", "position_bias", "head_mask", "indices", "cache"])
def test_arguments_that_change_the_result(name):
    with pytest.raises(ValueError, match=f"^{name}: not supported"):
        call_attention(**{name: torch.ones(4)})
    with pytest.raises(ValueError, match=f"^{name}: not supported"):
        call_attention(**{name: torch.ones(4)}, sliding_window=3)
    out, weights = call_attention(**{name: None})
    assert out.shape == (2, 4, 4, 8) and out.is_contiguous() and weights is None


def test_attention_weights(make_model, tokens):
    with pytest.raises(ValueError, match="^output_attentions"):
        use_entmax(make_model("llama"))(input_ids=tokens, output_attentions=True)
    # GPT-2 does not tell its attention: empty, as transformers documents for "sdpa"
    assert not use_entmax(make_model("gpt2"))(input_ids=tokens, output_attentions=True).attentions
    with pytest.raises(ValueError, match="output_attentions"):
        use_entmax(make_model("gpt2")).config.output_attentions = True


def test_layer_without_index_under_chosen_layers():
    class Layer(nn.Module):
        config = transformers.LlamaConfig(entmax_attention={"layers": [0]})

    with pytest.raises(ValueError, match="layers: Layer carries no layer index"):
        entmax_attention_forward(Layer(), *(torch.ones(1, 1, 2, 4),) * 3, None)


def test_attention_reads_no_tensor(monkeypatch):
    """On fake tensors any look at a value raises; on CUDA it would wait for the device in every layer."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    seen = {}
    monkeypatch.setattr(integration, "entmax_attention", lambda q, k, v, **given: seen.update(given) or q.clone())
    with FakeTensorMode():
        bounds = torch.ones(2, dtype=torch.int32), torch.ones(2, dtype=torch.int32)
        for window in (None, 3):
            call_attention(mask=KeyRange(*bounds, 4, True), sliding_window=window)
    assert seen["key_starts"] is bounds[0] and seen["key_lengths"] is bounds[1] and seen["causal"]
