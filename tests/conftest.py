"""Shared fixtures. Triton kernels run in its interpreter where there is no GPU, compiled where there is one."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

# Read when torch is imported. As many threads in each of as many processes as there are cores wait for one another.
if (_workers := int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))) > 1:
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // _workers)))

import torch  # noqa: E402

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when triton is first imported


@pytest.fixture
def device() -> str:
    """Where kernel tests put their tensors."""
    return "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(scope="session")
def data_root() -> Path:
    """The folder of real data, for tests marked ``realdata``."""
    folder = os.environ.get("ADASPLASH_DATA")
    if not folder:
        pytest.skip("ADASPLASH_DATA is not set: no real data on this machine")
    return Path(folder)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
