"""Halley-bisection (AdaSplash, algorithm 1): one pass for the largest score, then the safeguarded solve."""

from __future__ import annotations

import triton

from ..inputs import open_sizes
from ..launching import launched_by_key
from ..mapping import load_exponent
from ..scores import load_queries, query_block
from ..worklists.walk import all_tiles, mask_row
from .refine import bracket, highest_score, refine, store_passes, store_theta


@launched_by_key
@triton.jit(do_not_specialize=["max_iterations"])
def halley_kernel(x, size, theta_out, tiles_out, max_iterations, passes_out=None):
    """Write theta for one block of queries of one head, its marks and its passes unless these are None."""
    size = open_sizes(x, size)
    at = query_block(x, size)
    q = load_queries(x, size, at)
    a = load_exponent(x, size, at.head)
    empty, low, high = bracket(x, size, at, highest_score(x, size, at, q), a)
    marks = mask_row(x, size, at, tiles_out)
    middle = 0.5 * (low + high)
    theta, passes = refine(x, size, at, q, all_tiles(at), a, empty, low, high, middle, marks, max_iterations, False)
    store_theta(theta_out, size, at, theta)
    store_passes(passes_out, x, size, at, passes)
