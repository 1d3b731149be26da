"""What every system should have computed, in float64, for as much of a call as is worth the time.

Weights come from the oracle of adasplash_kernels (softmax for alpha 1), gradients from the closed form, a band of
queries at a time: nothing of the size n x n is stored.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from adasplash_kernels.reference import entmax_reference
from tasks.kernel_bench.correctness import relative_errors
from tasks.kernel_bench.inputs import Tensors
from tasks.kernel_bench.problem import Problem

LONGEST_WITH_GRADIENTS = 8192
_ROWS = 256  # the last ones, which see the most keys, and as many of the others, drawn at random
_KEY_HEADS = 2  # whose gradients are checked, with those of the queries that share them
_BAND = 128


@dataclass(frozen=True)
class Extent:
    """What is checked: the output's ``rows`` in all heads of some ``sequences``, the first and the last one, and
    gradients of ``key_heads`` heads of the first one.

    ``key_heads`` is 0 above 8192 tokens.
    """

    rows: Tensor
    key_heads: int
    sequences: tuple[int, ...]

    @classmethod
    def of(cls, problem: Problem, seed: int) -> Extent:
        """Choose by length; ``seed`` draws the rows."""
        n = problem.n
        if n <= 2 * _ROWS:
            rows = torch.arange(n)
        else:
            drawn = torch.randperm(n - _ROWS, generator=torch.Generator().manual_seed(seed))[:_ROWS]
            rows = torch.cat([drawn.sort().values, torch.arange(n - _ROWS, n)])
        heads = min(_KEY_HEADS, problem.h_kv) if n <= LONGEST_WITH_GRADIENTS else 0
        return cls(rows.to(problem.device), heads, tuple(sorted({0, problem.b - 1})))

    @property
    def params(self) -> dict[str, int]:
        """As records say it."""
        return {"checked_rows": len(self.rows), "checked_sequences": len(self.sequences),
                "checked_gradient_heads": self.key_heads}  # fmt: skip


@dataclass
class Exact:
    """The exact output and gradients of one call, for any alpha; found when first asked for."""

    problem: Problem
    tensors: Tensors
    extent: Extent
    _found: dict[float, dict[str, Tensor]] = field(default_factory=dict)
    _rounding: dict[float, dict[str, float]] = field(default_factory=dict)

    def parts(self, alpha: float) -> dict[str, Tensor]:
        """Return float64 ``out`` (sequences, h, rows, d) and, if checked, ``dq`` (heads, n, d), ``dk`` and ``dv``."""
        if alpha not in self._found:
            out, rounded = self._output(alpha)
            gradients, also_rounded = self._gradients(alpha)
            self._found[alpha] = {"out": out, **gradients}
            self._rounding[alpha] = relative_errors({"out": rounded, **also_rounded}, self._found[alpha])
        return self._found[alpha]

    def rounding(self, alpha: float) -> dict[str, float]:
        """Return the relative error that each part gets from rounding alone, to the dtype of the inputs.

        All is computed in float64, and rounded where a fused kernel has no choice: weights and gradients of scores
        before they are multiplied, the output (what the backward pass has of it too) and the gradients.
        """
        self.parts(alpha)
        return self._rounding[alpha]

    def pick(self, out: Tensor, gradients: tuple[Tensor, ...]) -> dict[str, Tensor]:
        """Return the same parts of a system's output and gradients."""
        picked = {"out": out[list(self.extent.sequences)][:, :, self.extent.rows]}
        if count := self.extent.key_heads:
            dq, dk, dv = gradients
            group = self.problem.h // self.problem.h_kv
            picked |= {"dq": dq[0, : count * group], "dk": dk[0, :count], "dv": dv[0, :count]}
        return picked

    def _output(self, alpha: float) -> tuple[Tensor, Tensor]:
        """Return the output, and the output with its rounding."""
        q, k, v = (x.detach() for x in (self.tensors.q, self.tensors.k, self.tensors.v))
        group = self.problem.h // self.problem.h_kv
        shape = len(self.extent.sequences), q.shape[1], len(self.extent.rows), q.shape[3]
        out, rounded = (q.new_zeros(shape, dtype=torch.float64) for _ in range(2))
        for place, batch in enumerate(self.extent.sequences):
            for head in range(self.problem.h):
                keys, values = (x[batch, head // group].double() for x in (k, v))
                for at in _bands(len(self.extent.rows)):
                    p = self._weights(q[batch, head], keys, self.extent.rows[at], alpha)
                    out[place, head, at] = p @ values
                    rounded[place, head, at] = self._rounded(self._rounded(p) @ values)
        return out, rounded

    def _gradients(self, alpha: float) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Return the gradients, and the gradients with their rounding."""
        if not self.extent.key_heads:
            return {}, {}
        problem, group = self.problem, self.problem.h // self.problem.h_kv
        q, k, v, do = (x.detach()[0] for x in (self.tensors.q, self.tensors.k, self.tensors.v, self.tensors.do))
        exact, rounded = (self._no_gradients(group) for _ in range(2))
        for head in range(self.extent.key_heads * group):
            keys, values = (x[head // group].double() for x in (k, v))
            for at in _bands(problem.n):
                rows = torch.arange(problem.n, device=q.device)[at]
                p = self._weights(q[head], keys, rows, alpha)
                u = p if alpha == 1 else torch.where(p > 0, p ** (2 - alpha), 0.0)
                u_sum = u.sum(-1, keepdim=True)
                queries, upstream = q[head, at].double(), do[head, at].double()
                dp = upstream @ values.T
                ds = u * (dp - (u * dp).sum(-1, keepdim=True) / u_sum)
                saved = self._rounded(u @ values / u_sum)  # the output if alpha is 1, another such mean otherwise
                ds_rounded = self._rounded(u * (dp - (saved * upstream).sum(-1, keepdim=True)))
                for found, scores, weights in ((exact, ds, p), (rounded, ds_rounded, self._rounded(p))):
                    found["dq"][head, at] = problem.scale * (scores @ keys)
                    found["dk"][head // group] += problem.scale * (scores.T @ queries)
                    found["dv"][head // group] += weights.T @ upstream
        return exact, {name: self._rounded(part) for name, part in rounded.items()}

    def _no_gradients(self, group: int) -> dict[str, Tensor]:
        q, k = self.tensors.q.detach()[0], self.tensors.k.detach()[0]
        heads = self.extent.key_heads
        dq = q.new_zeros(heads * group, *q.shape[1:], dtype=torch.float64)
        dk, dv = (k.new_zeros(heads, *k.shape[1:], dtype=torch.float64) for _ in range(2))
        return {"dq": dq, "dk": dk, "dv": dv}

    def _rounded(self, x: Tensor) -> Tensor:
        return x.to(self.tensors.q.dtype).double()

    def _weights(self, queries: Tensor, keys: Tensor, rows: Tensor, alpha: float) -> Tensor:
        scores = self.problem.scale * (queries[rows].double() @ keys.T)
        if self.problem.causal:
            scores = scores.masked_fill(torch.arange(len(keys), device=keys.device) > rows[:, None], -math.inf)
        return scores.softmax(-1) if alpha == 1 else entmax_reference(scores, alpha)


def _bands(rows: int) -> Iterator[slice]:
    for start in range(0, rows, _BAND):
        yield slice(start, min(start + _BAND, rows))
