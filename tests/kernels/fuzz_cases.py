"""Random calls of ``entmax_attention``: one integer seed gives one case, and the same tensors on any device."""

from __future__ import annotations

import functools
import math
import random
from dataclasses import dataclass
from typing import Any

import torch
from calls import KERNELS
from torch import Tensor

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
HEAD_DIMS = (1, 8, 16, 24, 33, 40, 64, 80, 96, 128, 200, 256)
SHAPES = ("equal", "fewer queries", "more queries", "decode", "tiles")
ALPHAS = ("number", "scalar", "one element", "per head")
MASKINGS = ("none", "starts", "lengths", "starts and lengths", "packed", "packed apart")
SLOPES = ("none", "per head", "per batch and head")
DATA = ("normal", "constant", "heavy tails", "duplicates", "one-hot")
LAYOUTS = ("contiguous", "heads last", "transposed", "sliced", "expanded")


@dataclass(frozen=True)
class Limits:
    """How large cases get.

    Attributes:
        length: most queries or keys.
        pairs: most (query, key) pairs of a case, over batch and heads.
        tiles: sizes next to whose multiples lengths are drawn.
        heads: most key-value heads, and most query heads for each of them.
    """

    length: int
    pairs: int
    tiles: tuple[int, ...]
    heads: tuple[int, int] = (3, 3)


COMPILED = Limits(700, 2_000_000, (32, 64, 128))
INTERPRETED = Limits(40, 6_000, (16,))


@dataclass(frozen=True)
class Case:
    """One call, all of it but the tensors' contents, which follow from ``seed``."""

    seed: int
    method: str
    dtype: str
    shape: str
    batch: int
    heads: int
    kv_heads: int
    n_q: int
    n_k: int
    head_dim: int
    alpha_kind: str
    alpha: tuple[float, ...]
    alpha_grad: bool
    causal: bool
    window: int | None
    slopes: str
    masking: str
    starts: tuple[int, ...]  # key_starts, or cu_seqlens_q
    ends: tuple[int, ...]  # key_lengths, or cu_seqlens_k
    long_indices: bool
    scale: float | None
    spread: float
    data: str
    layout: str
    backward: bool

    @staticmethod
    def draw(seed: int, limits: Limits) -> Case:
        """Return the case of a seed within limits."""
        pick = random.Random(seed)
        shape = pick.choice(SHAPES)
        kv_heads = pick.randint(1, limits.heads[0])
        heads = kv_heads * pick.choice((1, 1, *range(1, limits.heads[1] + 1)))
        masking = _weighted(pick, MASKINGS, (10, 2, 2, 2, 3, 3))
        n_q, n_k = _lengths(pick, shape, limits)
        if masking == "packed":  # one list of cumulative lengths for both
            n_q = n_k
        batch = 1 if masking.startswith("packed") else pick.choice((1, 1, 2, 3))
        while batch * heads * n_q * n_k > limits.pairs:
            if batch > 1:
                batch -= 1
            elif heads > kv_heads:
                heads = kv_heads
            elif heads > 1:
                heads = kv_heads = 1
            else:
                n_q, n_k = (n_q + 1) // 2, n_k if masking != "packed" else (n_k + 1) // 2
        starts, ends = _bounds(pick, masking, batch, n_q, n_k)
        backward = pick.random() < (0.4 if shape == "decode" else 0.7)
        kind = _weighted(pick, ALPHAS, (6, 2, 1, 2))
        count = heads if kind == "per head" else 1
        return Case(
            seed=seed, method=pick.choice(KERNELS), dtype=pick.choice(tuple(DTYPES)), shape=shape, batch=batch,
            heads=heads, kv_heads=kv_heads, n_q=n_q, n_k=n_k,
            head_dim=_weighted(pick, HEAD_DIMS, [{64: 16, 128: 8}.get(d, 1) for d in HEAD_DIMS]),
            alpha_kind=kind, alpha=tuple(_alpha(pick) for _ in range(count)),
            alpha_grad=backward and kind != "number" and pick.random() < 0.5, causal=pick.random() < 0.5,
            window=_window(pick, max(n_q, n_k)), slopes=_weighted(pick, SLOPES, (4, 1, 1)), masking=masking,
            starts=starts, ends=ends, long_indices=pick.random() < 0.5,
            scale=None if pick.random() < 0.7 else 10 ** pick.uniform(-1.5, 0.5),
            spread=1.0 if pick.random() < 0.35 else 10 ** pick.uniform(-2, 3),
            data=_weighted(pick, DATA, (5, 1, 2, 1, 1)), layout=_weighted(pick, LAYOUTS, (5, 3, 1, 1, 1)),
            backward=backward,
        )  # fmt: skip

    def tensors(self, device: torch.device | str) -> tuple[Tensor, Tensor, Tensor, Tensor, dict[str, Any]]:
        """Return q, k, v, the gradient that comes back, and the options of ``entmax_attention``."""
        generator = torch.Generator().manual_seed(self.seed)
        normal = functools.partial(torch.randn, generator=generator)
        dtype = DTYPES[self.dtype]
        q = self.spread * self._content(normal, self.heads, self.n_q)
        k = self._content(normal, self.kv_heads, self.n_k)
        v = normal(self.batch, self.kv_heads, self.n_k, self.head_dim)
        upstream = normal(q.shape)
        # queries may fill the range of float16, but not the sums of keys and values that it must hold
        bounds = (3e4, 60.0, 60.0, 60.0) if dtype == torch.float16 else (math.inf,) * 4
        q, k, v, upstream = (
            self._arrange(x.clamp(-b, b).to(dtype).to(device)) for x, b in zip((q, k, v, upstream), bounds, strict=True)
        )
        return q, k, v, upstream, self._options(normal, device)

    def _content(self, normal: Any, heads: int, n: int) -> Tensor:
        """Return (B, heads, n, D) float32 data of queries or keys."""
        x = normal(self.batch, heads, n, self.head_dim)
        if self.data == "constant":  # all scores of a row tie
            x = x[:, :, :1].expand_as(x)
        elif self.data == "heavy tails":
            x = x * normal(x.shape).exp()
        elif self.data == "duplicates":
            x = x[:, :, torch.arange(n) // 3]
        elif self.data == "one-hot":  # scores take few values: many ties, many zeros
            hot = torch.nn.functional.one_hot(x.argmax(-1), self.head_dim)
            x = hot * normal(self.batch, heads, n, 1).abs().ceil() * self.head_dim**0.25
        return x

    def _arrange(self, x: Tensor) -> Tensor:
        """Return the same values (of the first head for all, if expanded) in the case's memory layout."""
        if self.layout == "heads last":  # as a linear layer gives them
            return x.transpose(1, 2).contiguous().transpose(1, 2)
        if self.layout == "transposed":  # the head dim is not the fastest
            return x.mT.contiguous().mT
        if self.layout == "sliced":  # every other row, from a column that is not aligned
            wide = x.new_full((*x.shape[:2], 2 * x.shape[2], x.shape[3] + 3), math.nan)
            wide[:, :, ::2, 1:-2] = x
            return wide[:, :, ::2, 1:-2]
        return x[:, :1].expand_as(x) if self.layout == "expanded" else x

    def _options(self, normal: Any, device: torch.device | str) -> dict[str, Any]:
        found: dict[str, Any] = {"causal": self.causal, "window": self.window, "scale": self.scale}
        values = torch.tensor(self.alpha, dtype=torch.float32, device=device)
        values = values.reshape(()) if self.alpha_kind == "scalar" else values
        number = self.alpha_kind == "number"
        found["alpha"] = self.alpha[0] if number else values.requires_grad_(self.alpha_grad)
        if self.slopes != "none":
            shape = (self.heads,) if self.slopes == "per head" else (self.batch, self.heads)
            # from 1 down to 2^-8 and less, as in ALiBi; now and then negative or zero
            slopes = (-2.5 * normal(shape).abs()).exp2() * (normal(shape) + 1).sign()
            found["alibi_slopes"] = torch.where(normal(shape) > 1.5, 0.0, slopes).to(device)
        integer = torch.int64 if self.long_indices else torch.int32
        packed = self.masking.startswith("packed")
        names = ("cu_seqlens_q", "cu_seqlens_k") if packed else ("key_starts", "key_lengths")
        for name, places in zip(names, (self.starts, self.ends), strict=True):
            if places:
                found[name] = torch.tensor(places, dtype=integer, device=device)
        return {n: x for n, x in found.items() if x is not None}

    def __str__(self) -> str:
        """Say everything that is not off, in one line."""
        rows, groups = f"{self.n_q}x{self.n_k}", f"H{self.heads}/{self.kv_heads}"
        alpha = ",".join(f"{a:.9g}" for a in self.alpha) + (" grad" if self.alpha_grad else "")
        parts = [self.method, self.dtype, f"B{self.batch}", groups, rows, f"D{self.head_dim}",
                 f"alpha {self.alpha_kind} {alpha}", "forward+backward" if self.backward else "forward"]  # fmt: skip
        parts += ["causal"] * self.causal + [f"window {self.window}"] * (self.window is not None)
        parts += [f"slopes {self.slopes}"] * (self.slopes != "none")
        if self.masking != "none":
            parts.append(f"{self.masking} {list(self.starts)} {list(self.ends)} int{64 if self.long_indices else 32}")
        if self.scale is not None:
            parts.append(f"scale {self.scale:.3g}")
        return ", ".join([*parts, f"q x {self.spread:.3g}", self.data, self.layout])


def _weighted(pick: random.Random, values: Any, weights: Any) -> Any:
    return pick.choices(values, weights)[0]


def _length(pick: random.Random, most: int) -> int:
    """Draw 1 to ``most``: half the draws evenly, half of them by order of magnitude."""
    return pick.randint(1, most) if pick.random() < 0.5 else math.floor((most + 1) ** pick.random())


def _lengths(pick: random.Random, shape: str, limits: Limits) -> tuple[int, int]:
    most = limits.length
    if shape == "tiles":
        tile, both = pick.choice(limits.tiles), []
        for _ in range(2):
            both.append(max(1, min(most, tile * pick.randint(1, most // tile) + pick.randint(-1, 1))))
        return both[0], both[pick.randint(0, 1)]
    few, many = sorted((_length(pick, most), _length(pick, most)))
    if shape == "equal":
        return many, many
    if shape == "decode":
        return pick.randint(1, min(16, many)), pick.randint(many, most)
    return (few, many) if shape == "fewer queries" else (many, few)


def _alpha(pick: random.Random) -> float:
    """Draw one of the closed forms, close to softmax, or anything in between, as float32 can hold it."""
    near = 1 + 10 ** -pick.uniform(1, 8)
    value = pick.choice((1.0, 1.5, 1.5, 2.0, near, pick.uniform(1, 2), pick.uniform(1, 2)))
    return float(torch.tensor(value, dtype=torch.float32))


def _window(pick: random.Random, n: int) -> int | None:
    if pick.random() < 0.6:
        return None
    return pick.choice((1, 2, pick.randint(1, n), pick.randint(1, n), n + pick.randint(0, n), 2**30))


def _bounds(pick: random.Random, masking: str, batch: int, n_q: int, n_k: int) -> tuple[tuple[int, ...], ...]:
    """Return starts and lengths by sequence, or cumulative lengths of queries and keys; empty for None."""
    if masking.startswith("packed"):
        count = pick.randint(1, 6)
        return _cuts(pick, count, n_q), _cuts(pick, count, n_k) if masking == "packed apart" else ()
    starts = tuple(pick.choice((0, pick.randint(0, n_k), pick.randint(0, n_k // 4))) for _ in range(batch))
    ends = tuple(pick.choice((0, n_k, *(pick.randint(0, n_k + 2) for _ in range(3)))) for _ in range(batch))
    return starts if "starts" in masking else (), ends if "lengths" in masking else ()


def _cuts(pick: random.Random, count: int, n: int) -> tuple[int, ...]:
    """Return ``count`` + 1 rising places from 0: some sequences are empty, and some tokens come after the last."""
    end = n if pick.random() < 0.7 else pick.randint(0, n)
    places = sorted(pick.randint(0, end) for _ in range(count - 1))
    doubled = [places[max(0, i - 1)] if pick.random() < 0.2 else p for i, p in enumerate(places)]
    return 0, *sorted(doubled), end
