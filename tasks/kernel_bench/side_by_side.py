"""One case with all its systems: correctness first, then their times, taken in turn."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch

from tasks.kernel_bench import graphs, score_passes
from tasks.kernel_bench.compile_cache import state_at_start
from tasks.kernel_bench.correctness import worst
from tasks.kernel_bench.exact import Exact, Extent
from tasks.kernel_bench.inputs import Tensors, make_problem, make_tensors
from tasks.kernel_bench.problem import Problem
from tasks.kernel_bench.repeats import differing_runs
from tasks.kernel_bench.settings import GAUSSIAN, Case, SpeedSettings
from tasks.kernel_bench.sparsity import Sparsity, measure_sparsity
from tasks.kernel_bench.systems import ENTMAX, SYSTEMS
from tasks.kernel_bench.timing import PIECES, Clock, Times, interleave
from tasks.kernel_bench.trial import Trial, failed_trial, free_memory, judged, try_out
from tasks.records import Measurement

_MIB = 2**20
Tile = tuple[int, int]


class SideBySide:
    """The systems of a case on the same inputs; everything is measured once, when it is first asked for."""

    def __init__(self, case: Case, settings: SpeedSettings, data_root: Path | None,
                 say: Callable[[str], None]) -> None:  # fmt: skip
        self.case, self.settings, self.say = case, settings, say
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        free_memory(self.device)
        self.problem = make_problem(settings.inputs, case, self.device)
        self.tensors = self._make_tensors(data_root)
        self.extent = Extent.of(self.problem, case.seed)
        self._exact = Exact(self.problem, self.tensors, self.extent)
        self._trials: dict[str, Trial] = {}

    def _make_tensors(self, data_root: Path | None) -> Tensors:
        return make_tensors(self.settings.inputs, self.case, self.device, data_root)

    def measurements(self, name: str) -> list[Measurement]:
        """Return everything measured of one system; what was not has the reason among its parameters.

        A system that does not run, or is wrong, is answered for without the others being timed.
        """
        trial = self._trial(name)
        times = self._times.get(name) if trial.status == "ok" else None
        trial = self._trials[name]  # timing may have lost it
        return [*self._timed(name, trial, times), *self._speedup(name, trial), self._score_passes(name, trial, times),
                *self._replayed(name, trial), *self._tried(name, trial), *self._repeated(name, trial),
                *self._sparsity_of(name)]  # fmt: skip

    def _trial(self, name: str) -> Trial:
        if name not in self._trials:
            self._keep(name, try_out(SYSTEMS[name], self._problem_of(name), self._exact))
        return self._trials[name]

    def _problem_of(self, name: str) -> Problem:
        solver = self.settings.solver.get(name)
        return replace(self.problem, iterations=solver.iterations if solver else None)

    def _keep(self, name: str, trial: Trial) -> None:
        self._trials[name] = trial
        if trial.status != "ok":
            self.say(f"{name}, {self.case}: no speed recorded: {trial.reason}")

    def _lose(self, name: str, error: Exception) -> None:
        """Note that a system raised while it was timed; what its first call showed stays."""
        why = failed_trial(error)
        self._keep(name, replace(self._trials[name], status=why.status, reason=why.reason, attention=None))

    @cached_property
    def _times(self) -> dict[str, Times]:
        trials = {name: self._trial(name) for name in self.settings.measure}
        fit = {name: trial.attention for name, trial in trials.items() if trial.attention is not None}
        free_memory(self.device)
        times = interleave(fit, self.tensors, self.settings.timing, Clock(self.device), lose=self._lose)
        for name, found in times.items():
            spelled = ", ".join(f"{p.removesuffix('_ms')} {self._value(found, p):.4g}" for p in PIECES)
            rounds = len(found.pieces[PIECES[0]])
            self.say(f"{name}, {self.case}: {spelled} ms in {rounds} round{'s' * (rounds != 1)}, relative error "
                     f"{worst(trials[name].errors):.2g}")  # fmt: skip
        return times

    def _value(self, times: Times, piece: str) -> float:
        return times.value(piece, self.settings.timing.statistic)

    def _timed(self, name: str, trial: Trial, times: Times | None) -> list[Measurement]:
        params = self._params(name) | {"statistic": self.settings.timing.statistic}
        if times is None:
            return [Measurement(p, None, "ms", params | _why(trial), status=trial.status) for p in PIECES]
        return [Measurement(p, self._value(times, p), "ms", params, times.stats(p)) for p in PIECES]

    def _speedup(self, name: str, trial: Trial) -> list[Measurement]:
        base = self.settings.relative_to
        if base is None:
            return []
        params = self._params(name) | {"relative_to": base}
        if trial.status != "ok":
            return [Measurement("speedup", None, "ratio", params | _why(trial), status=trial.status)]
        if base not in self._times:
            params["reason"] = f"{base} has no time here"
            return [Measurement("speedup", None, "ratio", params, status="not_applicable")]
        mine, theirs = (self._value(self._times[n], "fwd_bwd_ms") for n in (name, base))
        return [Measurement("speedup", theirs / mine, "ratio", params)]

    def _score_passes(self, name: str, trial: Trial, times: Times | None) -> Measurement:
        params, metric, unit = self._params(name), "score_passes", "passes"
        if times is None:
            return Measurement(metric, None, unit, params | _why(trial), status=trial.status)
        if reason := score_passes.obstacle(self.problem):
            return Measurement(metric, None, unit, params | {"reason": reason}, status="not_applicable")
        flops = score_passes.rate(self.device)
        one_pass = score_passes.one_pass_ms(self.problem, flops)
        stats = {"one_pass_ms": one_pass, "matmul_tflops": flops / 1e12}
        return Measurement(metric, self._value(times, "fwd_ms") / one_pass, unit, params, stats)

    def _replayed(self, name: str, trial: Trial) -> list[Measurement]:
        """Return the time of a call as a CUDA graph, if that is asked for."""
        wanted = self.settings.graphs
        if wanted is None:
            return []
        params, metric = self._params(name) | {"statistic": self.settings.timing.statistic}, "graph_ms"
        asked = self.case.n <= wanted.longest
        reason = self._no_graphs() if asked else f"asked for up to {wanted.longest} tokens"
        if trial.status == "ok" and reason is not None:
            return [Measurement(metric, None, "ms", params | {"reason": reason}, status="not_applicable")]
        found = self._graph_times[name] if trial.status == "ok" else trial
        if isinstance(found, Trial):
            return [Measurement(metric, None, "ms", params | _why(found), status=found.status)]
        return [Measurement(metric, self._value(found, PIECES[0]), "ms", params, found.stats(PIECES[0]))]

    def _no_graphs(self) -> str | None:
        return None if self.device.type == "cuda" else "a CUDA graph needs a GPU"

    @cached_property
    def _graph_times(self) -> dict[str, Times | Trial]:
        """Capture all systems that have a time, then replay them in turn."""
        found: dict[str, Times | Trial] = {}
        captured = {}

        def lose(name: str, error: Exception) -> None:
            found[name] = failed_trial(error)
            self.say(f"{name}, {self.case}: not replayed as a CUDA graph: {found[name].reason}")

        for name, trial in self._trials.items():
            if trial.attention is None:
                continue
            try:
                captured[name] = graphs.checked(trial.attention, self.tensors, partial(self._fault, name))
            except Exception as error:  # whatever a foreign kernel raises
                lose(name, error)
        once = graphs.run_replay
        found |= interleave(captured, self.tensors, self.settings.timing, Clock(self.device), lose=lose, once=once)
        captured.clear()
        free_memory(self.device)
        return found

    def _fault(self, name: str, out: torch.Tensor, gradients: tuple[torch.Tensor, ...]) -> str | None:
        """Say what is wrong with a system's output and gradients, or None."""
        return judged(self._exact, SYSTEMS[name].alpha(self.problem.alpha), out, gradients)[1]

    def _repeated(self, name: str, trial: Trial) -> list[Measurement]:
        """Return how many runs differ from another, if that is asked for."""
        wanted = self.settings.determinism
        if wanted is None:
            return []
        params, metric, unit = self._params(name) | {"runs": wanted.runs}, "differing_runs", "runs"
        if self.case.n > wanted.longest:
            params["reason"] = f"asked for up to {wanted.longest} tokens"
            return [Measurement(metric, None, unit, params, status="not_applicable")]
        if trial.status == "ok":
            try:
                found = differing_runs(trial.attention, self.tensors, wanted.runs)
                return [Measurement(metric, found, unit, params)]
            except Exception as error:  # whatever a foreign kernel raises
                trial = failed_trial(error)
        return [Measurement(metric, None, unit, params | _why(trial), status=trial.status)]

    def _tried(self, name: str, trial: Trial) -> list[Measurement]:
        params = self._params(name)
        checked = params | self.extent.params
        bad = {"status": trial.status}
        if trial.first_call_s is None:
            first = Measurement("first_call_s", None, "s", params | _why(trial), **bad)
        elif reason := SYSTEMS[name].prepared(self.problem):
            here = {"here_s": trial.first_call_s}  # with what was found before
            first = Measurement("first_call_s", None, "s", params | {"reason": reason}, here,
                                status="not_applicable")  # fmt: skip
        else:
            cache = {"compile_cache_at_start": state_at_start()}
            first = Measurement("first_call_s", trial.first_call_s, "s", params | cache)
        if not trial.errors:
            error = Measurement("rel_err", None, "", checked | _why(trial), **bad)
        elif worst(trial.errors) < float("inf"):
            rounding = self._exact.rounding(SYSTEMS[name].alpha(self.problem.alpha))
            stats = trial.errors | {f"{part}_rounding": rounding[part] for part in trial.errors}
            error = Measurement("rel_err", worst(trial.errors), "", checked, stats)
        else:
            error = Measurement("rel_err", None, "", checked | _why(trial), status="failed")
        if trial.peak_bytes is not None:
            memory = Measurement("peak_mib", trial.peak_bytes / _MIB, "MiB", params)
        else:
            here = Trial("not_applicable", "memory is counted on a GPU only") if trial.status == "ok" else trial
            memory = Measurement("peak_mib", None, "MiB", params | _why(here), status=here.status)
        return [memory, first, error]

    def _sparsity_of(self, name: str) -> list[Measurement]:
        """Return the share of empty tiles, which describes the inputs: the same for every system that can use it."""
        wanted = self.settings.block_sparsity
        if wanted is None:
            return []
        tiles = self._tiles
        params = {metric: self._params(name) | {"tile": list(tile), "over": wanted.over}
                  for metric, tile in tiles.items()}  # fmt: skip
        if SYSTEMS[name].computes != ENTMAX:
            reason = {"reason": "no weight of softmax is zero"}
            return [Measurement(m, None, "%", p | reason, status="not_applicable") for m, p in params.items()]
        found = self._sparsity
        if isinstance(found, Trial):
            return [Measurement(m, None, "%", p | _why(found), status=found.status) for m, p in params.items()]
        return [Measurement(m, found.percent[tiles[m]], "%", p | {"heads": found.heads}) for m, p in params.items()]

    @property
    def _tiles(self) -> dict[str, Tile]:
        wanted = self.settings.block_sparsity
        assert wanted is not None
        main = (wanted.tile[0], wanted.tile[1])
        also = {f"block_sparsity_{size}": (size, size) for size in wanted.also if (size, size) != main}
        return {"block_sparsity": main, **also}

    @cached_property
    def _sparsity(self) -> Sparsity | Trial:
        wanted = self.settings.block_sparsity
        assert wanted is not None
        free_memory(self.device)
        try:
            return measure_sparsity(self.problem, self.tensors, set(self._tiles.values()), wanted.over)
        except torch.OutOfMemoryError as error:
            trial = failed_trial(error)
            self.say(f"block sparsity, {self.case}: not measured: {trial.reason}")
            return trial

    def _params(self, name: str) -> dict[str, Any]:
        """Return what identifies a measurement; nothing that differs between runs of the same config."""
        x = self.settings.inputs
        params = self._problem_params(name) | {"query_scale": self.case.query_scale}
        if x.data == GAUSSIAN:
            params |= {"query_variance": x.query_variance, "key_variance": x.key_variance,
                       "value_variance": x.value_variance}  # fmt: skip
        return params

    def _problem_params(self, name: str) -> dict[str, Any]:
        """Return those of them that every program has."""
        x, system = self.settings.inputs, SYSTEMS[name]
        params = {"b": x.b, "h": x.h, "h_kv": x.h_kv, "n": self.case.n, "d": x.d, "dtype": x.dtype,
                  "causal": x.causal, "alpha": system.alpha(x.alpha), "data": x.data}  # fmt: skip
        if name in self.settings.solver:
            params["iterations"] = self.settings.solver[name].iterations
        return params


def _why(trial: Trial) -> dict[str, str]:
    return {"reason": trial.reason}
