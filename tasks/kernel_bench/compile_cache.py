"""Had earlier processes left compiled kernels on the disk? It decides how long a first call takes."""

from __future__ import annotations

import getpass
import os
import tempfile
from functools import lru_cache
from pathlib import Path


def folders() -> list[Path]:
    """Return where Triton and torch.compile keep what they compiled; both take another folder from the environment."""
    triton = os.environ.get("TRITON_CACHE_DIR") or Path(os.environ.get("TRITON_HOME", Path.home()), ".triton", "cache")
    try:
        user = getpass.getuser()
    except (KeyError, OSError):  # a container's user without a name
        user = f"uid_{os.getuid()}"
    inductor = os.environ.get("TORCHINDUCTOR_CACHE_DIR") or Path(tempfile.gettempdir(), f"torchinductor_{user}")
    return [Path(triton), Path(inductor)]


@lru_cache
def state_at_start() -> str:
    """Return ``empty`` or ``used``, as it was when first asked in this process: ask before anything is compiled."""
    return "used" if any(f.is_dir() and any(f.iterdir()) for f in folders()) else "empty"
