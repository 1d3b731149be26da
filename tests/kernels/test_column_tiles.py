"""Lists of columns with the proportions of tiles that a GPU uses for 16-bit inputs: several lists to a block of the rest.

The interpreter's own tiles have one.
"""

from __future__ import annotations

import dataclasses
import functools

import pytest
import torch
from calls import random_qkv
from column_cases import ANY, CASES, Sides, columns, limit_some, overflowed, setting
from oracle import gradients

from adasplash_kernels import launch
from adasplash_kernels.tile_sizes import INTERPRETED, Tiles, choose_column_tiles

pytestmark = [
    pytest.mark.usefixtures("garbage"),
    pytest.mark.skipif(not INTERPRETED, reason="tiles of the interpreter's size"),
]


@pytest.fixture(params=[1, 2])
def proportioned(request, monkeypatch):
    """Four lists to a block of the rest, either way; the keys of a tile shared by one warp or by two."""
    usual = choose_column_tiles

    def choose(head_dim: int, dtype: torch.dtype):
        return dataclasses.replace(
            usual(head_dim, dtype),
            bound=Tiles(64, 32, 1),
            emit=Tiles(64, 32, 1),
            solve=Tiles(16, 32, 1),
            walk=Tiles(16, 64, 1),
            grad=Tiles(16, 32, request.param),
            grad_keys=Tiles(32, 16, 1),
            rest=Tiles(64, 64, 1),
            share=2,
        )

    monkeypatch.setattr(launch, "choose_column_tiles", choose)


@pytest.mark.parametrize("limit", [None, "DENSEST", "ENTRIES"])
@pytest.mark.parametrize("case", CASES)
def test_gradients_of_any_proportions(device, monkeypatch, compactions, proportioned, case, limit):
    """Output and gradients are those of the interpreter's own tiles, with lists for all, and for some."""
    monkeypatch.setattr(launch, "DENSEST", ANY)
    at = setting(case, device, spread=2.0)
    inputs = (at.problem.q, at.problem.k, at.problem.v)
    upstream = random_qkv(device, inputs[0].shape[2], heads=inputs[0].shape[1], batch=inputs[0].shape[0], seed=5)[0]
    run = functools.partial(columns, **at.options)
    found = gradients(run, inputs, upstream)
    assert Sides.of(at.problem, False).together == Sides.of(at.problem, True).together == 4
    if limit is not None:
        try:
            limit_some(monkeypatch, at, compactions, limit, (False,))
        except ValueError:
            pytest.skip("no limit leaves some blocks without a list")
        found = gradients(run, inputs, upstream)
        over = overflowed(compactions, False)
        assert over.any() and not over.all()
        fours = torch.nn.functional.pad(over, (0, -over.shape[1] % 4), value=False).unflatten(1, (-1, 4))
        there = torch.arange(fours.shape[1] * 4, device=over.device).view(-1, 4) < over.shape[1]
        assert (fours == (fours.any(2, keepdim=True) & there)).all()
    monkeypatch.undo()
    expected = gradients(run, inputs, upstream)
    for name, a, b in zip(("out", "dq", "dk", "dv"), found, expected, strict=True):
        torch.testing.assert_close(a, b, atol=2e-5, rtol=2e-5, msg=lambda text, name=name: f"{name}: {text}")
