"""Lists of columns: the bound they start from, what they hold and in which order, and that results rest on neither.

A list that is too dense or finds no room, a bound that is too low or a head in another launch must change the time a
call takes, and nothing else. What is never to be read holds garbage here, which as a key or as bits would be believed.
"""

from __future__ import annotations

import functools
import math
from dataclasses import replace
from typing import NamedTuple

import pytest
import torch
import triton
import triton.language as tl
from calls import UNLIMITED, positions, random_qkv, stretch
from column_cases import (
    ANY,
    CASES,
    HALF_TOO,
    Sides,
    bound,
    by_byte,
    check_lists,
    columns,
    headers,
    in_blocks,
    limit_some,
    named,
    names,
    overflowed,
    packed,
    pools,
    setting,
    shares,
    span,
    tiles_met,
    too_dense,
    unpacked,
)
from hard_rows import GENERAL, both_alphas, check_theta, computed, exact_theta, hard_rows, resolution, stacked
from maximum import maximum_drops_nan  # noqa: F401
from oracle import gradients
from torch import Tensor

from adasplash_kernels import launch, limits
from adasplash_kernels.problem import Problem
from adasplash_kernels.thresholds.lower_bound import rise
from adasplash_kernels.tile_sizes import choose_column_tiles, choose_tiles
from adasplash_kernels.worklists.columns import WORD, share_kernel
from adasplash_kernels.worklists.walk import HEADER

pytestmark = pytest.mark.usefixtures("garbage")

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
        in_blocks(at.scores > x[..., None], at.problem.listed.tiles.block_m).any(2).sum() for x in (at.edge, edge)
    )
    assert above <= passing + 2 and passing <= 1.25 * above


def test_each_head_has_its_own_alpha(device, monkeypatch):
    """The first is the largest: with it the others' lists would be too short, with theirs its own too long."""
    monkeypatch.setattr(limits, "DENSEST", ANY)
    alphas = torch.tensor([2.0, 1.5, 1.1], device=device)
    q, k, v = random_qkv(device, 18 * stretch(device), 60 * stretch(device), heads=3, spread=3.0)
    problem = Problem(q, k, v, alphas, GENERAL, 0.25)
    scores = 0.25 * q.double() @ k.double().mT
    exact = alphas.double().tolist()
    theta = torch.stack([exact_theta(scores[:, h], exact[h]) for h in range(3)], 1)
    assert (bound(problem).double() <= theta + 1e-5).all()
    edge = theta - 1 / (alphas.double()[:, None] - 1)
    must = in_blocks(scores > (edge + 1e-5)[..., None], problem.listed.tiles.block_m).any(2)
    found = names(launch.column_lists(problem)[1], problem.lists, k.shape[2])
    assert not (must & ~found).any()
    assert (found.sum((1, 2)) <= 1.25 * must.sum((1, 2))).all()


HARD = [(1.1, GENERAL), (1.5, "1.5"), (1.9, GENERAL), (2.0, "2")]


@pytest.mark.parametrize(("alpha", "kind"), HARD)
def test_hard_rows_have_their_support_listed(device, monkeypatch, alpha, kind):
    """Scores of all kinds, as many rows as a pair of blocks has; no bound is above theta, and no weight left out.

    Theta is the root, whether the solve walks the list or, of lists that are all too dense, all tiles.
    """
    monkeypatch.setattr(limits, "DENSEST", ANY)
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
    found = names(lists, problem.lists, scores.shape[-1])
    assert not (in_blocks(support[None], problem.listed.tiles.block_m).any(2) & ~found).any()
    labels = [labels[i % len(labels)] for i in range(pair)]
    check_theta(solved.flatten(), scores[0], exact, labels)
    monkeypatch.setattr(limits, "DENSEST", 0.0)
    solved, lists = launch.column_lists(problem)
    assert (headers(lists, problem.lists)[..., 0] == -1).all()
    check_theta(solved.flatten(), scores[0], exact, labels)


# The lists


@pytest.mark.parametrize("dtype", HALF_TOO)
@pytest.mark.parametrize("case", CASES)
def test_lists_hold_what_passes_the_bound(device, monkeypatch, case, dtype):
    """All of the support, every other key above the bound and no further one; ascending, none twice, none unseen.

    Then the same of those lists that the usual DENSEST leaves, with room for about half of what they want.
    """
    usual = limits.DENSEST
    monkeypatch.setattr(limits, "DENSEST", ANY)
    at = setting(case, device, dtype)
    (rows, tile, together), n_k = Sides.of(at.problem, False), at.problem.k.shape[2]
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
    assert blocks == at.problem.lists
    assert lists.shape == (heads, at.problem.list_size) and lists.dtype == torch.int32
    assert must.any() and may.sum() <= must.sum() + 2
    entries = named(lists, blocks)
    for head in range(heads):
        for block in range(blocks):
            found = entries[head][block]
            unseen = [x for x in found if not (0 <= x < n_k and seen[head, block, :, x].any())]
            assert not unseen, f"head {head}, block {block}: {len(unseen)} of {len(found)} entries not seen"
    check_lists(lists, [[sorted(set(x)) for x in of_head] for of_head in entries], seen, tile, words, together)
    found = names(lists, blocks, n_k)
    assert not (must & ~found).any() and not (found & ~may).any()

    monkeypatch.setattr(limits, "DENSEST", usual)
    each = max(1, sum(map(len, entries[0])) // (2 * blocks))
    monkeypatch.setattr(limits, "ENTRIES", each * at.problem.column_tiles.share)
    theta, lists = launch.column_lists(replace(at.problem))  # a problem keeps its sizes
    assert lists.shape == (heads, blocks * (HEADER.value + -(-each // 2)))
    check_lists(lists, entries, seen, tile, words, together)
    check_found(theta)


def test_rows_that_are_not_there_mark_no_key(device, monkeypatch):
    """Nor do those that see no key: of a first block, of half the second, and past the end of the last."""
    monkeypatch.setattr(limits, "DENSEST", ANY)
    rows = choose_tiles(16, torch.float32).block_m
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
    monkeypatch.setattr(limits, "DENSEST", ANY)
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


def test_packing_by_hand(device):
    """The two helpers that the tests around rest on."""
    flags = torch.rand(2, 3, 5 * WORD, generator=torch.Generator().manual_seed(0)).to(device) < 0.3
    assert torch.equal(unpacked(packed(flags)), flags)
    expected = torch.arange(32) == torch.tensor([[3], [31]])
    assert torch.equal(unpacked(torch.tensor([[8, 0], [0, -(2**15)]], dtype=torch.int16)), expected)


FEW = 35 if limits.INTERPRETED else 150
MANY = 530 if limits.INTERPRETED else 33000  # rows, for more blocks than are given their share at once
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
        words = triton.cdiv(n, other if keys else WORD) * (other // WORD if keys else 1)  # of whole blocks of queries
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
        pitch = HEADER.value * blocks + (-(-pool // 2) if limits.NARROW else pool)
        guarded = torch.full((heads * pitch + 8,), -5, dtype=torch.int32, device=self.problem.q.device)
        lists = guarded[:-8].view(heads, pitch)
        bits = packed(flags) if self.keys else by_byte(self.problem, flags)
        launch._compact(self.problem, bits.to(lists.device), lists, 1, self.keys)
        written = check_lists(lists, expected, self.seen, self.tile, self.words)
        untouched = pools(torch.full_like(lists, -5), blocks)
        assert (pools(lists, blocks) == untouched)[~written].all() and (guarded[-8:] == -5).all()
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

    There is room for all entries of a head but two; for exactly those that are not too dense; and for half of them.
    """
    frame, usual = Frame.of(device, mask, keys), limits.DENSEST
    heads, blocks = frame.seen.shape[:2]
    shares = torch.tensor([share[i % len(share)] for i in range(blocks)])[:, None]
    flags = torch.rand(heads, blocks, frame.words * WORD, generator=torch.Generator().manual_seed(blocks)) < shares
    expected = frame.entries(flags)
    most = max(sum(len(entries) + len(entries) % 2 for entries in x) for x in expected)
    if mask != "many blocks":
        monkeypatch.setattr(limits, "DENSEST", ANY)
        counts = frame.check(flags, expected, max(most - 2, 0))
        assert (counts < 0).any() == (most > 0) and (blocks == 1 or (counts >= 0).any())
        monkeypatch.setattr(limits, "DENSEST", usual)
        allowed = frame.allowed(expected)
        room = allowed.clamp_min(0)
        assert torch.equal(frame.check(flags, expected, int((room + room % 2).sum(1).amax())), allowed)
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
    assert limits.DENSEST == 2 / 3
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


@pytest.mark.parametrize("together", [1, 4])
def test_shares(device, together):
    """Room goes to blocks in their order, 32 at once here; to none after one that found too little.

    Lists that have to be there together are where one of them would pay and all fit.
    """
    generator = torch.Generator().manual_seed(0)
    wanted = torch.randint(-1, 40, (5, 150), generator=generator)
    wanted[1, 40:] = 0  # an empty list needs no room, unless it comes after one that found too little
    wanted[2, ::2] = -1
    wanted[3] = 2**25  # whose sum no 32 bits hold
    wanted[4, :32], wanted[4, 32:64], wanted[4, 64:] = 10, -1, 7
    wanted[4, 36:40], wanted[4, 42] = -9, -6  # what they would hold, less one
    sums = wanted.clamp_min(0).sum(1)
    for blocks in (1, 31, 32, 33, 64, 150):
        some = int(wanted[0, : blocks // 2].clamp_min(0).sum())
        for pool in {0, some, max(0, some - 1), 320, int(sums[2]), 10**6}:
            lists = torch.full((5, HEADER.value * blocks + 3), -5, dtype=torch.int32, device=device)
            headers(lists, blocks)[..., 0] = wanted[:, :blocks].to(device)
            share_kernel[(5,)](lists, blocks, lists.shape[1], pool, together, 32, num_warps=4)
            found = headers(lists, blocks)
            assert (found[..., 1:3] == -5).all() and (lists[:, -3:] == -5).all()
            for head in range(5):
                counts, starts = shares(wanted[head, :blocks].tolist(), pool, together)
                assert found[head, :, 0].tolist() == counts
                listed = [i for i, count in enumerate(counts) if count >= 0]
                assert [found[head, i, 3].item() for i in listed] == [starts[i] for i in listed]
