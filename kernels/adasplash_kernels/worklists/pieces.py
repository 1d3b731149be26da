"""Walks of blocks of keys, cut into pieces where they are long.

In trained models nearly all queries use the first keys, and one program that walks along all of them is still at it
when the rest is done. Such a walk is cut into pieces of so many tiles, and each piece is a program of its own, which
keeps its sum apart in float32; another kernel adds a block's pieces up in their order. Which walks are cut is decided
on the device, from lengths alone, so that gradients repeat bit for bit.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from ..inputs import open_sizes, opened
from ..launching import launched_by_key
from ..scores import key_block, key_block_at, rank_and_head, store_rows
from .walk import Walk, key_list, keys_are_anothers

_FAR = tl.constexpr(1 << 30)  # more tiles than any walk has


class Pieces(NamedTuple):
    """Where the pieces of a launch are.

    Attributes:
        first: (key-value heads, key blocks) int32, the number among a head's of each block's first piece; -1 where a
            walk is not cut.
        owner: (key-value heads, room) int32, the block of each piece; -1 for none.
        length: (key-value heads,) int32, tiles of a piece.
        sums: (key-value heads, room, 2, BLOCK_N, BLOCK_D) float32, dK and dV of each piece.
        room: pieces of a head at the most, sealed (see inputs.py).
    """

    first: Any
    owner: Any
    length: Any
    sums: Any
    room: int


class Part(NamedTuple):
    """Which part of its walk a program takes.

    Attributes:
        begin, end: tiles, counted through the walks of all query heads that share the block's keys.
        slot: the piece's number among all of the launch; -1 for a whole walk.
    """

    begin: Any
    end: Any
    slot: Any


@launched_by_key
@triton.jit
def count_tiles_kernel(x, size, tiles):
    """Write how many tiles the walk of one block of keys has, into (key-value heads of this launch, blocks) int32; 0
    where there is no list for it."""
    size = open_sizes(x, size)
    at = key_block(x, size)
    count = at.first * 0
    if not keys_are_anothers(x, size, at):
        for group in range(size.groups):
            walk = key_list(x, size, at, at.head + group)
            count += walk.last - walk.first
    blocks = tl.cdiv(size.n_k, x.BLOCK_N)
    tl.store(tiles + (at.head_index - size.first_head // size.groups) * blocks + at.index, count)


@triton.jit
def _cut(tiles, block, blocks, length):
    """Return how many pieces the walks of some blocks make; 0 for those that make one."""
    count = tl.cdiv(tl.load(tiles + block, mask=block < blocks, other=0), length)
    return tl.where(count > 1, count, 0)


@triton.jit
def _number(tiles, blocks, length, CHUNK: tl.constexpr):
    """Return how many pieces all walks make together."""
    number = 0
    for start in range(0, blocks, CHUNK):
        number += tl.sum(_cut(tiles, start + tl.arange(0, CHUNK), blocks, length), 0)
    return number


@launched_by_key
@triton.jit(do_not_specialize=["blocks", "room"])
def place_pieces_kernel(first, owner, length_out, blocks, room, LENGTH: tl.constexpr, CHUNK: tl.constexpr):
    """Number the pieces of one head.

    Args:
        first: numbers of tiles from ``count_tiles_kernel``, which ``Pieces.first`` takes the place of.
        LENGTH: tiles of a piece, if there is room for as many; else twice as many, or four times, and so on.
    """
    head = tl.program_id(0).to(tl.int64)
    first += head * blocks
    owner += head * room
    length = tl.full((), LENGTH, tl.int32)
    wanted = _number(first, blocks, length, CHUNK)
    while wanted > room:
        length *= 2
        wanted = _number(first, blocks, length, CHUNK)
    tl.store(length_out + head, length)
    taken = 0
    for start in range(0, blocks, CHUNK):
        block = start + tl.arange(0, CHUNK)
        count = _cut(first, block, blocks, length)
        place = taken + tl.cumsum(count, 0) - count
        tl.store(first + block, tl.where(count > 0, place, -1), mask=block < blocks)
        for i in range(tl.max(count, 0)):
            tl.store(owner + place + i, block, mask=i < count)
        taken += tl.sum(count, 0)
    for start in range(0, room, CHUNK):
        slot = start + tl.arange(0, CHUNK)
        tl.store(owner + slot, slot * 0 - 1, mask=(slot >= wanted) & (slot < room))


@triton.jit
def block_and_part(x, size, pieces):
    """Return this program's block of keys and the part of its walk that it takes; an empty one if there is none left.

    Pieces come first in the grid: they take the longest.
    """
    blocks = tl.cdiv(size.n_k, x.BLOCK_N)
    if pieces is None:
        at = key_block(x, size)
        part = Part(0, _FAR, -1)
    else:
        room = opened(pieces.room)
        first_head = size.first_head // size.groups
        number = tl.program_id(0)
        heads = tl.num_programs(0) // (blocks + room)
        slots = heads * room
        is_piece = number < slots
        slot = tl.where(is_piece, number, 0)
        owner = tl.where(is_piece, tl.load(pieces.owner + slot), -1)
        whole = tl.where(is_piece, 0, number - slots)
        rank, one = rank_and_head(x, whole, blocks, heads, size.n_q * size.groups)
        head = tl.where(is_piece, slot // room, one)
        index = tl.where(is_piece, tl.maximum(owner, 0), rank)
        first = tl.load(pieces.first + head * blocks + index)
        length = tl.load(pieces.length + head)
        begin = tl.where(is_piece, (slot % room - first) * length, 0)
        none = tl.where(is_piece, owner < 0, first >= 0)
        end = tl.where(none, begin, tl.where(is_piece, begin + length, _FAR))
        at = key_block_at(x, size, first_head + head, index)
        part = Part(begin, end, tl.where(is_piece & (owner >= 0), slot, -1))
    return at, part


@triton.jit
def part_of(walk, part, before):
    """Return the part of one head's walk that belongs to a part, and how many tiles there are up to its end.

    Args:
        before: how many tiles the heads before have.
    """
    tiles = walk.last - walk.first
    begin = tl.minimum(tl.maximum(part.begin - before, 0), tiles)
    end = tl.minimum(tl.maximum(part.end - before, 0), tiles)
    shorter = Walk(
        walk.start, walk.first + begin, walk.first + end, walk.inner_low, walk.inner_high, walk.count
    )  # fmt: skip
    return shorter, before + tiles


@triton.jit
def _place(x, pieces, slot, SIDE: tl.constexpr):
    """Return pointers to the sum of a piece (BLOCK_N, BLOCK_D): of dK for SIDE 0, of dV for 1."""
    row = (slot.to(tl.int64) * 2 + SIDE) * x.BLOCK_N + tl.arange(0, x.BLOCK_N)
    return pieces.sums + row[:, None] * x.BLOCK_D + tl.arange(0, x.BLOCK_D)[None, :]


@triton.jit
def store_part(x, pieces, slot, acc_k, acc_v):
    """Keep a piece's sums."""
    tl.store(_place(x, pieces, slot, 0), acc_k)
    tl.store(_place(x, pieces, slot, 1), acc_v)


@launched_by_key
@triton.jit
def add_pieces_kernel(x, size, pieces, dk, dv):
    """Add up the pieces of one block of keys, in order: the program of its first piece does it."""
    size = open_sizes(x, size)
    room = opened(pieces.room)
    head = tl.program_id(0) // room
    end = (head + 1) * room
    slot = tl.program_id(0)
    block = tl.load(pieces.owner + slot)
    blocks = tl.cdiv(size.n_k, x.BLOCK_N)
    first = tl.load(pieces.first + head * blocks + tl.maximum(block, 0))
    if (block >= 0) & (head * room + first == slot):
        acc_k = tl.zeros((x.BLOCK_N, x.BLOCK_D), tl.float32)
        acc_v = tl.zeros((x.BLOCK_N, x.BLOCK_D), tl.float32)
        owner = block
        while owner == block:
            acc_k += tl.load(_place(x, pieces, slot, 0))
            acc_v += tl.load(_place(x, pieces, slot, 1))
            slot += 1
            owner = tl.load(pieces.owner + slot, mask=slot < end, other=-1)
        at = key_block_at(x, size, size.first_head // size.groups + head, block)
        base = at.head_index * size.n_k * x.d
        store_rows(x, dk + base, acc_k, at.rows, size.n_k)
        store_rows(x, dv + base, acc_v, at.rows, size.n_k)
