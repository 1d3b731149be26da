"""How systems are timed in turn. No test asserts a time."""

from __future__ import annotations

import pytest
import torch

from tasks.kernel_bench.inputs import Tensors
from tasks.kernel_bench.settings import Timing
from tasks.kernel_bench.timing import PIECES, Clock, Times, interleave, rotated, run_forward

CPU = torch.device("cpu")


@pytest.fixture
def tensors():
    q, k, v = (torch.ones(1, 1, 2, 2, requires_grad=True) for _ in range(3))
    return Tensors(q, k, v, torch.ones(1, 1, 2, 2))


class Counting(Clock):
    """A clock that ticks at every mark, so that every span is a whole number."""

    def __init__(self):
        super().__init__(CPU)
        self.ticks = 0

    def mark(self):
        self.ticks += 1
        return self.ticks

    def between(self, start, end):
        return float(end - start)


def noting(name, seen, fails_at=None):
    def attention(q, k, v):
        seen.append(name)
        if fails_at is not None and seen.count(name) == fails_at:
            raise RuntimeError("gone")
        return q * k * v

    return attention


def run(names, tensors, timing, **options):
    seen, lost = [], []
    systems = {n: noting(n, seen, options.get("fails", {}).get(n)) for n in names}
    extra = {"now": options["now"]} if "now" in options else {}
    times = interleave(systems, tensors, timing, options.get("clock", Counting()),
                       lose=lambda name, error: lost.append((name, str(error))), **extra)  # fmt: skip
    return times, seen[::2], lost  # the function is called twice a turn: forward apart, and with the backward


def test_rotated():
    assert [rotated("abc", i) for i in range(4)] == [list("abc"), list("bca"), list("cab"), list("abc")]
    assert rotated([], 3) == []


def test_systems_take_turns_and_each_goes_first_in_turn(tensors):
    times, seen, lost = run("abc", tensors, Timing(1, 3, "median"))
    assert "".join(seen) == "abc" + "abc" + "bca" + "cab"
    assert lost == []
    assert {name: found.stats("fwd_ms")["n"] for name, found in times.items()} == {"a": 3, "b": 3, "c": 3}


def test_what_the_pieces_are(tensors):
    """Forward, backward, and both: one mark each in between, and the forward's output is let go before the third."""
    times, *_ = run("a", tensors, Timing(0, 2, "median"))
    assert times["a"].pieces == {"fwd_ms": [1.0, 1.0], "bwd_ms": [1.0, 1.0], "fwd_bwd_ms": [1.0, 1.0]}


def test_a_system_that_raises_is_left_out_and_the_others_go_on(tensors):
    times, seen, lost = run("abc", tensors, Timing(0, 3, "mean"), fails={"b": 3})
    assert lost == [("b", "gone")]
    assert set(times) == {"a", "c"}
    assert all(len(times[n].pieces[p]) == 3 for n in "ac" for p in PIECES)


def test_the_budget_ends_a_long_case_after_three_rounds(tensors):
    clock = iter(range(0, 10**6, 100))
    times, seen, _ = run("a", tensors, Timing(10, 50, "median", max_seconds=60.0), now=lambda: next(clock))
    assert len(seen) == 1 + 3  # one round of warm-up spent its quarter
    assert times["a"].stats("fwd_ms")["n"] == 3


def test_fewer_repeats_than_three_are_kept(tensors):
    clock = iter(range(0, 10**6, 100))
    times, *_ = run("a", tensors, Timing(0, 1, "median", max_seconds=1.0), now=lambda: next(clock))
    assert times["a"].stats("fwd_ms")["n"] == 1


def test_nothing_to_time(tensors):
    assert run("", tensors, Timing(1, 2, "median"))[0] == {}


def test_statistics():
    times = Times({"fwd_ms": [4.0, 1.0, 2.0, 3.0, 10.0], "bwd_ms": [1.0], "fwd_bwd_ms": []})
    assert (times.value("fwd_ms", "median"), times.value("fwd_ms", "mean")) == (3.0, 4.0)
    assert times.stats("fwd_ms") == {"n": 5, "min": 1.0, "q1": 2.0, "q3": 4.0, "max": 10.0,
                                     "std": pytest.approx(10**0.5)}  # fmt: skip
    assert times.stats("bwd_ms") == {"n": 1, "min": 1.0, "q1": 1.0, "q3": 1.0, "max": 1.0, "std": 0.0}


def test_the_clock_of_the_cpu():
    clock = Clock(CPU)
    start, end = clock.mark(), clock.mark()
    clock.wait()
    assert clock.between(start, end) >= 0


@pytest.mark.gpu
def test_the_clock_of_the_gpu():
    clock = Clock(torch.device("cuda"))
    start = clock.mark()
    torch.ones(10, device="cuda").sum()
    end = clock.mark()
    clock.wait()
    assert clock.between(start, end) >= 0


def test_the_forward_alone(tensors):
    """One span a round, no gradients, and nothing in the other pieces."""
    wanted = []

    def function(scores):
        wanted.append(torch.is_grad_enabled())
        return scores

    times = interleave({"a": function}, tensors.q, Timing(1, 3, "mean"), Counting(), lose=pytest.fail, once=run_forward)
    assert times["a"].pieces == {"fwd_ms": [1.0, 1.0, 1.0], "bwd_ms": [], "fwd_bwd_ms": []}
    assert wanted == [False] * 4
