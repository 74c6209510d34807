"""Several propagators as one: each voxel by their confidences and by how far each can be trusted at all."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ...volume import Geometry, Volume
from ..cases import LabelledCase, Propagation
from .base import Propagator
from .detours import Helper

#: Where nobody is confident the parts still count alike.
_LEAST = 0.02


class FusedPropagator:
    """The confidence-weighted mean of several propagations; transforms and signature are the first one's."""

    def __init__(self, parts: Sequence[Propagator]) -> None:
        self.parts = list(parts)

    def prepare(self, labelled: Sequence[LabelledCase]) -> list[Any]:
        return [part.prepare(labelled) for part in self.parts]

    def template_signature(self, prepared: list[Any]) -> NDArray[np.float16]:
        return self.parts[0].template_signature(prepared[0])

    def propagate(
        self, prepared: list[Any], volume: Volume, grid: Geometry, through: Sequence[Helper] = ()
    ) -> Propagation:
        found = [part.propagate(one, volume, grid, through) for part, one in zip(self.parts, prepared, strict=True)]
        # squared: a way that finds a quarter of the template's own label again must not move a registration's border
        weights = [(one.confidence.float().cpu() + _LEAST) * one.reliability**2 for one in found]
        total = torch.stack(weights).sum(0).clamp(min=1e-12)
        mixed = torch.empty(found[0].probabilities.shape, dtype=torch.float16)
        for value in range(len(mixed)):  # one class at a time: memory does not grow with their number
            votes = [w * one.probabilities[value].float().cpu() for w, one in zip(weights, found, strict=True)]
            mixed[value] = torch.stack(votes).sum(0) / total
        confidence = torch.stack([one.confidence.float().cpu() for one in found]).amax(0)
        facts = {key: value for one in found for key, value in one.facts.items()}
        return Propagation(grid, mixed, confidence, found[0].transforms, facts, found[0].signature)
