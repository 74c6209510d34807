"""A trained model by itself: one network file and its plan, without the training, the template or the project.

This module travels in the bundle together with what it imports; it needs numpy, scipy, torch, MONAI, SimpleITK and
pydantic.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import ndimage

from ... import files
from ...volume import Geometry, Volume
from ..data.boxes import Box, box_within, on_grid
from ..data.grids import canonical, resample_image, with_spacing
from ..data.intensities import IntensityPlan, scale_intensities
from .sliding import predict_probabilities
from .uncertainty import to_case_grid

#: How far windows overlap while a network looks for the place: there are many in a whole scan.
_OVERLAP = 0.1

#: Steps in which a box is moved until what is seen lies in its middle.
_CENTRED = 3


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
        root: the bundle's folder, with models/model.ts and plan.json. A network that learned from the surroundings of
            labels alone (`surroundings_mm`) finds them first.
        device: cpu, cuda or cuda:0.
    """

    def __init__(self, root: Path, device: str = "cpu") -> None:
        plan = files.read_json(Path(root) / "plan.json")
        self.values: list[int] = plan["label_values"]
        self._spacing = tuple(plan["spacing"])
        self._intensity = IntensityPlan.model_validate(plan["intensity"])
        self._windows = _Windows(tuple(plan["patch"]), plan["classes"])
        self._extent: list[float] | None = plan.get("surroundings_mm")
        self._passes: int = plan["test_time_passes"]
        self._seed: int = plan["seed"]
        self._runner = _Runner(torch.device(device))
        self._network = torch.jit.load(str(Path(root) / "models" / "model.ts"), map_location=device)

    def segment(self, volume: Volume) -> tuple[Volume, Volume]:
        """Label values and uncertainty (0-100 %) of a scan, (z, y, x) on its own grid."""
        if self._extent is None:
            return self._segmented(volume)
        grid, found = self._predicted(volume, 1, _OVERLAP)
        seen = 1 - found[0].astype(np.float32)
        del found
        box = on_grid(most_within(seen, grid, self._extent), grid, volume.geometry)
        labels, uncertainty = self._segmented(box.of(volume))
        return box.placed(labels, volume.geometry), box.placed(
            uncertainty, volume.geometry, 0 if labels.array.any() else 100
        )

    def _segmented(self, volume: Volume) -> tuple[Volume, Volume]:
        grid, found = self._predicted(volume, self._passes)
        seen = np.ones(grid.shape, bool)
        indices, uncertainty = to_case_grid(found, grid, seen, volume.geometry)
        kind = np.uint8 if max(self.values) <= 255 else np.uint16
        return Volume(np.asarray(self.values, kind)[indices.array], volume.geometry), uncertainty

    def _predicted(self, volume: Volume, passes: int, overlap: float = 0.5) -> tuple[Geometry, NDArray[np.float16]]:
        """Class probabilities (C, z, y, x), and the grid that they are on."""
        grid = with_spacing(canonical(volume.geometry), self._spacing)
        scaled = Volume(scale_intensities(volume, self._intensity), volume.geometry)
        image = resample_image(scaled, grid).astype(np.float16)
        given = (self._network, image, self._windows, self._runner, passes, self._seed)
        return grid, predict_probabilities(*given, overlap=overlap)


def most_within(seen: NDArray[np.float32], grid: Geometry, extent: Sequence[float]) -> Box:
    """The part of a scan, as large as those that a network learned from, in which it sees most of what it knows.

    Args:
        seen: probability of all that is no background, (z, y, x) on `grid`.
        grid: its axes are nearest to the patient's.
        extent: of that part along (z, y, x), mm.
    """
    shape = np.array(seen.shape)
    size = np.clip(np.rint(np.array(extent) / np.array(grid.spacing)), 1, shape).astype(int)
    sums = ndimage.uniform_filter(seen, size.tolist(), mode="constant")
    middle = np.array(np.unravel_index(int(sums.argmax()), seen.shape), float)
    for _ in range(_CENTRED):  # many boxes see all there is: the one with it in its middle
        first = np.clip(np.rint(middle - (size - 1) / 2), 0, shape - size).astype(int)
        box = box_within(first, first + size, seen.shape)
        part = seen[box.slices]
        if not part.any():
            break
        middle = first + np.array(ndimage.center_of_mass(part))
    return box
