"""Launching one kernel each way for short sequences, where the scores of a block of queries, or dQ of a head, fit on
chip."""

from __future__ import annotations

from functools import lru_cache

import torch
import triton
from torch import Tensor

from . import limits
from .backward import Upstream
from .on_chip import on_chip_kernel
from .problem import Problem, aligned
from .thresholds.refine import MAX_ITERATIONS
from .tile_sizes import INTERPRETED, Tiles

try:
    from .gradients_hopper import gradients_hopper_kernel
    from .on_chip_hopper import on_chip_hopper_kernel
except (ImportError, AttributeError):  # a Triton without Gluon, or with another
    on_chip_hopper_kernel = gradients_hopper_kernel = None


GRADIENT_TILES = Tiles(64, 128, 8, 1)


def on_chip(problem: Problem, need_out2: bool) -> tuple[Tensor, Tensor | None, Tensor] | None:
    """Return O and, if asked for, O2, (B, H, N_q, D) in q's dtype, and theta (B, H, N_q) float32; None where the scores
    of a block of queries do not fit."""
    q, keys = problem.q, problem.k.shape[2]
    if not _small(problem):
        return None
    hopper = _plain(problem) and _has_hopper_kernel(q.device)
    if keys > (limits.ON_CHIP_HOPPER if hopper else limits.ON_CHIP):
        return None
    part = problem.retiled(_tiles(keys, hopper))
    theta = torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    out2 = torch.empty(q.shape, dtype=q.dtype, device=q.device) if need_out2 else None
    each = _blocks_each(part.query_blocks, part.heads, _multiprocessors(q.device) * _PROGRAMS[part.tiles.block_n])
    grid = (part.heads * -(-part.query_blocks // each),)
    arguments = (part.inputs(), part.sizes(), theta, out, out2, MAX_ITERATIONS, each)
    if hopper:
        # causal: the first queries see the first half of the keys alone
        whole = _whole_rows(problem.k, problem.v)
        on_chip_hopper_kernel[grid](*arguments, problem.right == 0, whole, **part.options)
    else:
        on_chip_kernel[grid](*arguments, **part.options)
    return out, out2, theta


def gradients(problem: Problem, up: Upstream, out2: Tensor, dq: Tensor, dk: Tensor, dv: Tensor) -> bool:
    """Write the gradients to q, k and v with one kernel, and tell whether that was done: where dQ of a head fits.

    Args:
        up, out2, dq, dk, dv: as ``gradients_hopper_kernel`` takes them.
    """
    q, queries = problem.q, problem.q.shape[2]
    if not _small(problem) or not _plain(problem) or problem.groups > 1 or queries > limits.GRADIENTS_HOPPER:
        return False
    if not _has_hopper_kernel(q.device) or not _rounds_are_full(problem.heads, _multiprocessors(q.device)):
        return False
    if not _whole_rows(q, problem.k, problem.v, up.d_out):
        return False
    part = problem.retiled(GRADIENT_TILES)
    rows = max(128, triton.next_power_of_2(queries))
    gradients_hopper_kernel[(part.heads,)](part.inputs(), part.sizes(), up, out2, dq, dk, dv, rows, **part.options)
    return True


def _small(problem: Problem) -> bool:
    """Tell whether the kernels are for such numbers and heads."""
    plain_alpha = problem.alpha_kind == "1.5" and problem.scores is None
    return plain_alpha and problem.q.dtype != torch.float32 and problem.q.shape[3] <= 64


def _plain(problem: Problem) -> bool:
    """Tell whether nothing is asked for that only the portable kernels do."""
    return problem.alibi_slopes is None and problem.cu_seqlens_q is None


def _whole_rows(*tensors: Tensor) -> bool:
    """Tell whether rows of these start at multiples of 16 bytes and are 16 numbers long, or 32, ..."""
    return tensors[0].shape[3] % 16 == 0 and aligned(*tensors).value and not any(x.data_ptr() % 16 for x in tensors)


def _rounds_are_full(heads: int, at_a_time: int) -> bool:
    """Tell whether so many programs, of which so many run at a time, leave few of the places empty."""
    return heads >= limits.FILLED * -(-heads // at_a_time) * at_a_time


@lru_cache
def _blocks_each(blocks: int, heads: int, at_a_time: int) -> int:
    """Return how many blocks of queries of a head a program is to take, where so many programs run at a time.

    Loading keys and values takes a program about as long as a block does.
    """
    choices = range(1, max(1, min(blocks, 16)) + 1)
    return min(choices, key=lambda each: -(-heads * -(-blocks // each) // at_a_time) * (each + 1))


# programs that share a multiprocessor, by keys of a tile: what registers and shared memory leave room for
_PROGRAMS = {32: 1, 128: 3, 256: 2, 512: 1}


def _tiles(keys: int, hopper: bool) -> Tiles:
    """Pick tiles that hold all keys: three kernels at the most are compiled, whatever the lengths."""
    if INTERPRETED:
        return Tiles(16, 32, 1, 1)
    wide = max(128, triton.next_power_of_2(keys))
    return Tiles(64, wide, 8 if wide > 256 else 4, 1, None if wide > 128 else 168 if hopper else 128)


@lru_cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


@lru_cache
def _has_hopper_kernel(device: torch.device) -> bool:
    if on_chip_hopper_kernel is None or INTERPRETED or device.type != "cuda":
        return False
    return torch.version.hip is None and torch.cuda.get_device_capability(device)[0] == 9
