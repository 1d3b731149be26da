"""A system's forward and backward as a CUDA graph, whose replays show what it takes without the host.

Where the GPU is done before the host has launched what comes next, times of calls are times of the host. A training
step hides it as long as other work keeps the GPU busy, and a graph does away with it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tasks.kernel_bench.inputs import Tensors
from tasks.kernel_bench.problem import Attention, NotMeasured
from tasks.kernel_bench.timing import Clock, backward

_WARMUP = 3  # calls on another stream, as capturing asks for


class GraphReplay:
    """One forward and backward, captured.

    Attributes:
        out: (b, h, n, d), and
        gradients: to q, k and v; each replay writes them anew.

    Raises:
        NotMeasured: it does what cannot be captured, such as waiting for the GPU.
    """

    def __init__(self, attention: Attention, tensors: Tensors) -> None:
        stream, current = torch.cuda.Stream(), torch.cuda.current_stream()
        stream.wait_stream(current)
        with torch.cuda.stream(stream):
            for _ in range(_WARMUP):
                backward(attention(*tensors.leaves), tensors)
        current.wait_stream(stream)
        torch.cuda.synchronize()
        self._graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(self._graph):
                out = attention(*tensors.leaves)
                self.gradients: tuple[Tensor, ...] = backward(out, tensors)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:  # calls work, as was seen above
            raise NotMeasured("it cannot be captured as a CUDA graph") from error
        self.out = out.detach()

    def replay(self) -> None:
        """Compute output and gradients of what q, k, v and the gradient to the output hold now."""
        self._graph.replay()


def checked(attention: Attention, tensors: Tensors,
            fault: Callable[[Tensor, tuple[Tensor, ...]], str | None]) -> GraphReplay:  # fmt: skip
    """Capture a system and replay it once.

    Args:
        fault: says what is wrong with an output and gradients, or None.

    Raises:
        NotMeasured: it cannot be captured.
        RuntimeError: what a replay computes is wrong.
    """
    graph = GraphReplay(attention, tensors)
    graph.out.fill_(float("nan"))  # whatever the capture, or memory that was used before, has left there
    for x in graph.gradients:
        x.fill_(float("nan"))
    graph.replay()
    torch.cuda.synchronize()
    if reason := fault(graph.out, graph.gradients):
        raise RuntimeError(reason)
    return graph


def run_replay(graph: GraphReplay, _tensors: Tensors, clock: Clock) -> list[Any]:
    """Replay; return the marks around it."""
    marks = [clock.mark()]
    graph.replay()
    marks.append(clock.mark())
    return marks
