"""How much memory a training may use."""

from __future__ import annotations

import os

import torch

#: GPU memory left to others (the screen, Slicer's views), bytes.
LEFT_ON_GPU = 1 << 30


def usable_memory(device: torch.device) -> int:
    """Bytes that training on this device may use: free GPU memory less 1 GiB, or half of the main memory."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return max(free - LEFT_ON_GPU, LEFT_ON_GPU)
    if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    return 4 << 30
