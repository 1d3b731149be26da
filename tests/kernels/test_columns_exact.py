"""Attention by lists of columns: exact whatever limits the lists, in whatever chunks, and where there are none."""

from __future__ import annotations

import functools
import math
from typing import Any

import pytest
import torch
import triton
from calls import USUAL, bind, op_arguments, plain, positions, random_qkv, stretch
from column_cases import (
    ANY,
    HALF_TOO,
    Sides,
    check_lists,
    columns,
    in_blocks,
    limit_some,
    named,
    on_gpu,
    overflowed,
    setting,
    span,
    too_dense,
    unpacked,
)
from maximum import maximum_drops_nan  # noqa: F401
from oracle import check_against_oracle, gradients
from rowwise_oracle import check as check_rowwise
from rowwise_oracle import random_scores
from torch import Tensor

from adasplash_kernels import entmax, launch, limits
from adasplash_kernels.ops import backward_op, forward_op
from adasplash_kernels.problem import Problem, column_list_size, pool_entries
from adasplash_kernels.tile_sizes import choose_column_tiles, choose_tiles
from adasplash_kernels.worklists.columns import WORD

pytestmark = pytest.mark.usefixtures("garbage")

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
    monkeypatch.setattr(limits, *LIMITS[limit])
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
    monkeypatch.setattr(limits, "DENSEST", ANY)
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


@pytest.mark.parametrize(("case", "limit"), [on_gpu("causal", "room"), ("dense, grouped heads", "both")])
def test_some_lists_overflow(device, monkeypatch, compactions, case, limit):
    """Blocks that still have a list have the same one and give the same bits; the others stay exact."""
    monkeypatch.setattr(limits, "DENSEST", ANY)
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
        monkeypatch.setattr(limits, "DENSEST", (shares[middle - 1] + shares[middle]) / 2)
    if limit != "density":
        first = next(count for count, space in blocks if not too_dense(count, space))  # finds room at the least
        first = triton.cdiv(first, seen.shape[1])
        total = sum(count for count, space in blocks if not too_dense(count, space))
        monkeypatch.setattr(limits, "ENTRIES", max(first, int(0.7 * total / len(blocks))))
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
    """One group of heads a launch, two, or all at once: the same bits.

    Everything that goes by head or by sequence is there.
    """
    monkeypatch.setattr(limits, "LIST_TILES", False)  # heads go through in other chunks for those
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
    whole, alone, halves = [(0, 8)], [(0, 2), (2, 2), (4, 2), (6, 2)], [(0, 4), (4, 4)]
    assert chunks(False) == chunks(True) == whole
    of_keys, of_queries = (next(x for x in compactions if x.keys is keys) for keys in (False, True))
    each = [of_keys.bits[0].nbytes, of_queries.bits[0].nbytes + of_queries.lists[0].nbytes]
    for space, by_keys, by_queries in ((6 * each[0], halves, alone), (6 * each[1], whole, halves)):
        compactions.clear()
        monkeypatch.setattr(limits, "WORKSPACE", space)
        assert all(map(torch.equal, gradients(run, inputs, upstream), expected))
        assert chunks(False) == by_keys and chunks(True) == by_queries
    compactions.clear()
    monkeypatch.setattr(limits, "WORKSPACE", 1)
    assert all(map(torch.equal, gradients(run, inputs, upstream), expected))
    assert chunks(False) == chunks(True) == alone


# Entries of 32 bits


@pytest.mark.parametrize("case", ["causal, fewer queries", "packed", on_gpu("dense, grouped heads")])
def test_long_rows_change_nothing(device, monkeypatch, compactions, case):
    """Lists of more than 65,536 rows, here of fewer: the same entries in numbers of their own, the same bits."""
    monkeypatch.setattr(limits, "DENSEST", ANY)
    at = setting(case, device, **({"batch": 1, "heads": 2, "kv_heads": 1} if case.endswith("heads") else {}))
    run, inputs = functools.partial(columns, **at.options), (at.problem.q, at.problem.k, at.problem.v)
    upstream = torch.randn(at.problem.q.shape, device=device)
    blocks = {False: at.problem.lists, True: at.problem.key_lists}
    found = []
    for narrow in (limits.NARROW, 0):
        monkeypatch.setattr(limits, "NARROW", narrow)
        compactions.clear()
        gradient = gradients(run, inputs, upstream)
        found.append((gradient, [(x.keys, named(x.lists, blocks[x.keys])) for x in compactions]))
    assert all(map(torch.equal, found[0][0], found[1][0])) and found[0][1] == found[1][1]
    assert {keys for keys, _ in found[0][1]} == {False, True} and any(map(any, found[0][1][0][1]))


# Scores of any size


@pytest.mark.parametrize(
    ("spread", "densest"), [(0.01, USUAL), (0.01, ANY), (1000.0, USUAL)],
)  # fmt: skip
@pytest.mark.parametrize("alpha", [1.4, 2.0])
def test_score_scales(device, monkeypatch, spread, densest, alpha):
    monkeypatch.setattr(limits, "DENSEST", densest)
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
        on_gpu("dense, grouped heads", "ENTRIES"),
    ],
)
def test_queries_that_use_a_block_of_keys(device, monkeypatch, compactions, case, limit, dtype):
    """All queries with a weight on one of its keys and no others, whether lists or tiles were walked."""
    changes = {"n_q": 41, "n_k": 40, "batch": 1} if case.endswith("heads") else {}
    at = setting(case, device, dtype, **changes)
    monkeypatch.setattr(limits, "DENSEST", ANY)
    run, inputs = functools.partial(columns, **at.options), (at.problem.q, at.problem.k, at.problem.v)
    gradients(run, inputs, at.problem.q)
    if limit is not None:
        limit_some(monkeypatch, at, compactions, limit, (False,))
        gradients(run, inputs, at.problem.q)
    over = overflowed(compactions, False)
    assert over.any() == (limit is not None) and not over.all()
    keys, tile, together = Sides.of(at.problem, True)
    must, may = (
        in_blocks((at.seen & (at.scores > (at.edge + slack)[..., None])).mT, keys).any(2)
        for slack in (at.slack, -at.slack)
    )
    assert 0 < must.sum() < 0.9 * must.numel() and may.sum() <= must.sum() + 2
    bits, lists = (torch.cat([getattr(x, name) for x in compactions if x.keys]) for name in ("bits", "lists"))
    n_q = at.problem.q.shape[2]
    assert lists.shape == (at.problem.heads, at.problem.key_list_size)
    used = unpacked(bits)
    assert not used[..., n_q:].any()
    used = used[..., :n_q]
    assert not (must & ~used).any() and not (used & ~may).any()
    expected = [[x.nonzero().flatten().tolist() for x in of_head] for of_head in used]
    check_lists(lists, expected, in_blocks(at.seen.mT, keys), tile, bits.shape[2], together)


# Numbers that are none, and ties


@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")  # NumPy's, on the way to NaN
@pytest.mark.usefixtures("maximum_drops_nan")
@pytest.mark.parametrize(
    ("alpha", "densest", "entries", "place"),
    [(1.3, USUAL, 2560, "inside"), (1.3, ANY, 2560, "late"), (1.5, ANY, 2560, "first"), (2.0, ANY, 4, "late"),
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
    monkeypatch.setattr(limits, "DENSEST", densest)
    monkeypatch.setattr(limits, "ENTRIES", entries)
    found = columns(q, k, v, **options)
    sees = torch.arange(n_q, device=device) + n_k - n_q >= bad
    reached = torch.zeros(3, n_q, dtype=torch.bool, device=device)
    reached[0], reached[1], reached[2, 5] = sees, sees & (q[0, 1, :, 3] > 0), True
    assert torch.equal(found[0].isnan().all(-1), reached) and torch.equal(found[0].isnan().any(-1), reached)
    assert 0 < reached[1].sum() < n_q
    torch.testing.assert_close(found, expected, equal_nan=True)


@pytest.mark.parametrize(("densest", "entries"), [(ANY, 2560), (USUAL, 2560), (ANY, 8)])
@pytest.mark.parametrize("alpha", [1.25, 1.5, 2.0])
def test_ties_are_all_listed(device, monkeypatch, compactions, alpha, densest, entries):
    """Equal keys have equal weights: every list is full or left out, and the output is the mean of the values."""
    monkeypatch.setattr(limits, "DENSEST", densest)
    monkeypatch.setattr(limits, "ENTRIES", entries)
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


@pytest.mark.parametrize("entries", [0, 99, 100, 2560])
def test_column_list_size(monkeypatch, entries):
    """A header a block, and a pool that has room for every row or for so many a block: two a number up to 65,536.

    Rounded up to an even number, as lists start at even places.
    """
    monkeypatch.setattr(limits, "ENTRIES", entries)
    for blocks in (1, 3, 100):
        for n in (0, 1, 99, 100, 101, 2559, 2560, 2561, 2**16, 2**16 + 1, 10**6):
            size, pairs = column_list_size(blocks, n), math.ceil(min(n, entries) / 2)
            assert size == blocks * (4 + (pairs if n <= 2**16 else 2 * pairs))
            assert pool_entries(size, blocks, n) == 2 * pairs * blocks


@pytest.mark.parametrize(
    ("heads", "kv_heads", "batch", "d"), [(4, 4, 1, 16), (6, 2, 2, 16), (3, 1, 1, 5), (8, 1, 2, 1)]
)
@pytest.mark.parametrize("space", [0, 2000, 10**9])
def test_where_masks_go(monkeypatch, device, heads, kv_heads, batch, d, space):
    """Every head of a chunk in one round, and what it notes where no other of the round does: within what is there."""
    monkeypatch.setattr(limits, "WORKSPACE", space)
    n_q, n_k = 37, 45
    q = torch.zeros(batch, heads, n_q, d, dtype=torch.bfloat16, device=device)
    dk, dv = (torch.zeros(batch, kv_heads, n_k, d, dtype=torch.bfloat16, device=device) for _ in range(2))
    problem = Problem(q, dk, dv, None, "1.5", 1.0)
    tile = problem.column_tiles.grad
    pool = problem.lists * min(limits.ENTRIES // problem.column_tiles.share, n_k)
    lists = torch.zeros(batch * heads, problem.list_size, device=device)
    groups = heads // kv_heads
    for start, count in ((0, batch * heads), (groups, groups)):
        done = []
        for first, part, masks in launch._mask_rounds(problem, lists, (dk, dv), start, count):
            tiles, in_first, in_second, before = (
                (x - 3) // 2 for x in (masks.tiles, masks.in_first, masks.in_second, masks.before)
            )
            assert before == first - start and tiles * tile.block_n >= pool
            each = tiles * tile.block_m * tile.block_n // 8
            taken, left = [], part
            for place, most in ((masks.first, in_first), (masks.second, in_second), (masks.third, left)):
                number = min(left, most)
                left -= number
                end = place.data_ptr() + number * each
                assert number == 0 or end <= place.untyped_storage().data_ptr() + place.untyped_storage().nbytes()
                taken += [(place.data_ptr(), end)] * (number > 0)
                for x in (dk, dv):  # those of these heads alone
                    own = x.view(-1)[start // groups * n_k * d : (start + count) // groups * n_k * d]
                    if number and place.untyped_storage().data_ptr() == x.untyped_storage().data_ptr():
                        assert own.data_ptr() <= place.data_ptr() and end <= own.data_ptr() + own.nbytes
            assert left == 0
            taken.sort()
            assert all(a[1] <= b[0] for a, b in zip(taken, taken[1:], strict=False))
            done += range(first, first + part)
        assert done == list(range(start, start + count))


@pytest.mark.parametrize(("batch", "heads", "kv_heads"), [(1, 1, 1), (3, 4, 4), (2, 6, 2), (5, 4, 1)])
@pytest.mark.parametrize("workspace", [0, 1, 999, 1000, 4000, 10**9])
def test_head_chunks(monkeypatch, batch, heads, kv_heads, workspace):
    """Every head once, in order; whole groups, in as few chunks as fit, which differ by as little as they can."""
    monkeypatch.setattr(limits, "WORKSPACE", workspace)
    q, k = torch.zeros(batch, heads, 2, 16), torch.zeros(batch, kv_heads, 2, 16)
    problem, groups = Problem(q, k, k, torch.ones(1), "1.5", 1.0), heads // kv_heads
    for each in (0, 1, 250, 1000):
        chunks = list(problem.head_chunks(each))
        assert [x for start, count in chunks for x in range(start, start + count)] == list(range(batch * heads))
        assert all(start % groups == 0 and count % groups == 0 for start, count in chunks)
        for _, count in chunks:
            assert count == groups or count * each <= workspace
        most = max(1, workspace // max(1, each * groups))
        assert len(chunks) <= -(-batch * kv_heads // most)
        sizes = [count // groups for _, count in chunks]
        fewest = -(-batch * kv_heads // -(-batch * kv_heads // most))
        assert set(sizes[:-1]) <= {fewest} and sizes[-1] <= fewest


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
    assert lists.shape == (2, column_list_size(-(-19 // choose_tiles(16, torch.float32).block_m), 37))
    torch.library.opcheck(
        backward_op, (*arguments[:9], theta, out2, lists, torch.ones_like(out), *arguments[9:14], True), **tests
    )
