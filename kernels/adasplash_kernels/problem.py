"""A call as kernels are launched for it: what they are given, which tiles, how many programs. No tensor of results."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property

import torch
import triton.language as tl
from torch import Tensor

from . import limits
from .inputs import UNLIMITED, Inputs, Sizes, sealed
from .kept import block_d, constant, multiples_of_8, own_strides, sealed_sizes
from .spans import packed_spans
from .tile_sizes import ColumnTiles, Tiles, choose_column_tiles, choose_tiles
from .worklists.walk import EDGES, HEADER, MIXED


def column_list_size(blocks: int, n: int, share: int = 1) -> int:
    """Return how many numbers a head's lists of columns take: ``blocks`` headers, and the pool, among ``n`` rows.

    Args:
        share: lists have a part of ``limits.ENTRIES`` each, one in so many.
    """
    pairs = (torch.sym_min(limits.ENTRIES // share, n) + 1) // 2  # lists start at even places
    return blocks * (HEADER.value + (pairs if n <= limits.NARROW else 2 * pairs))


def list_numbers(tiles: ColumnTiles, blocks: int, n: int) -> int:
    """Return the same for these tiles; wide entries are two thirds as many.

    For N(0, 1) at N = 131072 and head dim 64, lists for 16 queries have 600 entries on average, and room for 768.
    """
    return column_list_size(blocks, n, tiles.share if tiles.share == 1 or n <= limits.NARROW else 3 * tiles.share // 2)


def pool_entries(numbers: int, blocks: int, n: int) -> int:
    """Return how many entries there is room for in a head whose lists take so many numbers."""
    return (numbers - blocks * HEADER.value) * (2 if n <= limits.NARROW else 1)


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
            aligned(q, k, v), constant(padded), constant(tiles.block_m), constant(tiles.block_n),
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
        if lists == "columns" and self.others(key_tiles is not None) <= limits.NARROW:
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
            *pitches(q), *pitches(k), *pitches(v),
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
        """Cut the heads, or some of them, into chunks, first and number, that take about ``limits.WORKSPACE`` bytes at
        the most and are of one size, but for the last; heads that share keys stay together."""
        end = self.heads if heads is None else first + heads
        # little beside large inputs is still more
        space = limits.WORKSPACE * max(1, self.query_bytes(self.heads) >> 26)
        groups = -(-(end - first) // self.groups)
        chunks = -(-groups // max(1, space // max(1, bytes_each * self.groups)))
        count = -(-groups // max(1, chunks)) * self.groups  # a launch of few heads ends with few programs at work
        return ((start, min(count, end - start)) for start in range(first, end, max(1, count)))

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


def pitches(x: Tensor) -> tuple[int, ...]:
    """Return the strides of batch, head and row; 0 where there is one only and its stride may be anything."""
    return own_strides(x.shape, x.stride())


def aligned(*tensors: Tensor) -> tl.constexpr:
    return multiples_of_8(*map(pitches, tensors))
