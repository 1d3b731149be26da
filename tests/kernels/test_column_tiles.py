"""Lists of columns with the proportions that tiles have on a GPU for 16-bit inputs: several to a block of the rest.

The interpreter's own tiles have one.
"""

from __future__ import annotations

import dataclasses
import functools

import pytest
import torch
from calls import random_qkv
from column_cases import ANY, Sides, columns, limit_some, overflowed, setting
from oracle import gradients

from adasplash_kernels import limits
from adasplash_kernels import problem as problems
from adasplash_kernels.tile_sizes import INTERPRETED, Tiles, choose_column_tiles

small = "these tiles are too small to be compiled; a GPU's own have the same proportions"
pytestmark = [pytest.mark.usefixtures("garbage"), pytest.mark.skipif(not INTERPRETED, reason=small)]


@pytest.fixture
def proportioned(monkeypatch):
    """Return what sets four lists to a block of the rest, either way, and how many warps share a tile's keys."""
    usual = choose_column_tiles

    def proportion(warps: int) -> None:
        def choose(head_dim: int, dtype: torch.dtype):
            return dataclasses.replace(
                usual(head_dim, dtype),
                bound=Tiles(64, 32, 1),
                emit=Tiles(64, 32, 1),
                solve=Tiles(16, 32, 1),
                walk=Tiles(16, 64, 1),
                grad=Tiles(16, 32, warps),
                grad_keys=Tiles(32, 16, 1),
                rest=Tiles(64, 64, 1),
                share=2,
            )

        monkeypatch.setattr(problems, "choose_column_tiles", choose)

    return proportion


@pytest.mark.parametrize(
    ("case", "limit", "warps"),
    [
        ("causal", None, 1),
        ("packed", None, 2),
        ("causal window", None, 1),
        ("padded", None, 2),
        ("ALiBi", None, 1),
        ("causal, more queries", "ENTRIES", 2),
        ("packed, causal", "DENSEST", 1),
    ],
)
def test_gradients_of_any_proportions(device, monkeypatch, compactions, proportioned, case, limit, warps):
    """Output and gradients are those of the interpreter's own tiles, with lists for all, and for some.

    Lists are cut by whole blocks of the rest.
    """
    at = setting(case, device, spread=2.0)
    inputs = (at.problem.q, at.problem.k, at.problem.v)
    upstream = random_qkv(device, inputs[0].shape[2], heads=inputs[0].shape[1], batch=inputs[0].shape[0], seed=5)[0]
    run = functools.partial(columns, **at.options)
    expected = gradients(run, inputs, upstream)
    proportioned(warps)
    monkeypatch.setattr(limits, "DENSEST", ANY)
    at = setting(case, device, spread=2.0)  # a problem keeps its sizes
    compactions.clear()
    found = gradients(run, inputs, upstream)
    assert Sides.of(at.problem, False).together == Sides.of(at.problem, True).together == 4
    if limit is not None:
        limit_some(monkeypatch, at, compactions, limit, (False,))
        found = gradients(run, inputs, upstream)
        over = overflowed(compactions, False)
        assert over.any() and not over.all()
        filled = torch.nn.functional.pad(over, (0, -over.shape[1] % 4)).unflatten(1, (-1, 4))
        there = torch.arange(filled.shape[1] * 4, device=over.device).view(-1, 4) < over.shape[1]
        assert torch.equal(filled, filled.any(2, keepdim=True) & there)
    for name, a, b in zip(("out", "dq", "dk", "dv"), found, expected, strict=True):
        torch.testing.assert_close(a, b, atol=2e-5, rtol=2e-5, msg=lambda text, name=name: f"{name}: {text}")
