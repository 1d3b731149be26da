"""Several devices: what the command line asks for, and which of the processes this one is.

One process drives one device. ``torchrun`` or SLURM's ``srun`` starts them, all with the same command line; each goes
through the same experiments and jobs, and only the first one speaks, records and renders.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

from tasks.errors import ConfigError

STRATEGIES = ("auto", "ddp", "fsdp")


@dataclass(frozen=True)
class Devices:
    """How many devices train one model, and how they share the work.

    Attributes:
        count: devices of each node.
        nodes: machines.
        strategy: ``auto`` or ``ddp`` (a copy of the model on each device, gradients averaged), or ``fsdp`` (each device
            holds a part of it).

    Raises:
        ConfigError: a value is out of range; the message names the option of the command line.
    """

    count: int = 1
    nodes: int = 1
    strategy: str = "auto"

    def __post_init__(self) -> None:
        for option, value in (("--devices", self.count), ("--num-nodes", self.nodes)):
            if value < 1:
                raise ConfigError(f"{option}: got {value}, allowed is 1 or more")
        if self.strategy not in STRATEGIES:
            raise ConfigError(f"--strategy: got {self.strategy!r}, allowed are {', '.join(STRATEGIES)}")

    @property
    def world(self) -> int:
        """Processes in all, one a device."""
        return self.count * self.nodes

    def check_launch(self) -> None:
        """Check that as many processes were started as there are devices.

        Lightning would start the missing ones by itself, running this program again in each: with jobs done one after
        the other and recorded that is no way.

        Raises:
            ConfigError: they differ; the message says how to start them.
        """
        started = _started()
        if started == self.world or started is None and self.world == 1:
            return
        found = "this is one process" if started is None else f"{started} processes were started"
        raise ConfigError(
            f"--devices: got {self.count} on {self.nodes} node(s), but {found}; start as many as devices: "
            f"torchrun --nproc-per-node {self.count} -m tasks run ... --devices {self.count}, or srun")


def rank() -> int:
    """Return which process of a run on several devices this is, from 0; 0 where there is only one."""
    return int(os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")) if _started() else 0)


def local_rank() -> int:
    """Return which process of its machine this is, from 0."""
    return int(os.environ.get("LOCAL_RANK", os.environ.get("SLURM_LOCALID", "0")) if _started() else 0)


def _started() -> int | None:
    """Return how many processes torchrun, or a step of SLURM with several tasks, started; None without either."""
    if "TORCHELASTIC_RUN_ID" in os.environ:
        return int(os.environ["WORLD_SIZE"])
    tasks = int(os.environ.get("SLURM_STEP_NUM_TASKS", "1"))
    return tasks if tasks > 1 else None
