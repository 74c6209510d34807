"""What goes into the engine and what comes out: cases, labels, propagations, results."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from ..volume import Geometry, Volume


@dataclass(frozen=True)
class EngineCase:
    """A scan to be segmented; its voxels are read when they are needed.

    Attributes:
        id: its name in files and events.
        geometry: its own grid, on which predictions are given back.
        load: reads the scan.
        trainable: False when its pseudo-label was rejected by a person: it is predicted, but not trained on.
    """

    id: str
    geometry: Geometry
    load: Callable[[], Volume]
    trainable: bool = True


@dataclass(frozen=True)
class LabelledCase:
    """A scan with a person's label.

    Attributes:
        id: its name.
        image: the scan, (z, y, x).
        label: class indices 0 (background) to C - 1 on the image's grid, uint8 or uint16.
        weight: how much its label counts beside others, > 0.
        origin: template, imported, accepted or corrected by a person; carried: by the propagation itself.
        unknown: classes that this label says nothing about; where it shows background, they may be.
    """

    id: str
    image: Volume
    label: Volume
    weight: float = 1.0
    origin: str = "template"
    unknown: tuple[int, ...] = ()

    def known_voxels(self) -> NDArray[np.bool_]:
        """(z, y, x): True where the label can be trusted as it is."""
        return (self.label.array > 0) if self.unknown else np.ones(self.label.geometry.shape, bool)


@dataclass(frozen=True)
class Propagation:
    """A template's label carried to a case.

    Attributes:
        geometry: the working grid.
        probabilities: (C, z, y, x) float16, sum 1.
        confidence: (z, y, x) float32 in [0, 1]; 0 = unknown, outside what the template shows.
        transforms: the transforms behind it, best first; empty without registration.
        facts: scores of the starts and the like, JSON-able.
        reliability: how far this way can be trusted at all, 0 to 1, where several ways are fused.
        signature: what the scan looks like; the similarity of two scans is the cosine of theirs, clipped at 0.
    """

    geometry: Geometry
    probabilities: Tensor
    confidence: Tensor
    transforms: Sequence[Any] = ()
    facts: dict[str, Any] = field(default_factory=dict)
    signature: NDArray[np.float16] | None = None
    reliability: float = 1.0


@dataclass(frozen=True)
class CaseResult:
    """What a round says about a case, on the case's own grid.

    Attributes:
        round: 0 for propagation alone, then 1, 2, ...
        case_id: the case.
        prediction: class indices, uint8 or uint16.
        uncertainty: uint8, 0-100 % of the maximal entropy.
        scores: JSON-able figures for the case and for each class.
    """

    round: int
    case_id: str
    prediction: Volume
    uncertainty: Volume
    scores: dict[str, Any]
