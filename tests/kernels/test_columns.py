"""Lists of columns: the bound they start from, what they hold and in which order, and that results rest on neither.

A list that is too dense or finds no room, a bound that is too low or a head in another launch must change the time a
call takes, and nothing else. What is never to be read holds garbage here, which as a key or as bits would be believed.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from fractions import Fraction
from typing import Any, NamedTuple

import pytest
import torch
import triton
import triton.language as tl
from calls import UNLIMITED, bind, op_arguments, plain, positions, random_qkv, stretch
from hard_rows import FLOAT32, GENERAL, both_alphas, check_theta, computed, exact_theta, hard_rows, resolution, stacked
from maximum import maximum_drops_nan  # noqa: F401
from oracle import check_against_oracle, gradients
from rowwise_oracle import check as check_rowwise
from rowwise_oracle import random_scores
from torch import Tensor

from adasplash_kernels import entmax, launch
from adasplash_kernels.dispatch import kernel_alpha
from adasplash_kernels.launch import Problem, choose_column_tiles
from adasplash_kernels.masks import AttentionMask
from adasplash_kernels.ops import backward_op, forward_op
from adasplash_kernels.thresholds.group_maxima import bound_kernel
from adasplash_kernels.thresholds.lower_bound import rise
from adasplash_kernels.worklists.columns import WORD, share_kernel
from adasplash_kernels.worklists.walk import HEADER

MAX_INT = 2**31 - 1
ANY = 2.0  # for launch.DENSEST: no list is too dense
HALF_TOO = [torch.float32, pytest.param(torch.float16, marks=pytest.mark.gpu)]  # whose tiles on a GPU are others
columns = bind("columns")


@pytest.fixture(autouse=True)
def garbage(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, int], None]:
    """Let uninitialised lists name a key that exists, and uninitialised bits be set; return what sets them to others.

    It comes after ``poisoned_empty``, which does the same for floats.
    """
    empty = torch.empty

    def refill(entry: int, word: int) -> None:
        fill = {torch.int32: entry, torch.int16: word}

        def filled(*args: Any, **options: Any) -> Tensor:
            x = empty(*args, **options)
            return x.fill_(fill[x.dtype]) if x.dtype in fill and type(x) is Tensor else x

        monkeypatch.setattr(torch, "empty", filled)

    refill(1, -1)
    return refill


class Compaction(NamedTuple):
    """One call of ``launch._compact``."""

    first_head: int
    keys: bool
    bits: Tensor
    lists: Tensor

    @property
    def counts(self) -> Tensor:
        """(heads, blocks), -1 for blocks that are left without a list."""
        return headers(self.lists, self.bits.shape[1])[..., 0]


@pytest.fixture
def compactions(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Compaction]]:
    """Overhear what is compacted."""
    found, compact = [], launch._compact

    def spy(problem: Problem, bits: Tensor, lists: Tensor, first_head: int, keys: bool) -> None:
        compact(problem, bits, lists, first_head, keys)
        found.append(Compaction(first_head, keys, bits.clone(), lists.clone()))

    monkeypatch.setattr(launch, "_compact", spy)
    yield found


# Thresholds climbed to from below


@triton.jit
def _rise_kernel(scores, counts, start, out, alpha, rows, STEPS: tl.constexpr, ALPHA: tl.constexpr):
    """Write what ``rise`` makes of the start of (rows, 64) scores, up to 32 rows."""
    row = tl.arange(0, 32)
    there = row < rows
    places = row[:, None] * 64 + tl.arange(0, 64)[None, :]
    s = tl.load(scores + places, mask=there[:, None], other=0.0)
    first = tl.load(start + row, mask=there, other=0.0)
    a = tl.load(alpha) - 1.0
    if counts is None:
        theta = rise(s, 1.0, first, a, STEPS, ALPHA)
    else:
        theta = rise(s, tl.load(counts + places, mask=there[:, None], other=1.0), first, a, STEPS, ALPHA)
    tl.store(out + row, theta, mask=there)


def risen(scores: Tensor, counts: Tensor | None, start: Tensor, alpha: Tensor, kind: str, steps: int) -> Tensor:
    """Return ``rise`` of (rows, 64) scores, in float64."""
    assert scores.shape[0] <= 32 and scores.shape[1] == 64
    out = torch.empty_like(start)
    _rise_kernel[(1,)](scores, counts, start, out, alpha, len(scores), steps, kind, num_warps=4)
    return out.double()


RISING = [(1.1, GENERAL), (1.25, GENERAL), (1.5, "1.5"), (1.5, GENERAL), (1.9, GENERAL), (2.0, "2"), (2.0, GENERAL)]


@pytest.mark.parametrize("counted", [False, True], ids=["once each", "with counts"])
@pytest.mark.parametrize(("alpha", "kind"), RISING)
def test_rise_stays_below_and_comes_close(device, alpha, kind, counted):
    """After any number of steps, from the largest score and from below it; each step up, and eight nearly there."""
    exact, tensor = both_alphas(alpha, kind, device)
    rows = hard_rows(64, exact)
    del rows["none seen"]
    scores, names = stacked({name: x[:1] for name, x in rows.items()}, device)
    counts = None
    repeated = scores
    if counted:
        counts = torch.randint(0, 4, scores.shape, generator=torch.Generator().manual_seed(2)).to(device)
        counts[scores == scores.amax(-1, keepdim=True)] = 2
        index = torch.arange(3, device=device)  # as often as it counts, else hidden
        repeated = torch.where(index < counts[..., None], scores[..., None], -math.inf).flatten(1)
        counts = counts.float()
    theta, slack = exact_theta(repeated, exact), resolution(scores)
    for below in (0.0, 1.0):
        start = scores.amax(-1) - below
        last = start.double()
        for steps in (0, 1, 2, 3, 4, 8):
            found = risen(scores, counts, start, tensor, kind, steps)
            for i, name in enumerate(names):
                assert found[i] <= theta[i] + slack[i], f"{name}, {steps} steps: {float(found[i] - theta[i]):.3g} above"
                assert found[i] >= last[i] - slack[i], f"{name}, {steps} steps: fell"
            last = found
        assert torch.equal(risen(scores, counts, start, tensor, kind, 0), start.double())
        short = dict(zip(names, (theta - last).tolist(), strict=True))
        assert all(x < 1e-3 for name, x in short.items() if "normal" in name or name == "all equal"), short


# What a mask of attention leaves, in float64


class Case(NamedTuple):
    """A mask and a shape; lengths, and tuples as positions, are ``stretch`` times longer on a GPU."""

    n_q: int
    n_k: int
    batch: int = 1
    heads: int = 1
    kv_heads: int = 1
    alpha: float = 1.5
    window: int | None = None
    causal: bool = False
    slopes: tuple[Any, ...] | None = None
    positions: dict[str, tuple[int, ...]] = {}


# Two blocks of queries are a pair, for the bound of 16 queries and for the bits of 32: in an odd number of blocks the
# second has some rows (57), or none (37, 41, 70). In the causal window each of a pair sees tiles the other does not.
CASES = {
    "dense": Case(37, 150, alpha=2.0),
    "dense, grouped heads": Case(41, 70, batch=2, heads=4, kv_heads=2),
    "causal": Case(70, 70, causal=True),
    "causal, fewer queries": Case(37, 150, alpha=1.25, causal=True),
    "causal, more queries": Case(70, 37, heads=2, kv_heads=1, causal=True),
    "window": Case(57, 57, alpha=2.0, window=9),
    "causal window": Case(64, 150, window=70, causal=True),
    "padded": Case(41, 100, batch=3, alpha=1.25,
                   positions={"key_starts": (0, 21, 50), "key_lengths": (77, 100, 50)}),
    "packed": Case(57, 110, positions={"cu_seqlens_q": (0, 10, 10, 37, 52), "cu_seqlens_k": (0, 30, 41, 90, 100)}),
    "packed, causal": Case(70, 70, alpha=2.0, causal=True, positions={"cu_seqlens_q": (0, 5, 40, 70)}),
    "ALiBi": Case(37, 70, batch=2, heads=2, kv_heads=1, slopes=((0.5, 0.01), (0.05, 0.2)), causal=True),
}  # fmt: skip


class Setting(NamedTuple):
    """A case with tensors: the kernels' problem, and what float64 makes of it."""

    problem: Problem
    options: dict[str, Any]
    alpha: float
    seen: Tensor  # (B, H, N_q, N_k) bool
    scores: Tensor  # the same, -inf where not seen
    theta: Tensor  # (B, H, N_q)
    slack: Tensor  # the same, how well float32 tells a score from an edge

    @property
    def edge(self) -> Tensor:
        """(B, H, N_q) above which a score is in the support."""
        return self.theta - 1 / (self.alpha - 1)


def setting(case: str, device: str, dtype: torch.dtype = torch.float32, spread: float = 3.0, **changes: Any) -> Setting:
    """Return a case on a device."""
    n_q, n_k, batch, heads, kv_heads, alpha, window, causal, slopes, places = CASES[case]._replace(**changes)
    factor = stretch(device)
    n_q, n_k, window = factor * n_q, factor * n_k, window and factor * window
    tensors = {name: positions(device, *(factor * x for x in values)) for name, values in places.items()}
    if "cu_seqlens_q" in tensors:
        tensors.setdefault("cu_seqlens_k", tensors["cu_seqlens_q"])
    if slopes is not None:
        tensors["alibi_slopes"] = torch.tensor(slopes, device=device)
    q, k, v = random_qkv(
        device, n_q, n_k, heads=heads, kv_heads=kv_heads, batch=batch, spread=spread, dtype=dtype, seed=n_q
    )
    numbers, kind = kernel_alpha(alpha, q.device)
    reach = UNLIMITED if window is None else window - 1
    problem = Problem(q, k, v, numbers, kind, 0.25, reach, 0 if causal else reach, **tensors)
    options = {"alpha": alpha, "window": window, "causal": causal, **tensors}

    rule = AttentionMask(window=window, causal=causal, **tensors)
    seen = rule.allowed(n_q, n_k, device=device).expand(batch, heads, n_q, n_k)
    keys = k.double().repeat_interleave(heads // kv_heads, 1)
    scores = 0.25 * q.double() @ keys.mT
    terms = 0.25 * q.double().norm(dim=-1) * keys.norm(dim=-1).amax(-1, keepdim=True)
    if slopes is not None:
        bias = rule.bias(n_q, n_k, device=device, dtype=torch.float64)
        scores, terms = scores + bias, terms - bias.amin(-1)
    scores = scores.masked_fill(~seen, -math.inf)
    exact, _ = both_alphas(alpha, kind, device)
    return Setting(problem, options, exact, seen, scores, exact_theta(scores, exact), 4 * FLOAT32 * terms + 2e-6)


def bound(problem: Problem) -> Tensor:
    """Return the bound (B, H, N_q), as ``launch.column_lists`` computes it."""
    tiles = choose_column_tiles(problem.q.shape[3], problem.q.dtype)
    coarse = problem.retiled(tiles.bound)
    floor = torch.empty(problem.q.shape[:3], device=problem.q.device)
    bound_kernel[coarse.pair_grid()](coarse.inputs(), coarse.sizes(), floor, tiles.groups, **coarse.options)
    return floor


def in_blocks(x: Tensor, rows: int) -> Tensor:
    """Return (B, H, N, other) bool as (B * H, blocks, rows of a block, other); rows past the end are false."""
    x = x.flatten(0, 1)
    return torch.nn.functional.pad(x, (0, 0, 0, -x.shape[1] % rows)).unflatten(1, (-1, rows))


def shared(seen: Tensor) -> tuple[int, int]:
    """Return the range that all rows of a block (rows, other) see; those that see nothing make it empty."""
    place = torch.arange(seen.shape[1], device=seen.device)
    low = torch.where(seen, place, MAX_INT).amin(-1)
    high = torch.where(seen, place + 1, 0).amax(-1)
    return int(low.amax()), int(high.amin())


def headers(lists: Tensor, blocks: int) -> Tensor:
    """Return the headers (heads, blocks, 4) of lists (heads, numbers)."""
    return lists[:, : HEADER.value * blocks].unflatten(1, (blocks, HEADER.value))


def named(lists: Tensor, blocks: int) -> list[list[list[int]]]:
    """Return the entries of each list of each head; all must be there, and lie in the pool."""
    found: list[list[list[int]]] = []
    for numbers in lists.tolist():
        pool = numbers[HEADER.value * blocks :]
        found.append([])
        for block in range(blocks):
            count, _, _, start = numbers[HEADER.value * block :][: HEADER.value]
            assert count == 0 or (count > 0 and 0 <= start <= len(pool) - count)
            found[-1].append(pool[start : start + count] if count else [])
    return found


def names(lists: Tensor, blocks: int, n: int) -> Tensor:
    """Return which of n rows each list of (heads, numbers) names, (heads, blocks, n); all lists must be there."""
    found = torch.zeros(lists.shape[0], blocks, n, dtype=torch.bool)
    for head, of_head in enumerate(named(lists, blocks)):
        for block, entries in enumerate(of_head):
            found[head, block, entries] = True
    return found.to(lists.device)


def tiles_met(seen: Tensor, tile: int) -> tuple[int, int]:
    """Return the first tile and the one past the last that the rows of a block (rows, other) see."""
    met = seen.any(0).nonzero().flatten().tolist()
    return (met[0] // tile, met[-1] // tile + 1) if met else (0, 0)


def span(seen: Tensor, tile: int, words: int) -> int:
    """Return how many words of bits those tiles have, of all the ``words``."""
    first, last = tiles_met(seen, tile)
    return min(last * tile // WORD, words) - first * tile // WORD


def shares(wanted: list[int], pool: int) -> tuple[list[int], list[int]]:
    """Return how long the lists of a head may be, in order of blocks, and where they start.

    Each starts where the ones before it would end, whether or not they fit; none fits after one that does not.

    Args:
        wanted: lengths; -1 for no list.
        pool: entries of a head.
    """
    counts, starts, taken = [], [], 0
    for count in wanted:
        starts.append(taken)
        taken += max(count, 0)
        counts.append(count if taken <= pool else -1)
    return counts, starts


def too_dense(entries: int, words: int) -> bool:
    """Tell whether a list has more entries than what DENSEST says of the rows of these words; without roundings."""
    return entries > Fraction(launch.DENSEST).limit_denominator(10**4) * WORD * words


def check_lists(lists: Tensor, expected: list[list[list[int]]], seen: Tensor, tile: int, words: int) -> Tensor:
    """Compare lists (heads, numbers) with the entries that they must have, as far as they are not too dense and fit.

    Args:
        expected: by head and block.
        seen: (heads, blocks, rows of a block, other), what rows see.
        tile: of the other side, in rows.
        words: of a block's bits.

    Returns:
        Which numbers are to be there, a mask of ``lists``; the others are those that nobody has written.
    """
    seen, written = seen.cpu(), torch.zeros(lists.shape, dtype=torch.bool)
    heads, blocks = seen.shape[:2]
    pool = lists.shape[1] - HEADER.value * blocks
    written[:, : HEADER.value * blocks] = True
    assert len(expected) == lists.shape[0] == heads and all(len(x) == blocks for x in expected)
    for head, numbers in enumerate(lists.tolist()):
        wanted = [
            -1 if too_dense(len(entries), span(seen[head, block], tile, words)) else len(entries)
            for block, entries in enumerate(expected[head])
        ]
        counts, starts = shares(wanted, pool)
        for block, entries in enumerate(expected[head]):
            count, below, inner, start = numbers[HEADER.value * block :][: HEADER.value]
            where = f"head {head}, block {block}"
            assert count == counts[block], f"{where}: {count} entries, {counts[block]} expected"
            low, high = shared(seen[head, block])
            assert below == sum(x < low for x in entries), where
            assert inner == sum(x < high for x in entries), where
            if count >= 0:
                assert start == starts[block], where
                place = HEADER.value * blocks + start
                assert numbers[place : place + count] == entries, where
                written[head, place : place + count] = True
    return written.to(lists.device)


def overflowed(compactions: list[Compaction], keys: bool) -> Tensor:
    """Return which of all blocks are left without a list of keys (of queries), (B * H, blocks)."""
    return torch.cat([x.counts for x in compactions if x.keys is keys]) < 0


def limit_some(
    monkeypatch: pytest.MonkeyPatch, at: Setting, compactions: list[Compaction], name: str, sides: tuple[bool, ...]
) -> None:
    """Set DENSEST or ENTRIES so that about half of the blocks have a list of keys, and forget what was overheard.

    Args:
        compactions: of a call without limits.
        sides: of which kinds of lists, of keys or of queries, there are to be some and some not.
    """
    tiles, wanted = (at.problem.tiles.block_m, at.problem.tiles.block_n), []
    for keys in sides:
        own, other = reversed(tiles) if keys else tiles
        seen = in_blocks(at.seen.mT if keys else at.seen, own).cpu()
        words = next(x.bits.shape[2] for x in compactions if x.keys is keys)
        spans = [[span(x, other, words) for x in of_head] for of_head in seen]
        counts = torch.cat([x.counts for x in compactions if x.keys is keys]).tolist()
        assert min(map(min, counts)) >= 0
        wanted.append((counts, spans, seen.shape[3]))
    most = max(map(max, wanted[0][0]))
    found = {}
    for value in [i / 50 for i in range(1, 50)] if name == "DENSEST" else range(1, most, 1 + most // 50):
        monkeypatch.setattr(launch, name, value)
        over = []
        for counts, spans, n in wanted:
            left = [
                shares([-1 if too_dense(*x) else x[0] for x in zip(a, b, strict=True)], len(a) * min(launch.ENTRIES, n))
                for a, b in zip(counts, spans, strict=True)
            ]
            over.append([x < 0 for of_head, _ in left for x in of_head])
        if all(any(x) and not all(x) for x in over):
            found[value] = abs(sum(over[0]) / len(over[0]) - 0.5)
    monkeypatch.setattr(launch, name, min(found, key=lambda x: found[x]))
    compactions.clear()


# The bound


@pytest.mark.parametrize("dtype", HALF_TOO)
@pytest.mark.parametrize("case", CASES)
def test_the_bound_is_below_theta(device, case, dtype):
    """And so close that few more keys pass it than theta itself."""
    at = setting(case, device, dtype, spread=1.0)
    empty = ~at.seen.any(-1)
    floor = bound(at.problem)
    assert torch.equal(floor == math.inf, empty)
    assert (floor.double() <= at.theta + at.slack)[~empty].all()
    edge = floor.double() - 1 / (at.alpha - 1)
    above, passing = (
        in_blocks(at.scores > x[..., None], at.problem.tiles.block_m).any(2).sum() for x in (at.edge, edge)
    )
    assert above <= passing + 2 and passing <= 1.25 * above


def test_each_head_has_its_own_alpha(device, monkeypatch):
    """The first is the largest: with it the others' lists would be too short, with theirs its own too long."""
    monkeypatch.setattr(launch, "DENSEST", ANY)
    alphas = torch.tensor([2.0, 1.5, 1.1], device=device)
    q, k, v = random_qkv(device, 18 * stretch(device), 60 * stretch(device), heads=3, spread=3.0)
    problem = Problem(q, k, v, alphas, GENERAL, 0.25)
    scores = 0.25 * q.double() @ k.double().mT
    exact = alphas.double().tolist()
    theta = torch.stack([exact_theta(scores[:, h], exact[h]) for h in range(3)], 1)
    assert (bound(problem).double() <= theta + 1e-5).all()
    edge = theta - 1 / (alphas.double()[:, None] - 1)
    must = in_blocks(scores > (edge + 1e-5)[..., None], problem.tiles.block_m).any(2)
    found = names(launch.column_lists(problem)[1], problem.query_blocks, k.shape[2])
    assert not (must & ~found).any()
    assert (found.sum((1, 2)) <= 1.25 * must.sum((1, 2))).all()


HARD = [(1.1, GENERAL), (1.5, "1.5"), (1.9, GENERAL), (2.0, "2")]


@pytest.mark.parametrize(("alpha", "kind"), HARD)
def test_hard_rows_have_their_support_listed(device, monkeypatch, alpha, kind):
    """Scores of all kinds, as many rows as a pair of blocks has; no bound is above theta, and no weight left out.

    Theta is the root, whether the solve walks the list or, of lists that are all too dense, all tiles.
    """
    monkeypatch.setattr(launch, "DENSEST", ANY)
    exact, tensor = both_alphas(alpha, kind, device)
    rows = hard_rows(90 * stretch(device), exact)
    scores, labels = stacked({name: x for name, x in rows.items() if x.isfinite().all()}, "cpu")
    pair = 2 * choose_column_tiles(16, torch.float32).bound.block_m
    assert len(scores) <= pair
    scores = scores.repeat(pair, 1)[:pair][None].to(device)
    problem = computed(scores, tensor, kind)
    theta, slack = exact_theta(scores, exact), resolution(scores)
    assert (bound(problem)[0].double() <= theta + slack).all()
    support = scores.double() > (theta - 1 / (exact - 1) + slack)[..., None]
    solved, lists = launch.column_lists(problem)
    found = names(lists, problem.query_blocks, scores.shape[-1])
    assert not (in_blocks(support[None], problem.tiles.block_m).any(2) & ~found).any()
    labels = [labels[i % len(labels)] for i in range(pair)]
    check_theta(solved.flatten(), scores[0], exact, labels)
    monkeypatch.setattr(launch, "DENSEST", 0.0)
    solved, lists = launch.column_lists(problem)
    assert (headers(lists, problem.query_blocks)[..., 0] == -1).all()
    check_theta(solved.flatten(), scores[0], exact, labels)


# The lists


@pytest.mark.parametrize("dtype", HALF_TOO)
@pytest.mark.parametrize("case", CASES)
def test_lists_hold_what_passes_the_bound(device, monkeypatch, case, dtype):
    """All of the support, every other key above the bound and no further one; ascending, none twice, none unseen.

    Then the same of those lists that the usual DENSEST leaves, with room for about half of what they want.
    """
    usual = launch.DENSEST
    monkeypatch.setattr(launch, "DENSEST", ANY)
    at = setting(case, device, dtype)
    (rows, tile), n_k = (at.problem.tiles.block_m, at.problem.tiles.block_n), at.problem.k.shape[2]
    theta, lists = launch.column_lists(at.problem)
    empty = ~at.seen.any(-1)

    def check_found(theta: Tensor) -> None:
        assert torch.equal(theta == math.inf, empty)
        assert ((theta.double() - at.theta).abs() <= at.slack)[~empty].all()

    check_found(theta)
    seen = in_blocks(at.seen, rows)
    passed = bound(at.problem).double() - 1 / (at.alpha - 1)
    margin = at.slack + 1e-6 * (1 + passed.nan_to_num(posinf=0).abs())
    must, may = (
        in_blocks(at.seen & (at.scores > edge[..., None]), rows).any(2)
        for edge in (torch.minimum(passed, at.edge) + at.slack, passed - margin)
    )
    (heads, blocks), words = must.shape[:2], triton.cdiv(n_k, WORD)
    assert lists.shape == (heads, launch.column_list_size(blocks, n_k)) and lists.dtype == torch.int32
    assert must.any() and may.sum() <= must.sum() + 2
    entries = named(lists, blocks)
    for head in range(heads):
        for block in range(blocks):
            found = entries[head][block]
            unseen = [x for x in found if not (0 <= x < n_k and seen[head, block, :, x].any())]
            assert not unseen, f"head {head}, block {block}: {len(unseen)} of {len(found)} entries not seen"
    check_lists(lists, [[sorted(set(x)) for x in of_head] for of_head in entries], seen, tile, words)
    found = names(lists, blocks, n_k)
    assert not (must & ~found).any() and not (found & ~may).any()

    monkeypatch.setattr(launch, "DENSEST", usual)
    monkeypatch.setattr(launch, "ENTRIES", max(1, sum(map(len, entries[0])) // (2 * blocks)))
    theta, lists = launch.column_lists(replace(at.problem))  # a problem keeps its sizes
    assert lists.shape == (heads, blocks * (HEADER.value + launch.ENTRIES))
    check_lists(lists, entries, seen, tile, words)
    check_found(theta)


def test_rows_that_are_not_there_mark_no_key(device, monkeypatch):
    """Nor do those that see no key: of a first block, of half the second, and past the end of the last."""
    monkeypatch.setattr(launch, "DENSEST", ANY)
    rows = launch.choose_tiles(16, torch.float32).block_m
    n_q, blind = 3 * rows + 3, rows + rows // 2
    n_k = n_q - blind
    query, key = torch.arange(n_q)[:, None], torch.arange(n_k)
    scores = torch.where(key == query - blind, 30.0, 0.0)[None]  # each query uses the last key that it sees alone
    problem = replace(computed(scores.to(device), torch.full((1,), 1.5, device=device), "1.5"), right=0)
    assert (problem.tiles.block_m, problem.query_blocks) == (rows, 4)
    expected = [[x - blind for x in range(start, min(start + rows, n_q)) if x >= blind]
                for start in range(0, n_q, rows)]  # fmt: skip
    assert [len(x) for x in expected] == [0, rows // 2, rows, 3]
    theta, lists = launch.column_lists(problem)
    assert torch.equal(theta[0, 0] == math.inf, torch.arange(n_q, device=device) < blind)
    seen = in_blocks((key <= query - blind)[None, None], rows)
    check_lists(lists, [expected], seen, problem.tiles.block_n, triton.cdiv(n_k, WORD))


@pytest.mark.parametrize("limit", [None, "DENSEST", "ENTRIES"])
def test_garbage_is_never_read(device, garbage, monkeypatch, compactions, limit):
    """Neither entries past a list's end nor bits of keys that no program sees."""
    monkeypatch.setattr(launch, "DENSEST", ANY)
    at = setting("packed", device)
    run = functools.partial(columns, **at.options)
    upstream = torch.randn(at.problem.q.shape, device=device)
    inputs = (at.problem.q, at.problem.k, at.problem.v)
    expected = gradients(run, inputs, upstream)
    if limit is not None:
        limit_some(monkeypatch, at, compactions, limit, (False,))
        expected = gradients(run, inputs, upstream)
    over = overflowed(compactions, False)
    assert over.any() == (limit is not None) and not over.all()
    for entry, word in ((2**30 - 1, 0), (-1, 0b1010)):
        garbage(entry, word)
        assert all(map(torch.equal, gradients(run, inputs, upstream), expected))


# Compaction alone


def packed(flags: Tensor) -> Tensor:
    """Return bits (..., words * 16) bool as (..., words) int16, lowest first."""
    value = (flags.unflatten(-1, (-1, WORD)).long() << torch.arange(WORD, device=flags.device)).sum(-1)
    return torch.where(value >= 2**15, value - 2**16, value).to(torch.int16)


def unpacked(words: Tensor) -> Tensor:
    """Return the bits of (..., words) int16, lowest first, as (..., words * 16) bool."""
    return (words.int()[..., None] >> torch.arange(WORD, device=words.device) & 1).flatten(-2).bool()


def test_packing_by_hand(device):
    """The two helpers that the tests around rest on."""
    flags = torch.rand(2, 3, 5 * WORD, generator=torch.Generator().manual_seed(0)).to(device) < 0.3
    assert torch.equal(unpacked(packed(flags)), flags)
    expected = torch.arange(32) == torch.tensor([[3], [31]])
    assert torch.equal(unpacked(torch.tensor([[8, 0], [0, -(2**15)]], dtype=torch.int16)), expected)


FEW = 35 if launch.INTERPRETED else 150
MANY = 530 if launch.INTERPRETED else 33000  # rows, for more blocks than are given their share at once
COMPACTED = {  # rows of blocks, and of entries, on either side of chunks of 256 words: 4096 rows
    "dense": (FEW, 5000, {}),
    "two chunks": (FEW, 8192, {}),
    "causal": (FEW, 4500, {"right": 0}),
    "window": (FEW, 4500, {"left": 4150, "right": 30}),
    "padded": (FEW, 4500, {"key_starts": (0, 11), "key_lengths": (30, 4400)}),
    "short": (FEW, 45, {"left": 19}),
    "many blocks": (MANY, 75, {"left": MANY - 50, "right": MANY - 50}),
}
MIXED = (0.5, 0.8, 0.05, 0.62, 0.72)


class Frame(NamedTuple):
    """What two heads' bits are of, the second head of a sequence and the first of the next."""

    problem: Problem
    keys: bool
    seen: Tensor  # (heads, blocks, rows of a block, other) bool
    tile: int  # of the other side
    words: int

    @classmethod
    def of(cls, device: str, mask: str, keys: bool) -> Frame:
        few, n, options = COMPACTED[mask]
        n_q, n_k = (n, few) if keys else (few, n)
        q, k = torch.zeros(2, 2, n_q, 1, device=device), torch.zeros(2, 1, n_k, 1, device=device)
        tensors = {name: positions(device, *x) for name, x in options.items() if isinstance(x, tuple)}
        reach = {"left": UNLIMITED, "right": UNLIMITED} | {x: y for x, y in options.items() if isinstance(y, int)}
        problem = Problem(q, k, k, torch.full((1,), 1.5, device=device), "1.5", 1.0, **reach, **tensors)
        query, key = torch.arange(n_q)[:, None] + n_k - n_q, torch.arange(n_k)
        seen = ((query - key <= reach["left"]) & (key - query <= reach["right"])).expand(2, 1, n_q, n_k)
        if tensors:
            start, end = (torch.tensor(options[x])[:, None, None, None] for x in ("key_starts", "key_lengths"))
            seen = seen & (key >= start) & (key < end)
        own, other = problem.tiles.block_m, problem.tiles.block_n
        if keys:
            own, other = other, own
        words = triton.cdiv(n, 32) * 2 if keys else triton.cdiv(n, WORD)  # as the bits of queries are made and viewed
        return cls(problem, keys, in_blocks(seen.mT if keys else seen, own), other, words)

    def entries(self, flags: Tensor) -> list[list[list[int]]]:
        """Return by head and block which of the bits (heads, blocks, words * 16) are the block's own to see."""
        expected: list[list[list[int]]] = []
        for flags_of_head, seen_of_head in zip(flags, self.seen, strict=True):
            expected.append([])
            for own, seen in zip(flags_of_head, seen_of_head, strict=True):
                first, last = (x * self.tile for x in tiles_met(seen, self.tile))
                expected[-1].append([first + x for x in own[first:last].nonzero().flatten().tolist()])
        return expected

    def allowed(self, expected: list[list[list[int]]]) -> Tensor:
        """Return (heads, blocks) how many entries they have where there is room, -1 if they are too dense."""
        spans = [[span(x, self.tile, self.words) for x in of_head] for of_head in self.seen]
        return torch.tensor([
            [-1 if too_dense(len(x), words) else len(x) for x, words in zip(*y, strict=True)]
            for y in zip(expected, spans, strict=True)
        ])  # fmt: skip

    def check(self, flags: Tensor, expected: list[list[list[int]]], pool: int) -> Tensor:
        """Compact into lists with room for so many entries; return (heads, blocks) how many they have, or -1."""
        heads, blocks = self.seen.shape[:2]
        pitch = HEADER.value * blocks + pool
        guarded = torch.full((heads * pitch + 8,), -5, dtype=torch.int32, device=self.problem.q.device)
        lists = guarded[:-8].view(heads, pitch)
        launch._compact(self.problem, packed(flags).to(lists.device), lists, 1, self.keys)
        written = check_lists(lists, expected, self.seen, self.tile, self.words)
        assert (lists[~written] == -5).all() and (guarded[-8:] == -5).all()
        return headers(lists, blocks)[..., 0].cpu()


@pytest.mark.parametrize("keys", [False, True], ids=["lists of keys", "lists of queries"])
@pytest.mark.parametrize(
    ("mask", "share"),
    [
        ("dense", (0.5, 0.0, 1.0)),
        ("two chunks", (1.0, 0.5, 0.01)),
        ("causal", MIXED),
        ("window", (0.5,)),
        ("padded", (0.01, 0.5, 0.0)),
        ("short", MIXED),
        ("many blocks", MIXED),
    ],
)
def test_compaction(device, monkeypatch, mask, share, keys):
    """Against loops in Python, with bits everywhere: those outside the tiles that a block sees are not its own.

    There is room for all entries of a head but one; for exactly those that are not too dense; and for half of them.
    """
    frame, usual = Frame.of(device, mask, keys), launch.DENSEST
    heads, blocks = frame.seen.shape[:2]
    shares = torch.tensor([share[i % len(share)] for i in range(blocks)])[:, None]
    flags = torch.rand(heads, blocks, frame.words * WORD, generator=torch.Generator().manual_seed(blocks)) < shares
    expected = frame.entries(flags)
    most = max(sum(map(len, x)) for x in expected)
    if mask != "many blocks":
        monkeypatch.setattr(launch, "DENSEST", ANY)
        counts = frame.check(flags, expected, max(most - 1, 0))
        assert (counts < 0).any() == (most > 0) and (blocks == 1 or (counts >= 0).any())
        monkeypatch.setattr(launch, "DENSEST", usual)
        allowed = frame.allowed(expected)
        assert torch.equal(frame.check(flags, expected, int(allowed.clamp_min(0).sum(1).amax())), allowed)
    if share == MIXED:
        allowed = frame.allowed(expected)
        assert (allowed < 0).any() and (allowed > 0).any()
        pool = max(int(allowed[0].clamp_min(0).sum()) // 2, int(allowed[:, 0].amax()))
        counts = frame.check(flags, expected, pool)
        assert (counts > 0).any() and (counts < allowed).any()


@pytest.mark.parametrize("keys", [False, True], ids=["lists of keys", "lists of queries"])
@pytest.mark.parametrize("mask", ["short", "padded"])
def test_how_dense_is_too_dense(device, mask, keys):
    """More than two thirds of the rows that a block's words stand for: those of tiles that it sees, the last in full.

    All bits outside are set, and do not count.
    """
    assert launch.DENSEST == 2 / 3
    frame = Frame.of(device, mask, keys)
    generator = torch.Generator().manual_seed(0)
    heads, blocks = frame.seen.shape[:2]
    rows = torch.zeros(heads, blocks, dtype=torch.int64)
    for more in (-1, 0, 1):
        flags = torch.ones(heads, blocks, frame.words * WORD, dtype=torch.bool)
        for head in range(heads):
            for block in range(blocks):
                first = tiles_met(frame.seen[head, block], frame.tile)[0] * frame.tile
                n = rows[head, block] = WORD * span(frame.seen[head, block], frame.tile, frame.words)
                flags[head, block, first : first + n] = torch.randperm(int(n), generator=generator) < 2 * n // 3 + more
        counts = frame.check(flags, frame.entries(flags), int(rows.sum()))
        assert torch.equal(counts, torch.where(rows == 0, 0, -1 if more > 0 else 2 * rows // 3 + more))


def test_shares(device):
    """Room goes to blocks in their order, 32 at once here; to none after one that found too little."""
    generator = torch.Generator().manual_seed(0)
    wanted = torch.randint(-1, 40, (5, 150), generator=generator)
    wanted[1, 40:] = 0  # an empty list needs no room, unless it comes after one that found too little
    wanted[2, ::2] = -1
    wanted[3] = 2**25  # whose sum no 32 bits hold
    wanted[4, :32], wanted[4, 32:64], wanted[4, 64:] = 10, -1, 7
    sums = wanted.clamp_min(0).sum(1)
    for blocks in (1, 31, 32, 33, 64, 150):
        some = int(wanted[0, : blocks // 2].clamp_min(0).sum())
        for pool in {0, some, max(0, some - 1), 320, int(sums[2]), 10**6}:
            lists = torch.full((5, HEADER.value * blocks + 3), -5, dtype=torch.int32, device=device)
            headers(lists, blocks)[..., 0] = wanted[:, :blocks].to(device)
            share_kernel[(5,)](lists, blocks, lists.shape[1], pool, 32, num_warps=4)
            found = headers(lists, blocks)
            assert (found[..., 1:3] == -5).all() and (lists[:, -3:] == -5).all()
            for head in range(5):
                counts, starts = shares(wanted[head, :blocks].tolist(), pool)
                assert found[head, :, 0].tolist() == counts
                listed = [i for i, count in enumerate(counts) if count >= 0]
                assert [found[head, i, 3].item() for i in listed] == [starts[i] for i in listed]


# Blocks without a list


OVERFLOWING = {
    "causal": {},
    "window": {"alpha": 2.0},
    "packed": {"alpha": 1.25},
    "dense, grouped heads": {"n_q": 19, "n_k": 40, "batch": 1},
    "ALiBi": {"n_q": 19, "n_k": 40},
}
LIMITS = {"no room": ("ENTRIES", 0), "too dense": ("DENSEST", 0.0)}


@pytest.mark.parametrize(
    ("case", "limit", "learned"),
    [
        *((case, [*LIMITS][i % 2], False) for i, case in enumerate(OVERFLOWING)),
        ("causal", "too dense", True),
        ("ALiBi", "too dense", True),
    ],
)
def test_overflow_is_exact(device, monkeypatch, compactions, case, limit, learned):
    """No block with a list, so that each visits all tiles, forward and backward."""
    monkeypatch.setattr(launch, *LIMITS[limit])
    at = setting(case, device, spread=1.0, **OVERFLOWING[case])
    options = at.options
    if learned:
        alpha = torch.tensor(1.4) if case == "causal" else torch.linspace(1.2, 1.9, at.problem.q.shape[1])
        options = options | {"alpha": alpha.to(device).requires_grad_()}
    check_against_oracle(columns, plain("columns"), at.problem.q, at.problem.k, at.problem.v, **options)
    for x in compactions:
        assert (x.counts <= 0).all() and (x.counts < 0).any(-1).all()
    assert overflowed(compactions, False).float().mean() > 0.8 and overflowed(compactions, True).any()


@pytest.mark.parametrize(
    ("case", "limit", "learned"),
    [("window", "DENSEST", False), ("packed", "ENTRIES", False), ("ALiBi", "ENTRIES", True)],
)
def test_lists_and_overflow_are_exact(device, monkeypatch, compactions, case, limit, learned):
    """Some blocks with a list and some without, of keys and of queries."""
    monkeypatch.setattr(launch, "DENSEST", ANY)
    at = setting(case, device, **(OVERFLOWING[case] | ({"n_q": 37} if case == "ALiBi" else {})))
    options, inputs = at.options, (at.problem.q, at.problem.k, at.problem.v)
    if learned:
        alpha = torch.linspace(1.2, 1.9, at.problem.q.shape[1])
        options = options | {"alpha": alpha.to(device).requires_grad_()}
    gradients(functools.partial(columns, **options), inputs, at.problem.q)
    limit_some(monkeypatch, at, compactions, limit, (False, True))
    check_against_oracle(columns, plain("columns"), *inputs, **options)
    for keys in (False, True):
        over = overflowed(compactions, keys)
        assert over.any() and not over.all()


@pytest.mark.parametrize(
    ("case", "limit"), [("causal", "room"), ("causal", "density"), ("dense, grouped heads", "both")]
)
def test_some_lists_overflow(device, monkeypatch, compactions, case, limit):
    """Blocks that still have a list have the same one and give the same bits; the others stay exact."""
    monkeypatch.setattr(launch, "DENSEST", ANY)
    changes = {"heads": 2, "alpha": 1.25} if case == "causal" else {"batch": 1, "heads": 2, "kv_heads": 1, "alpha": 2.0}
    at = setting(case, device, n_q=37, n_k=52, **changes)
    inputs = (at.problem.q, at.problem.k, at.problem.v)
    upstream = torch.randn(at.problem.q.shape, generator=torch.Generator().manual_seed(1)).to(device)
    run = functools.partial(columns, **at.options)
    long = gradients(run, inputs, upstream)
    (rows, tile), words = (at.problem.tiles.block_m, at.problem.tiles.block_n), triton.cdiv(inputs[1].shape[2], WORD)
    (lists,) = (x.lists for x in compactions if not x.keys)
    entries, seen = named(lists, at.problem.query_blocks), in_blocks(at.seen, rows)
    blocks = [(len(entries[i][j]), span(seen[i, j], tile, words)) for i in range(2) for j in range(seen.shape[1])]
    if limit != "room":
        shares = sorted({count / (WORD * space) for count, space in blocks})
        middle = len(shares) // 2
        monkeypatch.setattr(launch, "DENSEST", (shares[middle - 1] + shares[middle]) / 2)
    if limit != "density":
        first = next(count for count, space in blocks if not too_dense(count, space))  # finds room at the least
        first = triton.cdiv(first, seen.shape[1])
        total = sum(count for count, space in blocks if not too_dense(count, space))
        monkeypatch.setattr(launch, "ENTRIES", max(first, int(0.7 * total / len(blocks))))
    compactions.clear()
    short = gradients(run, inputs, upstream)
    (lists,) = (x.lists for x in compactions if not x.keys)
    check_lists(lists, entries, seen, tile, words)
    over = overflowed(compactions, False)
    assert over.any() and not over.all()
    kept = ~over.repeat_interleave(rows, 1)[:, : at.problem.q.shape[2]]
    for a, b in zip(short[:2], long[:2], strict=True):
        assert torch.equal(a.flatten(0, 1)[kept], b.flatten(0, 1)[kept])
    assert all(map(torch.equal, gradients(run, inputs, upstream), short))  # the same bits again
    check_against_oracle(columns, plain("columns"), *inputs, **at.options)


# Heads in chunks


def test_chunks_of_heads_change_nothing(device, monkeypatch, compactions):
    """One group of heads a launch, three groups and the rest, or all at once: the same bits. A chunk ends in a batch.

    Everything that goes by head or by sequence is there.
    """
    n_q, n_k = 17 * stretch(device), 23 * stretch(device)
    q, k, v = random_qkv(device, n_q, n_k, heads=4, kv_heads=2, batch=2, spread=2.0)
    alpha = torch.tensor([1.2, 1.5, 1.8, 2.0], device=device)
    slopes = torch.tensor([[0.5, 0.25, 0.1, 0.0], [0.2, 0.0, 0.3, 0.1]], device=device) / stretch(device)
    options = {"alibi_slopes": slopes, "key_lengths": positions(device, n_k, n_k // 2), "causal": True}
    inputs, upstream = (q, k, v, alpha), torch.randn(q.shape, device=device)

    def run(q: Tensor, k: Tensor, v: Tensor, alpha: Tensor) -> Tensor:
        return columns(q, k, v, alpha=alpha, **options)

    def chunks(keys: bool) -> list[tuple[int, int]]:
        return [(x.first_head, x.lists.shape[0]) for x in compactions if x.keys is keys]

    expected = gradients(run, inputs, upstream)
    whole, alone, uneven = [(0, 8)], [(0, 2), (2, 2), (4, 2), (6, 2)], [(0, 6), (6, 2)]
    assert chunks(False) == chunks(True) == whole
    each = [next(x.bits[0].nbytes + keys * x.lists[0].nbytes for x in compactions if x.keys is keys)
            for keys in (False, True)]  # fmt: skip
    for space, of_keys, of_queries in ((6 * each[0], uneven, alone), (6 * each[1], whole, uneven)):
        compactions.clear()
        monkeypatch.setattr(launch, "WORKSPACE", space)
        assert all(map(torch.equal, gradients(run, inputs, upstream), expected))
        assert chunks(False) == of_keys and chunks(True) == of_queries
    compactions.clear()
    monkeypatch.setattr(launch, "WORKSPACE", 1)
    assert torch.equal(run(*inputs), expected[0]) and chunks(False) == alone


# Scores of any size


@pytest.mark.parametrize(
    ("spread", "densest"), [(0.01, launch.DENSEST), (0.01, ANY), (1000.0, launch.DENSEST)],
)  # fmt: skip
@pytest.mark.parametrize("alpha", [1.4, 2.0])
def test_score_scales(device, monkeypatch, spread, densest, alpha):
    monkeypatch.setattr(launch, "DENSEST", densest)
    qkv = random_qkv(device, 32 * stretch(device), 110 * stretch(device), spread=spread)
    check_against_oracle(columns, plain("columns"), *qkv, alpha=alpha)


# The queries that use a key


@pytest.mark.parametrize("dtype", HALF_TOO)
@pytest.mark.parametrize(
    ("case", "limit"),
    [
        *((case, None) for case in ("causal, fewer queries", "packed", "dense, grouped heads")),
        ("causal, fewer queries", "ENTRIES"),
        ("packed", "DENSEST"),
        ("dense, grouped heads", "ENTRIES"),
    ],
)
def test_queries_that_use_a_block_of_keys(device, monkeypatch, compactions, case, limit, dtype):
    """All queries with a weight on one of its keys and no others, whether lists or tiles were walked."""
    changes = {"n_q": 41, "n_k": 40, "batch": 1} if case.endswith("heads") else {}
    at = setting(case, device, dtype, **changes)
    monkeypatch.setattr(launch, "DENSEST", ANY)
    run, inputs = functools.partial(columns, **at.options), (at.problem.q, at.problem.k, at.problem.v)
    gradients(run, inputs, at.problem.q)
    if limit is not None:
        limit_some(monkeypatch, at, compactions, limit, (False,))
        gradients(run, inputs, at.problem.q)
    over = overflowed(compactions, False)
    assert over.any() == (limit is not None) and not over.all()
    keys = at.problem.tiles.block_n
    must, may = (
        in_blocks((at.seen & (at.scores > (at.edge + slack)[..., None])).mT, keys).any(2)
        for slack in (at.slack, -at.slack)
    )
    assert 0 < must.sum() < 0.9 * must.numel() and may.sum() <= must.sum() + 2
    bits, lists = (torch.cat([getattr(x, name) for x in compactions if x.keys]) for name in ("bits", "lists"))
    n_q = at.problem.q.shape[2]
    assert lists.shape == (at.problem.heads, launch.column_list_size(at.problem.key_blocks, n_q))
    used = unpacked(bits)
    assert not used[..., n_q:].any()
    used = used[..., :n_q]
    assert not (must & ~used).any() and not (used & ~may).any()
    expected = [[x.nonzero().flatten().tolist() for x in of_head] for of_head in used]
    check_lists(lists, expected, in_blocks(at.seen.mT, keys), at.problem.tiles.block_m, bits.shape[2])


# Numbers that are none, and ties


@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")  # NumPy's, on the way to NaN
@pytest.mark.usefixtures("maximum_drops_nan")
@pytest.mark.parametrize(
    ("alpha", "densest", "entries", "place"),
    [(1.3, launch.DENSEST, 2560, "inside"), (1.3, ANY, 2560, "late"), (1.5, ANY, 2560, "first"), (2.0, ANY, 4, "late"),
     (2.0, 0.0, 2560, "inside")],
)  # fmt: skip
def test_bad_scores_reach_the_same_rows_as_ever(device, monkeypatch, alpha, densest, entries, place):
    """A NaN or an infinity in K, wherever it is, and a NaN in Q; each in a head of its own."""
    n_q, n_k = 32 * stretch(device), 90 * stretch(device)
    q, k, v = random_qkv(device, n_q, n_k, heads=3)
    tile = choose_column_tiles(16, torch.float32).bound.block_n
    bad = {"first": 0, "inside": tile + 3, "late": n_k - n_q // 2}[place]  # in a tile without a mask, and with one
    k[0, 0, bad, 3], k[0, 1, bad, 3], q[0, 2, 5, 3] = math.nan, math.inf, math.nan
    options = {"alpha": alpha, "causal": True}
    expected = bind("adasplash")(q, k, v, **options)
    monkeypatch.setattr(launch, "DENSEST", densest)
    monkeypatch.setattr(launch, "ENTRIES", entries)
    found = columns(q, k, v, **options)
    sees = torch.arange(n_q, device=device) + n_k - n_q >= bad
    reached = torch.zeros(3, n_q, dtype=torch.bool, device=device)
    reached[0], reached[1], reached[2, 5] = sees, sees & (q[0, 1, :, 3] > 0), True
    assert torch.equal(found[0].isnan().all(-1), reached) and torch.equal(found[0].isnan().any(-1), reached)
    assert 0 < reached[1].sum() < n_q
    torch.testing.assert_close(found, expected, equal_nan=True)


@pytest.mark.parametrize(("densest", "entries"), [(ANY, 2560), (launch.DENSEST, 2560), (ANY, 8)])
@pytest.mark.parametrize("alpha", [1.25, 1.5, 2.0])
def test_ties_are_all_listed(device, monkeypatch, compactions, alpha, densest, entries):
    """Equal keys have equal weights: every list is full or left out, and the output is the mean of the values."""
    monkeypatch.setattr(launch, "DENSEST", densest)
    monkeypatch.setattr(launch, "ENTRIES", entries)
    n_k = 45 * stretch(device)
    q, k, v = random_qkv(device, 18 * stretch(device), n_k)
    k = k[:, :, :1].expand_as(k).contiguous()
    check_against_oracle(columns, plain("columns"), q, k, v, alpha=alpha)
    torch.testing.assert_close(columns(q, k, v, alpha=alpha), v.mean(2, keepdim=True).expand_as(q))
    listed = torch.cat([x.counts for x in compactions if not x.keys])
    assert (listed == (n_k if (densest, entries) == (ANY, 2560) else -1)).all()


# Calls without lists


@pytest.fixture
def no_lists(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let making a list fail."""

    def fail(*args: Any, **options: Any) -> None:
        raise AssertionError("a list was made")

    monkeypatch.setattr(launch, "_compact", fail)


@pytest.mark.usefixtures("no_lists")
def test_softmax_makes_no_list(device):
    q, k, v = random_qkv(device, 18 * stretch(device), 40 * stretch(device), heads=2, kv_heads=1)
    check_against_oracle(columns, plain("columns"), q, k, v, alpha=1.0, causal=True)
    assert forward_op(*op_arguments(q, k, v, "columns", alpha=1.0))[3].numel() == 0
    with pytest.raises(AssertionError, match="a list was made"):  # the fixture does what it says
        columns(q, k, v)


@pytest.mark.usefixtures("no_lists")
@pytest.mark.parametrize("alpha", [1.0, 1.3, 1.5, 2.0])
def test_decoding_makes_no_list(device, alpha):
    q, k, v = random_qkv(device, 2, 1100 if device == "cuda" else 70, heads=2, kv_heads=1)
    check_against_oracle(columns, plain("columns"), q, k, v, alpha=alpha, causal=True, forward_only=True)


@pytest.mark.usefixtures("no_lists")
@pytest.mark.parametrize("alpha", [1.0, 1.3, 1.5, 2.0])
def test_rows_of_scores_make_no_list(device, alpha):
    check_rowwise("columns", random_scores(device, 4, 70 * stretch(device)), alpha)
    x = random_scores(device, 2, 30)
    assert torch.equal(entmax(x, alpha, method="columns"), entmax(x, alpha, method="adasplash_nomask"))


# Sizes


@pytest.mark.parametrize("entries", [0, 100, 2560])
def test_column_list_size(monkeypatch, entries):
    """A header a block, and a pool that has room for every row or for so many a block."""
    monkeypatch.setattr(launch, "ENTRIES", entries)
    for blocks in (1, 3, 100):
        for n in (0, 1, 99, 100, 101, 2559, 2560, 2561, 10**6):
            assert launch.column_list_size(blocks, n) == blocks * (4 + min(n, entries))


@pytest.mark.parametrize(("batch", "heads", "kv_heads"), [(1, 1, 1), (3, 4, 4), (2, 6, 2), (5, 4, 1)])
@pytest.mark.parametrize("workspace", [0, 1, 999, 1000, 4000, 10**9])
def test_head_chunks(monkeypatch, batch, heads, kv_heads, workspace):
    """Every head once, in order; whole groups, as many as fit and at the least one."""
    monkeypatch.setattr(launch, "WORKSPACE", workspace)
    q, k = torch.zeros(batch, heads, 2, 16), torch.zeros(batch, kv_heads, 2, 16)
    problem, groups = Problem(q, k, k, torch.ones(1), "1.5", 1.0), heads // kv_heads
    for each in (0, 1, 250, 1000):
        chunks = list(problem.head_chunks(each))
        assert [x for start, count in chunks for x in range(start, start + count)] == list(range(batch * heads))
        assert all(start % groups == 0 and count % groups == 0 for start, count in chunks)
        for _, count in chunks:
            assert count == groups or count * each <= workspace
        assert all((count + groups) * max(each, 1) > workspace for _, count in chunks[:-1])


# The ops, as PyTorch sees them


def test_fake_ops_have_the_shapes_of_the_real_ones(device):
    """Those of the lists above all, whose size goes by other numbers than that of bit masks."""
    q, k, v = random_qkv(device, 19, 37, heads=2, kv_heads=1)
    tests = {"test_utils": ("test_schema", "test_faketensor")}
    for alpha, need_backward in ((1.5, True), (1.0, True), (1.5, False)):
        arguments = op_arguments(q, k, v, "columns", alpha=alpha, need_backward=need_backward)
        torch.library.opcheck(forward_op, arguments, **tests)
    arguments = op_arguments(q, k, v, "columns", alpha=1.3)
    out, out2, theta, lists = forward_op(*arguments)
    assert lists.shape == (2, launch.column_list_size(-(-19 // launch.choose_tiles(16, torch.float32).block_m), 37))
    torch.library.opcheck(
        backward_op, (*arguments[:9], theta, out2, lists, torch.ones_like(out), *arguments[9:14], True), **tests
    )
