"""An array with its place in the patient: what every part of the library hands to the next."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

#: Corners of two grids that lie closer than this are the same place, in voxels.
SAME_LATTICE_TOLERANCE = 0.01

#: Percent, in an uncertainty map, of a voxel that no template had something to say of; of one that was seen less.
UNSEEN = 100


@dataclass(frozen=True)
class Geometry:
    """A voxel grid in patient space (LPS, mm). Arrays on it are (z, y, x); points in space are (x, y, z).

    Attributes:
        shape: voxels along (z, y, x).
        spacing: mm along the array's axes (z, y, x).
        origin: (x, y, z) of the centre of voxel (0, 0, 0), mm.
        direction: 3×3, row-major as SimpleITK gives it; column j is the direction of array axis x, y, z.
    """

    shape: tuple[int, int, int]
    spacing: tuple[float, float, float] = (1.0, 1.0, 1.0)
    origin: tuple[float, float, float] = (0.0, 0.0, 0.0)
    direction: tuple[float, ...] = (1.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 1.0)

    @property
    def index_to_space(self) -> NDArray[np.float64]:
        """4×4 matrix from homogeneous indices (x, y, z, 1) to points (x, y, z, 1) in mm."""
        matrix = np.eye(4)
        matrix[:3, :3] = np.reshape(self.direction, (3, 3)) * np.asarray(self.spacing[::-1])
        matrix[:3, 3] = self.origin
        return matrix

    @property
    def extent(self) -> tuple[float, float, float]:
        """Size of the field of view along (z, y, x), mm."""
        z, y, x = (n * s for n, s in zip(self.shape, self.spacing, strict=True))
        return z, y, x

    @property
    def voxels(self) -> int:
        return math.prod(self.shape)

    @property
    def centre(self) -> NDArray[np.float64]:
        """Centre of the field of view, (x, y, z) in mm."""
        middle = [(n - 1) / 2 for n in self.shape[::-1]]
        return (self.index_to_space @ np.array([*middle, 1.0]))[:3]

    def corners(self) -> NDArray[np.float64]:
        """The eight outermost voxel centres, (8, 3) points (x, y, z) in mm."""
        z, y, x = (n - 1 for n in self.shape)
        indices = np.array([(i, j, k, 1.0) for k in (0, z) for j in (0, y) for i in (0, x)])
        return (indices @ self.index_to_space.T)[:, :3]

    def same_grid(self, other: Geometry) -> bool:
        """True when both have the same voxels at the same places (corners within 0.01 voxel)."""
        if self.shape != other.shape:
            return False
        apart = np.abs(self.corners() - other.corners()).max()
        return bool(apart <= SAME_LATTICE_TOLERANCE * min(*self.spacing, *other.spacing))

    def field_apart(self, other: Geometry) -> float | None:
        """How far the corners of two fields of view are apart, mm; None where they show the same part of space.

        Grids of other voxels may differ by one of the larger voxels; grids of the same size and spacing, in whatever
        order their axes run, by 0.01 of a voxel: half a voxel is a mistake of somebody's header.
        """
        here, there = self._field_corners(), other._field_corners()
        apart = float(np.linalg.norm(here[:, None] - there[None], axis=2).min(1).max())
        alike = np.allclose(
            sorted(zip(self.shape, self.spacing, strict=True)), sorted(zip(other.shape, other.spacing, strict=True))
        )
        tolerance = SAME_LATTICE_TOLERANCE * min(self.spacing) if alike else max(*self.spacing, *other.spacing)
        return apart if apart > tolerance * math.sqrt(3) else None

    def _field_corners(self) -> NDArray[np.float64]:
        """The eight corners of the outermost voxels, (8, 3) points (x, y, z) in mm."""
        z, y, x = (n - 0.5 for n in self.shape)
        indices = np.array([(i, j, k, 1.0) for k in (-0.5, z) for j in (-0.5, y) for i in (-0.5, x)])
        return np.asarray((indices @ self.index_to_space.T)[:, :3])

    def to_json(self) -> dict[str, Any]:
        return {
            "shape_zyx": list(self.shape),
            "spacing_zyx_mm": list(self.spacing),
            "origin_xyz_mm": list(self.origin),
            "direction": list(self.direction),
        }

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Geometry:
        return cls(
            shape=tuple(value["shape_zyx"]),
            spacing=tuple(value["spacing_zyx_mm"]),
            origin=tuple(value["origin_xyz_mm"]),
            direction=tuple(value["direction"]),
        )


@dataclass(frozen=True)
class Volume:
    """A scan or a label map: an array (z, y, x) and the grid it lies on."""

    array: NDArray[Any]
    geometry: Geometry

    def __post_init__(self) -> None:
        if self.array.shape != self.geometry.shape:
            raise ValueError(f"array {self.array.shape} does not fit the grid {self.geometry.shape} (z, y, x)")


class StoredVolume(Volume):
    """A volume whose voxels are read anew each time they are asked for: of many such, none stays in memory."""

    _read: Callable[[], NDArray[Any]]

    def __init__(self, geometry: Geometry, read: Callable[[], NDArray[Any]]) -> None:
        """
        Args:
            geometry: its grid.
            read: gives the array (z, y, x).
        """
        object.__setattr__(self, "geometry", geometry)
        object.__setattr__(self, "_read", read)

    @property
    def array(self) -> NDArray[Any]:
        return Volume(self._read(), self.geometry).array


def values_in(labels: NDArray[Any]) -> set[int]:
    """The values that a label map holds, background too. Slice by slice: a body has a hundred million voxels, and this
    is called while a person waits."""
    if labels.dtype not in (np.uint8, np.uint16):
        return set(np.unique(labels).tolist())
    found = np.zeros(np.iinfo(labels.dtype).max + 1, bool)
    for part in labels.reshape(-1, *labels.shape[-2:]) if labels.ndim > 2 else labels[None]:
        found |= np.bincount(part.ravel(), minlength=len(found)).astype(bool)
    return set(np.flatnonzero(found).tolist())


def lattice_indices(source: Geometry, target: Geometry) -> list[tuple[int, NDArray[np.intp]]] | None:
    """How the voxels of `target` index those of `source` when both lie on one lattice, else None.

    One lattice: equal up to an integer offset, axis flips and permutation, corners within 0.01 voxel.

    Returns:
        for each array axis z, y, x of the target: (the source's array axis that runs along it, the source's index for
        every index of the target; indices outside the source are negative or too large).
    """
    to_source = np.linalg.inv(source.index_to_space) @ target.index_to_space  # (x, y, z) indices
    step, offset = np.rint(to_source[:3, :3]), np.rint(to_source[:3, 3])
    if not (np.abs(step).sum(0) == 1).all() or not (np.abs(step).sum(1) == 1).all():
        return None
    corners = np.array([(x, y, z) for x in (0, 1) for y in (0, 1) for z in (0, 1)])
    corners = corners * (np.array(target.shape[::-1]) - 1)
    apart = np.abs(corners @ (to_source[:3, :3] - step).T + (to_source[:3, 3] - offset)).max()
    if apart > SAME_LATTICE_TOLERANCE:
        return None
    indices = []
    for axis in range(3):
        along = int(np.flatnonzero(step[:, 2 - axis])[0])
        index = int(offset[along]) + int(step[along, 2 - axis]) * np.arange(target.shape[axis])
        indices.append((2 - along, index))
    return indices


def grid_of_both(one: Geometry, other: Geometry) -> Geometry | None:
    """The smallest grid on the lattice of `one` with both in it, or None when they do not share a lattice."""
    if lattice_indices(one, other) is None:
        return None
    to_one = np.linalg.inv(one.index_to_space) @ other.index_to_space
    far = np.array(other.shape[::-1]) - 1.0
    corners = np.rint(np.array([to_one[:3, 3], to_one[:3, :3] @ far + to_one[:3, 3]])).astype(int)  # (x, y, z)
    low = np.minimum(corners.min(0), 0)
    high = np.maximum(corners.max(0), np.array(one.shape[::-1]) - 1)
    x, y, z = (one.index_to_space @ np.array([*low, 1.0]))[:3].tolist()
    a, b, c = (int(n) for n in (high - low + 1)[::-1])
    return replace(one, shape=(a, b, c), origin=(x, y, z))


def copy_on_lattice(volume: Volume, target: Geometry, outside: float = 0) -> Volume | None:
    """The volume copied voxel by voxel to `target`, or None when the two grids do not share a lattice."""
    indices = lattice_indices(volume.geometry, target)
    if indices is None:
        return None
    turned = volume.array.transpose([axis for axis, _ in indices])
    result = np.full(target.shape, outside, volume.array.dtype)
    inside, taken = [], []
    for axis, (_, index) in enumerate(indices):
        valid = np.flatnonzero((index >= 0) & (index < turned.shape[axis]))
        inside.append(valid)
        taken.append(index[valid])
    result[np.ix_(*inside)] = turned[np.ix_(*taken)]
    return Volume(result, target)
