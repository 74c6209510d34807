"""Networks with and without a distance map: what a learner wants from what a network gives."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class TwoHeads(nn.Module):
    """The first half of a network's channels as a distance map in (-1, 1), the second as logits."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        distances, logits = self.network(image).chunk(2, 1)
        return torch.tanh(distances), logits


class ShiftedLogits(nn.Module):
    """A network's logits (B, C, z, y, x) plus one number for each class."""

    def __init__(self, network: nn.Module, shift: Tensor) -> None:
        super().__init__()
        self.network = network
        self.register_buffer("shift", shift.reshape(1, -1, 1, 1, 1))

    def forward(self, image: Tensor) -> Tensor:
        found: Tensor = self.network(image) + self.shift
        return found


class LogitsOnly(nn.Module):
    """A network's logits without its distance map.

    Args:
        network: gives (distances, logits).
        unused: its part that gives the distances alone; it is not trained (several processes wait for every gradient).
    """

    def __init__(self, network: nn.Module, unused: nn.Module | None = None) -> None:
        super().__init__()
        self.network = network
        if unused is not None:
            unused.requires_grad_(False)

    def forward(self, image: Tensor) -> Tensor:
        _, logits = self.network(image)
        found: Tensor = logits
        return found
