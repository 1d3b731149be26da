"""What models compute with attn_implementation="adasplash": alpha 1 is "sdpa", padding changes no token."""

from __future__ import annotations

import pytest
import torch

transformers = pytest.importorskip("transformers", reason="transformers is not installed; kernels do not need it")

from adasplash_kernels.integrations.transformers import (  # noqa: E402
    EntmaxAttentionConfig,
    get_entmax_config,
    use_entmax,
)

KINDS = ["gpt2", "bert", "roberta", "modernbert", "llama", "qwen2"]
DECODERS = ["gpt2", "llama", "qwen2"]
LENGTHS = (17, 11, 4)  # of the three sequences in a padded batch
N = max(LENGTHS)


@pytest.fixture
def tokens() -> torch.Tensor:
    return torch.randint(3, 61, (len(LENGTHS), N), generator=torch.Generator().manual_seed(1))


def padding(side: str) -> torch.Tensor:
    real = torch.arange(N) < torch.tensor(LENGTHS)[:, None]
    return (real if side == "right" else real.flip(-1)).long()


def positions(mask: torch.Tensor) -> torch.Tensor:
    return (mask.cumsum(-1) - 1).clamp_min(0)


@pytest.mark.parametrize("side", ["none", "right", "left"])
@pytest.mark.parametrize("kind", KINDS)
def test_alpha_one_is_sdpa(make_model, tokens, kind, side):
    model = make_model(kind).double()
    mask = None if side == "none" else padding(side)
    expected = model(input_ids=tokens, attention_mask=mask).logits
    use_entmax(model, EntmaxAttentionConfig(alpha=1.0))
    actual = model(input_ids=tokens, attention_mask=mask).logits
    # every row, those of padding tokens too: a query without keys gets zeros in both
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-12)
    assert model.config._attn_implementation == "adasplash"


@pytest.mark.parametrize("kind", KINDS)
def test_alpha_one_is_sdpa_in_float32(make_model, tokens, kind):
    model = make_model(kind)
    expected = model(input_ids=tokens, attention_mask=padding("right")).logits
    use_entmax(model, EntmaxAttentionConfig(alpha=1.0))
    actual = model(input_ids=tokens, attention_mask=padding("right")).logits
    torch.testing.assert_close(actual, expected, rtol=0, atol=5e-5)


@pytest.mark.parametrize("alpha", [1.5, 2.0])
@pytest.mark.parametrize("kind", KINDS)
def test_entmax_is_not_softmax(make_model, tokens, kind, alpha):
    model = make_model(kind)
    softmax = model(input_ids=tokens).logits
    use_entmax(model, EntmaxAttentionConfig(alpha=alpha))
    assert (model(input_ids=tokens).logits - softmax).abs().max() > 0.1


@pytest.mark.parametrize("alpha", [1.5, 2.0])
@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("kind", KINDS)
def test_padding_changes_no_real_token(make_model, tokens, kind, side, alpha):
    model = use_entmax(make_model(kind).double(), EntmaxAttentionConfig(alpha=alpha))
    mask = padding(side)
    tokens = torch.where(mask.bool(), tokens, 0)
    # RoBERTa counts its own positions, by the id of the padding token
    position_ids = None if kind == "roberta" else positions(mask)
    batch = model(input_ids=tokens, attention_mask=mask, position_ids=position_ids).logits
    for row, length in enumerate(LENGTHS):
        real = mask[row].bool()
        alone = model(input_ids=tokens[row : row + 1, real]).logits[0]
        assert alone.shape[0] == length
        torch.testing.assert_close(batch[row, real], alone, rtol=0, atol=1e-9)


@pytest.mark.parametrize("kind", KINDS)
def test_a_sequence_of_padding_alone_is_finite(make_model, tokens, kind):
    model = use_entmax(make_model(kind))
    mask = padding("right")
    mask[1] = 0
    logits = model(input_ids=tokens, attention_mask=mask).logits
    assert logits.isfinite().all()
    logits.square().mean().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated:FutureWarning")
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_reach_every_weight(make_model, tokens, kind, checkpointing):
    model = use_entmax(make_model(kind)).train()
    if checkpointing:
        model.set_attn_implementation("adasplash")  # repeated on purpose: it must not lose the settings
        model.gradient_checkpointing_enable()
    loss = model(input_ids=tokens, attention_mask=padding("right"), labels=tokens).loss
    loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        if parameter.ndim == 2 and "key" not in name and "k_proj" not in name and "position" not in name:
            assert parameter.grad.abs().max() > 0, name


@pytest.mark.parametrize("kind", DECODERS)
def test_left_padded_loss_ignores_padding(make_model, tokens, kind):
    model = use_entmax(make_model(kind).double(), EntmaxAttentionConfig(alpha=1.5))
    mask = padding("left")
    gradients = []
    for filler in (0, 7):
        model.zero_grad()
        filled = torch.where(mask.bool(), tokens, filler)
        labels = torch.where(mask.bool(), tokens, -100)
        labels[:, 1:][mask[:, :-1] == 0] = -100  # what a padding token predicts is not a loss either
        model(input_ids=filled, attention_mask=mask, position_ids=positions(mask), labels=labels).loss.backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-10)


@pytest.mark.parametrize("kind", DECODERS)
@pytest.mark.parametrize("side", ["none", "left"])
def test_generate_with_cache_equals_without(make_model, tokens, kind, side):
    model = use_entmax(make_model(kind).double(), EntmaxAttentionConfig(alpha=1.5))
    mask = torch.ones_like(tokens) if side == "none" else padding("left")
    settings = {"max_new_tokens": 9, "do_sample": False, "eos_token_id": None}
    cached, plain = (
        model.generate(tokens, attention_mask=mask, use_cache=use_cache, **settings) for use_cache in (True, False)
    )
    assert cached.shape == (3, N + 9)
    assert torch.equal(cached, plain)
    for row in range(3):
        real = mask[row].bool()
        alone = model.generate(tokens[row : row + 1, real], attention_mask=mask[row : row + 1, real], **settings)
        assert torch.equal(cached[row, N:], alone[0, real.sum() :])


@pytest.mark.parametrize("layers", [None, (1,)])
@pytest.mark.parametrize("kind", DECODERS)
def test_chunks_through_a_cache_equal_one_pass(make_model, tokens, kind, layers):
    """Queries that follow a cache are causal bottom-right, in entmax layers and in those left on softmax."""
    model = use_entmax(make_model(kind).double(), EntmaxAttentionConfig(alpha=1.5, layers=layers))
    mask = padding("left")
    for attention_mask in (None, mask):
        position_ids = positions(mask) if attention_mask is not None else torch.arange(N)[None].expand(3, -1)
        whole = model(input_ids=tokens, attention_mask=attention_mask, position_ids=position_ids).logits
        cache = transformers.DynamicCache(config=model.config)
        pieces, start = [], 0
        for size in (6, 5, 1, 5):
            stop = start + size
            seen = None if attention_mask is None else attention_mask[:, :stop]
            out = model(
                input_ids=tokens[:, start:stop],
                attention_mask=seen,
                position_ids=position_ids[:, start:stop],
                past_key_values=cache,
                use_cache=True,
            )
            pieces.append(out.logits)
            start = stop
        torch.testing.assert_close(torch.cat(pieces, 1), whole, rtol=0, atol=1e-9)


def test_modernbert_local_layers_keep_softmax(make_model, tokens):
    """Given the same inputs and mask, a local layer computes what it computes under "sdpa"."""
    model = make_model("modernbert").double()
    local = model.model.layers[1].attn
    assert local.sliding_window is not None and model.model.layers[0].attn.sliding_window is None
    inputs = {}
    local.register_forward_hook(lambda m, a, k, out: inputs.update(args=a, kwargs=k, out=out[0]), with_kwargs=True)
    use_entmax(model, EntmaxAttentionConfig(alpha=2.0))
    for mask in (None, padding("right")):
        model(input_ids=tokens, attention_mask=mask)
        held = dict(inputs)
        with torch.no_grad():
            model.config._attn_implementation = "sdpa"
            expected = local(*held["args"], **held["kwargs"])[0]
            model.config._attn_implementation = "adasplash"
        assert torch.equal(held["out"], expected)


@pytest.mark.parametrize("kind", ["gpt2", "bert", "llama"])
def test_layers_left_out_keep_softmax(make_model, tokens, kind):
    model = make_model(kind).double()
    softmax = model(input_ids=tokens, attention_mask=padding("right"), output_hidden_states=True).hidden_states
    use_entmax(model, EntmaxAttentionConfig(alpha=2.0, layers=(2,)))
    mixed = model(input_ids=tokens, attention_mask=padding("right"), output_hidden_states=True).hidden_states
    real = padding("right").bool()
    torch.testing.assert_close(mixed[2][real], softmax[2][real], rtol=0, atol=1e-12)  # what layers 0 and 1 made
    assert (mixed[3][real] - softmax[3][real]).abs().max() > 1e-3


def test_alpha_changes_all_layers_at_once(make_model, tokens):
    model = use_entmax(make_model("llama"), EntmaxAttentionConfig(alpha=1.1))
    get_entmax_config(model).alpha = 1.7
    changed = model(input_ids=tokens).logits
    fresh = use_entmax(make_model("llama"), EntmaxAttentionConfig(alpha=1.7))
    assert torch.equal(changed, fresh(input_ids=tokens).logits)
    assert not any("entmax" in name for name in model.state_dict())


def test_cross_attention(make_model, tokens):
    """Encoder keys of their own number and padding; not causal."""
    model = make_model("gpt2", add_cross_attention=True).double()
    states = torch.randn(3, 7, 32, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    states_mask = torch.tensor([[1] * 7, [1] * 3 + [0] * 4, [0] * 2 + [1] * 5])
    given = {"input_ids": tokens, "encoder_hidden_states": states, "encoder_attention_mask": states_mask}
    expected = model(**given).logits
    use_entmax(model, EntmaxAttentionConfig(alpha=1.0))
    torch.testing.assert_close(model(**given).logits, expected, rtol=0, atol=1e-12)


def test_decoder_made_bidirectional(make_model, tokens):
    """transformers' ``is_causal=False``: without padding the argument says so, with padding the mask."""
    model = make_model("llama").double()
    causal = model(input_ids=tokens, attention_mask=padding("right")).logits
    expected = [model(input_ids=tokens, attention_mask=m, is_causal=False).logits for m in (padding("right"), None)]
    assert (causal - expected[0]).abs().max() > 0.1
    use_entmax(model, EntmaxAttentionConfig(alpha=1.0))
    actual = [model(input_ids=tokens, attention_mask=m, is_causal=False).logits for m in (padding("right"), None)]
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("use_cache", [False, True])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_autocast(make_model, tokens, kind, use_cache):
    """Rotary embeddings leave queries and keys in float32 beside bfloat16 values."""
    model = use_entmax(make_model(kind))
    given = {"input_ids": tokens, "attention_mask": padding("right"), "use_cache": use_cache}
    exact = model(**given).logits
    with torch.autocast("cpu", torch.bfloat16):
        low = model(**given).logits
    assert low.dtype == torch.bfloat16
    real = padding("right").bool()
    assert (low.float() - exact)[real].norm() < 0.2 * exact[real].norm()


def test_scale_of_the_model_is_used(make_model, tokens):
    model = make_model("gpt2", scale_attn_by_inverse_layer_idx=True).double()
    expected = model(input_ids=tokens).logits
    use_entmax(model, EntmaxAttentionConfig(alpha=1.0))
    torch.testing.assert_close(model(input_ids=tokens).logits, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", ["gpt2", "modernbert"])
def test_compiles_as_one_graph(make_model, tokens, kind):
    model = use_entmax(make_model(kind, num_hidden_layers=2) if kind == "modernbert" else make_model(kind, n_layer=2))
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    for mask in (None, padding("right")):
        given = {"input_ids": tokens, "attention_mask": mask}
        if kind == "gpt2":
            given["use_cache"] = False  # transformers then prepares for packed sequences
        torch.testing.assert_close(compiled(**given).logits, model(**given).logits)
    with pytest.raises(RuntimeError, match="holes"):
        compiled(input_ids=tokens, attention_mask=padding("right") * (torch.arange(N) != 2))
    if kind == "gpt2":
        packed = torch.cat([torch.arange(9), torch.arange(8)])[None].expand(3, -1)
        with pytest.raises(RuntimeError, match="packed sequences"):
            compiled(input_ids=tokens, position_ids=packed, use_cache=False)
