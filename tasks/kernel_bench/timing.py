"""Times of several systems, taken in turn within one loop so that a drifting clock hits all alike.

On a GPU, CUDA events are recorded around each call and read at the end of a round; the host is not made to wait
between calls, so it may run ahead as it does in training, and what it costs shows where a system cannot keep the GPU
busy. The L2 cache is not flushed: other systems run in between, and in a model too what precedes attention leaves its
output there. On a CPU the clock is time.perf_counter.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from tasks.kernel_bench.inputs import Tensors
from tasks.kernel_bench.problem import Attention
from tasks.kernel_bench.settings import Timing

PIECES = ("fwd_ms", "bwd_ms", "fwd_bwd_ms")
_SPANS = ((0, 1), (1, 2), (3, 4))  # of each piece, among the marks of a call
_FEWEST_ROUNDS = 3
_WARMUP_SHARE = 0.25


class Clock:
    """Marks points in time on a device, and tells the milliseconds between two of them."""

    def __init__(self, device: torch.device) -> None:
        self.cuda = device.type == "cuda"

    def mark(self) -> Any:
        """Return this moment: on a GPU, of its queue of work."""
        if not self.cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def wait(self) -> None:
        """Return when all work is done, after which :meth:`between` may be asked."""
        if self.cuda:
            torch.cuda.synchronize()

    def between(self, start: Any, end: Any) -> float:
        """Return the milliseconds from one mark to another."""
        return start.elapsed_time(end) if self.cuda else (end - start) * 1e3


@dataclass
class Times:
    """Milliseconds of every timed round: forward, backward, and both timed together; empty where not timed."""

    pieces: dict[str, list[float]] = field(default_factory=lambda: {name: [] for name in PIECES})

    def value(self, piece: str, statistic: str) -> float:
        """Return the median or mean of a piece."""
        return (statistics.median if statistic == "median" else statistics.fmean)(self.pieces[piece])

    def stats(self, piece: str) -> dict[str, float]:
        """Return the number of rounds, least and most, quartiles and the (population) standard deviation."""
        values = self.pieces[piece]
        quartiles = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else values * 3
        return {"n": len(values), "min": min(values), "q1": quartiles[0], "q3": quartiles[2], "max": max(values),
                "std": statistics.pstdev(values)}  # fmt: skip


def run_once(attention: Attention, tensors: Tensors, clock: Clock) -> list[Any]:
    """Run forward, then backward, then both again; return the marks around them.

    The forward is the one that training runs, with gradients wanted; gradients go to q, k and v and are dropped.
    """
    marks = [clock.mark()]
    out = attention(*tensors.leaves)
    marks.append(clock.mark())
    backward(out, tensors)
    marks.append(clock.mark())
    del out  # before the next forward, or two outputs would be held at once
    marks.append(clock.mark())
    backward(attention(*tensors.leaves), tensors)
    marks.append(clock.mark())
    return marks


def run_forward(function: Callable[[Tensor], Tensor], scores: Tensor, clock: Clock) -> list[Any]:
    """Run a function of one tensor without gradients; return the marks around it."""
    with torch.no_grad():
        marks = [clock.mark()]
        function(scores)
        marks.append(clock.mark())
    return marks


def backward(out: Tensor, tensors: Tensors) -> tuple[Tensor, ...]:
    """Return the gradients to q, k and v."""
    return torch.autograd.grad(out, tensors.leaves, tensors.do)


def rotated(names: Sequence[str], by: int) -> list[str]:
    """Return the names in the order of round ``by``: each goes first in turn."""
    by %= max(len(names), 1)
    return [*names[by:], *names[:by]]


def interleave(
    systems: Mapping[str, Any], tensors: Any, timing: Timing, clock: Clock,
    lose: Callable[[str, Exception], None], now: Callable[[], float] = time.monotonic,
    once: Callable[[Any, Any, Clock], list[Any]] = run_once,
) -> dict[str, Times]:  # fmt: skip
    """Time the systems in rounds, each once a round.

    Args:
        systems: name to function, called before (nothing is compiled here).
        tensors: what ``once`` gives each of them.
        lose: told of a system that raises, which is left out from then on.
        now: seconds, for the budget.
        once: runs one of them and returns the marks: :func:`run_once` (attention) or :func:`run_forward` (rows).

    Returns:
        The times of every system that was not lost.
    """
    started, left = now(), dict(systems)
    times = {name: Times() for name in left}

    def play(number: int, keep: bool) -> None:
        marks = {}
        for name in rotated(list(left), number):
            try:
                marks[name] = once(left[name], tensors, clock)
            except Exception as error:  # whatever a foreign kernel raises
                del left[name]
                lose(name, error)
        clock.wait()
        for name, found in marks.items():
            for piece, (start, end) in zip(PIECES, _SPANS, strict=True):
                if keep and end < len(found):
                    times[name].pieces[piece].append(clock.between(found[start], found[end]))

    for number in range(timing.warmup):
        play(number, keep=False)
        if now() - started >= timing.max_seconds * _WARMUP_SHARE:
            break
    for number in range(timing.repeats):
        if number >= _FEWEST_ROUNDS and now() - started >= timing.max_seconds:
            break
        play(number, keep=True)
    return {name: times[name] for name in left}
