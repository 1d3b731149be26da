"""Scores along a training: what a capture holds, what is read from it, and what is said when there is none."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

import tasks.kernel_bench.solver_updates as program
from tasks.config import from_plain
from tasks.errors import ConfigError
from tasks.kernel_bench.solver_updates import TRAINING, UpdateSettings
from tasks.kernel_bench.training_trace import TrainingTrace, load_scores
from tasks.programs import Context

safetensors = pytest.importorskip("safetensors.torch", reason="safetensors is not installed; captures are such files")

TRACE = TrainingTrace("adasplash/table4", "entmax_1.5", steps=25, every_steps=10, sequences=2, captures="captured/x")


@pytest.fixture(autouse=True)
def elsewhere(tmp_path_factory, monkeypatch):
    """Where Python runs there are no captures, and none are left."""
    monkeypatch.chdir(tmp_path_factory.mktemp("elsewhere"))


def write(path: Path, b=2, h=4, h_kv=2, n=5, d=8, layers=(0, 2), **more) -> dict:
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for layer in layers:
        tensors[f"q.{layer}"] = torch.randn(b, h, n, d, generator=generator)
        tensors[f"k.{layer}"] = torch.randn(b, h_kv, n, d, generator=generator)
    path.parent.mkdir(parents=True, exist_ok=True)
    safetensors.save_file(tensors | more, path)
    return tensors


def test_points_and_files(tmp_path):
    assert list(TRACE.points) == [10, 20]
    assert TRACE.file(None, 10) == TRACE.file(tmp_path, 10) == Path("captured/x/step-10.safetensors")
    assert TRACE.present(tmp_path) == {}
    write(tmp_path / "captured/x/step-20.safetensors")
    assert TRACE.file(tmp_path, 10) == tmp_path / "captured/x/step-10.safetensors"
    assert list(TRACE.present(tmp_path)) == ["20"]


def test_all_scores_by_hand(tmp_path):
    """More rows asked for than there are: all of them, in the order layer, sequence, head, position."""
    tensors = write(tmp_path / "x.safetensors")
    found = load_scores(tmp_path / "x.safetensors", 2, 1000, seed=0)
    assert found.shape == (2 * 2 * 4 * 5, 5)
    rows = iter(found)
    for layer in (0, 2):
        for b in range(2):
            for h in range(4):
                for i in range(5):
                    row = next(rows)
                    q, k = tensors[f"q.{layer}"][b, h, i], tensors[f"k.{layer}"][b, h // 2]
                    assert torch.allclose(row[: i + 1], k[: i + 1] @ q / 8**0.5, atol=1e-5)
                    assert (row[i + 1 :] == -torch.inf).all()


def test_a_draw_is_part_of_all(tmp_path):
    write(tmp_path / "x.safetensors")
    every = load_scores(tmp_path / "x.safetensors", 2, 1000, seed=0)
    few = load_scores(tmp_path / "x.safetensors", 2, 30, seed=3)
    assert few.shape == (30, 5)
    places = [int((every == row).all(-1).nonzero()[0]) for row in few]
    assert places == sorted(places) and max(places) >= 40 > min(places)  # of both layers
    assert not torch.equal(few, load_scores(tmp_path / "x.safetensors", 2, 30, seed=4))


def test_files_that_do_not_fit(tmp_path):
    path = tmp_path / "x.safetensors"
    write(path)
    with pytest.raises(ConfigError, match=r"training_trace.sequences: got 3, allowed with .* is 1 to 2"):
        load_scores(path, 3, 10, 0)
    write(path, v=torch.zeros(1))
    with pytest.raises(ConfigError, match=r"training_trace.captures: .* holds .*v, allowed are q.<layer>"):
        load_scores(path, 1, 10, 0)
    write(path, h=3)
    with pytest.raises(ConfigError, match="which do not fit each other"):
        load_scores(path, 1, 10, 0)
    path.write_text("no such thing")
    with pytest.raises(ConfigError, match="is not a safetensors file"):
        load_scores(path, 1, 10, 0)


@pytest.fixture
def settings() -> UpdateSettings:
    return from_plain(UpdateSettings, {
        "measure": ["bisection_torch", "adasplash2"],
        "inputs": {"rows": 7, "n": 8, "dtype": "float32", "alpha": 1.5, "data": "gaussian", "score_variance": 1,
                   "bins": 8},
        "stop": {"tau_abs_error": 1e-6, "max_updates": 40},
        "sweeps": {"bins": [8], "score_variance": [1], "sparsity": [50], "n": [8]},
        "training_trace": {"run": TRACE.run, "system": TRACE.system, "steps": 25, "every_steps": 10, "sequences": 1,
                           "captures": TRACE.captures},
    }, "test.yaml")  # fmt: skip


def along(settings: UpdateSettings, data_root: Path) -> dict:
    jobs = [job for job in program.jobs(settings) if job.sweep == TRAINING]
    context = Context(data_root, data_root, lambda line: None)
    return {(job.system, m.params["point"], m.metric): m for job in jobs
            for m in program.solver_updates(job, settings, context)}  # fmt: skip


def test_without_captures_it_says_what_to_run(settings, tmp_path):
    found = along(settings, tmp_path)
    assert {key[:2] for key in found} == {("bisection_torch", 20), ("adasplash2", 20)}
    assert {m.status for m in found.values()} == {"not_applicable"}
    reason = found["adasplash2", 20, "updates"].params["reason"]
    assert reason == ("no captured/x/step-20.safetensors: first train entmax_1.5 of adasplash/table4 at this scale, "
                      "which writes it")


def test_captures_that_are_there_are_measured(settings, tmp_path):
    identity = program.identity(settings, tmp_path)
    write(tmp_path / TRACE.captures / "step-10.safetensors")
    assert program.identity(settings, tmp_path) != identity
    found = along(settings, tmp_path)
    assert {(p, m.status) for (_, p, _), m in found.items()} == {(10, "ok"), (20, "not_applicable")}
    assert found["adasplash2", 10, "updates"].value < found["bisection_torch", 10, "updates"].value
    assert found["adasplash2", 10, "tau_abs_error"].value < 1e-6
    assert found["adasplash2", 10, "updates"].stats["n"] == 7


def test_a_capture_of_a_model_is_what_its_attention_saw(tmp_path, capsys):
    """The share of weights above zero by head, from the captured scores, is the one observed in the model."""
    pytest.importorskip("transformers", reason="transformers is not installed; it makes the model")
    from transformers import GPT2Config, GPT2LMHeadModel

    from adasplash_kernels.integrations.transformers import EntmaxAttentionConfig, use_entmax
    from adasplash_kernels.reference import entmax_reference
    from tasks.data.tokens import TokenBlocks, TokenFile
    from tasks.kernel_bench import score_capture
    from tasks.models.support import nonzero_ratios

    torch.manual_seed(0)
    config = GPT2Config(vocab_size=30, n_positions=32, n_layer=2, n_head=2, n_embd=16, attn_pdrop=0.0, bos_token_id=0,
                        eos_token_id=0, scale_attn_by_inverse_layer_idx=True)  # fmt: skip
    model = use_entmax(GPT2LMHeadModel(config).eval(), EntmaxAttentionConfig(alpha=1.5))
    with torch.no_grad():
        for block in model.transformer.h:
            block.attn.c_attn.weight.mul_(40)
    model.save_pretrained(tmp_path / "model")
    ids = torch.randint(0, 30, (50,), generator=torch.Generator().manual_seed(1)).to(torch.uint16).numpy()
    (tmp_path / "t.bin").write_bytes(ids.tobytes())
    (tmp_path / "t.json").write_text(json.dumps({
        "dtype": "uint16", "tokens": 50, "largest": 29, "documents": 1, "vocab_size": 30, "split": "valid",
        "max_tokens": None, "corpus": "c", "corpus_fingerprint": "c", "tokenizer": "t", "tokenizer_fingerprint": "t",
        "format": 1}))  # fmt: skip
    out = tmp_path / "new" / "step-1.safetensors"
    arguments = ["--model", str(tmp_path / "model"), "--tokens", str(tmp_path / "t.bin"), "--out", str(out)]
    assert score_capture.main([*arguments, "--length", "20", "--sequences", "2"]) == 0
    assert "2 layers, q (2, 2, 20, 8)" in capsys.readouterr().out
    scores = load_scores(out, 2, 10**6, 0).view(2, 2, 2, 20, 20)  # layer, sequence, head, query, key
    blocks = TokenBlocks(TokenFile.load(tmp_path / "t.bin"), 20)
    tokens = torch.stack([blocks[i][:20] for i in range(2)])
    device = "cuda" if torch.cuda.is_available() else "cpu"
    ratios = nonzero_ratios(model.to(device), tokens.to(device))
    for layer in (0, 1):
        p = entmax_reference(scores[layer], 1.5)
        shares = (p > 0).sum((0, 2, 3)) / (2 * 20 * 21 / 2)
        assert torch.allclose(shares, ratios[layer].float(), atol=2e-3)
        assert float(shares.max()) < 0.9
    for length, message in (("0", "--length: got 0"), ("40", "holds 1 sequences of 40")):
        assert score_capture.main([*arguments, "--length", length, "--sequences", "2"]) == 2
        assert message in capsys.readouterr().err
    shutil.rmtree(tmp_path / "model")
    assert score_capture.main([*arguments, "--length", "20"]) == 2
    assert "error: " in capsys.readouterr().err
