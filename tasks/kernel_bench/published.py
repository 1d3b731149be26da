"""The kernels that the authors published as the package adasplash, called as they are."""

from __future__ import annotations

from importlib import metadata

from tasks.kernel_bench.problem import Attention, NotMeasured, Problem

VERSION = "0.2.2"
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
    from adasplash.adasplash_v2 import sparse_attn

    options = {} if problem.iterations is None else {"niter": problem.iterations}
    return lambda q, k, v: sparse_attn(q, k, v, **options)


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
