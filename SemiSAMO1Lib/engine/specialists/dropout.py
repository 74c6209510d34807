"""Dropout whose masks belong to the samples and not to the batch: in whatever process a sample lies, it is dropped
alike."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

_GENERATORS: ContextVar[Sequence[torch.Generator] | None] = ContextVar("generators", default=None)


@contextmanager
def dropped_by(generators: Sequence[torch.Generator]) -> Iterator[None]:
    """Within it each row of a batch is dropped by its own generator; several rows may share one."""
    token = _GENERATORS.set(generators)
    try:
        yield
    finally:
        _GENERATORS.reset(token)


class SampleDropout(nn.Module):
    """nn.Dropout, or nn.Dropout3d (`channels`), that draws from the generators of `dropped_by` where there are some."""

    def __init__(self, p: float, channels: bool) -> None:
        super().__init__()
        self.p, self.channels = p, channels

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.p == 0:
            return x
        generators = _GENERATORS.get()
        if generators is None:
            return F.dropout3d(x, self.p) if self.channels else F.dropout(x, self.p)
        shape = (*x.shape[:2], *[1] * (x.ndim - 2)) if self.channels else x.shape
        kept = torch.empty(shape, dtype=torch.bool, device=x.device)
        for row, generator in zip(kept, generators, strict=True):
            _draw(row, 1 - self.p, generator)
        return x * (kept.to(x.dtype) * (1 / (1 - self.p)))


def _draw(row: Tensor, share: float, generator: torch.Generator) -> None:
    """Fill with true for this share of the elements, false for the others.

    On a CPU torch draws them one by one, which took a quarter of a training step (docs/performance.md): there the
    generator gives the key of another one, and an element takes 16 of its bits.
    """
    if row.device.type != "cpu":
        row.bernoulli_(share, generator=generator)
        return
    key = int(torch.randint(2**62, (), generator=generator))
    drawn = np.random.SFC64(key).random_raw(-(-row.numel() // 4)).view(np.int16)[: row.numel()]
    torch.lt(torch.from_numpy(drawn).reshape(row.shape), min(round(share * 2**16) - 2**15, 2**15 - 1), out=row)


def with_sample_dropout(network: nn.Module) -> nn.Module:
    """Replace every dropout layer, in place."""
    for name, child in network.named_children():
        if isinstance(child, nn.Dropout | nn.Dropout3d):
            setattr(network, name, SampleDropout(child.p, isinstance(child, nn.Dropout3d)))
        else:
            with_sample_dropout(child)
    return network
