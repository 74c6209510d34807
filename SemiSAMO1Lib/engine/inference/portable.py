"""A trained model by itself: one network file and its plan, without the training, the template or the project.

This module travels in the bundle together with what it imports; it needs numpy, scipy, torch, MONAI, SimpleITK and
pydantic.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ... import files
from ...volume import Volume
from ..data.grids import canonical, resample_image, with_spacing
from ..data.intensities import IntensityPlan, scale_intensities
from .sliding import predict_probabilities
from .uncertainty import to_case_grid


@dataclass(frozen=True)
class _Windows:
    patch: tuple[int, int, int]
    classes: int


@dataclass(frozen=True)
class _Runner:
    device: torch.device

    def autocast(self) -> AbstractContextManager[Any]:
        return nullcontext()


class PortableModel:
    """The model of a bundle.

    Args:
        root: the bundle's folder, with models/model.ts and plan.json.
        device: cpu, cuda or cuda:0.
    """

    def __init__(self, root: Path, device: str = "cpu") -> None:
        plan = files.read_json(Path(root) / "plan.json")
        self.values: list[int] = plan["label_values"]
        self._spacing = tuple(plan["spacing"])
        self._intensity = IntensityPlan.model_validate(plan["intensity"])
        self._windows = _Windows(tuple(plan["patch"]), plan["classes"])
        self._passes: int = plan["test_time_passes"]
        self._seed: int = plan["seed"]
        self._runner = _Runner(torch.device(device))
        self._network = torch.jit.load(str(Path(root) / "models" / "model.ts"), map_location=device)

    def segment(self, volume: Volume) -> tuple[Volume, Volume]:
        """Label values and uncertainty (0-100 %) of a scan, (z, y, x) on its own grid."""
        grid = with_spacing(canonical(volume.geometry), self._spacing)
        scaled = Volume(scale_intensities(volume, self._intensity), volume.geometry)
        image = resample_image(scaled, grid).astype(np.float16)
        found = predict_probabilities(self._network, image, self._windows, self._runner, self._passes, self._seed)
        seen = np.ones(grid.shape, bool)
        indices, uncertainty = to_case_grid(found, grid, seen, volume.geometry)
        kind = np.uint8 if max(self.values) <= 255 else np.uint16
        return Volume(np.asarray(self.values, kind)[indices.array], volume.geometry), uncertainty
