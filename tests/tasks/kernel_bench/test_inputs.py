"""Inputs drawn and captured: the same for all, scaled as asked, and a clear line when a file does not fit."""

from __future__ import annotations

import pytest
import torch

from tasks.errors import ConfigError
from tasks.kernel_bench import captured
from tasks.kernel_bench.inputs import make_problem, make_tensors
from tasks.kernel_bench.run import PROGRAMS
from tasks.kernel_bench.settings import Case

safetensors = pytest.importorskip("safetensors.torch", reason="safetensors is not installed; captures need it")
save_file = safetensors.save_file
CPU = torch.device("cpu")


def drawn(settings, case=None, **inputs):
    return make_tensors(settings(inputs=inputs).inputs, case or Case(500, 1.0, 7), CPU, None)


def test_gaussian(settings):
    tensors = drawn(settings, h=4, query_variance=6.0, key_variance=1.0, value_variance=0.25)
    assert [tuple(x.shape) for x in (tensors.q, tensors.k, tensors.do)] == [(1, 4, 500, 4), (1, 1, 500, 4),
                                                                            (1, 4, 500, 4)]  # fmt: skip
    assert all(x.requires_grad and x.is_leaf and x.is_contiguous() for x in tensors.leaves)
    for x, variance in ((tensors.q, 6.0), (tensors.k, 1.0), (tensors.v, 0.25), (tensors.do, 1.0)):
        assert x.var().item() == pytest.approx(variance, rel=0.15)
    assert tensors.nbytes == 4 * (2 * 4 + 2 * 1) * 500 * 4


def test_the_seed_decides(settings):
    one, same = drawn(settings), drawn(settings)
    other = drawn(settings, Case(500, 1.0, 8))
    assert torch.equal(one.q, same.q) and not torch.equal(one.q, other.q)
    scaled = drawn(settings, Case(500, 4.0, 7))
    assert torch.equal(scaled.q, 4 * one.q) and torch.equal(scaled.k, one.k) and torch.equal(scaled.do, one.do)


def test_dtype(settings):
    tensors = drawn(settings, dtype="bfloat16")
    assert {x.dtype for x in (*tensors.leaves, tensors.do)} == {torch.bfloat16}
    assert make_problem(settings().inputs, Case(8, 1.0, 0), CPU).dtype == torch.float32


@pytest.fixture
def file(tmp_path):
    torch.manual_seed(0)
    tensors = {"q": torch.randn(1, 2, 20, 4), "k": torch.randn(1, 1, 20, 4), "v": torch.randn(1, 1, 20, 4)}
    save_file({name: x.bfloat16() for name, x in tensors.items()}, tmp_path / "qkv.safetensors")
    return tmp_path / "qkv.safetensors"


def test_captured(settings, file):
    inputs = settings(inputs={"data": "capture:qkv.safetensors"}).inputs
    short = make_tensors(inputs, Case(8, 1.0, 0), CPU, file.parent)
    long = make_tensors(inputs, Case(16, 2.0, 0), CPU, file.parent)
    assert torch.equal(long.q[:, :, :8], 2 * short.q) and torch.equal(long.k[:, :, :8], short.k)
    assert short.v.dtype == torch.float32 and short.v.shape == (1, 1, 8, 4)
    absolute = settings(inputs={"data": f"capture:{file}"}).inputs
    assert torch.equal(make_tensors(absolute, Case(8, 1.0, 0), CPU, None).q, short.q)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n": [21]}, "q has shape (1, 2, 20, 4), allowed is (1, 2, 21 or more, 4)"),
        ({"h": 4}, "q has shape (1, 2, 20, 4), allowed is (1, 4, 16 or more, 4)"),
        ({"h_kv": 2}, "k has shape (1, 1, 20, 4), allowed is (1, 2, 16 or more, 4)"),
        ({"d": 8}, "allowed is (1, 2, 16 or more, 8)"),
    ],
)
def test_a_capture_that_does_not_fit(changes, message, settings, file):
    wanted = settings(inputs={"data": f"capture:{file}"} | changes)
    with pytest.raises(ConfigError, match="^inputs.data: ") as caught:
        PROGRAMS["attention_speed"].identity(wanted, None)
    assert message in str(caught.value)


def test_a_capture_that_is_missing_or_none(settings, file):
    identity = PROGRAMS["attention_speed"].identity
    wanted = settings(inputs={"data": "capture:nowhere.safetensors"})
    with pytest.raises(ConfigError, match="^inputs.data: no such file: .*nowhere.safetensors"):
        identity(wanted, file.parent)
    file.write_bytes(b"text")
    with pytest.raises(ConfigError, match="^inputs.data: .* is not a safetensors file"):
        identity(settings(inputs={"data": f"capture:{file}"}), None)
    save_file({"q": torch.zeros(1, 2, 20, 4)}, file)
    with pytest.raises(ConfigError, match="^inputs.data: .* holds q, it lacks k"):
        identity(settings(inputs={"data": f"capture:{file}"}), None)


def test_identity_follows_the_captured_file(settings, file):
    wanted = settings(inputs={"data": f"capture:{file}"})
    before = PROGRAMS["attention_speed"].identity(wanted, None)
    assert before == {"captured": captured.sha256(file)}
    save_file({name: torch.zeros(1, h, 20, 4) for name, h in (("q", 2), ("k", 1), ("v", 1))}, file)
    assert PROGRAMS["attention_speed"].identity(wanted, None) != before
