"""Long walks of blocks of keys, cut into pieces whose sums are added up."""

from __future__ import annotations

import functools

import pytest
import torch
from calls import random_qkv, stretch
from column_cases import ANY, columns, on_gpu, setting
from oracle import gradients

from adasplash_kernels import launch, limits
from adasplash_kernels.problem import Problem
from adasplash_kernels.worklists.pieces import Pieces, place_pieces_kernel

pytestmark = pytest.mark.usefixtures("garbage")


def planned(tiles: list[int], room: int, shortest: int) -> tuple[int, list[int], list[int]]:
    """Return how long pieces are, each block's first piece, and the block of each piece."""
    length = shortest
    while sum(-(-n // length) for n in tiles if n > length) > room:
        length *= 2
    first, owner = [], []
    for block, n in enumerate(tiles):
        first.append(len(owner) if n > length else -1)
        owner += [block] * -(-n // length) if n > length else []
    return length, first, owner + [-1] * (room - len(owner))


@pytest.mark.parametrize("room", [2, 5, 16, 100])
def test_numbers_of_pieces(device, room):
    """Pieces get longer until there is room for all; more blocks than are looked at together, and heads apart."""
    tiles = [[70, 3, 4, 5, 0, 9, 8, 1] * 5, [0] * 40, [4] * 39 + [5], [1000] + [1] * 39]
    first = torch.tensor(tiles, dtype=torch.int32, device=device)
    owner = torch.full((4, room), 77, dtype=torch.int32, device=device)
    length = torch.empty(4, dtype=torch.int32, device=device)
    place_pieces_kernel[(4,)](first, owner, length, 40, room, 4, 16, num_warps=4)
    for head, of_head in enumerate(tiles):
        assert planned(of_head, room, 4) == (length[head].item(), first[head].tolist(), owner[head].tolist())


@pytest.fixture
def plans(monkeypatch: pytest.MonkeyPatch) -> list[Pieces]:
    """Overhear how walks are cut."""
    found, usual = [], launch._pieces

    def spy(*arguments: object) -> Pieces:
        found.append(usual(*arguments))
        return found[-1]

    monkeypatch.setattr(launch, "_pieces", spy)
    return found


@pytest.mark.parametrize(
    ("case", "room"), [("causal, more queries", 3), ("causal, more queries", 400), on_gpu("padded", 9)]
)
def test_sums_of_pieces(device, monkeypatch, plans, case, room):
    """Gradients are those of whole walks, whether there is room for few pieces or many; with lists and without."""
    monkeypatch.setattr(limits, "PIECE", 1)
    monkeypatch.setattr(Problem, "query_bytes", lambda problem, heads: 10**9)  # or they take too much memory
    monkeypatch.setattr(limits, "DENSEST", ANY if case == "padded" else 0.8)
    at = setting(case, device)
    inputs = (at.problem.q, at.problem.k, at.problem.v)
    upstream = random_qkv(device, inputs[0].shape[2], heads=inputs[0].shape[1], batch=inputs[0].shape[0], seed=5)[0]
    run = functools.partial(columns, **at.options)
    monkeypatch.setattr(limits, "PIECES", 0)
    expected = gradients(run, inputs, upstream)
    assert plans and not any((x.first >= 0).any() for x in plans)
    plans.clear()
    monkeypatch.setattr(limits, "PIECES", room * stretch(device) * inputs[1].shape[0] * inputs[1].shape[1])
    found = gradients(run, inputs, upstream)
    assert any((x.first >= 0).any() for x in plans)
    for name, a, b in zip(("out", "dq", "dk", "dv"), found, expected, strict=True):
        torch.testing.assert_close(a, b, atol=2e-5, rtol=2e-5, msg=lambda text, name=name: f"{name}: {text}")
    assert torch.equal(found[1], expected[1])
