"""Launching the kernels: pitches, grids and work lists. Nothing here knows about autograd."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .backward import Upstream, grad_key_value_kernel, grad_query_kernel
from .forward import output_kernel
from .inputs import UNLIMITED, Inputs, Sizes, sealed
from .kept import block_d, constant, multiples_of_8, own_strides, sealed_sizes
from .spans import packed_spans
from .thresholds import THRESHOLDS, register
from .thresholds.group_maxima import bound_kernel, listed_kernel
from .thresholds.halley import halley_kernel
from .thresholds.histogram import histogram_kernel
from .thresholds.refine import MAX_ITERATIONS
from .thresholds.settle import Settle
from .tile_sizes import INTERPRETED, ColumnTiles, Tiles, choose_column_tiles, choose_tiles
from .worklists.columns import WORD, compact_kernel, count_kernel, emit_kernel, share_kernel
from .worklists.marks import Masks, list_tiles, scatter_kernel
from .worklists.pieces import Pieces, add_pieces_kernel, count_tiles_kernel, place_pieces_kernel
from .worklists.tiles import transpose, words
from .worklists.walk import EDGES, HEADER, MIXED

DENSEST = 2 / 3  # of the rows a block sees: a guess at where gathering stops paying
ENTRIES = 2304  # of a list of columns, the most on average over the blocks of a head
WORKSPACE = 40 * 2**20  # bytes of bits and of lists of queries that exist at once; at least those of one head
PIECES = 512  # at the most, of a launch: about twice what a GPU works on at once
NARROW = 2**16  # rows whose numbers fit into 16 bits
LIST_TILES = True  # False to mark keys in all tiles, as a comparison
SCATTERED = 1 if INTERPRETED else 4  # programs that share a list whose marks are scattered
REST = 3 if INTERPRETED else 1024  # programs of a launch for the rest of the keys, at the most: usually there is none
PIECE = 2 if INTERPRETED else 32  # tiles of a piece that the walk of a block of keys is cut into, at the least


def settings() -> tuple:
    """Return the numbers above: what is launched follows from them and from a call's arguments."""
    return DENSEST, ENTRIES, WORKSPACE, PIECES, NARROW, LIST_TILES, SCATTERED, REST, PIECE


def column_list_size(blocks: int, n: int, share: int = 1) -> int:
    """Return how many numbers a head's lists of columns take: ``blocks`` headers, and the pool, among ``n`` rows.

    Args:
        share: lists have a part of ENTRIES each, one in so many.
    """
    pairs = (torch.sym_min(ENTRIES // share, n) + 1) // 2  # lists start at even places
    return blocks * (HEADER.value + (pairs if n <= NARROW else 2 * pairs))


def list_numbers(tiles: ColumnTiles, blocks: int, n: int) -> int:
    """Return the same for these tiles; wide entries are half as many."""
    return column_list_size(blocks, n, tiles.share if tiles.share == 1 or n <= NARROW else 2 * tiles.share)


def pool_entries(numbers: int, blocks: int, n: int) -> int:
    """Return how many entries there is room for in a head whose lists take so many numbers."""
    return (numbers - blocks * HEADER.value) * (2 if n <= NARROW else 1)


@dataclass(frozen=True)
class Problem:
    """Everything about a call that is not a tensor of results.

    Attributes:
        q, k, v: (B, H, N_q, D), (B, H_kv, N_k, D) twice, the last dimension contiguous.
        alpha: (1,) or (H,) float32, which is read where ``alpha_kind`` is "any"; else that is "1", "1.5" or "2", and
            alpha may be None.
        scale: factor on q.k.
        left, right: keys a query sees before and after its own position, ``UNLIMITED`` or more for all.
        alibi_slopes: (H,) or (B, H) float32.
        key_starts, key_lengths: (B,) integers.
        cu_seqlens_q, cu_seqlens_k: (S + 1,) integers.
        scores: (B, H, N_q, N_k) masked scores before ``scale``, where they are already there.
        tiles: sizes to use instead of the usual ones.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    alpha: Tensor | None
    alpha_kind: str
    scale: float
    left: int = UNLIMITED
    right: int = UNLIMITED
    alibi_slopes: Tensor | None = None
    key_starts: Tensor | None = None
    key_lengths: Tensor | None = None
    cu_seqlens_q: Tensor | None = None
    cu_seqlens_k: Tensor | None = None
    scores: Tensor | None = None
    tiles: Tiles = field(default=None)  # type: ignore[assignment]

    def __post_init__(self) -> None:
        if self.tiles is None:
            object.__setattr__(self, "tiles", choose_tiles(self.q.shape[3], self.q.dtype))

    @cached_property
    def _inputs(self) -> Inputs:
        q, k, v, tiles, slopes = self.q, self.k, self.v, self.tiles, self.alibi_slopes
        spans = (None, None)
        if self.cu_seqlens_q is not None:
            spans = packed_spans(self.cu_seqlens_q, self.cu_seqlens_k, q.shape[2], k.shape[2], self.left, self.right)
        padded = block_d(q.shape[3])
        return Inputs(
            q, k, v, self.scores, self.alpha, slopes, self.key_starts, self.key_lengths, *spans, None, None, q.shape[3],
            constant("all"), EDGES, MIXED, constant(self.alpha_kind), constant(q.shape[3] == padded),
            _aligned(q, k, v), constant(padded), constant(tiles.block_m), constant(tiles.block_n),
            constant(self.column_tiles.walk.block_m), constant(self.column_tiles.grad_keys.block_n),
        )  # fmt: skip

    def inputs(
        self, lists: str | None = None, *, query_tiles: Tensor | None = None, key_tiles: Tensor | None = None
    ) -> Inputs:
        """Return what kernels are given, with the work lists to use: "tiles", "columns", or "rest" for rows
        without a list of columns; by default none."""
        if lists is None:
            return self._inputs
        if lists == "rest":
            return self._inputs._replace(query_tiles=query_tiles, key_tiles=key_tiles, LISTS=constant(lists))
        if lists == "columns" and self.others(key_tiles is not None) <= NARROW:
            lists = "columns16"
        return self._inputs._replace(
            query_tiles=query_tiles, key_tiles=key_tiles, LISTS=constant(lists), FIRST_PART=MIXED,
            PARTS_END=constant(MIXED.value + 1),
        )  # fmt: skip

    @cached_property
    def _sizes(self) -> Sizes:
        q, k, v, slopes = self.q, self.k, self.v, self.alibi_slopes
        (_, heads, n_q, _), (_, kv_heads, n_k, _) = q.shape, k.shape
        return sealed_sizes(
            heads, heads // kv_heads, n_q, n_k, min(self.left, UNLIMITED), min(self.right, UNLIMITED),
            slopes.stride(0) if slopes is not None and slopes.ndim == 2 else 0, 
            1 if self.alpha is not None and self.alpha.numel() > 1 else 0,
            *_pitches(q), *_pitches(k), *_pitches(v),
            self.list_size, self.key_list_size, 0, 0, float(self.scale),
        )  # fmt: skip

    def sizes(self, first_head: int = 0, rest: int = 0) -> Sizes:
        """Return the run-time numbers.

        Args:
            first_head: the one that the grid starts with, counted over the batch.
            rest: heads of a launch for the rest of the keys; 0 for other launches.
        """
        if first_head or rest:
            return self._sizes._replace(first_head=sealed(first_head), launched=sealed(rest))
        return self._sizes

    def retiled(self, tiles: Tiles) -> Problem:
        """Return the same problem with other tiles, without working out anything again."""
        inputs = self._inputs._replace(BLOCK_M=constant(tiles.block_m), BLOCK_N=constant(tiles.block_n))
        other = object.__new__(Problem)  # nothing is checked or worked out again
        other.__dict__.update(self.__dict__, tiles=tiles, _inputs=inputs, _sizes=self._sizes)
        return other

    @property
    def column_tiles(self) -> ColumnTiles:
        return choose_column_tiles(self.q.shape[3], self.q.dtype)

    @property
    def lists(self) -> int:
        """Lists of columns of a head."""
        return -(-self.q.shape[2] // self.column_tiles.walk.block_m)

    @property
    def key_lists(self) -> int:
        """Lists of queries of a head."""
        return -(-self.k.shape[2] // self.column_tiles.grad_keys.block_n)

    @property
    def list_size(self) -> int:
        """Numbers that a head's lists of columns take."""
        return list_numbers(self.column_tiles, self.lists, self.k.shape[2])

    @property
    def key_list_size(self) -> int:
        """Numbers that a head's lists of queries take."""
        return list_numbers(self.column_tiles, self.key_lists, self.q.shape[2])

    @cached_property
    def listed(self) -> Problem:
        """The same with tiles for passes along lists of columns."""
        return self.retiled(self.column_tiles.walk)

    @cached_property
    def listed_keys(self) -> Problem:
        """The same with tiles for passes along lists of queries."""
        return self.retiled(self.column_tiles.grad_keys)

    @cached_property
    def unlisted(self) -> Problem:
        """The same with tiles for passes over all tiles, of queries or keys that have no list."""
        return self.retiled(self.column_tiles.rest)

    @property
    def query_blocks(self) -> int:
        return -(-self.q.shape[2] // self.tiles.block_m)  # triton.cdiv takes ten times as long

    @property
    def key_blocks(self) -> int:
        return -(-self.k.shape[2] // self.tiles.block_n)

    @property
    def groups(self) -> int:
        """Query heads per key-value head."""
        return self.q.shape[1] // self.k.shape[1]

    def query_bytes(self, heads: int) -> int:
        """Return how much memory the queries of so many heads take, in bytes."""
        return heads * self.q.shape[2] * self.q.shape[3] * self.q.itemsize

    @property
    def heads(self) -> int:
        """Query heads, counted over the batch."""
        return self.q.shape[0] * self.q.shape[1]

    def others(self, keys: bool) -> int:
        """Return how many rows lists name: queries, those of blocks of keys; else keys."""
        return self.q.shape[2] if keys else self.k.shape[2]

    def query_grid(self, heads: int | None = None) -> tuple[int]:
        """One program for each block of queries of each head, or of so many heads."""
        return (self.query_blocks * (heads or self.heads),)

    def key_grid(self, heads: int | None = None) -> tuple[int]:
        """One program for each block of keys of each key-value head that these query heads use."""
        return (self.key_blocks * (heads or self.heads) * self.k.shape[1] // self.q.shape[1],)

    def head_chunks(self, bytes_each: int, first: int = 0, heads: int | None = None) -> Iterator[tuple[int, int]]:
        """Cut the heads, or some of them, into chunks, first and number, that take about WORKSPACE bytes; heads that
        share keys stay together."""
        end = self.heads if heads is None else first + heads
        space = WORKSPACE * max(1, self.query_bytes(self.heads) >> 26)  # little beside large inputs is still more
        count = max(1, space // max(1, bytes_each * self.groups)) * self.groups
        return ((start, min(count, end - start)) for start in range(first, end, count))

    @property
    def options(self) -> dict[str, int]:
        """Launch options."""
        limit = {} if self.tiles.registers is None else {"maxnreg": self.tiles.registers}
        return {"num_warps": self.tiles.num_warps, "num_stages": self.tiles.num_stages} | limit

    def visit_options(self, lists: str | None) -> dict[str, int]:
        """Launch options of output and of the gradient of queries: a third stage pays along a bit mask of tiles alone.

        The gradient of keys and values has them too, but along lists of columns, where a third stage pays for it.
        """
        return self.options if lists == "tiles" else self.options | {"num_stages": min(self.tiles.num_stages, 2)}

    @property
    def capped_options(self) -> dict[str, int]:
        """More of them for kernels that find thresholds.

        Registers for three programs of 4 warps on a multiprocessor: what the compiler would keep in a few more of them
        is addresses for other loops. Above d = 64 there is not the shared memory for three.
        """
        fits = self.tiles.num_warps == 4 and self.q.shape[3] <= 64 and self.q.dtype != torch.float32
        return {"maxnreg": 168} if fits and self.alpha_kind != "any" else {}  # logarithms would spill


def _pitches(x: Tensor) -> tuple[int, ...]:
    """Return the strides of batch, head and row; 0 where there is one only and its stride may be anything."""
    return own_strides(x.shape, x.stride())


def _aligned(*tensors: Tensor) -> tl.constexpr:
    return multiples_of_8(*map(_pitches, tensors))


def _threshold(
    kernel: triton.JITFunction, problem: Problem, mark: bool, max_iterations: int
) -> tuple[Tensor, Tensor | None]:
    batch, heads, n_q, _ = problem.q.shape
    theta = torch.empty(batch, heads, n_q, dtype=torch.float32, device=problem.q.device)
    tiles = None
    # Softmax has no zeros, and where scores are stored no tile is visited again.
    if mark and problem.alpha_kind != "1" and problem.scores is None:
        # zeros: a block writes only the words of tiles that the mask of attention leaves it
        shape = (batch * heads, problem.query_blocks, words(problem.key_blocks))
        tiles = torch.zeros(shape, dtype=torch.int32, device=problem.q.device)
    options = problem.options | problem.capped_options
    kernel[problem.query_grid()](problem.inputs(), problem.sizes(), theta, tiles, max_iterations, **options)
    return theta, tiles


@register("adasplash", lists="tiles", replayed=True)
def halley(problem: Problem, max_iterations: int = MAX_ITERATIONS) -> tuple[Tensor, Tensor | None]:
    """Halley-bisection, with a bit mask of tiles (AdaSplash)."""
    return _threshold(halley_kernel, problem, True, max_iterations)


@register("adasplash_nomask", replayed=True)
def halley_without_mask(problem: Problem, max_iterations: int = MAX_ITERATIONS) -> Tensor:
    """Halley-bisection that leaves every tile to be visited (AdaSplash without block masks)."""
    return _threshold(halley_kernel, problem, False, max_iterations)[0]


@register("adasplash2", lists="tiles", replayed=True)
def histogram(problem: Problem, max_iterations: int = MAX_ITERATIONS) -> tuple[Tensor, Tensor | None]:
    """Histogram start and safeguarded updates, with a bit mask of tiles (AdaSplash-2)."""
    return _threshold(histogram_kernel, problem, True, max_iterations)


def _bound(
    problem: Problem,
    tiles: Tiles,
    floor: Tensor,
    visits: Tensor | None = None,
    start: int = 0,
    heads: int | None = None,
) -> None:
    """Write a lower bound of theta, from group maxima, to ``floor`` (B, H, N_q) float32; ``+inf`` where a row sees no
    key.

    Args:
        visits: (heads, blocks, numbers) int32, to be written as worklists/visits.py says; or None.
        start, heads: the first head, counted over the batch, and how many; all by default.
    """
    columns, coarse = problem.column_tiles, problem.retiled(tiles)
    inputs, sizes, pitch = coarse.inputs(), coarse.sizes(start), 0 if visits is None else visits.shape[2]
    groups, block = columns.groups, columns.emit.block_m
    bound_kernel[coarse.query_grid(heads)](inputs, sizes, floor, visits, pitch, groups, block, **coarse.options)


def _lists(problem: Problem, floor: Tensor) -> Tensor:
    """Return lists of columns (B * H, numbers) int32, see worklists/columns.py, and write the floor that they follow
    from, (B, H, N_q) float32."""
    n_k, tiles = problem.k.shape[2], problem.column_tiles
    coarse, block_m = problem.retiled(tiles.emit), tiles.walk.block_m
    programs, bytes_each = coarse.query_blocks, triton.cdiv(n_k, WORD) * WORD
    pitch = HEADER.value + coarse.key_blocks if LIST_TILES else 0
    stages = 2 * coarse.tiles.num_stages - 1  # as many fetch tiles of keys as elsewhere, and as many their numbers
    # zeros: it is an output of a custom op, which must be a function of its inputs even where nothing reads it
    lists = torch.zeros(problem.heads, problem.list_size, dtype=torch.int32, device=floor.device)
    for start, count in problem.head_chunks(4 * programs * pitch):
        visits = None
        if pitch:
            visits = torch.empty(count, programs, pitch, dtype=torch.int32, device=floor.device)
        _bound(problem, tiles.bound, floor, visits, start, count)
        for first, part in problem.head_chunks(programs * bytes_each, start, count):
            # zeros: where no tile is visited no byte is written
            shape = (part, programs, bytes_each)
            bits = (torch.zeros if pitch else torch.empty)(shape, dtype=torch.int8, device=floor.device)
            rows = None if visits is None else visits[first - start : first - start + part]
            inputs, sizes, grid = coarse.inputs(), coarse.sizes(first), coarse.query_grid(part)
            emit_kernel[grid](inputs, sizes, floor, bits, bytes_each, rows, pitch, block_m, stages, **coarse.options)
            _compact(problem.listed, bits, lists[first : first + part], first, keys=False)
    return lists


def _risen(problem: Problem, floor: Tensor, lists: Tensor | None, settle: Settle | None, max_iterations: int) -> Tensor:
    """Return theta, a step short with ``settle``, solved on lists of columns or on all keys."""
    tiles, theta = problem.column_tiles, torch.empty_like(floor)
    launches = ((tiles.scan, None),) if lists is None else ((tiles.solve, "columns"), (tiles.rest, "rest"))
    for size, kind in launches:
        part = problem.retiled(size)
        inputs, sizes = part.inputs(kind, query_tiles=lists), part.sizes()
        listed_kernel[part.query_grid()](inputs, sizes, floor, theta, settle, max_iterations, **part.options)
    return theta


def _from_maxima(
    problem: Problem, max_iterations: int = MAX_ITERATIONS, *, listed: bool, early: bool
) -> tuple[Tensor, Any, Any]:
    """Return theta from group maxima's bound, with ``listed`` the lists of columns that follow from it, and with
    ``early``, which leaves theta a step short, what the output's pass needs to take that step; else None."""
    settle = None
    if early:
        count = torch.empty(problem.q.shape[:3], dtype=torch.float32, device=problem.q.device)
        settle = Settle(count, constant(MAX_ITERATIONS), constant(torch.finfo(problem.q.dtype).eps))
    floor = torch.empty(problem.q.shape[:3], dtype=torch.float32, device=problem.q.device)
    lists = None
    if listed:
        lists = _lists(problem, floor)
    else:
        _bound(problem, problem.column_tiles.near, floor)
    return _risen(problem, floor, lists, settle, max_iterations), lists, settle


def _maxima_help(problem: Problem) -> bool:
    """Softmax has no zeros, and where scores are stored no pass over K is saved."""
    return problem.alpha_kind != "1" and problem.scores is None


@register("columns", lists="columns", approach=partial(_from_maxima, listed=True, early=True), replayed=True)
def column_lists(problem: Problem, max_iterations: int = MAX_ITERATIONS) -> tuple[Tensor, Tensor | None]:
    """Group maxima's bound, and the keys that pass it for any query of a block (this project)."""
    if not _maxima_help(problem):
        return _threshold(halley_kernel, problem, False, max_iterations)
    return _from_maxima(problem, max_iterations, listed=True, early=False)[:2]


@register("columns_nolist", approach=partial(_from_maxima, listed=False, early=True), replayed=True)
def columns_without_lists(problem: Problem, max_iterations: int = MAX_ITERATIONS) -> Tensor:
    """Group maxima's bound, and Newton's steps on all keys: for rows too short for lists to pay."""
    if not _maxima_help(problem):
        return _threshold(halley_kernel, problem, False, max_iterations)[0]
    return _from_maxima(problem, max_iterations, listed=False, early=False)[0]


def _compact(problem: Problem, bits: Tensor, lists: Tensor, first_head: int, keys: bool) -> None:
    """Write the lists of columns (heads, numbers) int32 that bits stand for.

    Args:
        bits: as ``count_kernel`` takes them.
        first_head: the head, counted over the batch, that they start with.
        keys: whether the blocks are of keys and the entries are queries.
    """
    (heads, _, numbers), pitch, n = bits.shape, lists.shape[1], problem.others(keys)
    blocks, words_each, shared = problem.key_lists, numbers, 1
    if not keys:
        tiles = problem.column_tiles
        blocks, words_each, shared = problem.lists, numbers // WORD, tiles.emit.block_m // tiles.walk.block_m
    inputs, sizes, grid = problem.inputs(), problem.sizes(first_head), (heads * blocks,)
    count_kernel[grid](inputs, sizes, bits, lists, blocks, words_each, pitch, DENSEST, keys, shared, num_warps=1)
    chunk = 32 if INTERPRETED else 1024
    own, rest = problem.tiles, problem.column_tiles.rest
    together = rest.block_n // own.block_n if keys else rest.block_m // own.block_m
    share_kernel[(heads,)](lists, blocks, pitch, pool_entries(pitch, blocks, n), together, chunk, num_warps=4)
    narrow = n <= NARROW
    compact_kernel[grid](inputs, sizes, bits, lists, blocks, words_each, pitch, keys, shared, narrow, num_warps=1)


def threshold(method: str, problem: Problem) -> tuple[Tensor, Tensor | None]:
    """Return theta (B, H, N_q) float32 and the work lists, if the method leaves any."""
    entry = THRESHOLDS[method]
    found = entry.solve(problem)
    return found if entry.lists else (found, None)


def kind_of_lists(method: str, lists: Tensor | None) -> str | None:
    """Return which kind of work lists these are: "tiles", "columns", or None for none."""
    return None if lists is None else THRESHOLDS[method].lists


def settles(problem: Problem) -> bool:
    """Tell whether the output's pass may take the last step to theta: 16 bits hide what that leaves (see settle.py)."""
    return problem.alpha_kind == "1.5" and problem.q.dtype != torch.float32 and problem.scores is None


def forward(method: str, problem: Problem, need_out2: bool) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None]:
    """Return O and, if asked for, O2, (B, H, N_q, D) in q's dtype; theta and work lists as ``threshold`` does."""
    entry, settle = THRESHOLDS[method], None
    if entry.approach is not None and settles(problem):
        theta, lists, settle = entry.approach(problem)
    else:
        theta, lists = threshold(method, problem)
    q = problem.q
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    out2 = torch.empty(q.shape, dtype=q.dtype, device=q.device) if need_out2 else None
    for part, inputs, options in _visits(problem, kind_of_lists(method, lists), lists):
        output_kernel[part.query_grid()](inputs, part.sizes(), theta, out, out2, settle, **options)
    return out, out2, theta, lists


def _visits(
    problem: Problem, kind: str | None, lists: Tensor | None, listed: Problem | None = None
) -> Iterator[tuple[Problem, Inputs, dict[str, int]]]:
    """Yield the launches that visit keys for each query: its tiles, inputs and options. Where there are lists of
    columns they are two: one along the lists, and one for the rest.

    Args:
        listed: with the tiles of the first of these, if not those of the output.
    """
    parts = ((problem, kind),)
    if kind == "columns":
        parts = (listed or problem.listed, kind), (problem.unlisted, "rest")
    for part, of in parts:
        yield part, part.inputs(of, query_tiles=lists), part.visit_options(of)


def backward_gradients(
    problem: Problem, theta: Tensor, out2: Tensor, method: str, lists: Tensor | None, d_out: Tensor, need_alpha: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Return dQ (B, H, N_q, D), dK and dV (B, H_kv, N_k, D) in the inputs' dtype; d_alpha (B, H, N_q) if asked for."""
    q, k, v = problem.q, problem.k, problem.v
    delta = torch.empty_like(theta)
    dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    d_alpha = torch.empty_like(theta) if need_alpha else None
    up = Upstream(theta, delta, d_out, *(sealed(n) for n in _pitches(d_out)), _aligned(d_out))
    kind = kind_of_lists(method, lists)
    if kind != "columns":
        sizes, inputs, options = problem.sizes(), problem.inputs(kind, query_tiles=lists), problem.visit_options(kind)
        grad_query_kernel[problem.query_grid()](inputs, sizes, up, out2, dq, d_alpha, None, None, **options)
        key_tiles = None if lists is None else transpose(lists, problem.key_blocks)
        keyed = problem.inputs(kind, key_tiles=key_tiles)
        grad_key_value_kernel[problem.key_grid()](keyed, sizes, up, dk, dv, None, **options)
        return dq, dk, dv, d_alpha
    each = 2 * problem.key_lists * _words_each(problem) + 4 * problem.key_list_size
    for start, count in problem.head_chunks(each):
        _gradients_along_lists(problem, up, out2, lists, (dq, dk, dv, d_alpha), start, count)
    return dq, dk, dv, d_alpha


def _words_each(problem: Problem) -> int:
    """Return how many words say which queries use a block of keys, one bit a query."""
    return problem.unlisted.query_blocks * (problem.unlisted.tiles.block_m // WORD)


def _gradients_along_lists(
    problem: Problem, up: Upstream, out2: Tensor, lists: Tensor, results: tuple, start: int, heads: int
) -> None:
    """Write the gradients of some heads along lists of columns.

    Args:
        results: dQ, dK and dV, and d_alpha or None.
        start, heads: the first head, counted over the batch, and how many.
    """
    dq, dk, dv, d_alpha = results
    shape, device = (heads, problem.key_lists, _words_each(problem)), dq.device
    numbers = math.prod(shape)
    whole = torch.zeros(triton.cdiv(numbers, 2), dtype=torch.int32, device=device)
    used = whole.view(torch.int16)[:numbers].view(shape)
    of_lists, of_rest = _visits(problem, "columns", lists, problem.retiled(problem.column_tiles.grad))
    (listed, inputs, options), (rest, rest_inputs, rest_options) = of_lists, of_rest
    for first, part, masks in _mask_rounds(problem, lists, (dk, dv), start, heads):
        sizes, grid = listed.sizes(first), listed.query_grid(part)
        grad_query_kernel[grid](inputs, sizes, up, out2, dq, d_alpha, masks, used, **options)
        scatter_kernel[(grid[0] * SCATTERED,)](inputs, sizes, masks, whole, SCATTERED, num_warps=1)
        grid = rest.query_grid(part)
        grad_query_kernel[grid](rest_inputs, sizes, up, out2, dq, d_alpha, masks, used, **rest_options)
    del masks  # the lists and the pieces take its place
    key_tiles = torch.empty(heads, problem.key_list_size, dtype=torch.int32, device=device)
    narrow = problem.listed_keys
    _compact(narrow, used, key_tiles, start, keys=True)
    del used, whole
    keyed, sizes = narrow.inputs("columns", key_tiles=key_tiles), problem.sizes(start)
    pieces = _pieces(narrow, keyed, sizes, heads)
    slots = pieces.owner.numel()
    grid = (narrow.key_grid(heads)[0] + slots,)
    grad_key_value_kernel[grid](keyed, sizes, up, dk, dv, pieces, **narrow.options)
    add_pieces_kernel[(slots,)](keyed, sizes, pieces, dk, dv, num_warps=4)
    keyed = rest.inputs("rest", key_tiles=key_tiles)
    sizes, grid = problem.sizes(start, heads), (min(REST, rest.key_grid(heads)[0]),)
    grad_key_value_kernel[grid](keyed, sizes, up, dk, dv, None, **rest_options)


def _mask_rounds(
    problem: Problem, lists: Tensor, spare: tuple[Tensor, Tensor], start: int, heads: int
) -> Iterator[tuple[int, int, Masks]]:
    """Cut heads into rounds: yield the first head and the number of each, and where its masks go.

    They go where dK and dV are to be written later, and as many more as take twice what queries do.
    """
    tiles, blocks, sides = problem.column_tiles.grad, problem.lists, _sides(problem)
    word = getattr(torch, f"int{tiles.block_n // 2 // sides}")
    number = list_tiles(pool_entries(lists.shape[1], blocks, problem.k.shape[2]), blocks, tiles.block_n)
    each = number * 2 * tiles.block_m * sides
    constants = sealed(_words_each(problem)), constant(problem.column_tiles.grad_keys.block_n), constant(sides)
    places = [_as_words(x, word, start // problem.groups, heads // problem.groups) for x in spare]
    rooms = [x.numel() // each for x in places]
    most = max(1, min(WORKSPACE, 2 * problem.query_bytes(heads)) // (each * word.itemsize))
    count = triton.cdiv(heads, triton.cdiv(heads, sum(rooms) + most))
    rest = count - sum(rooms)
    more = torch.empty(rest * each, dtype=word, device=lists.device) if rest > 0 else places[rooms[0] == 0]
    places = [place if room else more for place, room in zip(places, rooms, strict=True)]
    for first in range(start, start + heads, count):
        masks = Masks(*places, more, *map(sealed, (*rooms, number, first - start)), *constants)
        yield first, min(count, start + heads - first), masks


def _sides(problem: Problem) -> int:
    """Return how many warps share the keys of a tile that is walked along lists."""
    tiles = problem.column_tiles.grad
    return tiles.num_warps if tiles.block_m == WORD else 1


def _as_words(x: Tensor, word: torch.dtype, start: int, heads: int) -> Tensor:
    """Return the memory of some heads of (B, H, N, D), contiguous, as numbers; none if it does not start with one."""
    size, step = x.shape[2] * x.shape[3], max(1, word.itemsize // x.itemsize)
    if start * size % step:
        return x.view(-1)[:0].view(word)
    return x.view(-1)[start * size : start * size + heads * size // step * step].view(word)


def _pieces(problem: Problem, keyed: Inputs, sizes: Sizes, heads: int) -> Pieces:
    """Return the pieces that the walks of these query heads' blocks of keys are cut into; see worklists/pieces.py."""
    blocks, device = problem.key_blocks, problem.q.device
    kv_heads = problem.key_grid(heads)[0] // blocks
    piece = 8 * keyed.BLOCK_N.value * keyed.BLOCK_D.value  # bytes
    most = min(PIECES, problem.query_bytes(heads) // (2 * piece))
    room = max(1, min(most // kv_heads, 2 * blocks))
    first, owner = (torch.empty(kv_heads, n, dtype=torch.int32, device=device) for n in (blocks, room))
    lengths = torch.empty(kv_heads, dtype=torch.int32, device=device)
    shape = (kv_heads, room, 2, keyed.BLOCK_N.value, keyed.BLOCK_D.value)
    sums = torch.empty(shape, dtype=torch.float32, device=device)
    count_tiles_kernel[(kv_heads * blocks,)](keyed, sizes, first, num_warps=1)
    chunk = 32 if INTERPRETED else 1024
    place_pieces_kernel[(kv_heads,)](first, owner, lengths, blocks, room, PIECE, chunk, num_warps=4)
    return Pieces(first, owner, lengths, sums, sealed(room))
