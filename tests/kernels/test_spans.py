"""Spans, the two numbers a row that every kernel masks by, against the dense mask: interpreted or compiled."""

from __future__ import annotations

import itertools
import random
from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

from adasplash_kernels.inputs import UNLIMITED, open_sizes
from adasplash_kernels.masks import AttentionMask
from adasplash_kernels.problem import Problem
from adasplash_kernels.spans import inner_range, key_span, packed_spans, query_span, tile_range
from adasplash_kernels.tile_sizes import Tiles

BLOCK = 8  # rows of a program, and keys or queries of a tile of the other side
LENGTHS = [(1, 1), (5, 21), (21, 5), (16, 16), (19, 24)]


def reach(causal: bool, window: int | None) -> tuple[int, int]:
    """Return the keys a query sees before and after its own position, as the kernels take them."""
    side = UNLIMITED if window is None else window - 1
    return side, 0 if causal else side


def random_cu(generator: random.Random, total: int, sequences: int) -> list[int]:
    """Return cumulative lengths that leave some sequences empty and some tokens past the end."""
    return [0, *sorted(generator.choices(range(total + 1), k=sequences))]


def settings(kind: str, n_q: int, n_k: int, seed: int) -> tuple[int, dict[str, Tensor]]:
    """Return a batch size and the mask's tensors, drawn by seed."""
    generator = random.Random(seed)
    integer = generator.choice((torch.int32, torch.int64))
    if kind == "packed":
        cu_q, cu_k = (random_cu(generator, n, 4) for n in (n_q, n_k))
        return 1, {"cu_seqlens_q": torch.tensor(cu_q, dtype=integer), "cu_seqlens_k": torch.tensor(cu_k, dtype=integer)}
    drawn = {
        # past the end, past the length and before the beginning too
        "key_starts": torch.tensor([generator.randint(-2, n_k + 3) for _ in range(3)], dtype=integer),
        "key_lengths": torch.tensor([generator.randint(-2, n_k + 3) for _ in range(3)], dtype=integer),
    }
    names = {"none": (), "starts": ("key_starts",), "lengths": ("key_lengths",), "both": tuple(drawn)}[kind]
    return 3 if names else 1, {name: drawn[name] for name in names}


KINDS = ["none", "starts", "lengths", "both", "packed"]
by_kind = pytest.mark.parametrize("kind", KINDS)
by_rule = pytest.mark.parametrize(("causal", "window"), list(itertools.product((False, True), (None, 1, 4, 2**30))))


def visible(low: Tensor, high: Tensor, other: int) -> Tensor:
    """Return (rows, other) bool, what spans let each row see."""
    index = torch.arange(other, device=low.device)
    return (index >= low[:, None]) & (index < high[:, None])


@by_rule
@pytest.mark.parametrize("lengths", LENGTHS)
def test_packed_tables_equal_the_dense_mask(device, lengths, causal, window):
    for seed in range(8):
        _, fields = settings("packed", *lengths, seed)
        fields = {name: x.to(device) for name, x in fields.items()}
        seen = AttentionMask(causal=causal, window=window, **fields).allowed(*lengths, device=device)[0, 0]
        by_query, by_key = packed_spans(*fields.values(), *lengths, *reach(causal, window))
        assert by_query.dtype == by_key.dtype == torch.int32
        assert torch.equal(visible(*by_query[:2], lengths[1]), seen)
        assert torch.equal(visible(*by_key[:2], lengths[0]), seen.T)


def test_packed_tables_by_hand():
    """Two queries of three keys, a sequence of one key alone, two queries of two keys, and one token of each past."""
    cu_q, cu_k = torch.tensor([0, 2, 2, 4]), torch.tensor([0, 3, 4, 6])
    by_query, by_key = packed_spans(cu_q, cu_k, 5, 7, 1, 0)  # causal, a window of two
    low, high, shift = by_query.tolist()
    assert list(zip(low, high, strict=True))[:4] == [(0, 2), (1, 3), (4, 5), (4, 6)] and low[4] >= high[4]
    assert shift[:4] == [1, 1, 2, 2]
    low, high, shift = by_key.tolist()
    pairs = list(zip(low, high, strict=True))
    assert pairs[:3] == [(0, 1), (0, 2), (1, 2)] and pairs[4:6] == [(2, 4), (3, 4)]
    assert all(low[j] >= high[j] for j in (3, 6)) and shift[:3] == [1] * 3 and shift[4:6] == [2] * 2


@triton.jit(do_not_specialize=["count"])
def _store_spans(x, size, rows_out, tiles_out, count, KEYS: tl.constexpr):
    """Write low, high and position of ``count`` rows a batch entry, and first, last, inner_low, inner_high a block."""
    size = open_sizes(x, size)
    blocks = count // x.BLOCK_M
    batch = tl.program_id(0) // blocks
    block = tl.program_id(0) % blocks
    rows = block * x.BLOCK_M + tl.arange(0, x.BLOCK_M)
    if KEYS:
        low, high, position = key_span(x, size, batch, rows)
    else:
        low, high, position = query_span(x, size, batch, rows)
    out = rows_out + batch * 3 * count + rows
    tl.store(out, low)
    tl.store(out + count, high)
    tl.store(out + 2 * count, position)
    first, last = tile_range(low, high, x.BLOCK_N)
    inner_low, inner_high = inner_range(low, high)
    out = tiles_out + tl.program_id(0) * 4
    tl.store(out, first)
    tl.store(out + 1, last)
    tl.store(out + 2, inner_low)
    tl.store(out + 3, inner_high)


def spans(problem: Problem, batch: int, keys: bool) -> tuple[Tensor, Tensor]:
    """Return (B, 3, rows) low, high and position, rows past the end among them, and (B, blocks, 4) of tiles."""
    length = problem.k.shape[2] if keys else problem.q.shape[2]
    blocks = triton.cdiv(length, BLOCK) + 1  # one more than there are rows for
    rows_out = torch.full((batch, 3, blocks * BLOCK), -7, dtype=torch.int32, device=problem.q.device)
    tiles_out = torch.full((batch, blocks, 4), -7, dtype=torch.int32, device=problem.q.device)
    _store_spans[(batch * blocks,)](problem.inputs(), problem.sizes(), rows_out, tiles_out, blocks * BLOCK, KEYS=keys)
    return rows_out.cpu(), tiles_out.cpu()


def check_side(rows: Tensor, tiles: Tensor, seen: Tensor, distance: Tensor) -> None:
    """Compare one batch entry's spans with the pairs (rows, other side) seen, and the distances of those."""
    length, other = seen.shape
    found = visible(rows[0], rows[1], other)
    assert torch.equal(found[:length], seen)
    empty = rows[0] >= rows[1]
    assert torch.equal(empty[:length], ~seen.any(-1)) and empty[length:].all()
    assert (rows[0] >= 0)[~empty].all() and (rows[1] <= other)[~empty].all()
    apart = (rows[2, :length, None] - torch.arange(other)).abs()
    assert torch.equal(apart[seen], distance[seen])

    for block, (first, last, inner_low, inner_high) in enumerate(tiles.tolist()):
        own = found[block * BLOCK : (block + 1) * BLOCK]
        reached = own.any(0).nonzero().flatten().tolist()
        if reached:
            assert (first, last) == (reached[0] // BLOCK, reached[-1] // BLOCK + 1)
        else:
            assert 0 <= first == last
        assert list(range(inner_low, inner_high)) == own.all(0).nonzero().flatten().tolist()


def check(device: str, n_q: int, n_k: int, batch: int, fields: dict[str, Tensor], **rule: Any) -> None:
    """Compare both sides' spans with the dense mask."""
    q, k = (torch.empty(batch, 1, n, 1, device=device) for n in (n_q, n_k))
    left, right = reach(**rule)
    on_device = {name: x.to(device) for name, x in fields.items()}
    tiles = Tiles(BLOCK, BLOCK, 1)
    problem = Problem(q, k, k, torch.ones(1, device=device), "1.5", 1.0, left, right, tiles=tiles, **on_device)
    mask = AttentionMask(**rule, alibi_slopes=torch.ones(1), **fields)
    seen = mask.allowed(n_q, n_k).expand(batch, 1, n_q, n_k)[:, 0]
    distance = -mask.bias(n_q, n_k, dtype=torch.float64).expand(batch, 1, n_q, n_k)[:, 0].long()
    by_query, by_key = spans(problem, batch, keys=False), spans(problem, batch, keys=True)
    for b in range(batch):
        check_side(by_query[0][b], by_query[1][b], seen[b], distance[b])
        check_side(by_key[0][b], by_key[1][b], seen[b].T, distance[b].T)


@pytest.mark.in_turn(2)
@by_kind
@by_rule
def test_kernels_see_the_dense_mask(device, kind, causal, window):
    """Queries' and keys' spans both describe the allowed pairs, by row and by tile, and measure the same distances."""
    for seed, lengths in enumerate(LENGTHS):
        batch, fields = settings(kind, *lengths, seed)
        check(device, *lengths, batch, fields, causal=causal, window=window)


def test_settings_hold_what_is_rare():
    """The draws above hold empty sequences, tokens past the end, padding alone, and rows that see everything."""
    drawn = [settings("packed", n_q, n_k, seed)[1] for seed, (n_q, n_k) in enumerate(LENGTHS)]
    lengths = [(f["cu_seqlens_q"].diff(), f["cu_seqlens_k"].diff()) for f in drawn]
    assert any(((q == 0) & (k > 0)).any() for q, k in lengths) and any(((q > 0) & (k == 0)).any() for q, k in lengths)
    assert any(f["cu_seqlens_q"][-1] < n for f, (n, _) in zip(drawn, LENGTHS, strict=True))
    padded = [settings("both", n_q, n_k, seed)[1] for seed, (n_q, n_k) in enumerate(LENGTHS)]
    assert any((f["key_starts"] >= f["key_lengths"]).any() for f in padded)
    assert any((f["key_starts"] < f["key_lengths"]).any() for f in padded)


@pytest.mark.parametrize("name", ["key_starts", "key_lengths"])
@pytest.mark.parametrize("value", [-(2**40), 3 - 2**32, 2**32, 2**40])
def test_padding_of_any_size(device, name, value):
    """64-bit numbers that do not fit 32 bits are as good as any other number past the end."""
    check(device, 5, 9, 1, {name: torch.tensor([value])}, causal=False, window=None)
