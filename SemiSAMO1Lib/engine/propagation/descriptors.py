"""A scan made ready for registration: descriptors and weights on an isotropic grid along the patient's axes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
import torch.nn.functional as F
from scipy import ndimage
from torch import Tensor

from ...volume import Geometry, Volume
from ..data.grids import inside, patient_aligned, pooled, resample_image, space_points
from ..data.intensities import data_mask
from ..generalists.mind import mind_ssc

#: Voxels that a descriptor looks away from its own: dilation and radius of MIND-SSC.
DESCRIPTOR_REACH = 3

#: Widths of averaged descriptors that are kept of a scan.
_WIDTHS_KEPT = 6

#: Largest working grid, voxels.
LARGEST_GRID = 2_000_000


@dataclass(frozen=True)
class Features:
    """Descriptors on one grid.

    Attributes:
        geometry: isotropic, along the patient's axes.
        channels: (12 + 1, z, y, x) float; the last channel is the weight: 1 where the scan has data, 0 in padding
            and outside the field of view.
    """

    geometry: Geometry
    channels: Tensor

    @property
    def values(self) -> Tensor:
        return self.channels[:-1]

    @property
    def weight(self) -> Tensor:
        return self.channels[-1]

    def in_float32(self) -> Features:
        return Features(self.geometry, self.channels.float())

    def part(self, box: Sequence[tuple[int, int]]) -> Features:
        """Voxels first .. end - 1 along z, y, x."""
        (z, y, x), (depth, height, width) = [first for first, _ in box], [end - first for first, end in box]
        old = self.geometry
        a, b, c = (float(v) for v in (old.index_to_space @ np.array([x, y, z, 1.0]))[:3])
        geometry = Geometry((depth, height, width), old.spacing, (a, b, c), old.direction)
        return Features(geometry, self.channels[:, z : z + depth, y : y + height, x : x + width])


@dataclass(frozen=True)
class Described:
    """One scan ready for registration.

    Attributes:
        image: the scan on its working grid, float32, and that grid.
        weight: (z, y, x) float32 in [0, 1], as in Features.
        window: lowest and highest grey value that descriptors tell apart.
        coarse: descriptors averaged over 2³ voxels: searches and most of the refinement run here.
        fine: descriptors of every voxel, for the last refinement of small scans; None for large ones.
    """

    image: Volume
    weight: Tensor
    window: tuple[float, float]
    coarse: Features
    fine: Features | None
    _averages: dict[int, Features] = field(default_factory=dict, repr=False)

    def averaged(self, width: int) -> Features:
        """The coarse descriptors averaged over width³ voxels at every voxel; the widths used last are kept."""
        if width == 1:
            return self.coarse
        found = self._averages.pop(width, None) or _moving_average(self.coarse, width)
        self._averages[width] = found
        while len(self._averages) > _WIDTHS_KEPT:
            del self._averages[next(iter(self._averages))]
        return found

    def coarse_part(self, box: Sequence[tuple[int, int]]) -> Described:
        """The same scan with a part of its coarse descriptors alone: voxels first .. end - 1 along z, y, x."""
        return Described(self.image, self.weight, self.window, self.coarse.part(box), None)


def working_spacing(volumes: list[Geometry], limit: int = LARGEST_GRID) -> float:
    """The isotropic spacing in mm on which these scans are registered.

    The median voxel's side; the geometric mean of its sides where one is more than twice another (anisotropic scans);
    coarser where a grid would have more than `limit` voxels.
    """
    spacings = np.median([sorted(geometry.spacing) for geometry in volumes], axis=0)
    side = float(spacings.min() if spacings.max() <= 2 * spacings.min() else np.prod(spacings) ** (1 / 3))
    while max(patient_aligned(geometry, side).voxels for geometry in volumes) > limit:
        side *= 1.02
    return side


def describe(volume: Volume, spacing: float, device: torch.device, finest: bool, padded: bool = True) -> Described:
    """Bring a scan to its working grid and describe it.

    Args:
        volume: the scan on its own grid.
        spacing: isotropic, mm (see `working_spacing`).
        device: where the descriptors live; half precision on CUDA, float32 elsewhere.
        finest: keep the descriptors of every voxel too.
        padded: a border of one grey value holds no data; False: all of the scan is data.
    """
    grid = patient_aligned(volume.geometry, spacing)
    array = resample_image(volume, grid)
    mask = data_mask(volume.array) if padded else np.ones(volume.array.shape, bool)
    has_data = Volume(mask.astype(np.float32), volume.geometry)
    weight = torch.from_numpy(resample_image(has_data, grid).clip(0, 1)) * inside(volume.geometry, space_points(grid))
    weight = _away_from_padding(weight)
    low, high = np.percentile(array[weight.numpy() > 0.5], (0.5, 99.5)) if (weight > 0.5).any() else (0.0, 1.0)
    low, high = float(low), float(high)
    scaled = torch.from_numpy((array.clip(low, high) - low) / max(high - low, 1e-6)).to(device)
    weight = weight.to(device)
    values = mind_ssc(scaled, mask=weight > 0.5)
    kind = torch.float16 if device.type == "cuda" else torch.float32
    coarse = pool(Features(grid, torch.cat([values, weight[None]])), 2)
    coarse = Features(coarse.geometry, coarse.channels.to(kind))
    fine = Features(grid, torch.cat([values, weight[None]]).to(kind)) if finest else None
    return Described(Volume(array, grid), weight, (low, high), coarse, fine)


def _away_from_padding(weight: Tensor) -> Tensor:
    """No weight near padding: a descriptor there would describe its edge. Kept as it is where too little is left."""
    mask = weight.numpy() > 0.5
    eroded = ndimage.binary_erosion(mask, iterations=DESCRIPTOR_REACH, border_value=1)
    if 2 * np.count_nonzero(eroded) < np.count_nonzero(mask):
        return weight
    return weight * torch.from_numpy(eroded)


def _moving_average(features: Features, width: int) -> Features:
    before, after = (width - 1) // 2, width // 2
    padding = [before, after] * 3
    weight = F.avg_pool3d(F.pad(features.weight[None, None], padding), width, stride=1)[0]
    weighted = F.avg_pool3d(F.pad((features.values * features.weight)[None], padding), width, stride=1)[0]
    # the mean over an even width lies half a voxel after the voxel it is stored at
    origin = features.geometry.index_to_space @ np.array([(after - before) / 2] * 3 + [1.0])
    grid = replace(features.geometry, origin=(float(origin[0]), float(origin[1]), float(origin[2])))
    return Features(grid, torch.cat([weighted / weight.clamp(min=1e-3), weight]))


def pool(features: Features, stride: int) -> Features:
    """Average descriptors over stride³ blocks, voxels without data left out; the weight is the share with data."""
    grid = pooled(features.geometry, stride)
    ends = [n * stride - m for n, m in zip(grid.shape, features.geometry.shape, strict=True)]
    padding = (0, ends[2], 0, ends[1], 0, ends[0])
    weight = F.avg_pool3d(F.pad(features.weight[None, None], padding), stride)[0]
    weighted = F.avg_pool3d(F.pad((features.values * features.weight)[None], padding), stride)[0]
    return Features(grid, torch.cat([weighted / weight.clamp(min=1e-3), weight]))
