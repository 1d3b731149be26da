"""Lists of columns: for each block of queries, the single keys that any of its queries can use; and the transpose.

Zeros of entmax are scattered over tiles, but few keys are used by any one block of queries. Rows of K and V are
contiguous, so tiles gathered from a list of keys feed the tensor cores as dense ones do. A list is made in two steps.
First a byte a key, with a bit for each of up to 8 blocks: ``emit_kernel`` sets them in one pass over the scores, from
a lower bound of each query's threshold; of tiles that hold none of them it skips most (see visits.py). Then
``compact_kernel`` turns bits into row numbers.

The gradients of keys and values walk the transpose: for each block of keys, the queries that use any of them. Its bits,
here of 16 queries a word, come from the gradient of queries (see marks.py), and are compacted by the same kernel.

The lists of a head share one pool, each taking what it needs, so that the long ones of a few blocks need not fit into
an even share; entries take 16 bits where row numbers fit. A block whose list would save little, or finds the pool used
up, visits all tiles instead: as exact, only slower. All this is decided on the device and does not depend on the order
in which programs run.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..inputs import open_sizes
from ..launching import launched_by_key
from ..mapping import load_exponent
from ..scores import load_queries, load_theta, query_block, scores_by_key
from ..spans import inner_range, key_span, query_span, tile_range
from ..thresholds.lower_bound import lowest_score
from .tiles import any_sign, either
from .visits import listed_tile, visit_walk
from .walk import HEADER, INSIDE, all_tiles, lowest_bit, next_tile, run, set_bits

WORD = 16  # rows whose bits are counted and compacted together
_WORD = tl.constexpr(WORD)
_CHUNK = tl.constexpr(256)  # words that are compacted at once
_INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def _edge(x, size, at, floor_in, a):
    """Return the score that a query's support is above at the least; NaN for a row with NaN."""
    floor = load_theta(floor_in, size, at)
    none = floor == float("inf")
    floor = tl.where(none, 0.0, floor)
    return tl.where(none, float("inf"), lowest_score(floor, a))


@triton.jit
def _emit(x, size, at, q, walk, tile, edge, spoilt, row, pitch, BLOCK: tl.constexpr, PART: tl.constexpr):
    """Write the bytes of one tile of keys, a bit for each of the blocks of BLOCK queries among a block's.

    A key is marked if a score of it is above its query's edge, which is the sign of a difference: signs are put
    together two an instruction, comparisons and maxima are not. The queries are split so that each thread first puts
    together what it holds itself, (.., 4, 2) as products leave them, and all blocks, and then four threads do.

    Args:
        spoilt: int32, with the bits of blocks with a row with NaN, whose keys are all marked: it must come out.
        row: where the bytes of the block are, ``pitch`` of them.
    """
    count: tl.constexpr = x.BLOCK_M // BLOCK
    short = edge[None, :] - scores_by_key(x, size, at, q, walk, tile, PART) * size.scale
    signs = tl.reshape(short.to(tl.int32, bitcast=True), (x.BLOCK_N, count, BLOCK // 8, 4, 2))
    signs = any_sign(any_sign(signs, 4), 2)
    flags = ((signs >> 31) & 1) << tl.arange(0, count)[None, :, None]
    if _INTERPRETED:
        value = tl.sum(tl.max(flags, 2), 1)
    else:
        value = tl.reduce(tl.reduce(flags, 1, either), 1, either)
    keys = tile * x.BLOCK_N + tl.arange(0, x.BLOCK_N)
    tl.store(row + keys, (value | spoilt).to(tl.int8), mask=keys < pitch)


@launched_by_key
@triton.jit(do_not_specialize=["each", "pitch"])
def emit_kernel(x, size, floor_in, bits, each, visits, pitch, BLOCK: tl.constexpr, STAGES: tl.constexpr):
    """Mark the keys that any query of a block of BLOCK queries can use, for x.BLOCK_M queries at once.

    Args:
        floor_in: (B, H, N_q) float32, lower bounds of theta; ``+inf`` for rows that see no key.
        bits: (heads of this launch, blocks of x.BLOCK_M queries, each) int8, a byte a key with a bit for each block
            of BLOCK queries; written where a program sees keys, of tiles that it need not visit only if they are zero
            already.
        visits: which tiles to visit, a row of ``pitch`` int32 a program (see visits.py); None for all.
        BLOCK: queries of a block; x.BLOCK_M is a multiple, of up to 8.
        STAGES: of the loop along ``visits``, a load more deep than others.
    """
    size = open_sizes(x, size)
    at = query_block(x, size)
    q = load_queries(x, size, at)
    edge = _edge(x, size, at, floor_in, load_exponent(x, size, at.head))
    spoilt = tl.max(tl.reshape((edge != edge).to(tl.int32), (x.BLOCK_M // BLOCK, BLOCK)), 1)
    spoilt = tl.sum(spoilt << tl.arange(0, x.BLOCK_M // BLOCK), 0)
    bits += ((at.head_index - size.first_head) * tl.cdiv(size.n_q, x.BLOCK_M) + at.index) * each
    if visits is None:
        walk, listed = all_tiles(at), -1
    else:
        visits += (at.head_index - size.first_head) * tl.cdiv(size.n_q, x.BLOCK_M) * pitch + at.index * pitch
        walk, listed = visit_walk(visits, at, x.BLOCK_N)
    for part in tl.static_range(x.FIRST_PART, x.PARTS_END):
        state, count = run(walk, 0, x.LISTS, part, x.BLOCK_N)
        if part == INSIDE and visits is not None:
            for i in tl.range(0, listed, num_stages=STAGES):
                tile = listed_tile(visits, i)
                _emit(x, size, at, q, walk, tile, edge, spoilt, bits, each, BLOCK, part)
            count = tl.where(listed < 0, count, 0)
        for i in range(count):
            tile, _state = next_tile(walk, 0, state, i, x.LISTS, part, x.BLOCK_N)
            _emit(x, size, at, q, walk, tile, edge, spoilt, bits, each, BLOCK, part)


@triton.jit
def _block_span(x, size, blocks, KEYS: tl.constexpr):
    """Return this program's head and block, its words of bits, and the range of rows that needs no mask."""
    head = tl.program_id(0) // blocks
    index = tl.program_id(0) % blocks
    batch = (size.first_head + head) // size.heads
    if KEYS:
        low, high, _position = key_span(x, size, batch, index * x.BLOCK_N + tl.arange(0, x.BLOCK_N))
        first, last = tile_range(low, high, x.BLOCK_M)
        words_each: tl.constexpr = x.BLOCK_M // _WORD
    else:
        low, high, _position = query_span(x, size, batch, index * x.BLOCK_M + tl.arange(0, x.BLOCK_M))
        first, last = tile_range(low, high, x.BLOCK_N)
        words_each: tl.constexpr = x.BLOCK_N // _WORD
    inner_low, inner_high = inner_range(low, high)
    return head.to(tl.int64), index, first * words_each, last * words_each, inner_low, inner_high


@triton.jit
def _row(bits, head, index, blocks, words, KEYS: tl.constexpr, SHARED: tl.constexpr):
    """Return where the bits of a block are, and which of a byte's is its own; see ``count_kernel``."""
    if KEYS:
        row = bits + (head * blocks + index) * words
    else:
        row = bits + (head * tl.cdiv(blocks, SHARED) + index // SHARED) * words * _WORD
        row = row.to(tl.pointer_type(tl.int32), bitcast=True)
    return row, index % SHARED


@triton.jit
def _load_word(row, bit, word, end, KEYS: tl.constexpr):
    """Load words of a row of bits, as int32 without a sign; those from ``end`` on are 0."""
    if KEYS:
        value = tl.load(row + word, mask=word < end, other=0).to(tl.int32) & 0xFFFF
    else:
        four = tl.arange(0, _WORD // 4)[None, :]
        value = tl.load(row + word[:, None] * (_WORD // 4) + four, mask=(word < end)[:, None], other=0)
        # the product moves the bit of each of four bytes to the last four bits
        value = ((((value >> bit) & 0x01010101) * 0x10204080) >> 28) & 15
        value = tl.sum(value << four * 4, 1)
    return value


@triton.jit
def _rows_below(word, limit):
    """Return which bits of words are of rows below a limit."""
    return (1 << tl.minimum(tl.maximum(limit - word * _WORD, 0), _WORD)) - 1


@launched_by_key
@triton.jit(do_not_specialize=["blocks", "words", "pitch", "densest"])
def count_kernel(x, size, bits, lists, blocks, words, pitch, densest, KEYS: tl.constexpr, SHARED: tl.constexpr):
    """Write the header of one block's list: how many entries, n, or -1 - n where these are too many for a list to pay;
    how many of them are below the range that needs no mask (see walk.py), and how many below its end.

    Args:
        bits: with KEYS (heads of this launch, blocks, words) int16, a bit a query; else (heads of this launch,
            blocks / SHARED, words * 16) int8, a byte a key and in it a bit a block.
        lists: (heads of this launch, pitch) int32: the headers, then the pool.
        densest: share of the rows a block sees above which entries are too many.
        KEYS: whether blocks are of keys and entries are queries; else the other way round.
        SHARED: blocks that share a byte.
    """
    size = open_sizes(x, size)
    head, index, begin, end, inner_low, inner_high = _block_span(x, size, blocks, KEYS)
    row, bit = _row(bits, head, index, blocks, words, KEYS, SHARED)
    end = tl.minimum(end, words)
    count = tl.zeros((_CHUNK,), tl.int32)
    below = tl.zeros((_CHUNK,), tl.int32)
    inner = tl.zeros((_CHUNK,), tl.int32)
    for start in range(begin, end, _CHUNK):
        word = start + tl.arange(0, _CHUNK)
        value = _load_word(row, bit, word, end, KEYS)
        count += set_bits(value)
        below += set_bits(value & _rows_below(word, inner_low))
        inner += set_bits(value & _rows_below(word, inner_high))
    header = lists + head * pitch + index * HEADER
    entries = tl.sum(count, 0)
    tl.store(header, tl.where(entries > densest * ((end - begin) * _WORD), -1 - entries, entries))
    tl.store(header + 1, tl.sum(below, 0))
    tl.store(header + 2, tl.sum(inner, 0))


@launched_by_key
@triton.jit(do_not_specialize=["blocks", "pitch", "pool"])
def share_kernel(lists, blocks, pitch, pool, TOGETHER: tl.constexpr, CHUNK: tl.constexpr):
    """Say where each list of a head starts in the pool, and write how long it is; or -1 where there is none.

    Starts are even, as two entries of 16 bits are loaded together. Of TOGETHER lists in a row there are all or none:
    none where they do not fit, or where a list of any of them would not pay.
    """
    header = lists + tl.program_id(0).to(tl.int64) * pitch
    taken = tl.full((), 0, tl.int64)
    for start in range(0, blocks, CHUNK):
        block = start + tl.reshape(tl.arange(0, CHUNK), (CHUNK // TOGETHER, TOGETHER))
        count = tl.load(header + block * HEADER, mask=block < blocks, other=-1)
        none = (tl.max(count, 1) < 0)[:, None]
        count = tl.where(count < 0, -1 - count, count)
        wanted = tl.where(none, 0, (count.to(tl.int64) + 1) // 2 * 2)
        of_all = tl.sum(wanted, 1)
        until = taken + tl.cumsum(of_all, 0)
        tl.store(header + block * HEADER, tl.where(none | (until > pool)[:, None], -1, count), mask=block < blocks)
        begin = (until - of_all)[:, None] + tl.cumsum(wanted, 1) - wanted
        tl.store(header + block * HEADER + 3, begin.to(tl.int32), mask=block < blocks)
        taken += tl.sum(of_all, 0)


@launched_by_key
@triton.jit(do_not_specialize=["blocks", "words", "pitch"])
def compact_kernel(
    x, size, bits, lists, blocks, words, pitch, KEYS: tl.constexpr, SHARED: tl.constexpr, NARROW: tl.constexpr
):
    """Write the entries of one block's list, ascending, where its header says; arguments as for ``count_kernel``.

    Args:
        NARROW: whether entries take 16 bits.
    """
    size = open_sizes(x, size)
    head, index, begin, end, _inner_low, _inner_high = _block_span(x, size, blocks, KEYS)
    row, bit = _row(bits, head, index, blocks, words, KEYS, SHARED)
    header = lists + head * pitch + index * HEADER
    entries = lists + head * pitch + blocks * HEADER
    if NARROW:
        entries = entries.to(tl.pointer_type(tl.uint16), bitcast=True)
    entries += tl.load(header + 3)
    end = tl.where(tl.load(header) > 0, tl.minimum(end, words), begin)
    before = 0
    for start in range(begin, end, _CHUNK):
        word = start + tl.arange(0, _CHUNK)
        value = _load_word(row, bit, word, end, KEYS)
        count = set_bits(value)
        to = before + tl.cumsum(count, 0) - count
        before += tl.sum(count, 0)
        while tl.max(value, 0) > 0:  # a bit of each word at a time: most have one or none
            place, rest = lowest_bit(value)
            tl.store(entries + to, (word * _WORD + place).to(entries.dtype.element_ty), mask=value > 0)
            to += 1
            value = rest
