"""Thresholds that the output's pass settles: as good as solved ones, from whatever the solve before it left."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import triton.language as tl
from calls import bind, plain, random_qkv, stretch
from column_cases import Setting, columns, on_gpu, setting
from hard_rows import exact_theta
from maximum import maximum_drops_nan  # noqa: F401
from oracle import check_against_oracle
from torch import Tensor

from adasplash_kernels import forward as forward_module
from adasplash_kernels import launch, limits
from adasplash_kernels.launch import column_lists
from adasplash_kernels.problem import Problem
from adasplash_kernels.thresholds import THRESHOLDS, group_maxima
from adasplash_kernels.thresholds.settle import Settle
from adasplash_kernels.tile_sizes import INTERPRETED

pytestmark = pytest.mark.usefixtures("garbage")
# to the interpreter both are float32 but for roundings at the ends
DTYPES = [torch.bfloat16, pytest.param(torch.float16, marks=pytest.mark.gpu)]
by_dtype = pytest.mark.parametrize("dtype", DTYPES)


def start_with(monkeypatch: pytest.MonkeyPatch, change: Callable[..., Any] | None = None, **options: int) -> None:
    """Let the output's pass start from what the solve leaves after ``max_iterations``, or from what ``change`` makes
    of theta, lists and settle."""
    entry = THRESHOLDS["columns"]
    approach = functools.partial(entry.approach, **options)
    near = approach if change is None else lambda problem: change(problem, *approach(problem))
    monkeypatch.setitem(THRESHOLDS, "columns", replace(entry, approach=near))


def only(passes: int) -> Callable[..., Any]:
    """Return a change that limits the output's passes."""
    return lambda _, theta, lists, settle: (theta, lists, settle._replace(PASSES=tl.constexpr(passes)))


@pytest.fixture
def visits(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """Count passes over lists, of the solve and of the output, in all programs."""
    if not INTERPRETED:
        pytest.skip("compiled kernels cannot be made to count their passes from outside; the interpreter's can")
    counts = {"solve": 0, "output": 0}

    def spy(name: str, function: Callable[..., Any], *args: Any) -> Any:
        counts[name] += 1
        return function(*args)

    for name, module in (("solve", group_maxima), ("output", forward_module)):
        monkeypatch.setattr(module, "newton_step", functools.partial(spy, name, module.newton_step))
    return counts


def exact_outputs(at: Setting) -> tuple[Tensor, Tensor]:
    """Return O and O2 in float64."""
    return outputs(at, torch.where(at.theta.isinf(), 0.0, at.theta))


def outputs(at: Setting, theta: Tensor) -> tuple[Tensor, Tensor]:
    u = (1 + 0.5 * (at.scores - theta[..., None])).clamp_min(0)
    v = at.problem.v.double().repeat_interleave(at.problem.heads // at.problem.v.shape[:2].numel(), 1)
    return u.square() @ v, u @ v / u.sum(-1, keepdim=True).clamp_min(1e-300)


def settled_once(at: Setting, theta: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return O, O2 and theta of one pass over all tiles."""
    problem, theta = at.problem, theta.float()
    out, out2 = torch.empty_like(problem.q), torch.empty_like(problem.q)
    settle = Settle(torch.full_like(theta, 1.0), tl.constexpr(1), tl.constexpr(1e-3))
    launch.output_kernel[problem.query_grid()](
        problem.inputs(), problem.sizes(), theta, out, out2, settle, **problem.options
    )
    return out, out2, theta


@pytest.mark.parametrize("case", ["causal", "packed", "dense, grouped heads"])
@pytest.mark.parametrize("short", [1e-4, 1e-3, 1e-2])
def test_one_pass_leaves_what_the_formulas_say(device, case, short):
    """In float32, where nothing else shows; without the correction O would be many times as far off."""
    at = setting(case, device, spread=1.0, alpha=1.5, kv_heads=1, heads=1, batch=1)
    empty = at.theta.isinf()
    out, out2, theta = settled_once(at, at.theta - short)
    u = (1 + 0.5 * (at.scores - (at.theta - short)[..., None])).clamp_min(0)
    count, total, slope = (u > 0).sum(-1), u.square().sum(-1), u.sum(-1).clamp_min(1e-300)
    exact, exact2 = exact_outputs(at)
    largest = at.problem.v.abs().amax().double()
    left = (0.25 * short**2 * count)[..., None] * largest
    assert torch.equal(theta == math.inf, empty) and (out[empty] == 0).all() and (out2[empty] == 0).all()
    assert ((out - exact).abs() <= 2 * left + 1e-5 * largest).all()  # of a straight line, and of the step itself
    bend = 0.25 * (count / slope - slope / total.clamp_min(1e-300))
    error = torch.where(empty, 0.0, at.theta - theta)
    assert (error >= -at.slack)[~empty].all() and (error <= 1.01 * bend * short**2 + at.slack)[~empty].all()
    assert ((out2 - exact2).abs() <= (short * count / slope)[..., None] * largest + 1e-5 * largest).all()
    moved = (outputs(at, torch.where(empty, 0.0, at.theta - short))[0] - exact).norm()
    assert short > 1e-3 or moved > 30 * (out - exact).norm()


@by_dtype
@pytest.mark.parametrize(
    ("case", "iterations"),
    [
        ("causal", None),
        ("causal, more queries", 0),
        ("padded", None),
        ("packed", 0),
        on_gpu("padded", 1),
        on_gpu("ALiBi", None),
    ],
)
def test_settled_is_as_good_as_solved(device, monkeypatch, case, iterations, dtype):
    """However early the solve stopped: theta, O and O2. Not so after one pass from the bound."""
    at = setting(case, device, dtype, spread=1.0, alpha=1.5)
    empty = ~at.seen.any(-1)
    options = {} if iterations is None else {"max_iterations": iterations}
    with monkeypatch.context() as context:
        context.setattr(launch, "settles", lambda problem: False)
        solved = launch.forward("columns", at.problem, True)
    start_with(monkeypatch, **options)
    found = launch.forward("columns", at.problem, True)
    assert torch.equal(found[2] == math.inf, empty)
    assert ((found[2].double() - at.theta).abs() <= at.slack)[~empty].all()
    for x, y, exact in zip(found, solved, exact_outputs(at), strict=False):
        assert (x[empty] == 0).all()
        error, usual = ((z.double() - exact).norm() / exact.norm() for z in (x, y))
        assert error <= 1.1 * usual + 0.05 * torch.finfo(dtype).eps
    assert torch.equal(found[3], solved[3])
    assert all(map(torch.equal, launch.forward("columns", at.problem, True), found))
    if iterations == 0:
        start_with(monkeypatch, only(1), **options)
        early = launch.forward("columns", at.problem, False)[2]
        assert ((early.double() - at.theta).abs() > at.slack)[~empty].any() and not early.isnan().any()


@by_dtype
@pytest.mark.parametrize("iterations", [None, 0])
def test_gradients(device, monkeypatch, iterations, dtype):
    at = setting("causal", device, dtype, spread=2.0, heads=2, kv_heads=1)
    if iterations is not None:
        start_with(monkeypatch, max_iterations=iterations)
    check_against_oracle(columns, plain("columns"), at.problem.q, at.problem.k, at.problem.v, **at.options)


def test_what_settles(device, monkeypatch):
    """Only attention of 16 bits with alpha 1.5: nothing else may start from a theta that is not final."""

    def fail(problem: Problem) -> None:
        raise AssertionError("settled")

    monkeypatch.setitem(THRESHOLDS, "columns", replace(THRESHOLDS["columns"], approach=fail))
    q, k, v = random_qkv(device, 18, 40 * stretch(device, 27))
    half = [x.half() for x in (q, k, v)]
    for alpha in (1.0, 1.3, 2.0, torch.tensor(1.5, device=device)):
        columns(*half, alpha=alpha)
    columns(q, k, v)
    with torch.no_grad():
        columns(*(x[:, :, :2] if x is half[0] else x for x in half))  # as decoding is
        column_lists(Problem(*half, torch.full((1,), 1.5, device=device), "1.5", 0.25))
    with pytest.raises(AssertionError, match="settled"):
        columns(*half)


@by_dtype
def test_passes(device, monkeypatch, visits, dtype):
    """A solve that stops short, and an output that takes one pass; or as many as are missing."""
    q, k, v = random_qkv(device, 16, 200, dtype=dtype)
    problem = Problem(q, k, v, torch.full((1,), 1.5, device=device), "1.5", 0.25)
    column_lists(problem)
    alone = visits["solve"]
    assert visits["output"] == 0 and alone >= 4
    visits["solve"] = 0
    launch.forward("columns", problem, False)
    assert visits["output"] == 1 and 1 <= visits["solve"] <= alone - 2
    for iterations in (0, 1):
        visits.update(solve=0, output=0)
        start_with(monkeypatch, max_iterations=iterations)
        launch.forward("columns", problem, False)
        assert visits["solve"] == iterations and (iterations > 0 or visits["output"] > 1)
        assert iterations + visits["output"] <= alone


@by_dtype
@pytest.mark.usefixtures("maximum_drops_nan")
@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")
@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
def test_rows_of_all_kinds_in_a_block(device, monkeypatch, dtype):
    """Some settled, some as far away as the bound, some empty, some of NaN, which must neither hang nor spread."""
    n_q, n_k = 32 * stretch(device), 29 * stretch(device)  # the first rows see no key
    q, k, v = random_qkv(device, n_q, n_k, dtype=dtype, heads=2)
    k[0, 0, n_k // 2, 3] = math.nan  # seen by the later rows
    q[0, 1, 7], q[0, 1, n_q - 2] = math.nan, math.inf
    problem = Problem(q, k, v, torch.full((1,), 1.5, device=device), "1.5", 0.25, right=0)
    expected, _ = column_lists(problem)
    with monkeypatch.context() as context:
        context.setattr(launch, "settles", lambda problem: False)
        out, out2, _, _ = launch.forward("columns", problem, True)
    starts = []

    def mix(problem: Problem, theta: Tensor, lists: Tensor, settle: Settle) -> Any:
        far = torch.arange(n_q, device=theta.device) % 3 == 0
        starts.append((theta - expected)[..., far].nan_to_num(0, 0, 0).abs().amax())
        theta = torch.where(far, theta, expected)
        return theta, lists, settle._replace(count=torch.where(far, settle.count, 1.0), PASSES=tl.constexpr(10**9))

    start_with(monkeypatch, mix, max_iterations=0)
    found, found2, theta, _ = launch.forward("columns", problem, True)
    bad = expected.isnan()
    assert bad.any() and (expected == math.inf).any() and starts[0] > 0.01
    assert torch.equal(theta.isnan(), bad) and torch.equal(found.isnan().all(-1), bad)
    assert torch.equal(found.isnan().any(-1), bad)
    assert torch.equal(theta == math.inf, expected == math.inf)
    torch.testing.assert_close(theta, expected, equal_nan=True, rtol=1e-6, atol=3e-6)
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(found, out, equal_nan=True, rtol=eps, atol=eps)
    torch.testing.assert_close(found2, out2, equal_nan=True, rtol=eps, atol=eps)


@pytest.mark.usefixtures("maximum_drops_nan")
@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")
def test_nan_takes_no_passes_of_its_own(device, visits):
    q, k, v = random_qkv(device, 16, 60, dtype=torch.float16)
    q[0, 0, 3] = math.nan
    problem = Problem(q, k, v, torch.full((1,), 1.5, device=device), "1.5", 0.25)
    launch.forward("columns", problem, False)
    assert visits["output"] <= 2 and visits["solve"] <= 3
    column_lists(problem)
    assert visits["solve"] <= 8


@by_dtype
@pytest.mark.parametrize("iterations", [0, on_gpu(None)])
def test_a_crowd_inside_the_edge(device, monkeypatch, iterations, dtype):
    """Newton's steps shrink by half as long as keys tied at the edge of the support are above it: a small step says
    nothing there, and O2 and gradients, where each of them counts, would show it."""
    monkeypatch.setattr(limits, "DENSEST", 2.0)
    n_k = 600 * stretch(device)
    inside = torch.logspace(-4, -0.7, 16).to(dtype)
    q, k = torch.zeros(1, 1, 16, 16), torch.zeros(1, 1, n_k, 16)
    q[0, 0, :, 0], q[0, 0, :, 1] = 1, inside
    k[0, 0, :, 0], k[0, 0, :, 1] = -2, 1  # scores of -2 and what lies inside, of which theta goes below if alone
    k[0, 0, n_k // 2] = 0
    q, k = q.to(device, dtype), k.to(device, dtype)
    v = random_qkv(device, 16, n_k, dtype=dtype)[2]
    scores = q.double() @ k.double().mT
    if iterations is not None:
        start_with(monkeypatch, max_iterations=iterations)
    problem = Problem(q, k, v, torch.full((1,), 1.5, device=device), "1.5", 1.0)
    _, out2, theta, _ = launch.forward("columns", problem, True)
    exact = exact_theta(scores, 1.5)
    u = (1 + 0.5 * (scores - exact[..., None])).clamp_min(0)
    exact2 = u @ v.double() / u.sum(-1, keepdim=True)
    worst = ((out2.double() - exact2).norm(dim=-1) / exact2.norm(dim=-1)).amax()
    assert worst <= 1.5 * torch.finfo(dtype).eps
    assert (theta.double() - exact).abs().amax() <= 4e-6
    check_against_oracle(bind("columns"), plain("columns"), q, k, v, scale=1.0)
