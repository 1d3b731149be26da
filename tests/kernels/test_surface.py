"""Every method x feature x dtype against the float64 oracle; interpreted on a CPU, compiled on a GPU."""

from __future__ import annotations

import pytest
import torch
from calls import KERNELS, METHODS, bind, plain, random_qkv
from oracle import LOWEST_ALPHA, check_against_oracle, gradients
from surface import CELLS, DOCUMENT, DTYPES, FEATURES, HALVES, cell_id, document, interpreted_cells, supported
from torch import Tensor

from adasplash_kernels import entmax_attention
from adasplash_kernels.arguments import KERNEL_DTYPES
from adasplash_kernels.reference import attention_reference

RUN = CELLS if torch.cuda.is_available() else interpreted_cells()


@pytest.mark.parametrize("cell", RUN, ids=cell_id)
def test_cell(device, cell):
    method, name, dtype = cell
    feature = FEATURES[name]
    q, k, v, options = feature.build(device, dtype)
    if not supported(cell):
        with pytest.raises(ValueError, match=f"q: got {dtype}, allowed with method '{method}'"):
            bind(method)(q, k, v, **options)
    elif dtype == torch.float64:
        check_float64(bind(method), q, k, v, options)
    else:
        check_against_oracle(bind(method), plain(method), q, k, v, forward_only=feature.forward_only, **options)


def check_float64(function, q: Tensor, k: Tensor, v: Tensor, options) -> None:
    """Assert output and gradients equal to the oracle's at float64's precision."""
    alpha = options.pop("alpha", 1.5)
    learned = isinstance(alpha, Tensor) and alpha.requires_grad
    upstream = torch.randn(q.shape, dtype=q.dtype, device=q.device)

    def at(implementation, alpha):
        if learned:
            return gradients(lambda *x: implementation(*x[:3], alpha=x[3], **options), (q, k, v, alpha), upstream)
        return gradients(lambda *x: implementation(*x, alpha=alpha, **options), (q, k, v), upstream)

    exact = alpha.double().clamp_min(LOWEST_ALPHA) if isinstance(alpha, Tensor) else alpha
    for found, expected in zip(at(function, alpha), at(attention_reference, exact), strict=True):
        torch.testing.assert_close(found, expected, check_dtype=False)


def test_the_interpreter_meets_every_dtype():
    """They take turns there: with some kernel each must meet every feature, and each kernel some feature."""
    cells = set(interpreted_cells())
    assert {c for c in CELLS if c[0] == "eager" or not supported(c)} <= cells
    assert {(m, f) for m, f, _ in filter(supported, cells)} == {(m, f) for m, f, _ in CELLS}
    for dtypes in ((torch.float32,), HALVES):
        assert {f for m, f, d in cells if m == "columns" and d in dtypes} == set(FEATURES)
    for dtype in DTYPES:
        assert {f for m, f, d in cells if d == dtype and m in KERNELS} == set(FEATURES)
        assert {m for m, _, d in cells if d == dtype} == set(METHODS)


def test_document_lists_these_cells():
    assert DOCUMENT.read_text(encoding="utf-8") == document(), (
        "run: python tests/kernels/surface.py --write docs/support.md"
    )


@pytest.mark.parametrize("dtype", DTYPES)
def test_auto_chooses_a_method_that_works(device, dtype):
    q, k, v = random_qkv(device, 19, dtype=dtype)
    if device == "cuda" and dtype in KERNEL_DTYPES:
        check_against_oracle(entmax_attention, plain("auto"), q, k, v, causal=True)
    else:
        expected = bind("eager")(q, k, v, causal=True)
        torch.testing.assert_close(entmax_attention(q, k, v, causal=True), expected, rtol=0, atol=0)
