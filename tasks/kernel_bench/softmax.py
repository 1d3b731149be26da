"""Softmax attention: the two kernels of PyTorch's scaled_dot_product_attention, and FlexAttention."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from tasks.kernel_bench.problem import Attention, NotMeasured, Problem

_BLOCK = 128  # FlexAttention's own default


def flash(problem: Problem) -> Attention:
    """FlashAttention-2 in CUDA, as PyTorch ships it."""
    return _sdpa(problem, SDPBackend.FLASH_ATTENTION)


def cudnn(problem: Problem) -> Attention:
    """cuDNN's attention (of the FlashAttention-3 class on Hopper)."""
    return _sdpa(problem, SDPBackend.CUDNN_ATTENTION)


def _sdpa(problem: Problem, backend: SDPBackend) -> Attention:
    _need_cuda(problem)

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel(backend):  # this one or none: PyTorch falls back to no other
            try:
                return scaled_dot_product_attention(q, k, v, is_causal=problem.causal, enable_gqa=problem.grouped)
            except RuntimeError as error:
                if "No available kernel" not in str(error):
                    raise
                raise NotMeasured(f"PyTorch's {backend.name} does not take these inputs (the log says why)") from error

    return attention


def flex(problem: Problem) -> Attention:
    """FlashAttention-2 in Triton: FlexAttention, which PyTorch compiles and maintains.

    Compiled anew for every case (``dynamic=False``), which the first call pays for.
    """
    _need_cuda(problem)
    from torch.nn.attention.flex_attention import flex_attention

    torch.compiler.reset()  # else a limit on compilations is met, after which FlexAttention is dense
    compiled = torch.compile(flex_attention, dynamic=False, fullgraph=True)
    mask = causal_blocks(problem.n, problem.device) if problem.causal else None
    return lambda q, k, v: compiled(q, k, v, block_mask=mask, enable_gqa=problem.grouped)


def _causal(b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
    return query >= key


def causal_blocks(n: int, device: torch.device):  # noqa: ANN201 - BlockMask is imported late
    """Return FlexAttention's block mask of causal attention over n tokens.

    Written down rather than found by ``create_block_mask`` where n is whole blocks: that forms the n x n mask first,
    which takes tens of gigabytes at 131072.
    """
    from torch.nn.attention.flex_attention import BlockMask, create_block_mask

    if n % _BLOCK:
        return create_block_mask(_causal, None, None, n, n, device=device, BLOCK_SIZE=_BLOCK)
    blocks = torch.arange(n // _BLOCK, dtype=torch.int32, device=device)
    along = blocks.expand(len(blocks), -1)
    # Row i: block i is crossed by the diagonal, blocks 0 to i - 1 are seen whole. Entries past the counts are unread.
    diagonal = (along + blocks[:, None]) % len(blocks)
    return BlockMask.from_kv_blocks(
        torch.ones_like(blocks)[None, None], diagonal[None, None].contiguous(),
        blocks[None, None].contiguous(), along[None, None].contiguous(),
        BLOCK_SIZE=_BLOCK, mask_mod=_causal, seq_lengths=(n, n),
    )  # fmt: skip


def _need_cuda(problem: Problem) -> None:
    if problem.device.type != "cuda":
        raise NotMeasured("needs a CUDA device")
