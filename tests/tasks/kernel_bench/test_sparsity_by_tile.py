"""Block sparsity by tile size, against counting by hand, and what is recorded of it."""

from __future__ import annotations

import copy
import itertools
from pathlib import Path
from typing import Any

import pytest
import torch

from adasplash_kernels.reference import entmax_reference
from tasks.__main__ import main
from tasks.config import CONFIGS, from_plain, load_experiment
from tasks.errors import ConfigError
from tasks.kernel_bench import sparsity_by_tile
from tasks.kernel_bench.inputs import make_tensors
from tasks.kernel_bench.settings import cases
from tasks.kernel_bench.sparsity_by_tile import TileSettings, block_sparsity_by_tile, tile_jobs
from tasks.programs import Context
from tasks.records import read_records, records_path

TINY: dict[str, Any] = {
    "measure": ["adasplash"],
    "inputs": {"b": 2, "h": 2, "h_kv": 1, "n": 10, "d": 4, "dtype": "float32", "causal": False, "alpha": 1.5,
               "data": "gaussian", "query_variance": 100.0},
    "sweep": {"b_r": [1, 4, 6], "b_c": [2, 3]},  # 10 is no multiple of 4, 6 or 3
    "seeds": [0, 7],
}  # fmt: skip


def settings(**changes: Any) -> TileSettings:
    values = copy.deepcopy(TINY)
    for key, change in changes.items():
        values[key] = values[key] | change if isinstance(change, dict) else change
    return from_plain(TileSettings, values, "test.yaml")


@pytest.fixture
def context(tmp_path: Path, said: list[str]) -> Context:
    return Context(tmp_path, None, said.append)


def empty_percent(wanted: TileSettings, seed: int, b_r: int, b_c: int) -> float:
    """Count the first sequence's empty tiles one by one."""
    inputs = wanted.inputs.drawn_with(seed)
    tensors = make_tensors(inputs, cases(inputs)[0], torch.device("cpu"), None)
    empty = total = 0
    for head in range(wanted.inputs.h):
        q, k = tensors.q[0, head].detach().double(), tensors.k[0, 0].detach().double()
        p = entmax_reference(q @ k.T * wanted.inputs.d**-0.5, wanted.inputs.alpha)
        for row, column in itertools.product(range(0, 10, b_r), range(0, 10, b_c)):
            total += 1
            empty += not any(p[i, j] > 0 for i in range(row, min(row + b_r, 10))
                             for j in range(column, min(column + b_c, 10)))  # fmt: skip
    return 100 * empty / total


def test_against_counting_one_by_one(context, said):
    wanted = settings()
    values = set()
    for job in tile_jobs(wanted):
        found = block_sparsity_by_tile(job, wanted, context)
        assert [(m.params["b_r"], m.params["b_c"]) for m in found] == [(1, 2), (1, 3), (4, 2), (4, 3), (6, 2), (6, 3)]
        for m in found:
            assert m.value == pytest.approx(empty_percent(wanted, job.seed, m.params["b_r"], m.params["b_c"]))
            assert (m.metric, m.unit, m.params["n"], m.params["heads"]) == ("block_sparsity", "%", 10, 2)
        values.add(tuple(m.value for m in found))
    assert len(values) == 2 and all(max(v) > 0 for v in values)  # other seeds, other inputs
    assert "6x3" in said[-1]


def test_jobs():
    assert [(j.system, j.seed) for j in tile_jobs(settings(measure=["adasplash", "columns"]))] == [
        ("adasplash", 0), ("columns", 0), ("adasplash", 7), ("columns", 7)]  # fmt: skip


def test_out_of_memory_is_recorded_for_every_size(context, said, monkeypatch):
    def out_of_memory(*arguments):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 TiB.")

    monkeypatch.setattr(sparsity_by_tile, "measure_sparsity", out_of_memory)
    found = block_sparsity_by_tile(tile_jobs(settings())[0], settings(), context)
    assert {(m.status, m.value) for m in found} == {("oom", None)} and len(found) == 6
    assert found[0].params["reason"] == "out of memory: CUDA out of memory" and "not measured" in said[0]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"measure": []}, "measure: got []"),
        ({"measure": ["fa2"]}, "measure[0]: got 'fa2', allowed are adasplash_pypi_v1"),
        ({"seeds": []}, "seeds: got []"),
        ({"seeds": [1, 1]}, "seeds: got [1, 1]"),
        ({"seeds": [0, -1]}, "seeds[1]: got -1"),
        ({"sweep": {"b_r": []}}, "sweep.b_r: got []"),
        ({"sweep": {"b_c": [16, 16]}}, "sweep.b_c: got [16, 16]"),
        ({"sweep": {"b_c": [16, 0]}}, "sweep.b_c[1]: got 0, allowed is 1 or more"),
        ({"inputs": {"n": 0}}, "inputs.n: got 0"),
        ({"inputs": {"n": [8]}}, "inputs.n: got [8]"),
        ({"inputs": {"h": 3, "h_kv": 2}}, "inputs.h: got 3"),
        ({"inputs": {"dtype": "float64"}}, "inputs.dtype: got 'float64'"),
        ({"inputs": {"alpha": 1}}, "inputs.alpha: got 1"),
        ({"inputs": {"data": "placed_tiles"}}, "inputs.data: got 'placed_tiles', allowed is gaussian"),
        ({"inputs": {"key_variance": 0}}, "inputs.key_variance: got 0"),
    ],
)
def test_refused(changes, message):
    with pytest.raises(ConfigError) as caught:
        settings(**changes)
    assert str(caught.value).startswith(f"test.yaml: {message}")


def test_the_smoke_run(tmp_path, capsys):
    config = CONFIGS / "adasplash" / "blocksize.yaml"
    assert main(["run", str(config), "--scale", "smoke", "--results", str(tmp_path), "--no-render"]) == 0
    found = read_records(records_path(tmp_path, load_experiment(config).id, "smoke"))
    sizes = (16, 32, 64, 128)
    assert [(r.params["b_r"], r.params["b_c"]) for r in found] == list(itertools.product(sizes, sizes))
    by_size = {(r.params["b_r"], r.params["b_c"]): r.value for r in found}
    assert all(by_size[size, size] >= by_size[2 * size, 2 * size] for size in sizes[:-1])
