"""Where the chance of a training step comes from: a generator for each sample, whatever process it lies in."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch


@dataclass(frozen=True)
class Generators:
    """Generators of the samples of a batch, labelled ones first.

    Attributes:
        noise: on the CPU, of everything that is drawn there.
        views: on the device of the networks, of the noise that images get; on a CPU the same as `noise`.
        dropout: on the device of the networks.
        labelled: how many samples are labelled.
    """

    noise: Sequence[torch.Generator]
    views: Sequence[torch.Generator]
    dropout: Sequence[torch.Generator]
    labelled: int

    @property
    def of_labelled(self) -> Generators:
        """Those of the labelled samples alone."""
        labelled = self.labelled
        return Generators(self.noise[:labelled], self.views[:labelled], self.dropout[:labelled], labelled)

    @property
    def of_pseudo(self) -> Generators:
        """Those of the pseudo-labelled samples alone."""
        first = self.labelled
        return Generators(self.noise[first:], self.views[first:], self.dropout[first:], 0)


def generators_of(generator: torch.Generator, places: Sequence[int], labelled: int, device: torch.device) -> Generators:
    """The generators of the samples at `places` of the global batch; `generator` is that of the iteration, the same in
    every process."""

    def made(kind: int, where: torch.device) -> list[torch.Generator]:
        seed = generator.initial_seed()
        return [torch.Generator(where).manual_seed(hash_key(seed, place, kind)) for place in places]

    noise = made(0, torch.device("cpu"))
    return Generators(noise, noise if device.type == "cpu" else made(2, device), made(1, device), labelled)


def hash_key(*numbers: int) -> int:
    """One 63-bit seed from several numbers, spread well."""
    return int(np.random.SeedSequence(list(numbers)).generate_state(1, np.uint64)[0] >> np.uint64(1))
