"""The table of systems: every name is there, computes what it says, and says what it cannot take."""

from __future__ import annotations

import pytest
import torch

from adasplash_kernels.reference import attention_reference
from tasks.config import SCALES, find_experiments
from tasks.kernel_bench import published, softmax
from tasks.kernel_bench.problem import NotMeasured
from tasks.kernel_bench.run import PROGRAMS
from tasks.kernel_bench.systems import ENTMAX, SOFTMAX, SYSTEMS

NAMES = ("fa2", "fa2_triton", "cudnn", "adasplash_pypi_v1", "adasplash_pypi_v2", "adasplash", "adasplash_nomask",
         "adasplash2", "columns", "columns_nolist", "bisection_torch", "sort_torch")  # fmt: skip
ON_CUDA = ("fa2", "fa2_triton", "cudnn", "adasplash_pypi_v1", "adasplash_pypi_v2")


def test_every_name_has_an_entry():
    assert set(NAMES) <= set(SYSTEMS)
    assert {n for n in NAMES if SYSTEMS[n].computes == SOFTMAX} == {"fa2", "fa2_triton", "cudnn"}
    assert (SYSTEMS["fa2"].alpha(1.5), SYSTEMS["adasplash"].alpha(1.5)) == (1.0, 1.5)


def test_the_configs_name_no_other():
    for experiment in find_experiments():
        measures = "measure" in experiment.settings("paper")  # mappings of scores are no systems of attention
        if experiment.family == "kernel_bench" and experiment.program in PROGRAMS and measures:
            assert set(experiment.systems) <= set(NAMES)
            for scale in SCALES:
                assert set(experiment.settings(scale)["measure"]) <= set(NAMES)


@pytest.mark.parametrize("name", ON_CUDA)
def test_what_needs_cuda_says_so(name, problem):
    with pytest.raises(NotMeasured, match="needs a CUDA device"):
        SYSTEMS[name].build(problem())


@pytest.mark.parametrize(("name", "limited"), [(n, limited) for n in NAMES if n not in ON_CUDA
                                               for limited in (False, True)[: 1 + SYSTEMS[n].takes_iterations]])
def test_entmax(name, limited, problem, device):
    """Here in Triton's interpreter; output and gradients are compared in test_run.py and tests/kernels."""
    system = SYSTEMS[name]
    wanted = problem(device, h=2, h_kv=1, n=17, iterations=3 if limited else None)
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, h, 17, 16, device=device) for h in (2, 1, 1))
    assert system.computes == ENTMAX
    out = system.build(wanted)(q, k, v)
    error = (out - attention_reference(q, k, v, causal=True)).norm() / out.norm()
    assert error < (0.2 if limited else 1e-5)
    if limited and name == "bisection_torch":
        assert error > 1e-3


@pytest.mark.parametrize("alpha", [1.25, 1.5, 2.0])
def test_gradients_of_bisection(alpha, problem):
    wanted = problem(n=9, d=4, alpha=alpha)
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 2, 9, 4, dtype=torch.float64, requires_grad=True) for _ in range(3))
    found = torch.autograd.grad(SYSTEMS["bisection_torch"].build(wanted)(q, k, v).square().sum(), (q, k, v))
    exact = torch.autograd.grad(attention_reference(q, k, v, alpha=alpha, causal=True).square().sum(), (q, k, v))
    for one, other in zip(found, exact, strict=True):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-6)


def test_sorting_solves_two_alphas(problem):
    with pytest.raises(NotMeasured, match="alpha 1.5 and 2"):
        SYSTEMS["sort_torch"].build(problem(alpha=1.25))


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("adasplash_pypi_v1", {"n": 96}, "powers of two"),
        ("adasplash_pypi_v1", {"d": 40}, "head dimensions 16, 32"),
        ("adasplash_pypi_v1", {"h_kv": 1}, "no grouped queries"),
        ("adasplash_pypi_v2", {"causal": False}, "causal with alpha 1.5 only"),
        ("adasplash_pypi_v2", {"alpha": 2.0}, "causal with alpha 1.5 only"),
        ("adasplash_pypi_v2", {"n": 32}, "64 tokens or more"),
    ],
)
def test_limits_of_the_published_package(name, changes, message, problem, monkeypatch):
    monkeypatch.setattr(published, "installed", lambda: published.VERSION)
    with pytest.raises(NotMeasured, match=message):
        SYSTEMS[name].build(problem("cuda", **changes))


@pytest.mark.parametrize(("found", "message"), [(None, "not installed"), ("0.3.0", "installed as 0.3.0, 0.2.2 is")])
def test_another_release_is_not_measured(found, message, problem, monkeypatch):
    monkeypatch.setattr(published, "installed", lambda: found)
    with pytest.raises(NotMeasured, match=message):
        SYSTEMS["adasplash_pypi_v1"].build(problem("cuda"))


@pytest.mark.parametrize("n", [128, 640, 200])
def test_block_mask_of_flex_attention(n):
    """The one that is written down is the one that PyTorch finds from the n x n mask."""
    from torch.nn.attention.flex_attention import create_block_mask

    made = softmax.causal_blocks(n, torch.device("cpu"))
    found = create_block_mask(softmax._causal, None, None, n, n, device="cpu", BLOCK_SIZE=128)
    assert made.seq_lengths == found.seq_lengths == (n, n)
    for name in ("kv", "full_kv", "q", "full_q"):
        counts = getattr(made, f"{name}_num_blocks")
        assert torch.equal(counts, getattr(found, f"{name}_num_blocks"))
        for row, count in enumerate(counts[0, 0]):
            one, other = (getattr(m, f"{name}_indices")[0, 0, row, :count].sort().values for m in (made, found))
            assert torch.equal(one, other)


@pytest.mark.gpu
@pytest.mark.parametrize("h_kv", [2, 1])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("name", ["fa2", "cudnn", "fa2_triton"])
def test_softmax(name, causal, h_kv, problem):
    wanted = problem("cuda", n=256, d=64, h_kv=h_kv, causal=causal, dtype=torch.bfloat16)
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, h, 256, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True)
               for h in (2, h_kv, h_kv))  # fmt: skip
    out = SYSTEMS[name].build(wanted)(q, k, v)
    exact = attention_reference(q, k, v, alpha=1.0, causal=causal)
    assert (out - exact).norm() < 0.02 * exact.norm()
    for one, other in zip(torch.autograd.grad(out.float().square().sum(), (q, k, v)),
                          torch.autograd.grad(exact.square().sum(), (q, k, v)), strict=True):  # fmt: skip
        assert (one - other).norm() < 0.02 * other.norm()
