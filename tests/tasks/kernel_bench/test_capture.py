"""q, k and v as a model's attention gets them: with them, softmax attention gives what the model's layer gave."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from tasks.errors import UserError
from tasks.kernel_bench import capture

pytest.importorskip("transformers", reason="transformers is not installed; only captures need it")


def llama():
    from transformers import LlamaConfig, LlamaModel

    config = LlamaConfig(vocab_size=300, hidden_size=32, intermediate_size=32, num_hidden_layers=3,
                         num_attention_heads=4, num_key_value_heads=2)  # fmt: skip
    return LlamaModel(config), "layers.{}.self_attn.o_proj"


def gpt2():
    from transformers import GPT2Config, GPT2Model

    config = GPT2Config(vocab_size=300, n_positions=32, n_embd=32, n_layer=3, n_head=4,
                        scale_attn_by_inverse_layer_idx=True)  # fmt: skip
    return GPT2Model(config), "h.{}.attn.c_proj"


@pytest.mark.parametrize(("make", "key_heads"), [(llama, 2), (gpt2, 4)])
@pytest.mark.parametrize("layer", [None, 2])
def test_capture(make, key_heads, layer):
    torch.manual_seed(0)
    model, output = make()
    seen = []
    projection = model.get_submodule(output.format(1 if layer is None else layer))
    projection.register_forward_pre_hook(lambda _, arguments: seen.append(arguments[0].clone()))
    found = capture.capture(model, torch.arange(20)[None] % 50, layer)
    q, k, v = (found[name] for name in "qkv")
    assert q.shape == (1, 4, 20, 8) and k.shape == v.shape == (1, key_heads, 20, 8)
    out = scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    torch.testing.assert_close(out.transpose(1, 2).flatten(2), seen[-1], atol=1e-5, rtol=1e-5)


def test_no_such_layer():
    with pytest.raises(UserError, match="--layer: got 3, allowed are 0 to 2"):
        capture.capture(gpt2()[0], torch.zeros(1, 4, dtype=torch.long), 3)


def test_files(tmp_path, text, settings, capsys):
    from transformers import PreTrainedTokenizerFast

    from tasks.data import bpe
    from tasks.kernel_bench import captured

    folder = tmp_path / "model"
    gpt2()[0].save_pretrained(folder)
    tokenizer = bpe.train([text.read_text()], 270)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)
    out = tmp_path / "new" / "qkv.safetensors"
    arguments = ["--model", str(folder), "--text", str(text), "--out", str(out)]
    assert capture.main([*arguments, "--length", "16"]) == 0
    assert "q (1, 4, 16, 8)" in capsys.readouterr().out
    captured.check(out, (4, 4, 16, 8))
    for length, message in (("33", "takes at most 32"), ("10000", "tokens, --length asks"), ("0", "--length: got")):
        assert capture.main([*arguments, "--length", length]) == 2
        assert message in capsys.readouterr().err
