"""Calls played from a record give the bits of calls as written, on other tensors, and never where they must not."""

from __future__ import annotations

import contextlib
import gc
import inspect
from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch
import triton
from calls import KERNELS, bind, random_qkv
from surface import FEATURES
from torch import Tensor

from adasplash_kernels import custom_ops, launch, launching, limits, ops, replays
from adasplash_kernels.recording import Make
from adasplash_kernels.replays import Tape, replayed
from adasplash_kernels.thresholds import THRESHOLDS, register

SOME = ("causal", "grouped queries", "gradient to alpha", "strided", "decode, 1 query", "packed")
PACKED = "aten.arange.default is part of it"  # spans of packed sequences are made by tensor operations


@pytest.fixture(autouse=True)
def records(monkeypatch) -> list[dict]:
    """Play the interpreter's calls too, and start without records."""
    monkeypatch.setattr(replays, "ON_CPU", True)
    found = [ops._attend.records, ops._gradients.records]
    for each in found:
        each.clear()
    return found


@contextlib.contextmanager
def clean() -> Iterator[None]:
    """Let ``torch.empty`` be PyTorch's own: filling what it returns is an operation that no record holds."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("empty", "empty_like"):
            patch.setattr(torch, name, inspect.unwrap(getattr(torch, name)))
        yield


def run(method: str, q: Tensor, k: Tensor, v: Tensor, options: dict, forward_only: bool = False) -> list[Tensor]:
    """Return the output and, unless ``forward_only``, the gradients."""
    if forward_only:
        with torch.no_grad():
            return [bind(method)(q, k, v, **options)]
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    if isinstance(alpha := options.get("alpha"), Tensor) and alpha.requires_grad:
        leaves.append(alpha)
    out = bind(method)(*leaves[:3], **options)
    return [out.detach(), *torch.autograd.grad(out, leaves, torch.ones_like(out).cumsum(-1))]


def as_written(*arguments) -> list[Tensor]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(replays, "_state", lambda device: None)
        return run(*arguments)


def cases() -> list[tuple[str, str]]:
    """All kernels and features on a GPU; in the interpreter each kernel with one feature and each feature once."""
    if torch.cuda.is_available():
        return [(method, name) for method in KERNELS for name in FEATURES]
    return [(KERNELS[i % len(KERNELS)], name) for i, name in enumerate(SOME)]


@pytest.mark.parametrize(("method", "name"), cases())
def test_the_third_call_is_played(device, records, method, name):
    """On new values each, and on memory that shows what was not written."""
    feature = FEATURES[name]
    q, k, v, options = feature.build(device, torch.bfloat16)
    fresh = [tuple(_like(x, factor * x) for x in (q, k, v)) for factor in (1.0, 0.5, -0.75)]
    expected = [as_written(method, *each, options, feature.forward_only) for each in fresh]
    with clean():
        found = [run(method, *each, options, feature.forward_only) for each in fresh[:2]]
    kept = [record for each in records for record in each.values()]
    found.append(run(method, *fresh[2], options, feature.forward_only))
    for a, b in zip(found, expected, strict=True):
        assert all(map(torch.equal, a, b))
    assert kept and [record for each in records for record in each.values()] == kept
    assert all(record == PACKED if "packed" in name else isinstance(record, Tape) for record in kept)


def _like(x: Tensor, values: Tensor) -> Tensor:
    """Return values laid out in memory as ``x`` is."""
    storage = torch.zeros(x.untyped_storage().nbytes() // x.itemsize, dtype=x.dtype, device=x.device)
    return storage.as_strided(x.shape, x.stride(), x.storage_offset()).copy_(values)


def test_one_tensor_given_twice_is_no_part_of_the_kind(device):
    x = random_qkv(device, 33)[0]
    other = random_qkv(device, 33, seed=1)
    with clean():
        for _ in range(2):
            run("adasplash", x, x, x, {})
    assert all(map(torch.equal, run("adasplash", *other, {}), as_written("adasplash", *other, {})))


@pytest.mark.parametrize("change", ["length", "stride", "dtype", "alignment", "option", "setting"])
def test_another_kind_of_call_has_another_record(device, records, monkeypatch, change):
    q, k, v = random_qkv(device, 33)
    options = {}
    with clean():
        for _ in range(2):
            run("adasplash", q, k, v, options)
        assert [len(each) for each in records] == [1, 1]
        if change == "length":
            q, k, v = random_qkv(device, 34)
        elif change == "stride":
            q = q.transpose(2, 3).contiguous().transpose(2, 3).expand(1, 1, 33, 16).repeat(1, 1, 1, 2)[..., :16]
        elif change == "dtype":
            q, k, v = (x.bfloat16() for x in (q, k, v))
        elif change == "alignment":
            q = torch.empty(q.numel() + 1, device=device)[1:].view(q.shape).copy_(q)
        elif change == "option":
            options = {"causal": True}
        else:
            monkeypatch.setattr(limits, "DENSEST", 0.0)
        expected = as_written("adasplash", q, k, v, options)
        for _ in range(3):
            assert all(map(torch.equal, run("adasplash", q, k, v, options), expected))
    assert all(len(each) > 1 for each in records[:1])


def test_a_method_from_elsewhere_runs_as_written(device, records):
    @register("test_replays")
    def solve(problem):
        return launch.halley_without_mask(problem)

    try:
        with clean():
            for _ in range(3):
                run("test_replays", *random_qkv(device, 20), {})
    finally:
        del THRESHOLDS["test_replays"]
    assert records == [{}, {}]


def test_only_so_many_kinds_are_remembered(device, records, monkeypatch):
    monkeypatch.setattr(replays, "MOST", 3)
    for n in range(1, 7):
        run("adasplash", *random_qkv(device, n), {})
        assert all(1 <= len(each) <= 3 for each in records)


def test_calls_run_as_written_while_someone_listens_to_launches(monkeypatch):
    """Profilers hook into Triton's launches; what a record launches they would not see."""
    gpu, runtime = torch.device("cuda", 0), triton.knobs.runtime
    active = SimpleNamespace(get_current_device=lambda: 0)
    monkeypatch.setattr(replays, "driver", SimpleNamespace(active=active))
    assert replays._state(gpu) is not None
    for name in ("launch_enter_hook", "launch_exit_hook", "add_stages_inspection_hook"):
        with monkeypatch.context() as patch:
            patch.setattr(runtime, name, SimpleNamespace(calls=[print]))
            assert replays._state(gpu) is None
    before = replays._state(gpu)
    monkeypatch.setattr(runtime, "debug", not runtime.debug)
    assert replays._state(gpu) != before


OBSTACLES = {
    "an operation": lambda x: (torch.empty_like(x).copy_(x),),
    "a value read": lambda x: (torch.empty(int(x[0])),),
    "an argument returned": lambda x: (x,),
    "a view returned": lambda x: (torch.empty(4)[1:],),
}


@pytest.mark.parametrize("name", OBSTACLES)
def test_what_no_record_can_hold(name):
    function = replayed(tuple)(OBSTACLES[name])
    with clean():
        for value in (3.0, 2.0, 5.0, 1.0):
            x = torch.full((2,), value)
            (found,), (expected,) = function(x), OBSTACLES[name](x)
            assert found.shape == expected.shape
    (why,) = function.records.values()
    assert isinstance(why, str)


def test_a_call_that_raises_while_it_is_taken_down_is_taken_down_the_next_time():
    fails = iter((False, True, False, False))

    def function(x: Tensor) -> tuple[Tensor]:
        made = torch.empty(3)
        if next(fails):
            raise MemoryError("full")
        return (made,)

    call, x = replayed(tuple)(function), torch.ones(1)
    with clean():
        call(x)
        with pytest.raises(MemoryError, match="full"):
            call(x)
        assert getattr(launching._here, "listener", None) is None
        call(x)
    (record,) = call.records.values()
    assert isinstance(record, Tape)
    assert call(x)[0].shape == (3,) and next(fails) is False  # played: the function was not asked


def test_memory_is_let_go_of_after_its_last_launch(device, records):
    """Where the call as written frees bits before it asks for lists, a record must not hold on to both."""
    with clean():
        for _ in range(2):
            run("columns", *random_qkv(device, 70), {"causal": True})
    for record in (record for each in records for record in each.values()):
        alive, made = set(), 0
        for step in record._steps:
            if isinstance(step, Make):
                alive.add(step.number)
                made += 1
            else:
                assert set(step.drops) <= alive
                alive -= set(step.drops)
        assert alive == {x for x in record._outputs if type(x) is int} and made > len(alive)


@pytest.mark.gpu
@pytest.mark.parametrize("method", KERNELS)
def test_a_record_takes_no_more_memory(method, records):
    q, k, v = random_qkv("cuda", 3000, head_dim=64, heads=4, dtype=torch.bfloat16)
    peaks = []
    with clean():
        for _ in range(4):
            gc.collect()  # what other tests left
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            run(method, q, k, v, {"causal": True})
            peaks.append(torch.cuda.memory_stats()["requested_bytes.all.peak"])  # not of blocks, which vary
    assert all(isinstance(record, Tape) for each in records for record in each.values())
    assert min(peaks[2:]) <= peaks[0]  # the least: autograd's thread may still hold what the call before saved


@pytest.mark.gpu
def test_a_record_is_captured_and_replayed_in_a_cuda_graph():
    q, k, v = random_qkv("cuda", 200, head_dim=64, heads=4, dtype=torch.bfloat16)
    with clean():
        for _ in range(3):
            run("columns", q, k, v, {"causal": True})
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            found = run("columns", q, k, v, {"causal": True})
        for other in (random_qkv("cuda", 200, head_dim=64, heads=4, dtype=torch.bfloat16, seed=s) for s in (1, 2)):
            for x, y in zip((q, k, v), other, strict=True):
                x.copy_(y)
            graph.replay()
            assert all(map(torch.equal, found, as_written("columns", *other, {"causal": True})))


def test_a_call_runs_on_the_gpu_of_its_tensors(monkeypatch):
    """Triton launches on the current one, which need not be theirs."""
    entered = []

    @contextlib.contextmanager
    def enter(device):
        entered.append(device)
        yield

    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.setattr(torch.cuda, "device", enter)
    function = custom_ops.on_its_device(lambda x, y: (x, y))
    first, second, cpu = (SimpleNamespace(device=torch.device(name)) for name in ("cuda:0", "cuda:1", "cpu"))
    for x in (first, second, cpu):
        assert function(x, 5) == (x, 5)
    assert entered == [torch.device("cuda:0")]
