"""The published package, called as it is: what is taken over of its tuning."""

from __future__ import annotations

import sys
from dataclasses import replace
from types import ModuleType, SimpleNamespace

import pytest
import torch

from tasks.kernel_bench import published
from tasks.kernel_bench.problem import NotMeasured, Problem
from tasks.kernel_bench.published import _take_over_tuning, tuned_before

PROBLEM = Problem(1, 4, 2, 32, 16, torch.float32, True, 1.5, torch.device("cpu"))


class Tuner:
    """Keeps a choice for each length, as Triton's autotuner does."""

    def __init__(self, keys: tuple[str, ...] = ("N_CTX", "H_DIM")) -> None:
        self.keys, self.cache, self.tuned = list(keys), {}, []

    def __call__(self, q):
        key = (q.shape[2], q.shape[3], str(q.dtype))
        if key not in self.cache:
            self.tuned.append(q.shape[2])
            self.cache[key] = f"tuned at {q.shape[2]}"


@pytest.fixture
def short(monkeypatch):
    monkeypatch.setattr("tasks.kernel_bench.published.TUNED_UP_TO", 8)


def package(*tuners):
    """Return a module with these, and a function that calls them."""

    def attention(q, k, v):
        for tuner in tuners:
            tuner(q)
        return q * k.sum() * v.sum()

    return SimpleNamespace(sqrt=len, table={}, kind=dict, **{f"kernel_{i}": x for i, x in enumerate(tuners)}), attention


def test_long_lengths_take_what_was_tuned_at_a_short_one(short):
    tuners = Tuner(), Tuner()
    module, attention = package(*tuners)
    for n in (32, 64):
        _take_over_tuning(module, attention, replace(PROBLEM, n=n))
        attention(*(torch.zeros(1, h, n, 16) for h in (4, 2, 2)))
    for tuner in tuners:
        assert tuner.tuned == [8]
        assert {key[0]: choice for key, choice in tuner.cache.items()} == dict.fromkeys((8, 32, 64), "tuned at 8")


@pytest.mark.parametrize("tuners", [(), (Tuner(), Tuner(("H_DIM", "N_CTX")))])
def test_another_package_is_not_guessed_at(short, tuners):
    with pytest.raises(NotMeasured, match="not known"):
        _take_over_tuning(*package(*tuners), PROBLEM)


def test_first_calls_that_are_not_as_published_say_so():
    assert tuned_before(replace(PROBLEM, n=16384)) is None
    assert tuned_before(replace(PROBLEM, n=32768)) == "tuned at 16384 tokens, not at 32768"


@pytest.mark.parametrize("n", [64, 128])
def test_second_kernels_are_found_where_the_package_has_them(monkeypatch, n):
    """Its release 0.2.2 has a function of the same name as their module."""
    tuner = Tuner()
    package_, module = ModuleType("adasplash"), ModuleType("adasplash.adasplash_v2")
    package_.__path__, package_.adasplash_v2 = [], lambda: None

    def sparse_attn(q, k, v, niter):
        tuner(q)
        return q + niter + 0 * k.sum() + 0 * v.sum()

    module.sparse_attn, module.kernel = sparse_attn, tuner
    monkeypatch.setitem(sys.modules, "adasplash", package_)
    monkeypatch.setitem(sys.modules, "adasplash.adasplash_v2", module)
    monkeypatch.setattr(published, "installed", lambda: published.VERSION)
    monkeypatch.setattr(published, "TUNED_UP_TO", 64)
    problem = replace(PROBLEM, n=n, device=torch.device("cuda"), iterations=3)
    monkeypatch.setattr(published.torch, "randn", lambda *shape, device, **more: torch.zeros(*shape, **more))
    attention = published.second(problem)
    out = attention(*(torch.zeros(1, h, n, 16) for h in (4, 2, 2)))
    assert (out == 3).all() and tuner.tuned == [64]
