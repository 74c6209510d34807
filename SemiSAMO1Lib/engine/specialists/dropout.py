"""Dropout whose masks belong to the samples and not to the batch: in whatever process a sample lies, it is dropped
alike."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar

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
        kept = torch.empty(shape, dtype=x.dtype, device=x.device)
        for row, generator in zip(kept, generators, strict=True):
            row.bernoulli_(1 - self.p, generator=generator)
        return x * kept.div_(1 - self.p)


def with_sample_dropout(network: nn.Module) -> nn.Module:
    """Replace every dropout layer, in place."""
    for name, child in network.named_children():
        if isinstance(child, nn.Dropout | nn.Dropout3d):
            setattr(network, name, SampleDropout(child.p, isinstance(child, nn.Dropout3d)))
        else:
            with_sample_dropout(child)
    return network
