"""Launching the kernels: grids and work lists. Nothing here knows about autograd."""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
import triton
from torch import Tensor

from . import limits
from .backward import Upstream, grad_key_value_kernel, grad_query_kernel
from .forward import output_kernel
from .inputs import Inputs, Sizes, sealed
from .kept import constant
from .problem import Problem, aligned, pitches, pool_entries
from .short import gradients, on_chip
from .thresholds import THRESHOLDS, register
from .thresholds.group_maxima import bound_kernel, listed_kernel
from .thresholds.halley import halley_kernel
from .thresholds.histogram import histogram_kernel
from .thresholds.refine import MAX_ITERATIONS
from .thresholds.settle import Settle
from .tile_sizes import INTERPRETED, Tiles
from .worklists.columns import WORD, compact_kernel, count_kernel, emit_kernel, share_kernel
from .worklists.marks import Masks, list_tiles, scatter_kernel
from .worklists.pieces import Pieces, add_pieces_kernel, count_tiles_kernel, place_pieces_kernel
from .worklists.tiles import transpose, words
from .worklists.walk import HEADER


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
    pitch = HEADER.value + coarse.key_blocks if limits.LIST_TILES else 0
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


@register("columns_nolist", approach=partial(_from_maxima, listed=False, early=True), replayed=True, on_chip=True)
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
    count_kernel[grid](inputs, sizes, bits, lists, blocks, words_each, pitch, limits.DENSEST, keys, shared, num_warps=1)
    chunk = 32 if INTERPRETED else 1024
    own, rest = problem.tiles, problem.column_tiles.rest
    together = rest.block_n // own.block_n if keys else rest.block_m // own.block_m
    share_kernel[(heads,)](lists, blocks, pitch, pool_entries(pitch, blocks, n), together, chunk, num_warps=4)
    narrow = n <= limits.NARROW
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
    if entry.on_chip and (done := on_chip(problem, need_out2)) is not None:
        out, out2, theta = done
        return out, out2, theta, None
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
    up = Upstream(theta, delta, d_out, *(sealed(n) for n in pitches(d_out)), aligned(d_out))
    kind = kind_of_lists(method, lists)
    short = THRESHOLDS[method].on_chip and lists is None and not need_alpha
    if short and gradients(problem, up, out2, dq, dk, dv):
        return dq, dk, dv, d_alpha
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
        scatter_kernel[(grid[0] * limits.SCATTERED,)](inputs, sizes, masks, whole, limits.SCATTERED, num_warps=1)
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
    sizes, grid = problem.sizes(start, heads), (min(limits.REST, rest.key_grid(heads)[0]),)
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
    most = max(1, min(limits.WORKSPACE, 2 * problem.query_bytes(heads)) // (each * word.itemsize))
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
    most = min(limits.PIECES, problem.query_bytes(heads) // (2 * piece))
    room = max(1, min(most // kv_heads, 2 * blocks))
    first, owner = (torch.empty(kv_heads, n, dtype=torch.int32, device=device) for n in (blocks, room))
    lengths = torch.empty(kv_heads, dtype=torch.int32, device=device)
    shape = (kv_heads, room, 2, keyed.BLOCK_N.value, keyed.BLOCK_D.value)
    sums = torch.empty(shape, dtype=torch.float32, device=device)
    count_tiles_kernel[(kv_heads * blocks,)](keyed, sizes, first, num_warps=1)
    chunk = 32 if INTERPRETED else 1024
    place_pieces_kernel[(kv_heads,)](first, owner, lengths, blocks, room, limits.PIECE, chunk, num_warps=4)
    return Pieces(first, owner, lengths, sums, sealed(room))
