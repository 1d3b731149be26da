"""Bit masks of tiles: marking them, turning them round, and walking them; interpreted or compiled."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

from adasplash_kernels.worklists.tiles import mark_tile, transpose, words
from adasplash_kernels.worklists.walk import EDGES, INSIDE, MIXED, Walk, next_tile, run, run_range

ROWS, KEYS = 4, 16  # of a tile of scores


def pack(bits: Tensor) -> Tensor:
    """Pack (..., n) bool into (..., words(n)) int32, bit ``i % 32`` of word ``i // 32``."""
    padded = torch.nn.functional.pad(bits.cpu().long(), (0, -bits.shape[-1] % 32)).unflatten(-1, (-1, 32))
    unsigned = (padded << torch.arange(32)).sum(-1)
    return torch.where(unsigned >= 2**31, unsigned - 2**32, unsigned).to(bits.device, torch.int32)


def random_bits(*shape: int, share: float, seed: int = 0) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < share


def test_packing_by_hand():
    """The two helpers the other tests rest on."""
    bits = torch.zeros(2, 34, dtype=torch.bool)
    bits[0, [0, 31, 33]] = True
    assert pack(bits).tolist() == [[1 - 2**31, 2], [0, 0]]
    assert [words(n) for n in (1, 31, 32, 33, 64, 65)] == [1, 1, 1, 2, 2, 3]


@pytest.mark.parametrize("share", [0.05, 0.5, 1.0])
@pytest.mark.parametrize(("rows", "cols"), [(1, 1), (31, 33), (32, 32), (33, 31), (70, 40), (1, 100), (100, 1)])
def test_transpose(device, rows, cols, share):
    bits = random_bits(2, rows, cols, share=share, seed=rows + cols).to(device)
    found = transpose(pack(bits), cols)
    assert found.dtype == torch.int32 and found.shape == (2, cols, words(rows))
    assert torch.equal(found, pack(bits.mT))


def test_transpose_leaves_out_what_does_not_count(device):
    """Bits past the last column of a row have no row to go to, and none of them shows in another."""
    bits = random_bits(2, 5, 64, share=0.5).to(device)
    assert torch.equal(transpose(pack(bits), 37), pack(bits[..., :37].mT))


@triton.jit(do_not_specialize=["first", "last", "low", "high", "capacity"])
def _walk_kernel(
    tiles, first, last, low, high, visited, capacity, LISTS: tl.constexpr, PART: tl.constexpr, KEYS: tl.constexpr
):
    """Write the tiles of a part of a list in the order of the walk, and after ``capacity`` of them how many there were.

    Rows from ``low`` to ``high`` need no mask; a tile is KEYS of them.
    """
    at = Walk(tiles, first, last, low, high, -1)
    begin, end = run_range(at, LISTS)
    place = 0
    for number in range(begin, end):
        state, count = run(at, number, LISTS, PART, KEYS)
        for i in range(count):
            tile, state = next_tile(at, number, state, i, LISTS, PART, KEYS)
            tl.store(visited + place, tile, mask=place < capacity)
            place += 1
    tl.store(visited + capacity, place)


def walk(tiles: Tensor | None, first: int, last: int, device: str, part: int = MIXED.value,
         inner: tuple[int, int] = (0, 0)) -> list[int]:  # fmt: skip
    """Return the tiles in the order of the walk."""
    capacity = 200
    visited = torch.full((capacity + 1,), -1, dtype=torch.int32, device=device)
    kind = "all" if tiles is None else "tiles"
    tiles = visited if tiles is None else tiles
    _walk_kernel[(1,)](tiles, first, last, *inner, visited, capacity, kind, part, KEYS, num_warps=1)
    *visited, count = visited.tolist()
    return visited[:count]


RANGES = [(0, 1), (0, 31), (0, 32), (0, 33), (5, 70), (31, 33), (32, 64), (40, 41), (33, 97), (63, 130)]


@pytest.mark.parametrize(("first", "last"), [*RANGES, (0, 0), (3, 3), (64, 64)])
def test_without_a_list_all_tiles_are_walked(device, first, last):
    assert walk(None, first, last, device) == list(range(first, last))


@pytest.mark.parametrize("inner", [(0, 0), (0, 160), (33, 95), (32, 96), (47, 49), (40, 40), (90, 60), (500, 900)])
@pytest.mark.parametrize(("first", "last"), [(0, 1), (0, 7), (2, 6), (3, 3)])
def test_parts_are_the_tiles_at_the_edges_and_those_inside(device, first, last, inner):
    """A tile is inside if all of its rows are in the range that needs no mask."""
    low, high = inner
    inside = [t for t in range(first, last) if low <= t * KEYS and (t + 1) * KEYS <= high]
    assert walk(None, first, last, device, INSIDE.value, inner) == inside
    assert walk(None, first, last, device, EDGES.value, inner) == [t for t in range(first, last) if t not in inside]


@pytest.mark.parametrize("share", [0.0, 0.03, 0.5, 1.0])
@pytest.mark.parametrize(("first", "last"), RANGES)
def test_a_list_is_walked_bit_by_bit(device, first, last, share):
    """Each set bit once and in order, those of words before ``first`` and after ``last`` never."""
    bits = torch.zeros(160, dtype=torch.bool)
    bits[first:last] = random_bits(last - first, share=share, seed=last)
    listed = pack(bits)
    listed[: first // 32] = -1  # nobody wrote these words for this block
    listed[(last + 31) // 32 :] = -1
    assert walk(listed.to(device), first, last, device) == bits.nonzero().flatten().tolist()


@pytest.mark.parametrize("bit", range(32))
def test_every_bit_alone(device, bit):
    """Each bit of a word is its own tile, the sign bit too; the second word counts on from the first."""
    word = -(2**31) if bit == 31 else 2**bit
    listed = torch.tensor([0, word, word], dtype=torch.int32, device=device)
    assert walk(listed, 0, 96, device) == [32 + bit, 64 + bit]


def test_an_empty_range_has_no_run(device):
    listed = torch.full((3,), -1, dtype=torch.int32, device=device)
    assert walk(listed, 0, 0, device) == walk(listed, 64, 64, device) == []


@triton.jit(do_not_specialize=["first", "last", "n", "scale"])
def _mark_kernel(scores, edges, marks, first, last, n, scale, ROWS: tl.constexpr, KEYS: tl.constexpr):
    """Mark tiles ``first`` to ``last`` of (ROWS, n) scores."""
    rows = tl.arange(0, ROWS)
    edge = tl.load(edges + rows)
    word = tl.zeros((ROWS,), tl.int32)
    for tile in range(first, last):
        raw = tl.load(scores + rows[:, None] * n + (tile * KEYS + tl.arange(0, KEYS))[None, :])
        word = mark_tile(marks, word, raw, scale, edge, tile, last)


def mark(scores: Tensor, edges: Tensor, first: int, last: int, scale: float = 1.0) -> Tensor:
    """Return the marks of (ROWS, tiles * KEYS) scores; words that were not written are 77."""
    n = scores.shape[1]
    marks = torch.full((words(n // KEYS),), 77, dtype=torch.int32, device=scores.device)
    _mark_kernel[(1,)](scores, edges, marks, first, last, n, scale, ROWS=ROWS, KEYS=KEYS, num_warps=1)
    return marks


def random_scores(device: str, tiles: int, seed: int) -> tuple[Tensor, Tensor]:
    """Return scores and an edge by row that about a third of the tiles pass in some row."""
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(ROWS, tiles * KEYS, generator=generator)
    per_row = scores.unflatten(1, (tiles, KEYS)).amax(-1).sort(-1).values
    edges = per_row[:, -1 - tiles // (3 * ROWS)]  # a score that is there: reaching the edge is not passing it
    return scores.to(device), edges.to(device)


@pytest.mark.parametrize("scale", [1.0, 0.5])
@pytest.mark.parametrize(("first", "last"), RANGES)
def test_marked_and_walked_are_the_tiles_above_the_edge(device, first, last, scale):
    tiles = 130
    scores, edges = random_scores(device, tiles, seed=first)
    above = (scores.unflatten(1, (tiles, KEYS)).amax(-1) > edges[:, None]).any(0).cpu()
    assert 0 < above.sum() < tiles
    above[:first] = above[last:] = False
    marks = mark(scores, scale * edges, first, last, scale)
    written = slice(first // 32, (last + 31) // 32)
    assert torch.equal(marks[written].cpu(), pack(above)[written])
    assert (marks[: written.start] == 77).all() and (marks[written.stop :] == 77).all()
    assert walk(marks, first, last, device) == above.nonzero().flatten().tolist()


def test_nan_is_marked(device):
    """A row whose edge is NaN marks every tile, and a score that is NaN its own: NaN must reach the output."""
    scores, edges = torch.zeros(ROWS, 5 * KEYS, device=device), torch.ones(ROWS, device=device)
    assert mark(scores, edges, 0, 5).tolist() == [0]
    scores[2, 3 * KEYS + 1] = torch.nan
    assert mark(scores, edges, 0, 5).tolist() == [0b01000]
    edges[1] = torch.nan
    assert mark(scores, edges, 0, 5).tolist() == [0b11111]


def test_hidden_keys_are_not_marked(device):
    scores, edges = torch.full((ROWS, 3 * KEYS), -torch.inf, device=device), torch.full((ROWS,), -1e30, device=device)
    assert mark(scores, edges, 0, 3).tolist() == [0]
    scores[3, -1] = 0
    assert mark(scores, edges, 0, 3).tolist() == [0b100]
