"""Kernels that no interpreter runs are compiled for the GPU that they are for, which takes no GPU."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

SHARED = 232_448  # bytes of shared memory that a program may have on Hopper

COMPILE = """
import sys

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver


class Hopper:
    "Stands in for a driver as far as compiling asks."

    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0


driver.set_active(Hopper())

from adasplash_kernels.on_chip_hopper import on_chip_hopper_kernel
from adasplash_kernels.problem import Problem
from adasplash_kernels.short import _tiles

keys, head_dim = map(int, sys.argv[1:])
q = torch.empty(2, 16, keys, head_dim, dtype=torch.bfloat16)
part = Problem(q, q, q, None, "1.5", 0.125, right=0).retiled(_tiles(keys, hopper=True))
theta = torch.empty(q.shape[:3])
arguments = (part.inputs(), part.sizes(), theta, q, q, 40, 2, True, head_dim % 16 == 0)
compiled = on_chip_hopper_kernel.warmup(*arguments, grid=(1,), **part.options)
print(compiled.metadata.shared, "wgmma.mma_async" in compiled.asm["ptx"])
"""


@pytest.mark.parametrize(("keys", "head_dim"), [(128, 64), (256, 16), (512, 64), (512, 40)])
def test_the_kernel_for_short_sequences_compiles_for_hopper(tmp_path, keys, head_dim):
    own = {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", COMPILE, str(keys), str(head_dim)]
    done = subprocess.run(command, env=os.environ | own, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    shared, products = done.stdout.split()
    assert int(shared) <= SHARED and products == "True"
