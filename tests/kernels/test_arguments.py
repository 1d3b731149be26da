"""Bad input is refused with the argument's name, what was given and what is allowed."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from adasplash_kernels import entmax, entmax_attention, support_map

X = torch.randn(2, 4, 6, 8)


def call(**changes):
    arguments = {"q": X, "k": X, "v": X, **changes}
    q, k, v = (arguments.pop(n) for n in "qkv")
    return entmax_attention(q, k, v, **arguments)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"alpha": 0.5}, r"alpha: got 0.5, allowed is 1 .* to 2"),
        ({"alpha": 2.5}, "alpha: got 2.5"),
        ({"alpha": float("nan")}, "alpha: got nan"),
        ({"alpha": "1.5"}, "alpha: got str"),
        ({"alpha": True}, "alpha: got bool"),
        ({"alpha": torch.tensor([1, 2])}, "alpha: got a tensor of torch.int64"),
        ({"alpha": torch.ones(3)}, r"alpha: got shape \(3,\), allowed is a scalar or \(4,\)"),
        ({"q": X[0]}, r"q: got shape \(4, 6, 8\)"),
        ({"q": X.tolist()}, "q: got list"),
        ({"q": X.int()}, "q: got torch.int32"),
        ({"k": X.half()}, "k: got torch.float16, allowed is q's dtype"),
        ({"k": X[:, :3], "v": X[:, :3]}, "k: got 3 heads, allowed is a divisor of q's 4 heads"),
        ({"k": X[:1], "v": X[:1]}, "k: got batch size 1"),
        ({"k": X[..., :4], "v": X[..., :4]}, "k: got head dim 4"),
        ({"v": X[:, :, :3]}, "v: got shape"),
        ({"k": X[:, :, :0], "v": X[:, :, :0]}, "k: got length 0"),
        ({n: torch.zeros(1, 1, 2, 257) for n in "qkv"}, "q: got head dim 257"),
        ({"scale": 0.0}, "scale: got 0.0"),
        ({"scale": "1"}, "scale: got str"),
        ({"key_lengths": torch.ones(2)}, "key_lengths: got torch.float32, allowed is a tensor of int32 or int64"),
        ({"key_lengths": [1, 2]}, "key_lengths: got list"),
        ({"key_starts": torch.zeros(3, dtype=torch.int32)}, r"key_starts: got shape \(3,\), allowed is \(2,\)"),
        ({"method": "flash"}, "method: got 'flash', allowed are auto, eager, adasplash"),
        ({"method": "adasplash", **{n: X.double() for n in "qkv"}}, "q: got torch.float64"),
    ],
)
def test_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        call(**changes)


@pytest.mark.parametrize(
    "changes",
    [{"window": 4}, {"alibi_slopes": torch.ones(4)}, {"cu_seqlens_q": torch.zeros(2)}, {"method": "columns"}],
)
def test_what_must_wait_says_so(changes):
    name = next(iter(changes))
    with pytest.raises(NotImplementedError, match=name):
        call(**changes)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.zeros(3, dtype=torch.int64),), "x: got torch.int64"),
        ((torch.zeros(3), 0.5), "alpha: got 0.5"),
        ((torch.zeros(3), 1.5, 1), "dim: got 1"),
        ((torch.zeros(3, 0),), "x: dimension -1 has size 0"),
        ((torch.zeros(2, 3), torch.ones(5)), r"alpha: got shape \(5,\)"),
    ],
)
def test_entmax_refuses(arguments, message):
    with pytest.raises(ValueError, match=message):
        entmax(*arguments)


def test_support_map_refuses():
    with pytest.raises(ValueError, match="tile: got"):
        support_map(X, X, tile=(0, 4))


def test_kernels_on_cpu_tensors_need_the_interpreter():
    """Without a GPU and without TRITON_INTERPRET the kernels cannot run: the message says what to do."""
    program = (
        "import torch; from adasplash_kernels import entmax_attention as f; x = torch.randn(1, 1, 4, 4)\n"
        "try: f(x, x, x, method='adasplash')\n"
        "except ValueError as e: print(e)"
    )
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(sys.path)
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert "needs CUDA tensors" in done.stdout, done.stderr


def test_autocast_casts_before_it_checks():
    q, k, v = X, X, X.bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        assert entmax_attention(q, k, v).dtype == torch.bfloat16
