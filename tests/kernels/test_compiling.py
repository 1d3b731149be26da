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

from adasplash_kernels.backward import Upstream
from adasplash_kernels.gradients_hopper import gradients_hopper_kernel
from adasplash_kernels.inputs import sealed
from adasplash_kernels.on_chip_hopper import on_chip_hopper_kernel
from adasplash_kernels.problem import Problem, aligned, pitches
from adasplash_kernels.short import GRADIENT_TILES, _tiles

name, *numbers = sys.argv[1:]
n, head_dim = map(int, numbers)
q = torch.empty(2, 16, n, head_dim, dtype=torch.bfloat16)
theta = torch.empty(q.shape[:3])
problem = Problem(q, q, q, None, "1.5", 0.125, right=0)
if name == "forward":
    kernel, part = on_chip_hopper_kernel, problem.retiled(_tiles(n, hopper=True))
    arguments = (theta, q, q, 40, 2, True, head_dim % 16 == 0)
else:
    kernel, part = gradients_hopper_kernel, problem.retiled(GRADIENT_TILES)
    arguments = (Upstream(theta, theta, q, *map(sealed, pitches(q)), aligned(q)), q, q, q, q, n)
compiled = kernel.warmup(part.inputs(), part.sizes(), *arguments, grid=(1,), **part.options)
print(compiled.metadata.shared, "wgmma.mma_async" in compiled.asm["ptx"])
"""


@pytest.mark.parametrize(
    ("kernel", "n", "head_dim"),
    [
        ("forward", 128, 64), ("forward", 256, 16), ("forward", 512, 64), ("forward", 512, 40),
        ("gradients", 128, 64), ("gradients", 512, 16), ("gradients", 512, 64),
    ],
)  # fmt: skip
def test_kernels_for_short_sequences_compile_for_hopper(tmp_path, kernel, n, head_dim):
    own = {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", COMPILE, kernel, str(n), str(head_dim)]
    done = subprocess.run(command, env=os.environ | own, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    shared, products = done.stdout.split()
    assert int(shared) <= SHARED and products == "True"
