"""The kernels of this repository: what each launch reads, from the very work lists that it walked."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from tasks.kernel_bench import own
from tasks.kernel_bench.inputs import Tensors
from tasks.kernel_bench.problem import Problem
from tasks.kernel_bench.reads import columns
from tasks.kernel_bench.reads.launches import Launch, watched
from tasks.kernel_bench.reads.tally import BACKWARD, FORWARD, Reads, Tally
from tasks.kernel_bench.reads.walks import rows_of, taken_keys, taken_queries, visited_keys, visited_queries
from tasks.kernel_bench.timing import backward

# They take as many passes as their slowest query needs; the output takes one more than one where the last step to a
# threshold turns out longer than it may be.
SOLVING = ("halley", "histogram", "listed", "output")


def count(method: str, problem: Problem, tensors: Tensors) -> dict[str, Tally]:
    """Run a method forward, as training does, and backward; return the reads of each pass."""
    attention = own.kernels(method, problem)
    forward, out = _counted(problem, lambda: attention(*tensors.leaves))
    return {FORWARD: forward, BACKWARD: _counted(problem, lambda: backward(out, tensors))[0]}


def _counted(problem: Problem, call: Callable[[], Tensor]) -> tuple[Tally, Tensor]:
    """Make a call and count what it reads; block sizes are those of the kernel that makes the output or dQ, the larger
    ones where it is launched once along lists of few queries and once for the rest."""
    reads: list[tuple[str, Reads]] = []
    tiles: list[tuple[int, int]] = []

    def report(launch: Launch) -> None:
        if launch.kernel not in READS:
            raise RuntimeError(f"what the kernel {launch.kernel} reads is not known to {__name__}")
        reads.append((launch.kernel, READS[launch.kernel](launch)))
        if launch.kernel in ("output", "grad_query"):
            tiles.append((launch.block_m, launch.block_n))

    with watched(report, SOLVING):
        result = call()
    block_m, block_n = max(tiles)
    tally = Tally(block_m, block_n, problem.b * problem.h * -(-problem.n // block_m))
    for kernel, rows in reads:
        tally.add(kernel, rows)
    return tally, result


def _threshold(before: int) -> Callable[[Launch], Reads]:
    """Return the count of a kernel that goes over its keys ``before`` it solves, and once in every pass of that."""

    def reads(launch: Launch) -> Reads:
        assert launch.passes is not None
        keys = visited_keys(launch) * (before + launch.passes)
        return Reads(q=_own_queries(launch), k=int(keys.sum()))

    return reads


def _visit(launch: Launch) -> Reads:
    """Output, and gradient of queries: a block of queries, and a row of K and one of V for each key it visits."""
    keys = visited_keys(launch) * (1 if launch.passes is None else launch.passes)
    visited = int(keys.sum())
    return Reads(q=_own_queries(launch), k=visited, v=visited)


def _own_queries(launch: Launch) -> int:
    """Return how many rows of Q are read: a launch for the rest looks before it reads whether a block is its own."""
    taken = taken_queries(launch)
    return rows_of(launch, taken if launch.x.LISTS.value == "rest" else torch.ones_like(taken), launch.block_m)


def _visit_queries(launch: Launch) -> Reads:
    """Gradients of keys and values: a block of keys and values, and a row of Q (and of dO, not counted here) for each
    query of each head that visits them. Where long walks may be cut, each piece loads its block of keys again."""
    pieces = launch.arguments[5]
    heads = launch.key_heads if pieces is None else pieces.owner.shape[0]
    queries = visited_queries(launch, heads * launch.groups)
    taken = taken_keys(launch, heads * launch.groups)
    own_rows = rows_of(launch, taken, launch.block_n)
    own_rows += 0 if pieces is None else columns.piece_rows(launch, pieces.owner, taken)
    return Reads(q=int(queries.sum()), k=own_rows, v=own_rows)


def _nothing(launch: Launch) -> Reads:
    """Kernels that look at lists alone."""
    return Reads()


READS: dict[str, Callable[[Launch], Reads]] = {
    "halley": _threshold(before=1),  # for the largest score
    "histogram": _threshold(before=2),  # the same, and for the counts
    "bound": columns.all_keys_at_once,
    "emit": columns.listed_tiles_at_once,
    "count": _nothing,
    "share": _nothing,
    "compact": _nothing,
    "scatter": _nothing,
    "count_tiles": _nothing,
    "place_pieces": _nothing,
    "add_pieces": _nothing,
    "listed": _threshold(before=0),
    "output": _visit,
    "grad_query": _visit,
    "grad_key_value": _visit_queries,
}
