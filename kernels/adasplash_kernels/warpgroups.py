"""Two groups of four warps of a Hopper program that have half of the keys each, and numbers of a row that they share.

Tensors have a row for each group and query, (groups x queries,), and a group holds its own: what is reduced along a row
is so within a few lanes. Then both groups put what they have into shared memory, and read what both have there, which
takes one barrier. With one group there is nothing to do.
"""

from __future__ import annotations

import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

_ALL = gl.constexpr(tl.PropagateNan.ALL)


@gluon.jit
def my_group():
    """Return which group a warp belongs to.

    A number that differs from warp to warp, which this language has no other way to: with it, an operand in shared
    memory is another one for each group.
    """
    if gl.num_warps() == 4:
        group = 0
    else:
        group = gl.inline_asm_elementwise(
            "{ .reg .u32 thread; mov.u32 thread, %tid.x; shr.u32 $0, thread, 7; }",
            "=r,r",
            [gl.to_tensor(0)],
            dtype=gl.int32,
            is_pure=True,
            pack=1,
        )
    return group


@gluon.jit
def larger(a, b):
    """Return the larger one; NaN if one is."""
    return gl.maximum(a, b, propagate_nan=_ALL)


@gluon.jit
def _of_both(place, a, QUERIES: gl.constexpr):
    """Return what the groups have put into ``place``, (queries,) each, where every warp has its rows' of both."""
    layout: gl.constexpr = gl.SliceLayout(0, gl.reshape(a, [2, QUERIES]).type.layout)
    return place.slice(0, QUERIES).load(layout), place.slice(QUERIES, QUERIES).load(layout)


@gluon.jit
def _for_both(of_query, like, QUERIES: gl.constexpr):
    """Return (queries,) as (groups x queries,), with the layout of ``like``."""
    of_query = gl.expand_dims(of_query, 0)
    layout: gl.constexpr = of_query.type.layout
    twice = of_query + gl.zeros([2, QUERIES], gl.float32, layout)
    return gl.convert_layout(gl.reshape(twice, [2 * QUERIES]), like.type.layout)


@gluon.jit
def larger_of_both(a, place, QUERIES: gl.constexpr):
    """Return the larger of what both groups have of a query, to both.

    Args:
        place: (groups x queries,) float32 in shared memory; not used with one group.
    """
    if gl.num_warps() > 4:
        place.store(a)
        first, second = _of_both(place, a, QUERIES)
        a = _for_both(larger(first, second), a, QUERIES)
    return a


@gluon.jit
def sums_of_both(a, b, places, QUERIES: gl.constexpr):
    """Return the sums over both groups of two numbers a query.

    Args:
        places: two, as above.
    """
    if gl.num_warps() > 4:
        places[0].store(a)
        places[1].store(b)
        first, second = _of_both(places[0], a, QUERIES)
        first_b, second_b = _of_both(places[1], b, QUERIES)
        a = _for_both(first + second, a, QUERIES)
        b = _for_both(first_b + second_b, b, QUERIES)
    return a, b
