"""Devices by their names, and the Fabric that runs a network on one."""

from __future__ import annotations

import logging
from datetime import timedelta
from typing import Any

import torch
from lightning_fabric import Fabric
from lightning_fabric.plugins.environments.lightning import LightningEnvironment
from lightning_fabric.plugins.environments.slurm import SLURMEnvironment
from lightning_fabric.strategies.ddp import DDPStrategy

from .config import split_device
from .ranks import by_torchrun, started_together

#: How long a process waits for another.
LONGEST_WAIT = timedelta(days=1)


def make_fabric(device: str, precision: str, together: bool = False) -> Fabric:
    """A Fabric on one named device: 'auto', 'cpu', 'cuda' or 'cuda:0'.

    Args:
        device: its name.
        precision: '32-true' or 'bf16-mixed'.
        together: connect the processes that torchrun or srun started with this one; each has a device of its own.

    Raises:
        ValueError: there is no such device here, one GPU was named for several processes, or there are fewer GPUs than
            processes.
    """
    kind, number = require_device(device)
    logging.getLogger("lightning_fabric").setLevel(logging.WARNING)  # the precision stands in the plan
    count, here = started_together() if together else (1, 1)
    if count == 1:
        devices: Any = [int(number)] if number else 1
        # named, or inside a SLURM allocation Fabric would look for processes that nobody started
        alone = LightningEnvironment()
        return Fabric(accelerator=kind, devices=devices, precision=precision, plugins=[alone])  # type: ignore[arg-type]
    if number:
        raise ValueError(
            f"{count} processes cannot share {device}; give --device cuda, and each takes a GPU of its own"
        )
    if kind == "cuda" and torch.cuda.device_count() < here:
        raise ValueError(
            f"{here} processes run on this computer and each sees {torch.cuda.device_count()} GPUs: all have to see "
            "all of them (SLURM: --gpus-per-node, not --gpus-per-task), or start fewer"
        )
    # one waits for another as long as the slowest case takes, not half an hour
    strategy = DDPStrategy(
        cluster_environment=None if by_torchrun() else SLURMEnvironment(),
        process_group_backend="nccl" if kind == "cuda" else "gloo",
        timeout=LONGEST_WAIT,
    )
    nodes = count // here
    fabric = Fabric(
        accelerator=kind,
        strategy=strategy,
        devices=here,
        num_nodes=nodes,
        precision=precision,  # type: ignore[arg-type]
    )
    fabric.launch()
    return fabric


def require_device(device: str) -> tuple[str, str]:
    """Kind and number ('' for any) of a named device. Raises ValueError: there is no such device here."""
    kind, number = split_device(device)
    if kind == "auto":
        kind = "cuda" if torch.cuda.is_available() else "cpu"
    if kind == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device {device!r}: no CUDA GPU can be used here. Use --device cpu, or see: semisamo1 doctor")
    if kind == "cuda" and number and int(number) >= torch.cuda.device_count():
        raise ValueError(f"device {device!r}: there are {torch.cuda.device_count()} GPUs, counted from 0")
    return kind, number
