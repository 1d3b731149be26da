"""What the tests of lists of columns share: masks with what float64 makes of them, and what lists must hold."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from fractions import Fraction
from typing import Any, NamedTuple

import pytest
import torch
from calls import UNLIMITED, bind, positions, random_qkv, stretch
from hard_rows import FLOAT32, both_alphas, exact_theta
from maximum import maximum_drops_nan  # noqa: F401
from torch import Tensor

from adasplash_kernels import launch, limits
from adasplash_kernels.dispatch import kernel_alpha
from adasplash_kernels.masks import AttentionMask
from adasplash_kernels.problem import Problem
from adasplash_kernels.worklists.columns import WORD
from adasplash_kernels.worklists.walk import HEADER

MAX_INT = 2**31 - 1
columns = bind("columns")
ANY = 2.0  # for limits.DENSEST: no list is too dense
HALF_TOO = [torch.float32, pytest.param(torch.float16, marks=pytest.mark.gpu)]  # whose tiles on a GPU are others


def on_gpu(*values: Any) -> Any:
    """Return a case for a GPU alone: in the interpreter others say the same, and it takes ten seconds."""
    return pytest.param(*values, marks=pytest.mark.gpu)


@pytest.fixture
def garbage(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, int], None]:
    """Let uninitialised lists name a key that exists, and uninitialised bits be set; return what sets them to others.

    It comes after ``poisoned_empty``, which does the same for floats.
    """
    empty = torch.empty

    def refill(entry: int, word: int) -> None:
        fill = {torch.int32: entry, torch.int16: word, torch.int8: word}

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
    blocks: int
    bits: Tensor
    lists: Tensor

    @property
    def counts(self) -> Tensor:
        """(heads, blocks), -1 for blocks that are left without a list."""
        return headers(self.lists, self.blocks)[..., 0]

    @property
    def words(self) -> int:
        """Of 16 rows, in the bits of a block."""
        return self.bits.shape[2] if self.keys else self.bits.shape[2] // WORD


@pytest.fixture
def compactions(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Compaction]]:
    """Overhear what is compacted."""
    found, compact = [], launch._compact

    def spy(problem: Problem, bits: Tensor, lists: Tensor, first_head: int, keys: bool) -> None:
        compact(problem, bits, lists, first_head, keys)
        blocks = problem.key_lists if keys else problem.lists
        found.append(Compaction(first_head, keys, blocks, bits.clone(), lists.clone()))

    monkeypatch.setattr(launch, "_compact", spy)
    yield found


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
    """Return the bound (B, H, N_q), as ``launch.columns_without_lists`` computes it."""
    floor = torch.empty(problem.q.shape[:3], device=problem.q.device)
    launch._bound(problem, problem.column_tiles.bound, floor)
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


def pools(lists: Tensor, blocks: int) -> Tensor:
    """Return the entries of lists (heads, numbers), which name fewer rows than 16 bits tell apart unless a test limits
    that, (heads, entries) int32."""
    pool = lists[:, HEADER.value * blocks :]
    return pool.contiguous().view(torch.int16).int() & 0xFFFF if limits.NARROW else pool


def named(lists: Tensor, blocks: int) -> list[list[list[int]]]:
    """Return the entries of each list of each head; all must be there, and lie in the pool."""
    found: list[list[list[int]]] = []
    for numbers, pool in zip(lists.tolist(), pools(lists, blocks).tolist(), strict=True):
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


def shares(wanted: list[int], pool: int, together: int = 1) -> tuple[list[int], list[int]]:
    """Return how long the lists of a head may be, in order of blocks, and where they start.

    Each starts where the ones before it would end, whether or not they fit, at an even place; none fits after one that
    does not.

    Args:
        wanted: lengths; -1 and less for a list of so many less one that would not pay.
        pool: entries of a head.
        together: of so many in a row all are there or none; none if none would pay.
    """
    counts, starts, taken = [], [], 0
    for first in range(0, len(wanted), together):
        group = wanted[first : first + together]
        group = [-1] * len(group) if max(group) < 0 else [max(x, -1 - x) for x in group]
        for count in group:
            starts.append(taken)
            taken += max(count, 0) + count % 2 * (count > 0)
        counts += group if taken <= pool else [-1] * len(group)
    return counts, starts


def too_dense(entries: int, words: int) -> bool:
    """Tell whether a list has more entries than what DENSEST says of the rows of these words; without roundings."""
    return entries > Fraction(limits.DENSEST).limit_denominator(10**4) * WORD * words


def check_lists(
    lists: Tensor, expected: list[list[list[int]]], seen: Tensor, tile: int, words: int, together: int = 1
) -> Tensor:
    """Compare lists (heads, numbers) with the entries that they must have, as far as they are not too dense and fit.

    Args:
        expected: by head and block.
        seen: (heads, blocks, rows of a block, other), what rows see.
        tile: of the other side, in rows.
        words: of a block's bits.
        together: blocks in a row that have lists, or none.

    Returns:
        Which entries are to be there, a mask of ``pools``; the others are those that nobody has written.
    """
    heads, blocks = seen.shape[:2]
    seen, entries_of = seen.cpu(), pools(lists, blocks).cpu()
    pool = entries_of.shape[1]
    written = torch.zeros(heads, pool, dtype=torch.bool)
    assert len(expected) == lists.shape[0] == heads and all(len(x) == blocks for x in expected)
    for head, numbers in enumerate(lists.tolist()):
        wanted = [
            -1 - len(entries) if too_dense(len(entries), span(seen[head, block], tile, words)) else len(entries)
            for block, entries in enumerate(expected[head])
        ]
        counts, starts = shares(wanted, pool, together)
        for block, entries in enumerate(expected[head]):
            count, below, inner, start = numbers[HEADER.value * block :][: HEADER.value]
            where = f"head {head}, block {block}"
            assert count == counts[block], f"{where}: {count} entries, {counts[block]} expected"
            low, high = shared(seen[head, block])
            assert below == sum(x < low for x in entries), where
            assert inner == sum(x < high for x in entries), where
            if count >= 0:
                assert start == starts[block], where
                assert entries_of[head, start : start + count].tolist() == entries, where
                written[head, start : start + count] = True
    return written.to(lists.device)


class Sides(NamedTuple):
    """How many rows of either side lists of one kind go by."""

    own: int  # of a block that has a list
    other: int  # of a tile of rows that may be entries
    together: int  # blocks in a row that have lists, or none

    @classmethod
    def of(cls, problem: Problem, keys: bool) -> Sides:
        """Return those of lists of queries, with ``keys``, or of keys."""
        tiles, rest = (problem.listed_keys if keys else problem.listed).tiles, problem.unlisted.tiles
        if keys:
            return cls(tiles.block_n, tiles.block_m, rest.block_n // tiles.block_n)
        return cls(tiles.block_m, tiles.block_n, rest.block_m // tiles.block_m)


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
    wanted = []
    for keys in sides:
        own, other, together = Sides.of(at.problem, keys)
        seen = in_blocks(at.seen.mT if keys else at.seen, own).cpu()
        words = next(x.words for x in compactions if x.keys is keys)
        spans = [[span(x, other, words) for x in of_head] for of_head in seen]
        counts = torch.cat([x.counts for x in compactions if x.keys is keys]).tolist()
        assert min(map(min, counts)) >= 0
        wanted.append((counts, spans, seen.shape[3], together))
    most = max(map(max, wanted[0][0]))
    found = {}
    for value in [i / 50 for i in range(1, 50)] if name == "DENSEST" else range(0, most, 1 + most // 50):
        monkeypatch.setattr(limits, name, value)
        over = []
        for counts, spans, n, together in wanted:
            left = [
                shares(
                    [-1 - x[0] if too_dense(*x) else x[0] for x in zip(a, b, strict=True)],
                    2 * len(a) * math.ceil(min(limits.ENTRIES // at.problem.column_tiles.share, n) / 2),
                    together,
                )
                for a, b in zip(counts, spans, strict=True)
            ]
            over.append([x < 0 for of_head, _ in left for x in of_head])
        if all(any(x) and not all(x) for x in over):
            found[value] = abs(sum(over[0]) / len(over[0]) - 0.5)
    monkeypatch.setattr(limits, name, min(found, key=lambda x: found[x]))
    compactions.clear()


def by_byte(problem: Problem, flags: Tensor) -> Tensor:
    """Return bits (heads, blocks, keys) bool of blocks of queries as (heads, blocks / 8 or so, keys) int8: a bit a
    block of those that one program marks keys for."""
    shared = problem.column_tiles.emit.block_m // problem.column_tiles.walk.block_m
    flags = torch.nn.functional.pad(flags, (0, 0, 0, -flags.shape[1] % shared)).unflatten(1, (-1, shared))
    value = (flags.long() << torch.arange(shared, device=flags.device)[:, None]).sum(2)
    return torch.where(value >= 2**7, value - 2**8, value).to(torch.int8)


def packed(flags: Tensor) -> Tensor:
    """Return bits (..., words * 16) bool as (..., words) int16, lowest first."""
    value = (flags.unflatten(-1, (-1, WORD)).long() << torch.arange(WORD, device=flags.device)).sum(-1)
    return torch.where(value >= 2**15, value - 2**16, value).to(torch.int16)


def unpacked(words: Tensor) -> Tensor:
    """Return the bits of (..., words) int16, lowest first, as (..., words * 16) bool."""
    return (words.int()[..., None] >> torch.arange(WORD, device=words.device) & 1).flatten(-2).bool()
