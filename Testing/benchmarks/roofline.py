"""The least time that a computation needs on this machine: its operations at the measured rates.

FLOPs are those of matrix products and convolutions, at the rate of a large matrix product in the same type; bytes are
what every operation reads and writes, at the rate of a large copy. What numpy, scipy and SimpleITK do is not counted.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry


@dataclass(frozen=True)
class Rates:
    """What the machine reaches: FLOP/s of a matrix product by type, bytes/s of a copy (read and written)."""

    flops: dict[torch.dtype, float]
    bytes: float

    @classmethod
    def measured(cls, device: torch.device) -> Rates:
        size = 8192 if device.type == "cuda" else 2048
        flops = {}
        for kind in (torch.float32, torch.bfloat16):
            a, b = (torch.randn(size, size, device=device).to(kind) for _ in range(2))
            flops[kind] = 2 * size**3 / best_of(partial(torch.matmul, a, b), device)
        source = torch.randn(1 << 26, device=device)
        target = torch.empty_like(source)
        return cls(flops, 2 * 4 * source.numel() / best_of(lambda: target.copy_(source), device))

    def in_words(self) -> str:
        flops = ", ".join(f"{str(kind).removeprefix('torch.')} {rate / 1e9:.0f}" for kind, rate in self.flops.items())
        return f"GFLOP/s {flops}; copy {self.bytes / 1e9:.1f} GB/s"


@dataclass(frozen=True)
class Floor:
    """Seconds that the FLOPs and that the bytes of a computation need."""

    flops_s: float
    bytes_s: float

    @property
    def seconds(self) -> float:
        """The larger of the two; tensors that stay in the cache can be faster than the second."""
        return max(self.flops_s, self.bytes_s)


#: Operations that move nothing, and such that write their first argument without reading it.
_ALLOCATES = frozenset({"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"})
_OVERWRITES = frozenset({"copy_", "fill_", "zero_", "normal_", "uniform_", "bernoulli_", "random_"})


class Counter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts what is done while it is entered."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.flops: dict[torch.dtype, int] = {}
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket not in flop_registry:
            with self:  # in inference mode a convolution comes as one call of many parts
                found = func.decompose(*args, **(kwargs or {}))
            if found is not NotImplemented:
                return found
        found = func(*args, **(kwargs or {}))
        if func.overloadpacket.__name__ in _ALLOCATES:
            return found
        read = [one for one in tree_leaves(_read_by(func, args, kwargs or {})) if isinstance(one, Tensor)]
        wrote = [one for one in tree_leaves(found) if isinstance(one, Tensor)]
        memory = {one.untyped_storage().data_ptr() for one in read}
        if not wrote or func._schema.is_mutable or any(_where(one) not in memory for one in wrote):  # else a view
            self.bytes += sum(map(_bytes_of, (*read, *wrote)))
        count = flop_registry.get(func.overloadpacket)
        if count is not None and wrote:
            kind = wrote[0].dtype
            self.flops[kind] = self.flops.get(kind, 0) + count(*args, **(kwargs or {}), out_val=found)
        return found

    def floor(self, rates: Rates) -> Floor:
        flops_s = sum(n / rates.flops.get(kind, rates.flops[torch.float32]) for kind, n in self.flops.items())
        return Floor(flops_s, self.bytes / rates.bytes)


def _read_by(func: Any, args: Any, kwargs: dict[str, Any]) -> list[Any]:
    """The arguments whose values an operation uses: neither an output, nor what is only overwritten."""
    overwritten = func.overloadpacket.__name__ in _OVERWRITES
    outputs = {one.name for one in func._schema.arguments if one.is_out}
    return [*args[1 if overwritten else 0 :], *(one for name, one in kwargs.items() if name not in outputs)]


def _bytes_of(tensor: Tensor) -> int:
    """Of the values that lie in memory: an expanded axis has one."""
    steps = zip(tensor.shape, tensor.stride(), strict=True)
    return math.prod(size if step else 1 for size, step in steps) * tensor.element_size()


def _where(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def floor_of(action: Callable[[], Any], rates: Rates) -> Floor:
    """The floor of what an action does with tensors."""
    counter = Counter()
    with counter:
        action()
    return counter.floor(rates)


def seconds_of(action: Callable[[], Any], device: torch.device) -> float:
    """How long an action takes, the device's queue included."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    began = time.perf_counter()
    action()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began


def best_of(action: Callable[[], Any], device: torch.device, times: int = 5) -> float:
    action()
    return min(seconds_of(action, device) for _ in range(times))


def in_turn(actions: dict[str, Callable[[], Any]], device: torch.device, repetitions: int) -> dict[str, list[float]]:
    """Seconds of several actions, one after the other again and again, so that all meet the same neighbours; each is
    done once before."""
    for action in actions.values():
        action()
    found: dict[str, list[float]] = {name: [] for name in actions}
    for _ in range(repetitions):
        for name, action in actions.items():
            found[name].append(seconds_of(action, device))
    return found


def median_ratio(first: list[float], second: list[float]) -> float:
    """Median of the ratios of what was measured side by side."""
    return statistics.median(a / b for a, b in zip(first, second, strict=True))
