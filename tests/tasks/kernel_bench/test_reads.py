"""Reads that the program counts are the loads that the kernels make, as Triton's interpreter sees them; and by hand."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import pytest
import torch

from tasks.config import CONFIGS, load_experiment
from tasks.errors import ConfigError
from tasks.kernel_bench.inputs import Tensors
from tasks.kernel_bench.problem import NotMeasured
from tasks.kernel_bench.reads import published
from tasks.kernel_bench.reads.program import METRICS, UNIT, count_reads, jobs
from tasks.kernel_bench.reads.settings import ReadsSettings
from tasks.kernel_bench.reads.tally import BACKWARD, FORWARD, PASSES
from tasks.kernel_bench.run import PROGRAMS
from tasks.programs import Context
from tasks.schema import Misfit, convert

METHODS = ("adasplash_nomask", "adasplash", "adasplash2", "columns")
OPERANDS = ("q", "k", "v")
interpreted = pytest.mark.skipif(torch.cuda.is_available(), reason="loads are seen in Triton's interpreter only")


class Loads:
    """How often each element of some tensors is loaded by kernels in the interpreter."""

    def __init__(self, tensors: Tensors) -> None:
        self.tensors = {name: getattr(tensors, name) for name in OPERANDS}
        self.counts = {name: np.zeros(x.numel(), dtype=np.int64) for name, x in self.tensors.items()}

    @contextmanager
    def seen(self) -> Iterator[None]:
        from triton.runtime.interpreter import InterpreterBuilder

        load = InterpreterBuilder.create_masked_load

        def noting(builder, pointers, mask, *rest):
            addresses = np.asarray(pointers.data)[np.asarray(mask.data).astype(bool)].astype(np.int64).ravel()
            for name, x in self.tensors.items():
                inside = addresses[(addresses >= x.data_ptr()) & (addresses < x.data_ptr() + x.nbytes)]
                np.add.at(self.counts[name], (inside - x.data_ptr()) // x.element_size(), 1)
            return load(builder, pointers, mask, *rest)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(InterpreterBuilder, "create_masked_load", noting)
            yield

    def rows(self) -> dict[str, int]:
        """Return rows loaded so far, and start again; a row is loaded whole or not at all."""
        found = {}
        for name, counts in self.counts.items():
            by_row = counts.reshape(-1, self.tensors[name].shape[-1])
            assert (by_row == by_row[:, :1]).all()
            found[name] = int(by_row[:, 0].sum())
            counts[:] = 0
        return found


def tensors(q: torch.Tensor, k: torch.Tensor) -> Tensors:
    torch.manual_seed(0)
    v, do = torch.randn_like(k), torch.randn_like(q)
    return Tensors(*(x.contiguous().requires_grad_() for x in (q, k, v)), do)


def one_local_one_dense(n: int, d: int) -> Tensors:
    """Two heads that share keys: the queries of one use their neighbours, those of the other use all keys."""
    torch.manual_seed(0)
    angle = 2 * torch.pi * torch.arange(n) / n
    place = torch.stack([angle.cos(), angle.sin()], -1)
    k = torch.cat([place, 0.1 * torch.randn(n, d - 2)], -1)
    local = 300 * torch.cat([place, torch.zeros(n, d - 2)], -1)
    return tensors(torch.stack([local, 0.3 * torch.randn(n, d)])[None], k[None, None])


def all_to_one(n: int) -> Tensors:
    """Every query puts all its weight on key 5."""
    k = 6 * torch.eye(n)
    return tensors(k[[5] * n][None, None], k[None, None])


def counted(method: str, problem, given: Tensors) -> dict:
    from tasks.kernel_bench.reads.own import count

    return count(method, problem, given)


@interpreted
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("method", METHODS)
def test_counts_are_the_loads(method, causal, problem, monkeypatch):
    from tasks.kernel_bench.reads import own

    n = 70
    given = one_local_one_dense(n, 12)
    loads, seen, backward = Loads(given), {}, own.backward

    def between(*arguments):
        seen[FORWARD] = loads.rows()
        return backward(*arguments)

    monkeypatch.setattr(own, "backward", between)
    with loads.seen():
        found = own.count(method, problem(h=2, h_kv=1, n=n, d=12, causal=causal), given)
    seen[BACKWARD] = loads.rows()
    for which in PASSES:
        assert found[which].blocks == 2 * 5
        assert {x: round(found[which].per_block(x) * 10) for x in OPERANDS} == seen[which]
        assert sum(found[which].by_part("k").values()) == pytest.approx(found[which].per_block("k"))
    every = {True: 2 * (16 + 32 + 48 + 64 + 70), False: 2 * 5 * 70}[causal]  # rows of V that 10 blocks of 16 see
    if method == "adasplash_nomask":
        assert seen[FORWARD]["v"] == every
    else:  # something is left out in the one head, not in the other
        assert every / 2 < seen[FORWARD]["v"] < every


@interpreted
@pytest.mark.parametrize(
    ("causal", "forward", "backward"),
    [
        # Two blocks of 16. Halley: Q once, K for the largest score and in one iteration; output: Q, K and V once.
        # dQ: Q, K and V once. dK and dV: a block of keys and values, and the queries that see it.
        (False, (16 + 16, 2 * 32 + 32, 32), (16 + 32, 32 + 16, 32 + 16)),
        (True, (16 + 16, 2 * 24 + 24, 24), (16 + 24, 24 + 16, 24 + 16)),  # the blocks see 16 and 32 keys
    ],
)
def test_by_hand(causal, forward, backward, problem):
    torch.manual_seed(0)
    wanted = problem(h=1, h_kv=1, n=32, d=16, causal=causal, iterations=1)
    found = counted("adasplash_nomask", wanted, tensors(torch.randn(1, 1, 32, 16), torch.randn(1, 1, 32, 16)))
    assert tuple(found[FORWARD].per_block(x) for x in OPERANDS) == forward
    assert tuple(found[BACKWARD].per_block(x) for x in OPERANDS) == backward


@interpreted
def test_tiles_by_hand(problem):
    """Only the first block of keys is used: V is read of it alone, and dK and dV of the other read no query."""
    found = counted("adasplash", problem(h=1, h_kv=1, n=32, d=32, causal=False), all_to_one(32))
    assert found[FORWARD].by_part("v") == {"output": 16}
    assert found[FORWARD].by_part("k")["output"] == 16
    assert found[BACKWARD].by_part("q") == {"grad_query": 16, "grad_key_value": 32 / 2}
    assert found[BACKWARD].by_part("k") == {"grad_query": 16, "grad_key_value": 16}


@interpreted
def test_columns_by_hand(problem):
    """Key 5 is on the list of either block, and on no list of queries for the block of keys that all of them use."""
    found = counted("columns", problem(h=1, h_kv=1, n=32, d=32, causal=False), all_to_one(32))
    assert found[FORWARD].by_part("q") == {"bound": 16, "emit": 16, "listed": 16, "output": 16}
    # bound and emit read K once for 32 queries; one step on the list is enough
    assert found[FORWARD].by_part("k") == {"bound": 16, "emit": 16, "listed": 1, "output": 1}
    assert found[FORWARD].by_part("v") == {"output": 1}
    # two blocks, the first in the launch for the rest: a program for pieces, which nothing needs, loads nothing of it
    assert found[BACKWARD].by_part("v") == {"grad_query": 1, "grad_key_value": 2 * 16 / 2}
    assert found[BACKWARD].by_part("q") == {"grad_query": 16, "grad_key_value": (32 + 0) / 2}


@interpreted
def test_heads_in_chunks(problem, monkeypatch):
    """Lists of columns are made for a few heads at a time; which ones, each launch says."""
    from adasplash_kernels import limits

    torch.manual_seed(0)
    q, k = (x * torch.randn(1, 2, 32, 16) for x in (torch.tensor([8.0, 1.0])[None, :, None, None], 1.0))
    once, chunked = [], []
    for found, workspace in ((once, limits.WORKSPACE), (chunked, 1)):
        monkeypatch.setattr(limits, "WORKSPACE", workspace)
        tallies = counted("columns", problem(h=2, h_kv=2, n=32, d=16), tensors(q, k))
        found += [tallies[which].by_part(operand) for which in PASSES for operand in OPERANDS]
    assert once == chunked


@pytest.mark.parametrize(
    ("d", "causal", "forward", "backward"),
    [
        # 128 x 128: blocks of 128, 128 and 44 queries see 128, 256 and 300 keys; those of keys 300, 172 and 44 queries
        (64, True, (100, 684 / 3, 684 / 3), (516 / 3, 100, 100)),
        (64, False, (100, 300, 300), (300, 100, 100)),
        # 128 x 64 forward: 128, 256 and 300 keys; 64 x 128 backward: five blocks of queries
        (128, True, (100, 684 / 3, 684 / 3), (516 / 5, 60, 60)),
    ],
)
def test_flash_by_hand(d, causal, forward, backward, problem):
    wanted = problem(h=2, h_kv=1, n=300, d=d, causal=causal)
    for which, expected in ((FORWARD, forward), (BACKWARD, backward)):
        found = published.flash(wanted, which)
        assert tuple(found.per_block(x) for x in OPERANDS) == pytest.approx(expected)


def test_flash_tiles_are_written_down_up_to_128(problem):
    with pytest.raises(NotMeasured, match="up to d = 128"):
        published.flash(problem(d=129), FORWARD)


@pytest.mark.parametrize("which", PASSES)
def test_dense_by_hand(which, problem):
    """Three blocks: each goes through all 300 rows of the other side, and its own are loaded for each tile."""
    found = published.dense(problem(n=300, causal=True), which)
    assert [found.per_block(x) for x in OPERANDS] == [300, 300, 300]


# -- the program --


@pytest.fixture
def plain() -> dict:
    values = copy.deepcopy(load_experiment(CONFIGS / "adasplash/reads.yaml").settings("smoke"))
    values["inputs"]["n"] = [16, 32]
    return values


@pytest.fixture
def run(plain, tmp_path) -> Callable:
    def job_by_job(**changes) -> dict:
        settings = convert(ReadsSettings, plain | changes)
        context = Context(tmp_path, None, say=lambda line: None)
        return {(j.system, j.case.n): count_reads(j, settings, context) for j in jobs(settings)}

    return job_by_job


def test_records(run):
    found = run(measure=["fa2", "adasplash_nomask"], solver={"adasplash_nomask": {"iterations": 1}})
    assert set(found) == {(s, n) for s in ("fa2", "adasplash_nomask") for n in (16, 32)}
    for (system, n), measurements in found.items():
        assert [(m.params["pass"], m.metric) for m in measurements] == [(p, m) for p in PASSES for m in METRICS]
        for m in measurements:
            assert (m.unit, m.status, m.params["n"], m.params["d"]) == (UNIT, "ok", n, 16)
            assert m.params.get("iterations") == (None if system == "fa2" else 1)
            assert m.value == pytest.approx(sum(m.stats.values()))
    if not torch.cuda.is_available():  # block sizes are others there
        assert [m.value for m in found["adasplash_nomask", 32]] == [32, 96, 32, 48, 48, 48]


def test_what_is_due_on_a_cpu(plain, monkeypatch):
    program = PROGRAMS["count_reads"]
    long = convert(ReadsSettings, load_experiment(CONFIGS / "adasplash/reads.yaml").settings("paper"))
    assert [(j.system, j.case.n) for j in program.jobs(long)][::6] == [("bisection_torch", n)
                                                                       for n in (2048, 8192, 32768)]  # fmt: skip
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "needs a GPU" in program.obstacle(long, None)
    assert program.obstacle(convert(ReadsSettings, plain), None) is None


def test_passes_that_are_not_asked_for_are_left_out(run):
    assert [m.params["pass"] for m in run(measure=["fa2"], passes=["backward"])["fa2", 16]] == ["backward"] * 3


def test_a_kernel_that_is_not_known_is_not_passed_over(run, monkeypatch):
    """A change of the kernels that the counts do not follow shows as a failure, and other systems go on."""
    from adasplash_kernels import launch
    from tasks.kernel_bench.reads.own import READS

    before = launch.output_kernel
    monkeypatch.delitem(READS, "output")
    found = run(measure=["adasplash_nomask", "bisection_torch"])
    assert {(m.status, m.value) for m in found["adasplash_nomask", 16]} == {("failed", None)}
    assert "kernel output" in found["adasplash_nomask", 16][0].params["reason"]
    assert {m.status for m in found["bisection_torch", 16]} == {"ok"}
    assert launch.output_kernel is before


@pytest.mark.parametrize(
    ("changes", "key", "message"),
    [
        ({"measure": []}, "measure", "allowed is one or more"),
        ({"measure": ["fa2", "fa2"]}, "measure", "each once"),
        ({"measure": ["sort_torch"]}, "measure[0]", "got 'sort_torch', allowed are bisection_torch, fa2"),
        ({"passes": ["sideways"]}, "passes[0]", "got 'sideways', allowed are forward, backward"),
        ({"passes": []}, "passes", "allowed is one or more"),
        ({"solver": {"columns": {"iterations": 3}}}, "solver.columns", "unknown, allowed are bisection_torch"),
        ({"solver": {"adasplash": {"iterations": 0}}}, "solver.adasplash.iterations", "got 0, allowed is 1 or more"),
    ],
)
def test_refused(changes, key, message, plain):
    with pytest.raises(Misfit) as caught:
        convert(ReadsSettings, plain | changes)
    assert caught.value.key == key and message in caught.value.reason


def test_the_config_names_the_key(tmp_path):
    text = (CONFIGS / "adasplash/reads.yaml").read_text(encoding="utf-8").replace("passes: [forward", "passes: [foward")
    path = tmp_path / "reads.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError, match=r"reads.yaml: common.passes\[0\]: got 'foward', allowed are forward"):
        load_experiment(path).typed_settings("paper", ReadsSettings)
