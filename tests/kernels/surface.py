"""The surface of ``entmax_attention``: every feature, on tensors small enough for Triton's interpreter.

``test_surface.py`` runs each method x feature x dtype of the lists below; ``docs/support.md`` is written from the
same lists. After changing them: ``python tests/kernels/surface.py --write docs/support.md``.
"""

from __future__ import annotations

import argparse
import itertools
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from calls import METHODS, Device, random_qkv, stretch, tile_size
from torch import Tensor

from adasplash_kernels.arguments import KERNEL_DTYPES

HALVES = (torch.float16, torch.bfloat16)
DTYPES = (torch.float32, *HALVES, torch.float64)
DOCUMENT = Path(__file__).parents[2] / "docs" / "support.md"

Option = Callable[[Device, int], Any]  # made on a device, with lengths times a factor


def lengths(*values: int, dtype: torch.dtype = torch.int32) -> Option:
    """Positions in a sequence, one per sequence or cumulative."""
    return lambda device, factor: torch.tensor([factor * x for x in values], dtype=dtype, device=device)


def span(value: int) -> Option:
    """A number of positions."""
    return lambda device, factor: factor * value


def numbers(*values: float | list[float], grad: bool = False, scalar: bool = False) -> Option:
    """A float32 tensor of these values, or the one value as a scalar."""
    data = values[0] if scalar else list(values)
    return lambda device, factor: torch.tensor(data, dtype=torch.float32, device=device, requires_grad=grad)


@dataclass(frozen=True)
class Feature:
    """One row of the support matrix: what it is, and a call that uses it.

    Lengths count for the interpreter's tiles of 16 x 16 and are ``factor`` times as long on a GPU.
    """

    description: str
    n_q: int = 18
    n_k: int | None = None
    head_dim: int = 16
    heads: int = 1
    kv_heads: int | None = None
    batch: int = 1
    spread: float = 1.0
    factor: int = 9
    fixed_queries: bool = False  # decoding: as many queries on any device
    forward_only: bool = False
    projection: bool = False
    options: dict[str, Any] = field(default_factory=dict)

    def build(self, device: Device, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, dict[str, Any]]:
        """Return q, k, v and the options of ``entmax_attention``."""
        factor = stretch(device, self.factor)
        n_q = self.n_q if self.fixed_queries else factor * self.n_q
        n_k = None if self.n_k is None else factor * self.n_k
        qkv = random_qkv(device, n_q, n_k, self.head_dim, heads=self.heads, kv_heads=self.kv_heads, batch=self.batch,
                         spread=self.spread, dtype=dtype, seed=zlib.crc32(self.description.encode()))  # fmt: skip
        if self.projection:  # as one linear layer gives them: (B, N, 3, H, D), seen as (B, H, N, D)
            qkv = torch.stack([x.transpose(1, 2) for x in qkv], 2).unbind(2)
            qkv = tuple(x.transpose(1, 2) for x in qkv)
        return *qkv, {k: o(device, factor) if callable(o) else o for k, o in self.options.items()}


class TileBorder(Feature):
    """Lengths one past a whole number of the kernels' tiles, whatever those are."""

    def build(self, device: Device, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, dict[str, Any]]:
        rows, keys = tile_size(self.head_dim, dtype)
        n_q, n_k = rows + 1, 2 * keys + 1
        return *random_qkv(device, n_q, n_k, self.head_dim, dtype=dtype, seed=1), dict(self.options)


def _alphas() -> dict[str, Feature]:
    found = {}
    for alpha, name in ((1.0, "softmax"), (1.25, ""), (1.5, ""), (1.75, ""), (2.0, "sparsemax")):
        note = f"`alpha={alpha:g}`" + (f", {name}" if name else "")
        found[f"alpha {alpha:g}"] = Feature(note, options={"alpha": alpha})
        found[f"alpha {alpha:g}, causal"] = Feature(f"{note}, causal", options={"alpha": alpha, "causal": True})
    return found


_PER_HEAD = (1.0, 1.2, 1.5, 2.0)
_CAUSAL: dict[str, Any] = {"causal": True}
_PACKED = {"cu_seqlens_q": lengths(0, 5, 5, 24, 30)}  # an empty sequence, one across tiles, two tokens of none
_PACKED_APART = {
    "cu_seqlens_q": lengths(0, 5, 9, 9, 26, dtype=torch.int64),
    "cu_seqlens_k": lengths(0, 11, 11, 14, 32, dtype=torch.int64),
}
_PADDING = {"key_starts": lengths(3, 9, 0), "key_lengths": lengths(18, 17, 0, dtype=torch.int64)}
_PADDING_SWAPPED = {"key_starts": lengths(3, 9, 0, dtype=torch.int64), "key_lengths": lengths(18, 17, 0)}
_DECODE: dict[str, Any] = dict(
    n_k=49, heads=2, kv_heads=1, factor=83, fixed_queries=True, forward_only=True
)  # a cache of about 4096 keys on a GPU

FEATURES: dict[str, Feature] = {
    "dense": Feature("every query sees every key, `N_q` and `N_k` differ", 18, 21, heads=2),
    "causal": Feature("`causal=True`, as many queries as keys", 33, options=_CAUSAL),
    "causal, fewer queries": Feature("`causal=True`, `N_q < N_k`: the last query sees every key", 18, 34,
                                     options=_CAUSAL),
    "causal, more queries": Feature("`causal=True`, `N_q > N_k`: the first queries see no key", 34, 18,
                                    options=_CAUSAL),
    "grouped queries": Feature("`H = 2 H_kv` (GQA)", heads=4, kv_heads=2, options=_CAUSAL),
    "multi-query": Feature("`H_kv = 1` (MQA)", 13, heads=3, kv_heads=1, batch=2, options=_CAUSAL),
    "key lengths": Feature("`key_lengths`: right padding", batch=2, options={"key_lengths": lengths(17, 5)}),
    "key starts": Feature("`key_starts`: left padding", batch=2,
                          options={"key_starts": lengths(1, 16, dtype=torch.int64)}),
    "key lengths and starts": Feature("both paddings, one sequence of padding alone", batch=3, options=_PADDING),
    "key lengths and starts, causal": Feature("both paddings under a causal mask", batch=3,
                                              options=_PADDING_SWAPPED | _CAUSAL),
    "packed": Feature("`cu_seqlens_q`: sequences in one batch row, an empty one among them", 32, options=_PACKED),
    "packed, causal": Feature("`cu_seqlens_q`, causal within each sequence", 32, heads=2, kv_heads=1,
                              options=_PACKED | _CAUSAL),
    "packed, two lengths": Feature("`cu_seqlens_q` and `cu_seqlens_k`: queries without keys, keys without queries",
                                   27, 33, options=_PACKED_APART),
    "packed, two lengths, causal": Feature("the same under a causal mask, aligned bottom-right in each sequence",
                                           27, 33, options=_PACKED_APART | _CAUSAL),
    "window, causal": Feature("`window` keys back", 34, options={"window": span(6), **_CAUSAL}),
    "window, both sides": Feature("`window` keys to either side", 34, options={"window": span(6)}),
    "window, two lengths": Feature("`window` with `N_q < N_k`, counted from the bottom-right diagonal", 17, 40,
                                   options={"window": span(5)}),
    "window of one": Feature("`window=1`: each query sees its own key", 18, options={"window": 1}),
    "window, padded": Feature("`window` with both paddings", batch=3, options={"window": span(5), **_PADDING}),
    "window, packed, causal": Feature("`window` within packed sequences", 32,
                                      options={"window": span(5), **_PACKED, **_CAUSAL}),
    "ALiBi per head": Feature("`alibi_slopes` (H,)", heads=2, options={"alibi_slopes": numbers(0.25, 0.0625)}),
    "ALiBi per batch and head, causal": Feature(
        "`alibi_slopes` (B, H), one of them negative, causal", 13, 15, heads=2, batch=2,
        options={"alibi_slopes": numbers([0.5, 0.125], [0.0, -0.03]), **_CAUSAL},
    ),
    "ALiBi, packed": Feature("`alibi_slopes` by distance within packed sequences", 27, 33, heads=2, kv_heads=1,
                             options={"alibi_slopes": numbers(0.25, 0.0625), **_PACKED_APART}),
    "ALiBi, window, padded": Feature(
        "`alibi_slopes` with a window and both paddings, causal", batch=3,
        options={"alibi_slopes": numbers(0.25), "window": span(8), **_PADDING, **_CAUSAL},
    ),
    **_alphas(),
    "alpha tensor": Feature("`alpha` a scalar tensor", options={"alpha": numbers(1.3, scalar=True)}),
    "alpha per head": Feature("`alpha` a tensor (H,), softmax and sparsemax among its values", 13, heads=4,
                              options={"alpha": numbers(*_PER_HEAD)}),
    "gradient to alpha": Feature("`alpha` a scalar tensor that requires grad", heads=2,
                                 options={"alpha": numbers(1.4, scalar=True, grad=True), **_CAUSAL}),
    "gradient to alpha per head": Feature("`alpha` a tensor (H,) that requires grad, grouped queries", 13, heads=4,
                                          kv_heads=2, options={"alpha": numbers(1.1, 1.3, 1.6, 1.95, grad=True)}),
    "gradient to alpha, packed, ALiBi": Feature(
        "`alpha` that requires grad with ALiBi in packed sequences", 32, heads=2,
        options={"alpha": numbers(1.2, 1.7, grad=True), "alibi_slopes": numbers(0.25, 0.0625), **_PACKED, **_CAUSAL},
    ),
    "strided": Feature("q, k and v views of one projection (B, N, 3, H, D)", 13, heads=2, batch=2, head_dim=24,
                       projection=True, options=_CAUSAL),
    "head dim 40": Feature("a head dim that is not a power of two", 19, head_dim=40, options=_CAUSAL),
    "head dim 1": Feature("the smallest head dim", 19, head_dim=1, options=_CAUSAL),
    "head dim 256": Feature("the largest head dim", 19, head_dim=256, options=_CAUSAL),
    "decode, 1 query": Feature("one query against a cache of grouped keys, without gradients", 1, **_DECODE,
                               options=_CAUSAL),
    "decode, 16 queries": Feature("16 queries against a cache, causal, without gradients", 16, **_DECODE,
                                  options=_CAUSAL),
    "decode, padded": Feature("one query a sequence, caches filled to different lengths", 1, batch=2, **_DECODE,
                              options={"key_starts": lengths(0, 7), "key_lengths": lengths(33, 48)}),
    "decode, window and ALiBi": Feature(
        "3 queries against a cache, causal, with a window and ALiBi", 3, **_DECODE,
        options={"window": span(25), "alibi_slopes": numbers(0.5, 0.125), "alpha": 1.25, **_CAUSAL},
    ),
    "custom scale": Feature("`scale` other than `1/sqrt(D)`", options={"scale": 0.7}),
    "scores x 0.01": Feature("nearly uniform scores", spread=0.01),
    "scores x 30": Feature("peaked scores", spread=30.0),
    "scores x 1000": Feature("scores so large that most rows have one key", spread=1000.0),
    "one query, one key": Feature("`N_q = N_k = 1`", 1, factor=1),
    "tile border": TileBorder("`N_q` and `N_k` one past a whole number of tiles", options=_CAUSAL),
}  # fmt: skip

Cell = tuple[str, str, torch.dtype]
CELLS: tuple[Cell, ...] = tuple(itertools.product(METHODS, FEATURES, DTYPES))


def supported(cell: Cell) -> bool:
    """Tell whether a cell must agree with the oracle; the others must be refused."""
    method, _, dtype = cell
    return method == "eager" or dtype in KERNEL_DTYPES


def interpreted_cells() -> tuple[Cell, ...]:
    """Return the cells worth the interpreter's time: one of the three dtypes in turn, and of columns two.

    The turn goes by method and feature, so each dtype meets each feature with some method and each method with some
    feature. Of columns, whose lists hold other entries for half precision, it is float32 and one of the other two.
    Cells that end at once, in an error or in eager attention, are all there.
    """
    order = {m: i for i, m in enumerate(METHODS)} | {f: i for i, f in enumerate(FEATURES)}

    def runs(cell: Cell) -> bool:
        method, feature, dtype = cell
        turn = order[method] + order[feature]
        if method == "eager" or dtype not in KERNEL_DTYPES:
            return True
        if method == "columns":
            return dtype not in HALVES or dtype == HALVES[turn % 2]
        return dtype == (torch.float32, *HALVES)[turn % 3]

    return tuple(filter(runs, CELLS))


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def cell_id(cell: Cell) -> str:
    """The name of a cell's test."""
    method, feature, dtype = cell
    return f"{method}-{feature}-{dtype_name(dtype)}"


_TEXT = """\
# What is supported

Generated by `python tests/kernels/surface.py --write docs/support.md`; do not edit. The rows are `FEATURES` of
`tests/kernels/surface.py`, the columns the values of `method` in `entmax_attention`, and each cell lists the dtypes
with which output and gradients are compared with a float64 reference. A dtype that is not listed is refused with an
error that names the argument, and a cell of which all are refused is `-`.

{dtypes}.

Every cell is a test, `test_cell[METHOD-FEATURE-DTYPE]` in `tests/kernels/test_surface.py`; the one for the first
cell is `{example}`. All run on a GPU. Without one, Triton's interpreter runs one dtype of each method
and feature in turn, and of `columns` two. A test fails when this page differs from what the lists give. `method="auto"`
takes eager on a CPU and for float64, and a kernel elsewhere.

{table}
"""


def document() -> str:
    """Return the text of docs/support.md."""
    short = {torch.float32: "f32", torch.float16: "f16", torch.bfloat16: "bf16", torch.float64: "f64"}
    head = ["feature", "what it is", *(f"`{m}`" for m in METHODS)]
    rows = [head, ["---"] * len(head)]
    for feature, about in FEATURES.items():
        cells = [[short[c[2]] for c in CELLS if c[:2] == (m, feature) and supported(c)] for m in METHODS]
        rows.append([feature, about.description, *(" ".join(c) or "-" for c in cells)])
    legend = ", ".join(f"{s} is `torch.{dtype_name(d)}`" for d, s in short.items())
    table = "\n".join(f"| {' | '.join(row)} |" for row in rows)
    return _TEXT.format(dtypes=legend, example=f"test_cell[{cell_id(CELLS[0])}]", table=table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", type=Path, metavar="FILE", help="the file to write, docs/support.md")
    options = parser.parse_args()
    if options.write is None:
        print(document(), end="")
    else:
        options.write.write_text(document(), encoding="utf-8")


if __name__ == "__main__":
    main()
