"""How much memory a training may use."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import TypeVar

import torch

from .observer import Observer
from .out_of_memory import is_out_of_memory

T = TypeVar("T")

#: GPU memory left to others (the screen, Slicer's views), bytes.
LEFT_ON_GPU = 1 << 30

#: Cases that are looked at side by side: at most so many, and no more than this many bytes for all of them.
MOST_AT_ONCE, ROOM_AT_ONCE = 8, 512 << 20


def usable_memory(device: torch.device, processes: int = 1) -> int:
    """Bytes that training on this device may use: free GPU memory less 1 GiB, or half of the main memory.

    Args:
        device: of this process.
        processes: that train together on this computer; each has a GPU of its own, but they share the main memory.
    """
    if device.type == "cuda":
        torch.cuda.empty_cache()  # what torch keeps for later is free for it
        free, _ = torch.cuda.mem_get_info(device)
        return max(free - LEFT_ON_GPU, 0)
    if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2 // processes
    return (4 << 30) // processes


def cases_at_once(bytes_each: int) -> int:
    """How many cases are looked at side by side, a thread each, where most of the work with one is a single core's.

    Args:
        bytes_each: what one of them needs.
    """
    return max(1, min(torch.get_num_threads(), MOST_AT_ONCE, ROOM_AT_ONCE // bytes_each))


def or_on_cpu(work: Callable[[torch.device], T], device: torch.device, observer: Observer, what: str) -> T:
    """Do `work` on a device, or on the CPU when the GPU's memory does not suffice; the observer is told."""
    try:
        return work(device)
    except (RuntimeError, MemoryError) as error:
        if device.type == "cpu" or not is_out_of_memory(error):
            raise
        observer.event("warning", text=f"{what}: the GPU's memory does not suffice; done on the CPU")
    torch.cuda.empty_cache()  # only now: while an error is handled, its traceback holds what did not fit
    return work(torch.device("cpu"))
