"""Empty tiles, counted by hand on attention whose support is chosen."""

from __future__ import annotations

import pytest
import torch

from tasks.kernel_bench import sparsity
from tasks.kernel_bench.inputs import Tensors
from tasks.kernel_bench.sparsity import heads_to_count, measure_sparsity

N = 6


@pytest.fixture
def chosen():
    """One query head a row of ``targets``: query i puts all its weight on one key."""

    def make(*targets):
        keys = 30 * torch.eye(N)[None, None]
        q = torch.stack([30 * torch.eye(N)[list(t)] for t in targets])[None]
        return Tensors(q.requires_grad_(), keys, keys, q)

    return make


@pytest.mark.parametrize(
    ("tile", "over", "empty", "total"),
    [
        # keys of the queries 0 to 5: 0 0 0 3 0 0
        ((1, 1), "whole_square", 30, 36),
        ((1, 1), "causal_half", 15, 21),
        ((2, 2), "whole_square", 5, 9),  # occupied: (0,0) (1,0) (1,1) (2,0)
        ((2, 2), "causal_half", 2, 6),
        ((4, 4), "whole_square", 2, 4),  # occupied: (0,0) (1,0); the last row and column of tiles are partial
        ((4, 4), "causal_half", 1, 3),
        ((2, 4), "whole_square", 3, 6),
        ((2, 4), "causal_half", 1, 4),  # tiles of the second column begin at key 4: seen by queries 4 and 5
    ],
)
def test_by_hand(tile, over, empty, total, chosen, problem):
    wanted = problem(h=1, h_kv=1, n=N, d=N)
    found = measure_sparsity(wanted, chosen([0, 0, 0, 3, 0, 0]), {tile, (2, 2)}, over)
    assert found.percent[tile] == pytest.approx(100 * empty / total)
    assert found.heads == 1


def test_queries_that_share_a_key_head_count_apart(chosen, problem):
    wanted = problem(h=2, h_kv=1, n=N, d=N)
    found = measure_sparsity(wanted, chosen([0] * 6, [0, 1, 2, 3, 4, 5]), {(3, 3), (6, 6)}, "whole_square")
    assert found.percent == {(3, 3): pytest.approx(100 * (2 + 2) / 8), (6, 6): 0.0}
    assert found.heads == 2


def test_long_inputs_are_measured_on_few_heads(problem, chosen, monkeypatch):
    assert [heads_to_count(problem(h=16, n=n)) for n in (4096, 32768, 65536, 262144)] == [16, 4, 1, 1]
    monkeypatch.setattr(sparsity, "MOST_PAIRS", N * N)
    found = measure_sparsity(problem(h=2, h_kv=1, n=N, d=N), chosen([0] * 6, range(6)), {(3, 3)}, "whole_square")
    assert (found.percent[3, 3], found.heads) == (50.0, 1)
