"""What the methods leave behind the output: thresholds as accurate as float32 allows, and bit masks of tiles."""

from __future__ import annotations

import pytest
import torch
from calls import KERNELS, UNLIMITED, bind, op_arguments, plain, positions, random_qkv, stretch, tile_mask, tile_size
from oracle import check_against_oracle
from torch import Tensor

from adasplash_kernels import support_map
from adasplash_kernels.ops import forward_op
from adasplash_kernels.reference import entmax_reference
from adasplash_kernels.thresholds import THRESHOLDS, register

FLOAT32 = 2**-23


@pytest.mark.parametrize("method", KERNELS)
@pytest.mark.parametrize("spread", [0.01, 1.0, 30.0, 1000.0])
@pytest.mark.parametrize("alpha", [1.1, 1.5, 2.0])
def test_thresholds_are_accurate(device, method, alpha, spread):
    """theta = (tau + 1) / (alpha - 1) is in units of scores: it inherits their rounding, and adds a millionth."""
    q, k, v = random_qkv(device, 18 * stretch(device), 34 * stretch(device), spread=spread)
    theta = forward_op(*op_arguments(q, k, v, method, alpha=alpha))[2].double()
    scores = 0.25 * q.double() @ k.double().mT
    best, a = entmax_reference(scores, alpha).amax(-1), alpha - 1
    exact = scores.amax(-1) - (best**a - 1) / a  # p = (1 + a (s - theta))^(1/a), solved for theta
    terms = 0.25 * q.double().norm(dim=-1) * k.double().norm(dim=-1).amax()  # of the sum that a score is
    assert ((theta - exact).abs() <= 4 * FLOAT32 * terms + 2e-6).all()


@pytest.mark.in_turn(2)
@pytest.mark.parametrize("method", [m for m in KERNELS if THRESHOLDS[m].lists == "tiles"])
@pytest.mark.parametrize("masks", ["dense", "causal", "window", "padded", "packed"])
@pytest.mark.parametrize("alpha", [1.25, 1.5, 2.0])
def test_tile_bits_cover_the_support(device, method, masks, alpha):
    """Every tile with a weight has its bit, and few others have; more keys than fit in one word of bits."""
    rows, keys = tile_size(16, torch.float32)
    n = 35 * max(rows, keys)
    q, k, v = random_qkv(device, 2 * rows + 1, n, spread=0.5)
    common = k[:, :, n // 2 : n // 2 + 1]  # queries much alike use few keys in common: few tiles of any size hold one
    q = q + 16 * common / common.norm()
    options = {
        "dense": {},
        "causal": {"causal": True},
        "window": {"window": 10 * keys},
        "padded": {"key_starts": positions(device, keys + 1), "key_lengths": positions(device, n - 5)},
        "packed": {"cu_seqlens_q": positions(device, 0, rows + 1, 2 * rows),
                   "cu_seqlens_k": positions(device, 0, 17, n)},
    }[masks]  # fmt: skip
    reach = options["window"] - 1 if masks == "window" else UNLIMITED
    tensors = {name: x for name, x in options.items() if isinstance(x, Tensor)}
    right = 0 if masks == "causal" else reach
    words = forward_op(*op_arguments(q, k, v, method, alpha=alpha, left=reach, right=right, **tensors))[3]
    found = tile_mask(words, -(-n // keys))
    needed = support_map(q, k, alpha=alpha, tile=(rows, keys), **options).occupancy.flatten(0, 1)
    assert found.shape == needed.shape
    assert not (needed & ~found).any()
    assert 0 < needed.float().mean() < 0.7
    assert found.sum() <= needed.sum() + 0.1 * found.numel()


def test_a_method_without_a_mask_leaves_none(device):
    assert forward_op(*op_arguments(*random_qkv(device, 18), "adasplash_nomask"))[3].numel() == 0


def test_a_new_method_is_one_function(device):
    """A threshold found by other means, here sorting, needs no kernel, no list of names and no gradient of its own."""

    @register("sorted")
    def sorted_sparsemax(problem) -> Tensor:
        k = problem.k.repeat_interleave(problem.q.shape[1] // problem.k.shape[1], 1)
        s = (problem.scale * problem.q.float() @ k.float().mT).sort(-1, descending=True).values
        mean_excess = (s.cumsum(-1) - 1) / torch.arange(1, s.shape[-1] + 1, device=s.device)
        size = (mean_excess < s).sum(-1, keepdim=True)
        return mean_excess.gather(-1, size - 1).squeeze(-1) + 1

    try:
        q, k, v = random_qkv(device, 19, 35, heads=2, kv_heads=1)
        check_against_oracle(bind("sorted"), plain("sorted"), q, k, v, alpha=2.0)
        with pytest.raises(ValueError, match="name: 'sorted' is taken"):
            register("sorted")
    finally:
        THRESHOLDS.pop("sorted")
    with pytest.raises(ValueError, match="method: got 'sorted'"):
        bind("sorted")(q, k, v)
