"""A model sharded over devices (PyTorch's FSDP2): each holds a part of every weight, gradient and optimizer state.

The weights of a block are put together while it computes, and gradients are summed and cut up behind it. Checkpoints
and the trained model are whole, as those of a single device are.
"""

from __future__ import annotations

from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.strategies import ModelParallelStrategy
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from transformers import GPT2LMHeadModel

from tasks.distributed import Devices


def strategy_of(devices: Devices) -> Any:
    """Return what Lightning is to be told of how devices share the work."""
    if devices.strategy != "fsdp":
        return devices.strategy
    return ModelParallelStrategy(data_parallel_size=devices.world, tensor_parallel_size=1,
                                 save_distributed_checkpoint=False)  # fmt: skip


def is_sharded(trainer: pl.Trainer) -> bool:
    """Tell whether every process must take part where the model is used."""
    return isinstance(trainer.strategy, ModelParallelStrategy)


def shard(model: GPT2LMHeadModel, mesh: DeviceMesh) -> None:
    """Shard a GPT-2 in place over a one-dimensional mesh: each block by itself, then embeddings and what is left."""
    for block in model.transformer.h:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)


def whole_state(trainer: pl.Trainer, prefix: str) -> dict[str, Tensor]:
    """Return the whole weights of the module that was trained, those below ``prefix``, on the CPU of the first process;
    the others, which must call this too, get none."""
    state = trainer.strategy.lightning_module_state_dict()
    return {name.removeprefix(prefix): x for name, x in state.items() if name.startswith(prefix)}
