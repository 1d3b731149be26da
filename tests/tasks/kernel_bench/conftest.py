"""What the tests of the kernel benchmarks share: tiny settings, and systems that do as they are told."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor

from adasplash_kernels import entmax_attention
from tasks.config import CONFIGS, Experiment, from_plain, load_experiment
from tasks.kernel_bench.problem import Attention, NotMeasured, Problem
from tasks.kernel_bench.settings import SpeedSettings
from tasks.kernel_bench.systems import ENTMAX, SYSTEMS, System

# Systems in plain PyTorch alone: no test of the frame waits for Triton's interpreter.
TINY: dict[str, Any] = {
    "measure": ["sort_torch", "bisection_torch"],
    "relative_to": "sort_torch",
    "inputs": {"b": 1, "h": 2, "h_kv": 1, "n": [8, 16], "d": 4, "dtype": "float32", "causal": True, "alpha": 1.5,
               "data": "gaussian", "query_variance": 4.0},
    "block_sparsity": {"tile": [2, 4], "over": "whole_square"},
    "timing": {"warmup": 1, "repeats": 2, "statistic": "median"},
}  # fmt: skip


@pytest.fixture
def write_tiny(tmp_path: Path) -> Callable[[str, dict[str, Any]], Experiment]:
    """Return what writes a real config with other settings, the same at all scales, outside the tree and loads it."""

    def write(real: str, values: dict[str, Any]) -> Experiment:
        config = yaml.safe_load((CONFIGS / f"{real}.yaml").read_text(encoding="utf-8"))
        config |= {"experiment": "here/tiny", "common": values, "scales": {"smoke": {}, "lab": {}, "paper": {}},
                   "systems": {name: name for name in values["measure"]}, "reported": None, "claims": []}  # fmt: skip
        path = tmp_path / "tiny.yaml"
        path.write_text(yaml.safe_dump(config), encoding="utf-8")
        return load_experiment(path)

    return write


@pytest.fixture(scope="session")
def plain() -> Callable[..., dict[str, Any]]:
    """Return the tiny settings as a config holds them, with whole keys or parts of a mapping replaced."""

    def make(**changes: Any) -> dict[str, Any]:
        values = copy.deepcopy(TINY)
        for key, change in changes.items():
            values[key] = values[key] | change if isinstance(change, dict) and key in values else change
        return values

    return make


@pytest.fixture(scope="session")
def settings(plain: Callable[..., dict[str, Any]]) -> Callable[..., SpeedSettings]:
    """As ``plain``, made into the dataclass that the program takes."""
    return lambda **changes: from_plain(SpeedSettings, plain(**changes), "test.yaml")


@pytest.fixture(scope="session")
def problem() -> Callable[..., Problem]:
    """Return a problem, small unless told otherwise. One on a GPU may be described without having it."""

    def make(device: str = "cpu", **changes: Any) -> Problem:
        values = {"b": 1, "h": 2, "h_kv": 2, "n": 64, "d": 16, "dtype": torch.float32, "causal": True, "alpha": 1.5}
        return Problem(**(values | changes), device=torch.device(device))

    return make


def right(problem: Problem) -> Attention:
    return partial(entmax_attention, method="eager", alpha=problem.alpha, causal=problem.causal)


def wrong(problem: Problem) -> Attention:
    return lambda q, k, v: right(problem)(q, k, 1.1 * v)


def wrong_gradient(problem: Problem) -> Attention:
    return lambda q, k, v: right(problem)(q.detach() + 0.5 * (q - q.detach()), k, v)


def not_finite(problem: Problem) -> Attention:
    return lambda q, k, v: right(problem)(q, k, v) * float("nan")


def broken(problem: Problem) -> Attention:
    raise RuntimeError("went wrong\nsecond line")


def unfit(problem: Problem) -> Attention:
    raise NotMeasured("takes no such thing")


def unwritten(problem: Problem) -> Attention:
    raise NotImplementedError("not written yet")


def not_installed(problem: Problem) -> Attention:
    raise ImportError("No module named 'x'")


def out_of_memory(problem: Problem) -> Attention:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 TiB. GPU 0 has less")


class Late:
    """Right at its first calls, then out of memory."""

    def __init__(self, problem: Problem, calls: int = 3) -> None:
        self.attention, self.left = right(problem), calls

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        self.left -= 1
        if self.left < 0:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 TiB.")
        return self.attention(q, k, v)


ACTORS = {f.__name__: f for f in (right, wrong, wrong_gradient, not_finite, broken, unfit, unwritten, not_installed,
                                  out_of_memory)}  # fmt: skip
ACTORS["late"] = Late


@pytest.fixture(autouse=True)
def actors(monkeypatch: pytest.MonkeyPatch) -> None:
    """Systems whose names say how they behave."""
    for name, build in ACTORS.items():
        monkeypatch.setitem(SYSTEMS, name, System(ENTMAX, build))


@pytest.fixture
def said() -> list[str]:
    """The lines of progress so far."""
    return []


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text("the river slowly wears down a stone under bright water " * 20, encoding="utf-8")
    return path
