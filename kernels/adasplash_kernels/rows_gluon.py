"""Rows of matrices in Gluon: loaded, stored, and copied to shared memory in the background."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere.async_copy import async_copy_global_to_shared


@gluon.jit
def load_rows(base, rows, pitch, n_rows, d, D: gl.constexpr, LAYOUT: gl.constexpr):
    """Load (rows, D) of a matrix; what lies outside is zero."""
    columns = gl.arange(0, D, layout=gl.SliceLayout(0, LAYOUT))
    keep = (rows < n_rows)[:, None] & (columns < d)[None, :]
    return gl.load(base + rows.to(gl.int64)[:, None] * pitch + columns[None, :], mask=keep, other=0.0)


@gluon.jit
def copy_rows(place, base, rows, pitch, n_rows, d, LAYOUT: gl.constexpr):
    """Start copying rows of a matrix to shared memory, (rows, D); what lies outside becomes zero.

    Rows are to start at multiples of 16 bytes, and ``d`` is a multiple of 16.
    """
    columns = gl.arange(0, place.shape[1], layout=gl.SliceLayout(0, LAYOUT))
    keep = (rows < n_rows)[:, None] & (columns < d)[None, :]
    async_copy_global_to_shared(place, base + rows.to(gl.int64)[:, None] * pitch + columns[None, :], mask=keep)


@gluon.jit
def store_rows(base, rows, n_rows, d, value, D: gl.constexpr, LAYOUT: gl.constexpr):
    """Store (rows, D) in a contiguous matrix, in its dtype; what lies outside is left alone."""
    columns = gl.arange(0, D, layout=gl.SliceLayout(0, LAYOUT))
    keep = (rows < n_rows)[:, None] & (columns < d)[None, :]
    gl.store(base + rows.to(gl.int64)[:, None] * d + columns[None, :], value.to(base.dtype.element_ty), mask=keep)
