"""The bits that lists of queries are made of: noted along lists of keys or tile by tile, then put together by keys."""

from __future__ import annotations

import functools
import math

import pytest
import torch
import triton
import triton.language as tl
from calls import bind, random_qkv, stretch
from column_cases import ANY, HALF_TOO, Sides, by_byte, columns, headers, limit_some, overflowed, setting, unpacked
from oracle import gradients
from torch import Tensor

from adasplash_kernels import launch, limits
from adasplash_kernels.inputs import open_sizes, sealed
from adasplash_kernels.kept import constant
from adasplash_kernels.problem import Problem, pool_entries
from adasplash_kernels.scores import query_block
from adasplash_kernels.tile_sizes import choose_column_tiles
from adasplash_kernels.worklists.columns import WORD
from adasplash_kernels.worklists.marks import (
    Masks,
    list_tiles,
    mark_queries,
    masks_of_list,
    scatter_kernel,
    words_of_queries,
)
from adasplash_kernels.worklists.walk import MIXED, may_start, may_walk, members, query_list, run

pytestmark = pytest.mark.usefixtures("garbage")


@triton.jit
def _mark_kernel(x, size, weights, masks, used):
    """Do what the gradient of queries does with its weights, with those (heads, N_q, N_k) float32 that are given.

    A query that is there has weight 1 on keys past the end of its list, as a row of NaN would.
    """
    size = open_sizes(x, size)
    at = query_block(x, size)
    walk = query_list(x, size, at)
    if not may_start(x, size, at.head_index, at.index):
        return
    if not may_walk(x, walk):
        return
    place, step = words_of_queries(x, size, at.head_index, at.index, masks, used)
    if x.LISTS != "rest":
        place = masks_of_list(x, size, at.head_index, at.index, masks)
    first, count = run(walk, 0, x.LISTS, MIXED, x.BLOCK_N)
    rows = (at.head_index * size.n_q + at.rows)[:, None] * size.n_k
    for i in range(count):
        keys = members(walk, first + i, x.BLOCK_N, x.LISTS)[None, :]
        there = (at.rows < size.n_q)[:, None]
        u = tl.load(weights + rows + keys, mask=there & (keys < size.n_k), other=1.0)
        u = tl.where(there & ((x.LISTS != "rest") | (keys < size.n_k)), u, 0.0)
        mark_queries(x, size, first + i, place, step, u, masks.KEYS, masks.SIDES)


def scattered(problem: Problem, lists: Tensor, weights: Tensor, rounds: list[int], parts: int) -> Tensor:
    """Return which queries use which blocks of keys, (heads, key blocks, queries of whole blocks) bool.

    Args:
        rounds: heads of each launch.
    """
    tiles, heads, sides = problem.column_tiles.grad, sum(rounds), launch._sides(problem)
    listed, rest, blocks = problem.retiled(tiles), problem.unlisted, problem.key_lists
    room = pool_entries(lists.shape[1], problem.lists, problem.k.shape[2])
    number = list_tiles(room, problem.lists, tiles.block_n)
    word = getattr(torch, f"int{tiles.block_n // 2 // sides}")
    words = launch._words_each(problem)
    whole = torch.zeros(triton.cdiv(heads * blocks * words, 2), dtype=torch.int32, device=lists.device)
    used = whole.view(torch.int16)[: heads * blocks * words].view(heads, blocks, words)
    inputs, first = listed.inputs("columns", query_tiles=lists), 0
    constants = sealed(words), constant(problem.column_tiles.grad_keys.block_n), constant(sides)
    for count in rounds:
        each = (count // 2, count // 4, count)  # of the last place there is more than is needed
        size = 2 * tiles.block_m * sides
        guarded = [torch.full((n * number * size + 8,), 77, dtype=word, device=lists.device) for n in each]
        masks = Masks(*(x[:-8] for x in guarded), *map(sealed, (*each[:2], number, first)), *constants)
        grid, sizes = listed.query_grid(count), problem.sizes(first)
        _mark_kernel[grid](inputs, sizes, weights, masks, used, num_warps=tiles.num_warps)
        assert all((x[-8:] == 77).all() for x in guarded)
        assert (guarded[2][(count - sum(each[:2])) * number * size :] == 77).all()
        others = rest.inputs("rest", query_tiles=lists)
        _mark_kernel[rest.query_grid(count)](others, sizes, weights, masks, used, num_warps=4)
        scatter_kernel[(grid[0] * parts,)](inputs, sizes, masks, whole, parts, num_warps=1)
        first += count
    return unpacked(used)


SHARES = (0.3, 1.0, 0.0, 0.02, 0.6)  # of the keys, in the lists of a head's blocks in turn


@pytest.mark.in_turn(2)
@pytest.mark.parametrize("dtype", HALF_TOO)
@pytest.mark.parametrize("limit", ["none", "too dense", "no room"])
@pytest.mark.parametrize(("n_q", "n_k", "parts"), [(75, 150, 4), (33, 75, 2), (5, 40, 1)])
def test_bits_of_queries(device, monkeypatch, dtype, limit, n_q, n_k, parts):
    """Exactly those with a weight on one of the keys that they visit; by heads together and in two launches."""
    n_q, n_k = n_q * stretch(device), n_k * stretch(device)
    generator = torch.Generator().manual_seed(n_k)
    q = torch.zeros(2, 2, n_q, 16, dtype=dtype, device=device)
    k = torch.zeros(2, 1, n_k, 16, dtype=dtype, device=device)
    monkeypatch.setattr(limits, "DENSEST", 0.5 if limit == "too dense" else ANY)
    share = choose_column_tiles(16, dtype).share
    monkeypatch.setattr(limits, "ENTRIES", share * (n_k // 4 if limit == "no room" else n_k))
    problem = Problem(q, k, k, torch.full((1,), 1.5, device=device), "1.5", 1.0)
    rows, keys, blocks = problem.listed.tiles.block_m, problem.column_tiles.grad_keys.block_n, problem.lists
    words = triton.cdiv(n_k, WORD)
    together = Sides.of(problem, False).together
    groups = triton.cdiv(blocks, together)
    shares = torch.tensor([SHARES[i % len(SHARES)] for i in range(4 * groups)]).view(4, groups, 1)
    shares = shares.repeat_interleave(together, 1)[:, :blocks]
    listed = torch.rand(4, blocks, WORD * words, generator=generator) < shares
    listed[..., n_k:] = False
    lists = torch.empty(4, problem.list_size, dtype=torch.int32, device=device)
    launch._compact(problem.listed, by_byte(problem, listed).to(device), lists, 0, keys=False)
    over = headers(lists, blocks)[..., 0].cpu() < 0
    assert over.any() == (limit != "none") and (groups == 1 or not over.all())

    weights = torch.rand(4, n_q, n_k, generator=generator)
    weights[weights > 3 / keys] = 0.0
    weights[:, ::7] = math.nan
    weights[:, 3::7] = 0.0
    weights[:, 4::7] *= 1e-37
    visited = (listed[..., :n_k] | over[..., None]).repeat_interleave(rows, 1)[:, :n_q]
    expected = torch.zeros(4, launch._words_each(problem) * WORD, problem.key_lists * keys, dtype=torch.bool)
    expected[:, :n_q, :n_k] = visited & ~(weights <= 0)
    expected = expected.unflatten(2, (-1, keys)).any(3).mT
    assert expected.any() and not expected[..., :n_q].all()
    weights = weights.to(device)
    for rounds in ([4], [1, 3]):
        assert torch.equal(scattered(problem, lists, weights, rounds, parts).cpu(), expected)


@pytest.mark.parametrize("limit", [None, "DENSEST", "ENTRIES"])
@pytest.mark.parametrize("case", ["causal", "packed", "window"])
def test_gradients_with_bad_queries(device, monkeypatch, compactions, case, limit):
    """A NaN in a query reaches the keys that it sees: all that the dense method has it reach, and no others."""
    monkeypatch.setattr(limits, "DENSEST", ANY)
    at = setting(case, device, spread=2.0)
    q, k, v = at.problem.q.clone(), at.problem.k, at.problem.v
    q[:, :, 21 * stretch(device), 3] = math.nan
    upstream = random_qkv(device, q.shape[2], heads=q.shape[1], batch=q.shape[0], seed=5)[0]
    run = functools.partial(columns, **at.options)
    if limit is not None:
        run(q, k, v)
        limit_some(monkeypatch, at, compactions, limit, (False,))
    found = gradients(run, (q, k, v), upstream)
    if limit is not None:
        assert overflowed(compactions, False).any()
    expected = gradients(functools.partial(bind("adasplash_nomask"), **at.options), (q, k, v), upstream)
    for name, a, b in zip(("out", "dq", "dk", "dv"), found, expected, strict=True):
        assert b.isnan().any() and not b.isnan().all(), name
        assert torch.equal(a.isnan(), b.isnan()), name
        torch.testing.assert_close(a, b, equal_nan=True, atol=2e-5, rtol=2e-5)


def test_gradients_repeat(device, monkeypatch, compactions):
    """Bit for bit, where some blocks have lists and some do not, in one launch and head by head."""
    monkeypatch.setattr(limits, "DENSEST", ANY)
    at = setting("causal, more queries", device)
    run = functools.partial(columns, **at.options)
    inputs = (at.problem.q, at.problem.k, at.problem.v)
    run(*inputs)
    limit_some(monkeypatch, at, compactions, "ENTRIES", (False,))
    first = gradients(run, inputs, at.problem.q)
    over = overflowed(compactions, False)
    assert over.any() and not over.all()
    assert all(map(torch.equal, gradients(run, inputs, at.problem.q), first))
    monkeypatch.setattr(limits, "WORKSPACE", 1)
    assert all(map(torch.equal, gradients(run, inputs, at.problem.q), first))
