"""The kernels that the authors published as the package adasplash, called as they are."""

from __future__ import annotations

from importlib import import_module, metadata
from types import ModuleType

import torch

from tasks.kernel_bench.problem import Attention, NotMeasured, Problem

VERSION = "0.2.2"
TUNED_UP_TO = 16384  # tokens: beyond, the second kernels' tuning takes minutes, longer than all else together
_HEAD_DIMS = (16, 32, 64, 128, 256)
_SHORTEST = 64  # of the second kernels: one tile of their mask


def installed() -> str | None:
    """Return the version of adasplash that is installed, None if none is."""
    try:
        return metadata.version("adasplash")
    except metadata.PackageNotFoundError:
        return None


def first(problem: Problem) -> Attention:
    """The kernels of AdaSplash, with a block mask; 10 iterations, the package's default, if none are asked for."""
    _check(problem)
    if problem.grouped:
        raise NotMeasured("its first kernels take no grouped queries")
    from adasplash.adasplash_block_mask import sparse_attn

    options = {} if problem.iterations is None else {"niter": problem.iterations}
    return lambda q, k, v: sparse_attn(q, k, v, alpha=problem.alpha, is_causal=problem.causal, **options)


def second(problem: Problem) -> Attention:
    """The kernels of AdaSplash-2; one iteration after the histogram, the default, if none are asked for."""
    _check(problem)
    if not problem.causal or problem.alpha != 1.5:
        raise NotMeasured("its second kernels are causal with alpha 1.5 only")
    if problem.n < _SHORTEST:
        raise NotMeasured(f"its second kernels need {_SHORTEST} tokens or more")
    # by its full name: as an attribute of the package it is a function
    adasplash_v2 = import_module("adasplash.adasplash_v2")
    options = {} if problem.iterations is None else {"niter": problem.iterations}

    def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return adasplash_v2.sparse_attn(q, k, v, **options)

    if problem.n > TUNED_UP_TO:
        _take_over_tuning(adasplash_v2, attention, problem)
    return attention


def tuned_before(problem: Problem) -> str | None:
    """Say why the first call of the second kernels is not as published, if it is not."""
    return f"tuned at {TUNED_UP_TO} tokens, not at {problem.n}" if problem.n > TUNED_UP_TO else None


def _take_over_tuning(module: ModuleType, attention: Attention, problem: Problem) -> None:
    """Have the second kernels tune themselves at TUNED_UP_TO tokens, and use what they found for this length too.

    They tune anew for every length, which is the first part of what they keep their choices by.
    """
    tuners = [x for x in vars(module).values() if isinstance(getattr(x, "keys", None), list) and "N_CTX" in x.keys]
    if not tuners or any(tuner.keys[0] != "N_CTX" for tuner in tuners):
        raise NotMeasured("how its second kernels keep what they tuned is not known")
    q, k, v = (torch.randn(problem.b, h, TUNED_UP_TO, problem.d, dtype=problem.dtype, device=problem.device,
                           requires_grad=True) for h in (problem.h, problem.h_kv, problem.h_kv))  # fmt: skip
    attention(q, k, v).sum().backward()  # some of them, which ones the package knows, tune themselves now
    for tuner in tuners:
        for key, choice in list(tuner.cache.items()):
            if key[0] == TUNED_UP_TO:
                tuner.cache.setdefault((problem.n, *key[1:]), choice)


def _check(problem: Problem) -> None:
    """Refuse what the package refuses (or would compute wrongly), and any release but the one the tables name."""
    if problem.device.type != "cuda":
        raise NotMeasured("needs a CUDA device")
    if (found := installed()) != VERSION:
        state = "not installed" if found is None else f"installed as {found}"
        raise NotMeasured(f"the package adasplash is {state}, {VERSION} is measured (the extra bench)")
    if problem.n.bit_count() != 1:
        raise NotMeasured("takes only lengths that are powers of two")
    if problem.d not in _HEAD_DIMS:
        raise NotMeasured(f"takes only head dimensions {', '.join(map(str, _HEAD_DIMS))}")
