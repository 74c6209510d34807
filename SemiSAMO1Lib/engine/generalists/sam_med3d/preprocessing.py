"""How a scan is brought to the model: two published ways, and where the windows lie."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from ....volume import Geometry, Volume
from ...data.grids import canonical, inside, sample, space_points

#: Voxel side of the official preprocessing, mm.
OFFICIAL_SPACING = 1.5

Preprocessing = Literal["official", "released"]
Kind = TypeVar("Kind", bound=np.generic)
Coverage = Literal["full", "centre"]


@dataclass(frozen=True)
class Prepared:
    """A scan as the model wants it.

    Attributes:
        volume: padded to at least one window and to whole patches along each axis.
        seen: (z, y, x) bool: True where the scan has voxels, False in the padding.
        per_window: normalise each window by itself (official); else the volume is normalised already.
    """

    volume: Volume
    seen: NDArray[np.bool_]
    per_window: bool


def prepare(volume: Volume, how: Preprocessing, coverage: Coverage, size: int, patch: int) -> Prepared:
    """Bring a scan to the model's grid.

    'official': 1.5 mm, axes of RAS+ in reverse order (z, y, x), each window normalised over its voxels above 0.
    'released' (SemiSAM-O1): voxels and axes as stored, normalised over the whole scan.

    Args:
        volume: the scan.
        how: which preprocessing.
        coverage: 'centre' cuts one window out of the middle, as the paper does; 'full' pads to whole patches.
        size: voxels along each axis of a window.
        patch: voxels along each axis of a patch.
    """
    if how == "official":
        grid = official_grid(volume.geometry)
        points = space_points(grid)
        array = sample(torch.from_numpy(volume.array.astype(np.float32))[None], volume.geometry, points)[0].numpy()
        seen = inside(volume.geometry, points).numpy()
        array = np.where(seen, array, 0)
    else:
        grid, array = volume.geometry, volume.array.astype(np.float32)
        array = (array - array.mean()) / max(float(array.std()), 1e-8)
        seen = np.ones(array.shape, bool)
    shape: tuple[int, ...] = (size, size, size)
    if coverage == "full":
        shape = tuple(max(size, -(-n // patch) * patch) for n in array.shape)
    # both ways the smaller half comes first, as released
    before = [(w - n) // 2 if w >= n else -((n - w) // 2) for w, n in zip(shape, array.shape, strict=True)]
    padded = Volume(_placed(array, before, shape), _shifted(grid, before, shape))
    return Prepared(padded, _placed(seen, before, shape), how == "official")


def official_grid(geometry: Geometry) -> Geometry:
    """1.5 mm voxels from the outer corner of the first voxel on, then axes turned to RAS+."""
    shape = [
        int(np.ceil(round(n * s / OFFICIAL_SPACING, 6))) for n, s in zip(geometry.shape, geometry.spacing, strict=True)
    ]
    first = [0.5 * (OFFICIAL_SPACING / s - 1) for s in geometry.spacing]
    origin = geometry.index_to_space @ np.array([*first[::-1], 1.0])
    spacing = (OFFICIAL_SPACING,) * 3
    fine = Geometry(
        _three_ints(shape), spacing, (float(origin[0]), float(origin[1]), float(origin[2])), geometry.direction
    )
    return _to_ras(canonical(fine))


def windows(shape: tuple[int, ...], size: int, patch: int) -> Iterator[tuple[slice, slice, slice]]:
    """Windows of `size` voxels that overlap by half and begin on whole patches; they cover a padded volume."""
    step = max(patch, size // 2 // patch * patch)
    starts = [sorted({*range(0, n - size + 1, step), n - size}) for n in shape]
    for z, y, x in itertools.product(*starts):
        yield slice(z, z + size), slice(y, y + size), slice(x, x + size)


def normalised(window: NDArray[np.float32]) -> NDArray[np.float32] | None:
    """Mean and unbiased deviation of the voxels above 0, applied to all; None where there is nothing to see."""
    positive = window[window > 0]
    if len(positive) < 2 or not positive.std() > 1e-5 * positive.mean():  # less is rounding: one value throughout
        return None
    return np.asarray((window - positive.mean()) / positive.std(ddof=1), np.float32)


def _placed(array: NDArray[Kind], before: list[int], shape: tuple[int, ...]) -> NDArray[Kind]:
    """The array in the middle of zeros, or its middle, along each axis."""
    result = np.zeros(shape, array.dtype)
    into = tuple(slice(max(b, 0), max(b, 0) + min(n, m)) for b, n, m in zip(before, array.shape, shape, strict=True))
    out_of = tuple(
        slice(max(-b, 0), max(-b, 0) + min(n, m)) for b, n, m in zip(before, array.shape, shape, strict=True)
    )
    result[into] = array[out_of]
    return result


def _shifted(grid: Geometry, before: list[int], shape: tuple[int, ...]) -> Geometry:
    origin = grid.index_to_space @ np.array([-b for b in before[::-1]] + [1.0])
    return Geometry(
        _three_ints(shape), grid.spacing, (float(origin[0]), float(origin[1]), float(origin[2])), grid.direction
    )


def _to_ras(geometry: Geometry) -> Geometry:
    """Array axes of a canonical grid turned from (superior, posterior, left) to (superior, anterior, right)."""
    direction = np.reshape(geometry.direction, (3, 3)).copy()
    _, y, x = geometry.shape
    last = geometry.index_to_space @ np.array([x - 1, y - 1, 0, 1.0])
    direction[:, :2] *= -1
    origin = (float(last[0]), float(last[1]), float(last[2]))
    return Geometry(geometry.shape, geometry.spacing, origin, tuple(float(v) for v in direction.ravel()))


def _three_ints(values: tuple[int, ...] | list[int]) -> tuple[int, int, int]:
    a, b, c = (int(v) for v in values)
    return a, b, c
